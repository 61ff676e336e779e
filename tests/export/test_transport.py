"""Sending: what becomes of a request over either protocol, whatever the endpoint does, in words for the user."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Pair
from endpoints import (
    PROTOCOLS,
    E,
    at,
    body,
    expired_pair,
    grpc_server,
    http_answer,
    http_server,
    opened,
    relay,
    sent,
    server,
    to,
    unused_address,
)
from grpc import StatusCode
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from patience import patience

from esper_otel.export.transport import Outcome, Result
from esper_otel.testing import MemoryCollector


@pytest.mark.parametrize(
    ("protocol", "compression"),
    [("grpc", "none"), ("grpc", "gzip"), ("http/protobuf", "none"), ("http/protobuf", "gzip")],
)
def test_a_request_arrives_with_its_headers_compressed_as_asked(protocol: str, compression: str) -> None:
    """And is answered: delivered."""
    with MemoryCollector(headers={"authorization": "Bearer secret", "x-scope": "a b"}) as collector:
        headers = "Authorization=Bearer%20secret,x-scope=a%20b"
        outcome = sent(at(collector, protocol, HEADERS=headers, COMPRESSION=compression), times=2)
        assert outcome == Outcome(Result.DELIVERED)
        assert [request.SerializeToString() for request in collector.requests] == [body()] * 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [0, 3_000_000])
def test_a_server_that_never_answers_costs_the_timeout_only(protocol: str, size: int) -> None:
    """A black hole; what does not fit into the system's buffers waits before it is sent."""
    with server(lambda connection: None) as address, opened(to(protocol, f"http://{address}")) as sender:
        started = time.monotonic()
        outcome = sender.send(bytes(size), 0.4)
        assert time.monotonic() - started < patience(2.0)
    assert outcome.result is Result.TEMPORARY
    assert "within 0.4 s" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_that_is_reset_is_no_reason_to_drop_data(protocol: str) -> None:
    """In the middle of the request."""

    def reset(connection: socket.socket) -> None:
        connection.recv(10)  # the rest stays unread
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()

    with server(reset) as address:
        outcome = sent(to(protocol, f"http://{address}"), timeout_s=3.0)
    assert outcome.result is Result.TEMPORARY
    assert address in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_sender_recovers_from_a_request_that_got_no_answer(protocol: str) -> None:
    """With the same sender, as the exporter has it; the connection is used again and again."""
    with MemoryCollector(hang=True) as collector, opened(at(collector, protocol)) as sender:
        assert sender.send(body(), 0.3).result is Result.TEMPORARY
        collector.hang = False
        assert [sender.send(body(), 5.0).result for _ in range(3)] == [Result.DELIVERED] * 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_closing_ends_a_request_that_hangs(protocol: str) -> None:
    """close() of a session must not wait for an endpoint; over HTTP it once took the whole time-out."""
    with MemoryCollector(hang=True) as collector, opened(at(collector, protocol)) as sender:
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(sender.send(body(), 30.0)))
        thread.start()
        assert collector.wait_for(lambda c: c.attempts == 1)
        started = time.monotonic()
        sender.close()
        thread.join(120)
        assert time.monotonic() - started < patience(1.0)
        closed = Outcome(Result.TEMPORARY, "the session was closed before the endpoint answered")
        assert outcomes == [closed]
        assert sender.send(body(), 1.0) == closed


@pytest.mark.parametrize(
    ("protocol", "answer"),
    [
        *(("grpc", code) for code in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED)),
        *(("http/protobuf", status) for status in (429, 503)),
    ],
)
def test_an_endpoint_that_is_busy_may_leave_the_pause_to_us(protocol: str, answer: StatusCode | int) -> None:
    """Without a hint the specification drops what finds an endpoint exhausted; nobody would send it again."""
    with MemoryCollector(answer=lambda _: answer) as collector:
        outcome = sent(at(collector, protocol))
    assert (outcome.result, outcome.retry_after_s) == (Result.TEMPORARY, None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("garbage", [b"\x00\xff" * 100, b"\xff" * 5_000, b"220 mail.example ESMTP\r\n"], ids=repr)
def test_garbage_is_no_reason_to_drop_data(protocol: str, garbage: bytes) -> None:
    """Something else has taken the port."""

    def talk(connection: socket.socket) -> None:
        with suppress(OSError):  # the sender may hang up at the first bytes
            connection.recv(65536)
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)

    with server(talk) as address:
        outcome = sent(to(protocol, f"http://{address}"), 1.0)
    assert outcome.result is Result.TEMPORARY
    assert address in outcome.reason


