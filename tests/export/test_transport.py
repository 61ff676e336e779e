"""Sending: what becomes of a request, whatever the endpoint does, in words for the user. Real sockets only."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from frames import make_frame
from grpc import StatusCode
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel.export.encode import Encoder
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.resource import resource_for
from esper_otel.export.transport import Outcome, Result, open_sender
from esper_otel.schema import METRICS
from esper_otel.testing import MemoryCollector

PROTOCOLS = ["grpc", "http/protobuf"]
E = "OTEL_EXPORTER_OTLP_"


def body() -> bytes:
    def fail(where: str, error: Exception) -> None:
        raise AssertionError(where) from error

    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for, fail)
    [request] = encoder.requests([make_frame()])
    return request.body


def at(collector: MemoryCollector, protocol: str, **settings: str) -> dict[str, str]:
    endpoint = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
    return {f"{E}PROTOCOL": protocol, f"{E}ENDPOINT": endpoint} | {f"{E}{n}": text for n, text in settings.items()}


def sent(environ: dict[str, str], timeout_s: float = 5.0, times: int = 1) -> Outcome:
    sender = open_sender(endpoint_from_environment(environ))
    try:
        for _ in range(times):
            outcome = sender.send(body(), timeout_s)
        return outcome
    finally:
        sender.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("compression", ["none", "gzip", "deflate"])
def test_a_request_arrives_with_its_headers_compressed_as_asked(protocol: str, compression: str) -> None:
    """And is answered: delivered."""
    if (protocol, compression) == ("grpc", "deflate"):
        return  # refused by the settings
    with MemoryCollector(headers={"authorization": "Bearer secret", "x-scope": "a b"}) as collector:
        headers = "Authorization=Bearer%20secret,x-scope=a%20b"
        if compression == "deflate":  # the receiver speaks gzip; what we send is another matter
            outcome = sent(at(collector, protocol, HEADERS=headers, COMPRESSION=compression))
            assert outcome.result is Result.REFUSED
            return
        outcome = sent(at(collector, protocol, HEADERS=headers, COMPRESSION=compression), times=2)
        assert outcome == Outcome(Result.DELIVERED)
        assert [request.SerializeToString() for request in collector.requests] == [body()] * 2


@pytest.mark.parametrize(
    ("code", "result"),
    [
        (StatusCode.UNAVAILABLE, Result.TEMPORARY),
        (StatusCode.DEADLINE_EXCEEDED, Result.TEMPORARY),
        (StatusCode.RESOURCE_EXHAUSTED, Result.TEMPORARY),
        (StatusCode.ABORTED, Result.TEMPORARY),
        (StatusCode.CANCELLED, Result.TEMPORARY),
        (StatusCode.OUT_OF_RANGE, Result.TEMPORARY),
        (StatusCode.DATA_LOSS, Result.TEMPORARY),
        (StatusCode.UNIMPLEMENTED, Result.TEMPORARY),
        (StatusCode.UNAUTHENTICATED, Result.UNAUTHENTICATED),
        (StatusCode.PERMISSION_DENIED, Result.UNAUTHENTICATED),
        (StatusCode.INVALID_ARGUMENT, Result.REFUSED),
        (StatusCode.INTERNAL, Result.REFUSED),
        (StatusCode.UNKNOWN, Result.REFUSED),
    ],
)
def test_each_grpc_status_says_whether_to_keep_the_data(code: StatusCode, result: Result) -> None:
    """OTLP's table, but for credentials and wrong ports: somebody will put those right, and the data is kept."""
    with MemoryCollector(answer=lambda _: code, retry_after_s=1.5) as collector:
        outcome = sent(at(collector, "grpc"))
    assert outcome.result is result
    assert outcome.reason
    assert "127.0.0.1" in outcome.reason
    assert outcome.retry_after_s == (1.5 if result is Result.TEMPORARY else None)


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (429, Result.TEMPORARY),
        (502, Result.TEMPORARY),
        (503, Result.TEMPORARY),
        (504, Result.TEMPORARY),
        (408, Result.TEMPORARY),
        (404, Result.TEMPORARY),
        (307, Result.TEMPORARY),
        (401, Result.UNAUTHENTICATED),
        (403, Result.UNAUTHENTICATED),
        (413, Result.TOO_LARGE),
        (400, Result.REFUSED),
        (500, Result.REFUSED),
    ],
)
def test_each_http_status_says_whether_to_keep_the_data(status: int, result: Result) -> None:
    """With what the server asks for in Retry-After."""
    with MemoryCollector(answer=lambda _: status, retry_after_s=2) as collector:
        outcome = sent(at(collector, "http/protobuf"))
    assert outcome.result is result
    assert str(status) in outcome.reason
    assert outcome.retry_after_s == (2.0 if status in {429, 502, 503, 504, 408} else None)


