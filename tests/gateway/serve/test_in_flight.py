"""What is in flight is bounded, on both ports: bytes, requests, answers, polls and connections.

Each attack runs beside a trainer and a controller who go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from attack.beside import events
from certificates import Authority
from frame_examples import RUN, make_frame
from gateways import RunningGateway, pull
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http2 import RawClient, message
from patience import patience
from programs import until
from test_ports import PROTOBUF, body_of, code_of, export

from esper_otel.export.encode import Encoder
from esper_otel.export.resource import resource_for
from esper_otel.frames.frame import WIDTH, Run, SeedTable
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.core import Core
from esper_otel.gateway.security import Certificates
from esper_otel.gateway.serve import connections, ports
from esper_otel.gateway.serve.ports import OTLP_SERVICE, Gateway, Ports
from esper_otel.gateway.store.base import StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.pull.messages import SERVICE, EventsRequest, EventsResponse, PullRequest
from esper_otel.schema import METRICS

pytestmark = pytest.mark.lengthy

EXPORT, PULL = f"/{OTLP_SERVICE}/Export", f"/{SERVICE}/Pull"
SOON_S = 5.0  # on a machine that is busy with other tests


def memory_mib(gateway: RunningGateway, what: str = "VmHWM") -> float:
    """What the gateway holds, or the most that it has held."""
    status = Path(f"/proc/{gateway.process.pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what)) / 1024


def connected(address: str) -> socket.socket:
    """To one of the ports."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 20)


class Honest(threading.Thread):
    """A trainer that sends a step, and a controller that pulls it, again and again, while the ``with`` block runs.

    Each has a connection of its own, and tries again what it is asked to try again. ``slowest_s`` is the longest
    that a step took from one to the other.
    """

    def __init__(self, gateway: RunningGateway, send: str | None = None, take: str | None = None) -> None:
        super().__init__()
        self._gateway = gateway
        self._tokens = send, take
        self._over = threading.Event()
        self.steps = 0
        self.slowest_s = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self._gateway.channel() as trainer, grpc.insecure_channel(self._gateway.grpc, [("one", 1)]) as taker:
                while not self._over.is_set():
                    started_s = time.monotonic()
                    run_id = f"honest {self.steps}"
                    self._again(lambda run_id=run_id: export(trainer, body_of(run_id), self._tokens[0]))
                    found = self._again(lambda run_id=run_id: pull(taker, run_id, token=self._tokens[1], wait_s=5.0))
                    assert len(found.steps) == 1
                    self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
                    self.steps += 1
                    self._over.wait(0.02)
        except Exception as error:
            self.error = error

    def _again(self, call: Any) -> Any:
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or self._over.is_set():
                    raise
                time.sleep(0.1)

    def __enter__(self) -> Honest:
        self.start()
        until("the honest have begun", lambda: self.steps or self.error)
        self.slowest_s = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(20)

    def check(self) -> None:
        """They went on."""
        assert self.error is None
        assert self.slowest_s < patience(SOON_S)


@pytest.fixture
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway() as gateway:
        yield gateway