@contextmanager
def listening(protocol: str, port: int, pair: Pair | None = None) -> Iterator[None]:
    """An endpoint on this port, with TLS when there is a certificate; over HTTP for one request."""
    if protocol == "grpc":
        credentials = pair and grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])
        with grpc_server(lambda request, context: b"", f"127.0.0.1:{port}", credentials):
            yield
        return
    context = None
    if pair is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
    with http_server(http_answer("200 OK"), port=port, tls=context):
        yield


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_endpoint_that_starts_again_is_found_within_about_a_second(protocol: str) -> None:
    """On the same port, twice; gRPC's own pause before it connects again grows to 2 minutes."""
    address = unused_address()
    pause = threading.Event()
    with opened(to(protocol, f"http://{address}")) as sender:
        for _ in range(2):
            with listening(protocol, int(address.partition(":")[2])):
                started = time.monotonic()
                while sender.send(body(), 1.0).result is not Result.DELIVERED:
                    assert time.monotonic() - started < patience(2.5)
                    pause.wait(0.05)
            assert sender.send(body(), 1.0).result is Result.TEMPORARY


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_may_expire_and_be_renewed_between_requests(protocol: str, tmp_path: Path) -> None:
    """The data waits until somebody has renewed it; the same sender then goes on."""
    authority = Authority(tmp_path)
    address = unused_address()
    port = int(address.partition(":")[2])
    environ = to(protocol, f"https://{address}", CERTIFICATE=str(authority.certificate))
    pause = threading.Event()
    with opened(environ) as sender:
        with listening(protocol, port, authority.pair("first")):
            assert sender.send(body(), 5.0).result is Result.DELIVERED
        with listening(protocol, port, expired_pair(authority)):
            started = time.monotonic()
            while "has expired" not in sender.send(body(), 1.0).reason:
                assert time.monotonic() - started < patience(5.0)
                pause.wait(0.05)
        with listening(protocol, port, authority.pair("second")):
            started = time.monotonic()
            while sender.send(body(), 1.0).result is not Result.DELIVERED:
                assert time.monotonic() - started < patience(5.0)
                pause.wait(0.05)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_authorities_that_are_renewed_in_their_file_are_trusted(protocol: str, tmp_path: Path) -> None:
    """A certificate manager replaces both sides' files while a run goes on; an empty file is one being written."""
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(first.certificate.read_bytes())
    address = unused_address()
    environ = to(protocol, f"https://{address}", CERTIFICATE=str(trusted))
    pause = threading.Event()
    with opened(environ) as sender, listening(protocol, int(address.partition(":")[2]), second.pair("server")):
        assert "is not trusted" in sender.send(body(), 5.0).reason
        trusted.write_bytes(b"")
        assert sender.send(body(), 5.0).result is Result.TEMPORARY
        trusted.write_bytes(second.certificate.read_bytes())
        started = time.monotonic()
        while sender.send(body(), 1.0).result is not Result.DELIVERED:
            assert time.monotonic() - started < patience(5.0)
            pause.wait(0.05)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_that_falls_silent_is_given_up_with_its_request(protocol: str) -> None:
    """The host behind it is gone: TCP itself goes on trying for a quarter of an hour."""
    with MemoryCollector() as collector:
        port = int(at(collector, protocol)[f"{E}ENDPOINT"].rpartition(":")[2])
        with (
            relay(port) as (address, silenced),
            opened(to(protocol, f"http://{address}")) as sender,
            opened(to(protocol, f"http://{address}")) as another,
        ):
            assert sender.send(body(), 5.0).result is Result.DELIVERED
            assert another.send(body(), 5.0).result is Result.DELIVERED
            silenced.set()
            assert "within 0.3 s" in sender.send(body(), 0.3).reason
            silenced.clear()
            assert sender.send(body(), 5.0).result is Result.DELIVERED


FORK = """
import gc
import os
import sys
import threading

from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.transport import open_sender

sender = open_sender(endpoint_from_environment())
outcomes = []
sending = threading.Thread(target=lambda: outcomes.append(sender.send(b"", 20.0)))
sending.start()
sys.stdin.readline()
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sending.join()
    print(outcomes[0].result.name)
    sender.close()
else:
    print(sender.send(b"", 5.0).reason)
    sender.close()
    del sender
    gc.collect()
    sys.exit(0)
"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_forked_child_neither_sends_nor_hangs_nor_ends_what_its_parent_sends(protocol: str) -> None:
    """DataLoader workers are forked while a request is on its way; a whole interpreter ends in this one."""
    release = threading.Event()

    def answer(request: ExportMetricsServiceRequest) -> None:
        release.wait(20)

    with MemoryCollector(answer=answer) as collector:
        environ = {**os.environ, **at(collector, protocol)}
        command = [sys.executable, "-W", "ignore", "-c", FORK]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert collector.wait_for(lambda c: c.attempts == 1)
            process.stdin.write("\n")
            process.stdin.flush()
            lines = [process.stdout.readline(), process.stdout.readline()]
            release.set()
            lines.append(process.stdout.readline())
    assert lines == [
        "this is a forked child: only the process that opened the connection sends\n",
        "0\n",
        "DELIVERED\n",
    ]