def test_a_message_too_large_for_grpc_is_told_from_an_overload() -> None:
    """A receiver's limit is answered by smaller requests, not by waiting."""
    with MemoryCollector() as collector:
        sender = open_sender(endpoint_from_environment(at(collector, "grpc")))
        outcome = sender.send(b"\x0a" + b"\xff\xff\xff\x02" + bytes(6 * 1024 * 1024), 5.0)
        sender.close()
    assert outcome.result is Result.TOO_LARGE


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_points_that_were_not_taken_are_told(protocol: str) -> None:
    """The official exporters say nothing about partial success."""
    answer = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(rejected_data_points=3, error_message="too old")
    )
    with MemoryCollector(answer=lambda _: answer) as collector:
        assert sent(at(collector, protocol)) == Outcome(Result.DELIVERED, "too old", rejected_points=3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_port_where_nothing_listens_is_named(protocol: str) -> None:
    """The commonest mistake."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        outcome = sent({f"{E}PROTOCOL": protocol, f"{E}ENDPOINT": f"http://{address}"})
    assert outcome.result is Result.TEMPORARY
    assert "nothing listens on" in outcome.reason
    assert address in outcome.reason


@contextmanager
def server(talk: Any) -> Iterator[str]:
    """A server that does as it likes with each connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    connections = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connections.append(connection)
            talk(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_never_answers_costs_the_timeout_only(protocol: str) -> None:
    """A black hole."""
    with server(lambda connection: None) as address:
        started = time.monotonic()
        outcome = sent({f"{E}PROTOCOL": protocol, f"{E}ENDPOINT": f"http://{address}"}, timeout_s=0.4)
        assert time.monotonic() - started < 2.0
    assert outcome.result is Result.TEMPORARY
    assert "within 0.4 s" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_that_is_reset_is_no_reason_to_drop_data(protocol: str) -> None:
    """In the middle of the request."""

    def reset(connection: socket.socket) -> None:
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()

    with server(reset) as address:
        outcome = sent({f"{E}PROTOCOL": protocol, f"{E}ENDPOINT": f"http://{address}"}, timeout_s=3.0)
    assert outcome.result is Result.TEMPORARY
    assert address in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_needs_the_authority_and_the_right_name(protocol: str, tmp_path: Path) -> None:
    """Trusted with it, named when not."""
    authority = Authority(tmp_path)
    good, elsewhere = authority.pair("good"), authority.pair("elsewhere", "elsewhere.example")
    with MemoryCollector(certificate_file=good.certificate, key_file=good.key) as collector:
        assert sent(at(collector, protocol, CERTIFICATE=str(authority.certificate))).result is Result.DELIVERED
        outcome = sent(at(collector, protocol))
        assert outcome.result is Result.TEMPORARY
        assert "not trusted" in outcome.reason
        assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in outcome.reason
    with MemoryCollector(certificate_file=elsewhere.certificate, key_file=elsewhere.key) as collector:
        outcome = sent(at(collector, protocol, CERTIFICATE=str(authority.certificate)))
        assert outcome.result is Result.TEMPORARY


def test_mutual_tls_shows_our_certificate(tmp_path: Path) -> None:
    """The server asks for one that its authority has signed."""
    import ssl

    authority = Authority(tmp_path)
    ours, theirs = authority.pair("client"), authority.pair("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*theirs)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    seen: list[Any] = []

    def answer(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                seen.append(secured.getpeercert())
                received = secured.recv(65536)
                while len(received) < len(body()):
                    received += secured.recv(65536)
                secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except OSError as error:
            seen.append(error)

    with server(answer) as address:
        environ = {
            f"{E}PROTOCOL": "http/protobuf",
            f"{E}ENDPOINT": f"https://{address}",
            f"{E}CERTIFICATE": str(authority.certificate),
        }
        assert sent(environ, 2.0).result is Result.TEMPORARY
        files = {f"{E}CLIENT_CERTIFICATE": str(ours.certificate), f"{E}CLIENT_KEY": str(ours.key)}
        assert sent({**environ, **files}, 5.0).result is Result.DELIVERED
    assert seen[-1]["subject"] == ((("commonName", "client"),),)


def test_the_protocols_are_told_apart_when_they_meet_the_wrong_port() -> None:
    """gRPC at 4318 and HTTP at 4317: the second commonest mistake."""
    with MemoryCollector() as collector:
        outcome = sent({f"{E}ENDPOINT": collector.http_endpoint})
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in outcome.reason
        outcome = sent({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": collector.grpc_endpoint})
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in outcome.reason


def test_closing_ends_a_request_that_hangs() -> None:
    """close() of a session must not wait for an endpoint."""
    with MemoryCollector(hang=True) as collector:
        sender = open_sender(endpoint_from_environment(at(collector, "grpc")))
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(sender.send(body(), 30.0)))
        thread.start()
        assert collector.wait_for(lambda c: c.attempts == 1)
        sender.close()
        thread.join(5.0)
        assert [outcome.result for outcome in outcomes] == [Result.TEMPORARY]
        assert sender.send(body(), 1.0).result is Result.TEMPORARY