def test_messages_that_unpack_to_much_are_unpacked_one_after_the_other(gateway: RunningGateway) -> None:
    """Sixty of 64 kB on one connection would be four gigabytes."""
    bomb = gzip.compress(bytes(63 * 1024 * 1024), 9)
    before = memory_mib(gateway)
    with Honest(gateway) as honest, gateway.channel() as channel:
        send = channel.unary_unary(EXPORT, None, None)
        calls = [send.future(bomb, timeout=300) for _ in range(60)]
        assert {call.code() for call in calls} <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
        assert calls[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    honest.check()
    assert memory_mib(gateway) - before < 300


def test_a_connection_that_takes_its_calls_back_without_end_is_cut(gateway: RunningGateway) -> None:
    """gRPC would serve thousands of them before anybody else's. One that does so now and then goes on."""
    with RawClient(gateway.grpc) as rare, RawClient(gateway.grpc) as client:
        for _ in range(20):
            rare.take_back(rare.begin(EXPORT))
        with contextlib.suppress(OSError):
            for _ in range(1_000):
                client.take_back(client.begin(EXPORT))
            until("it is cut", lambda: is_closed(client.socket))
        assert not is_closed(rare.socket)


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer has ended it; raises OSError if it did so before it had read everything."""
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)
    return True


def test_calls_whose_messages_stall_hold_up_nobody(gateway: RunningGateway) -> None:
    """They are ended when others wait for their places, and few at a time can send much."""
    large = message(bytes(60 * 1024 * 1024))[:-1]
    before = memory_mib(gateway)
    with Honest(gateway) as honest, contextlib.ExitStack() as opened:
        with ThreadPoolExecutor(12) as pool:
            clients = [opened.enter_context(RawClient(gateway.grpc)) for _ in range(12)]
            streams = [client.begin(EXPORT) for client in clients]
            sent = list(pool.map(lambda one, stream: one.send_as_allowed(stream, large, 2.0), clients, streams))
        for client in clients:
            for _ in range(50):
                client.begin(EXPORT, large[:100])
        time.sleep(1.0)
    honest.check()
    assert any(each > 10_000_000 for each in sent)
    assert memory_mib(gateway) - before < 350


def post_in_part(address: str, head: str, body: bytes) -> socket.socket:
    """A request of which the rest never comes."""
    connection = connected(address)
    connection.sendall(
        f"POST /v1/metrics HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n{head}".encode()
    )
    connection.sendall(b"\r\n\r\n" + body)
    return connection


def test_bodies_that_stall_hold_up_nobody_and_the_largest_give_way(gateway: RunningGateway) -> None:
    """A chunked one reserves what has come of it, not what may come."""
    url = f"http://{gateway.http}/v1/metrics"
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    with contextlib.ExitStack() as opened:
        for _ in range(100):
            opened.enter_context(post_in_part(gateway.http, "transfer-encoding: chunked", b"5\r\nhello\r\n"))
        assert requests.post(url, body_of("beside"), headers=PROTOBUF, timeout=300).status_code == 200
        before = memory_mib(gateway)
        large = [
            opened.enter_context(post_in_part(gateway.http, "transfer-encoding: chunked", 40 * chunk)) for _ in range(6)
        ]
        assert requests.post(url, body_of("beside"), headers=PROTOBUF, timeout=300).status_code == 200
        answers = [each.recv(12) for each in large[:3]]
        assert answers == [b"HTTP/1.1 503"] * 3
        assert memory_mib(gateway) - before < 250


def test_polls_are_shared_out_by_token(tmp_path: Path) -> None:
    """One token's thousand polls leave room for another's; the one who has the most is asked to come again."""
    tokens = tmp_path / "tokens"
    tokens.write_text("many run=a\nfew run=b\n")
    with RunningGateway("--pull-tokens", str(tokens)) as gateway, contextlib.ExitStack() as opened:
        asked = message(PullRequest(run_id="a", wait_s=60.0).SerializeToString())
        clients = [opened.enter_context(RawClient(gateway.grpc, authorization="Bearer many")) for _ in range(6)]
        for number in range(1_010):
            clients[number % 6].begin(PULL, asked, is_all=True)
        url = f"http://{gateway.http}/metrics"
        until("they wait", lambda: "esper_gateway_waiting_pulls 1000\n" in requests.get(url, timeout=300).text)
        with gateway.channel() as channel:
            assert code_of(pull, channel, "a", token="many", wait_s=1.0) is grpc.StatusCode.UNAVAILABLE
            export(channel, body_of("b"))
            cursor = pull(channel, "b", token="few").cursor
            waiting = threading.Timer(0.3, export, (channel, body_of("b", 2)))
            waiting.start()
            assert len(pull(channel, "b", cursor, token="few", wait_s=20.0).steps) == 1
            waiting.join()
        assert "esper_gateway_waiting_pulls 999\n" in requests.get(url, timeout=300).text


def test_pages_of_events_are_made_one_after_the_other(gateway: RunningGateway) -> None:
    """Each is 15 MB of objects while it is made, and any number may be asked for at once."""
    content = gzip.compress(events("run", 1, 1_000))
    headers = {**PROTOBUF, "content-encoding": "gzip"}
    assert requests.post(f"http://{gateway.http}/v1/logs", content, headers=headers, timeout=300).ok
    before = memory_mib(gateway)
    with gateway.channel() as channel:
        call = channel.unary_unary(f"/{SERVICE}/Events", None, EventsResponse.FromString)
        asked = EventsRequest(run_id="run", max_events=1_000).SerializeToString()
        calls = [call.future(asked, timeout=300) for _ in range(30)]
        assert [len(each.result().events) for each in calls] == [1_000] * 30
    assert memory_mib(gateway) - before < 200


def steps_with_seeds(run_id: str, steps: int, seeds: int) -> list[bytes]:
    """Large steps, as requests."""
    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    table = SeedTable(tuple(f"seed-{number:05}" for number in range(seeds)), np.full((seeds, WIDTH), 0.5))
    frames = [
        make_frame(
            run=Run(run_id, RUN.attempt),
            sequence=step,
            global_step=step,
            time_unix_ns=RUN.attempt * 10**6 + step * 10**6,
            seeds=table,
            live=table,
        )
        for step in range(1, steps + 1)
    ]
    return [bytes(request.body) for request in encoder.requests(blocks_of(frames))]


def test_answers_that_nobody_reads_are_bounded(gateway: RunningGateway) -> None:
    """A puller that never reads is cut off when others need the room."""
    with gateway.channel() as channel, contextlib.ExitStack() as opened:
        for body in steps_with_seeds("large", 25, 100):
            export(channel, body)
        size = len(pull(channel, "large").SerializeToString())
        assert size > 1_500_000
        before = memory_mib(gateway)
        asked = message(PullRequest(run_id="large").SerializeToString())
        with Honest(gateway) as honest:
            for _ in range(2):
                client = opened.enter_context(RawClient(gateway.grpc))
                for _ in range(80):
                    client.begin(PULL, asked, is_all=True)
            time.sleep(5)
    honest.check()
    assert memory_mib(gateway) - before < 150


def test_watches_and_reflection_are_bounded(gateway: RunningGateway) -> None:
    """What needs no token must cost little: two hundred go on, the oldest of those who have the most are ended."""
    with contextlib.ExitStack() as opened, Honest(gateway) as honest:
        clients = [opened.enter_context(RawClient(gateway.grpc)) for _ in range(4)]
        for client in clients:
            for _ in range(100):
                client.begin("/grpc.health.v1.Health/Watch", message(b""), is_all=True)
        with gateway.channel() as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=300)
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            watched.cancel()
        ended = sum(client.read(1.0).count(b"too many watches") for client in clients)
    assert ended >= 200
    honest.check()


@pytest.mark.parametrize("port", ["grpc", "http"])
def test_silent_connections_leave_room_for_others(port: str) -> None:
    """On either port, without a handshake too; descriptors stay free, and no log grows."""
    with RunningGateway(descriptors=256) as gateway, contextlib.ExitStack() as opened:
        with Honest(gateway) as honest, requests.Session() as before:
            health = f"http://{gateway.http}/healthz"
            assert before.get(health, timeout=300).text == "ok\n"
            address = getattr(gateway, port)
            for _ in range(400):
                with contextlib.suppress(OSError):
                    opened.enter_context(connected(address))
            newcomer = f"http://{gateway.http}/v1/metrics"

            def is_taken() -> bool:
                with contextlib.suppress(requests.ConnectionError, grpc.RpcError), gateway.channel() as channel:
                    export(channel, body_of("newcomer"))
                    return requests.post(newcomer, body_of("newcomer"), headers=PROTOBUF, timeout=300).ok
                return False

            started_s = time.monotonic()
            until("a newcomer is let in", is_taken, 8)
            assert before.get(health, timeout=300).text == "ok\n"
            assert len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir())) < 256
        assert honest.error is None
        del started_s
        gateway.end()
    assert len(gateway.said) < 2_000


def test_a_connection_that_never_says_anything_is_closed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain text, before a handshake, and before a request; one that was served stays."""
    for module in (connections, ports):
        monkeypatch.setattr(module, "SILENT_S", 1.0)
    pair = Authority(tmp_path).pair("server")

    async def ends_of(certificates: Certificates | None) -> list[bytes]:
        ports = Ports("127.0.0.1:0", "127.0.0.1:0", certificates)
        async with Gateway(Core(MemoryStore(StoreLimits())), ports) as gateway:
            streams = [
                await asyncio.open_connection(*(address or "").split(":"))
                for address in (gateway.grpc_address, gateway.http_address)
            ]
            async with asyncio.timeout(10):
                ends = [await reader.read() for reader, _ in streams]
            for _, writer in streams:
                writer.close()
            return ends

    for certificates in (None, Certificates(pair.certificate, pair.key)):
        of_grpc, of_http = asyncio.run(ends_of(certificates))
        assert of_http == b""
        assert len(of_grpc) < 200  # its settings, and why it ends
