"""Sending: what becomes of a request, whatever the endpoint does, in words for the user. Real sockets only."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from frames import make_frame
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # has .pyi, no py.typed
from grpc import StatusCode
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel.errors import ConfigurationError
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
        connection.recv(10)  # the rest stays unread
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
        assert "not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)" in outcome.reason
    with MemoryCollector(certificate_file=elsewhere.certificate, key_file=elsewhere.key) as collector:
        outcome = sent(at(collector, protocol, CERTIFICATE=str(authority.certificate)))
        assert outcome.result is Result.TEMPORARY
        assert "is for another host name" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_and_plain_text_are_told_apart(protocol: str, tmp_path: Path) -> None:
    """http:// where https:// is meant, and the other way round."""
    authority = Authority(tmp_path)
    pair = authority.pair("good")
    with MemoryCollector() as collector:
        environ = at(collector, protocol)
        outcome = sent({**environ, f"{E}ENDPOINT": environ[f"{E}ENDPOINT"].replace("http:", "https:")})
        assert (outcome.result, "does not speak TLS" in outcome.reason) == (Result.TEMPORARY, True)
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        environ = at(collector, protocol)
        outcome = sent({**environ, f"{E}ENDPOINT": environ[f"{E}ENDPOINT"].replace("https:", "http:")})
        assert (outcome.result, "may speak TLS (https://)" in outcome.reason) == (Result.TEMPORARY, True)


def test_grpc_meets_tls_without_http2(tmp_path: Path) -> None:
    """The HTTP port of a collector with TLS."""
    authority = Authority(tmp_path)
    pair = authority.pair("good")
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        outcome = sent({f"{E}ENDPOINT": collector.http_endpoint, f"{E}CERTIFICATE": str(authority.certificate)})
    assert "speaks TLS, but not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in outcome.reason


@contextmanager
def grpc_server(answer: Any, address: str = "127.0.0.1:0", credentials: Any = None) -> Iterator[int]:
    """A gRPC server that answers each Export as it likes."""
    threads = ThreadPoolExecutor(2)
    serving = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(answer)
    service = "opentelemetry.proto.collector.metrics.v1.MetricsService"
    serving.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
    port = serving.add_secure_port(address, credentials) if credentials else serving.add_insecure_port(address)
    serving.start()
    try:
        yield port
    finally:
        serving.stop(None).wait(5)
        threads.shutdown()


def test_mutual_tls_over_grpc(tmp_path: Path) -> None:
    """With our certificate delivered; without, the variable is named."""
    authority = Authority(tmp_path)
    ours, theirs = authority.pair("client"), authority.pair("server")
    credentials = grpc.ssl_server_credentials(
        [(theirs.key.read_bytes(), theirs.certificate.read_bytes())],
        authority.certificate.read_bytes(),
        require_client_auth=True,
    )
    with grpc_server(lambda request, context: b"", credentials=credentials) as port:
        environ = {f"{E}ENDPOINT": f"https://127.0.0.1:{port}", f"{E}CERTIFICATE": str(authority.certificate)}
        outcome = sent(environ)
        assert outcome.result is Result.TEMPORARY
        assert "may want OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE" in outcome.reason
        files = {f"{E}CLIENT_CERTIFICATE": str(ours.certificate), f"{E}CLIENT_KEY": str(ours.key)}
        assert sent({**environ, **files}).result is Result.DELIVERED


def test_grpc_over_a_socket_file(tmp_path: Path) -> None:
    """A sidecar's."""
    address = f"unix://{tmp_path}/otel.sock"
    environ = {f"{E}ENDPOINT": address, f"{E}INSECURE": "true"}
    with grpc_server(lambda request, context: b"", address):
        assert sent(environ).result is Result.DELIVERED
    assert f"nothing listens on {address}" in sent(environ).reason


@pytest.mark.parametrize(
    ("code", "details", "result"),
    [
        (StatusCode.RESOURCE_EXHAUSTED, "grpc: received message larger than max (5 vs. 4)", Result.TOO_LARGE),
        (StatusCode.RESOURCE_EXHAUSTED, "gRPC message exceeds maximum size 4194304: 6291456", Result.TOO_LARGE),
        (StatusCode.OUT_OF_RANGE, "Error, decoded message length too large: found 6 bytes", Result.TOO_LARGE),
        (StatusCode.UNKNOWN, "Received http2 header with status: 413", Result.TOO_LARGE),
        (StatusCode.RESOURCE_EXHAUSTED, "too many requests", Result.TEMPORARY),
        (StatusCode.UNAVAILABLE, "exporter: dial tcp 10.0.0.1:9090: connect: connection refused", Result.TEMPORARY),
        (StatusCode.DEADLINE_EXCEEDED, "backend too slow", Result.TEMPORARY),
    ],
)
def test_what_a_server_says_is_repeated_not_mistaken(code: StatusCode, details: str, result: Result) -> None:
    """A collector whose backend refuses connections does listen."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        # Neither status nor hint of this can be read.
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(code, details)

    with grpc_server(answer) as port:
        outcome = sent({f"{E}ENDPOINT": f"http://127.0.0.1:{port}"})
    assert outcome == Outcome(result, f"127.0.0.1:{port} answered {code.name}: {details}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_name_that_is_not_known_is_told_whatever_it_contains(protocol: str) -> None:
    """The words that are looked for may stand in the host's name."""
    environ = {f"{E}PROTOCOL": protocol, f"{E}ENDPOINT": "http://ssl-alert-http1.invalid:4317"}
    outcome = sent(environ, 3.0)
    assert outcome.result is Result.TEMPORARY
    assert outcome.reason.endswith("cannot be resolved")


@contextmanager
def http_server(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives each connection the next answer; and what it was sent."""
    received: list[bytes] = []
    left = list(answers)

    def talk(connection: socket.socket) -> None:
        got = b""
        while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < len(body()) // 20:
            got += connection.recv(65536)
        received.append(got)
        connection.sendall(left.pop(0))
        connection.shutdown(socket.SHUT_WR)

    with server(talk) as address:
        yield address, received


def http_answer(status: str, headers: str = "", content: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize(
    ("answer", "result", "words"),
    [
        (
            http_answer("400 Bad Request", "", b"Client sent an HTTP request to an HTTPS server.\n"),
            "TEMPORARY",
            "https://",
        ),
        (http_answer("200 OK", "Content-Type: text/html\r\n", b"<html>"), "TEMPORARY", "no OTLP metrics at this path"),
        (http_answer("405 Method Not Allowed"), "TEMPORARY", "no OTLP metrics at this path"),
        (http_answer("302 Found", "Location: https://login/\r\n"), "TEMPORARY", "302 Found: it takes no OTLP metrics"),
        (http_answer("407 Proxy Authentication Required"), "UNAUTHENTICATED", "the proxy refuses the credentials"),
        (http_answer("400 Bad", "", Status(message="no such tenant").SerializeToString()), "REFUSED", "no such tenant"),
        (http_answer("422 Odd", "", b"a\r\n\tb \x07\xff" + b"x" * 5000), "REFUSED", "422 Odd: a b \ufffdxxx"),
        (http_answer("200 OK", "", b"\xff not protobuf"), "DELIVERED", ""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ncut", "DELIVERED", ""),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "TEMPORARY", "does not speak HTTP/1.1"),
    ],
)
def test_odd_http_answers_are_explained(answer: bytes, result: str, words: str) -> None:
    """What stands at the wrong port, and what servers say in their answers; no redirect is followed."""
    with http_server(answer) as (address, received):
        outcome = sent({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": f"http://{address}"})
    assert outcome.result is Result[result]
    assert words in outcome.reason
    assert len(outcome.reason) < 500
    assert len(received) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("7", 7.0), ("0", None), ("-3", None), ("nan", None), ("inf", None), ("soon", None), ("", None)),
        *(("Sun, 06 Nov 1994 08:49:37 GMT", None), ("Fri, 31 Dec 9999 23:59:59 -2359", "later")),
    ],
)
def test_a_hint_that_is_none_leaves_the_pause_to_the_caller(text: str, expected: float | str | None) -> None:
    """A wait of nan seconds would end the exporting thread, one of 0 would hammer the endpoint."""
    answer = http_answer("503 Busy", f"Retry-After: {text}\r\n")
    with http_server(answer) as (address, _):
        outcome = sent({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": f"http://{address}"})
    if expected == "later":
        assert outcome.retry_after_s is not None
        assert outcome.retry_after_s > 1e9
    else:
        assert outcome.retry_after_s == expected


def test_no_delay_over_grpc_is_no_hint_either() -> None:
    """RetryInfo of 0 s."""
    with MemoryCollector(answer=lambda _: StatusCode.UNAVAILABLE, retry_after_s=0.0) as collector:
        assert sent(at(collector, "grpc")).retry_after_s is None


def test_deflate_is_what_the_official_exporter_sends() -> None:
    """zlib's format, as HTTP has it."""
    with http_server(http_answer("200 OK")) as (address, received):
        environ = {f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": f"http://{address}", f"{E}COMPRESSION": "deflate"}
        assert sent(environ).result is Result.DELIVERED
    head, _, content = received[0].partition(b"\r\n\r\n")
    assert b"Content-Encoding: deflate" in head
    assert b"User-Agent: esper_otel/" in head
    assert zlib.decompress(content) == body()


def test_proxies_are_honoured_as_everywhere_in_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters often have no other way out."""
    with http_server(http_answer("200 OK")) as (address, received):
        monkeypatch.setenv("http_proxy", f"http://{address}")
        environ = {f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": "http://collector.invalid:4318"}
        assert sent(environ).result is Result.DELIVERED
    assert received[0].startswith(b"POST http://collector.invalid:4318/v1/metrics HTTP/1.1")


def test_a_server_that_drips_cannot_hold_a_request_longer_than_its_timeout() -> None:
    """``requests`` limits each read only: 60 header lines of 0.1 s took 6 s with a time-out of 0.3 s."""
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not stop.wait(0.05):
                connection.sendall(b"X: y\r\n")

    with server(drip) as address:
        started = time.monotonic()
        outcome = sent({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": f"http://{address}"}, timeout_s=0.3)
        assert time.monotonic() - started < 1.0
        stop.set()
    assert outcome == Outcome(Result.TEMPORARY, f"no answer from http://{address}/v1/metrics within 0.3 s")


def test_a_resolver_that_hangs_cannot_hold_a_request_longer_than_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """getaddrinfo has no time-out."""
    released = threading.Event()

    def hang(*arguments: Any, **settings: Any) -> Any:
        released.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    sender = open_sender(
        endpoint_from_environment({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": "http://collector.invalid:4318"})
    )
    started = time.monotonic()
    assert "within 0.2 s" in sender.send(body(), 0.2).reason
    assert "within 0.2 s" in sender.send(body(), 0.2).reason  # the first one still waits
    assert time.monotonic() - started < 1.5
    released.set()
    assert "cannot be resolved" in sender.send(body(), 5.0).reason
    sender.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_sender_recovers_from_a_request_that_got_no_answer(protocol: str) -> None:
    """With the same sender, as the exporter has it; the connection is used again and again."""
    with MemoryCollector(hang=True) as collector:
        sender = open_sender(endpoint_from_environment(at(collector, protocol)))
        assert sender.send(body(), 0.3).result is Result.TEMPORARY
        collector.hang = False
        assert [sender.send(body(), 5.0).result for _ in range(3)] == [Result.DELIVERED] * 3
        sender.close()


def test_requests_share_a_connection() -> None:
    """A new one for each would cost a TLS handshake every second."""
    accepted = []

    def talk(connection: socket.socket) -> None:
        accepted.append(connection)
        for _ in range(3):
            got = b""
            while not got.endswith(body()):
                got += connection.recv(65536)
            connection.sendall(http_answer("200 OK"))

    with server(talk) as address:
        outcome = sent({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": f"http://{address}"}, times=3)
    assert (outcome.result, len(accepted)) == (Result.DELIVERED, 1)


def test_an_endpoint_that_starts_later_is_found_soon() -> None:
    """gRPC's own pause before it connects again grows to 2 minutes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    sender = open_sender(endpoint_from_environment({f"{E}ENDPOINT": f"http://{address}"}))
    for _ in range(5):
        assert "nothing listens" in sender.send(body(), 1.0).reason
    with grpc_server(lambda request, context: b"", address):
        started = time.monotonic()
        pause = threading.Event()
        while sender.send(body(), 1.0).result is not Result.DELIVERED:
            assert time.monotonic() - started < 4.0
            pause.wait(0.05)
    sender.close()


PROVIDER = """
import grpc
import requests


def session():
    session = requests.Session()
    session.headers["authorization"] = "Bearer provided"
    return session


def credentials():
    with open({certificate!r}, "rb") as file:
        return grpc.ssl_channel_credentials(file.read())


def broken():
    raise RuntimeError("no metadata server")
"""


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An installed package with credential providers."""
    authority = Authority(tmp_path)
    (tmp_path / "provider_for_tests.py").write_text(PROVIDER.format(certificate=str(authority.certificate)))
    about = tmp_path / "provider_for_tests-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: provider_for_tests\nVersion: 1\n")
    names = "".join(f"test-{name} = provider_for_tests:{name}\n" for name in ("session", "credentials", "broken"))
    (about / "entry_points.txt").write_text(f"[opentelemetry_otlp_credential_provider]\n{names}")
    monkeypatch.syspath_prepend(tmp_path)
    return authority


def test_credential_providers_give_session_and_channel_credentials(provider: Authority) -> None:
    """As installed packages of clouds offer them."""
    pair = provider.pair("server")
    with MemoryCollector(headers={"authorization": "Bearer provided"}) as collector:
        environ = {"OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "test-session"}
        assert sent({**at(collector, "http/protobuf"), **environ}).result is Result.DELIVERED
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        environ = {"OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": "test-credentials"}
        assert sent({**at(collector, "grpc"), **environ}).result is Result.DELIVERED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "'nobody' is not among the entry points"),
        ("test-session", "'test-session' gives a Session, not grpc.ChannelCredentials"),
        ("test-broken", "'test-broken' fails: RuntimeError: no metadata server"),
    ],
)
def test_a_credential_provider_that_does_not_work_is_named(provider: Authority, name: str, message: str) -> None:
    """When the session starts."""
    environ = {f"{E}ENDPOINT": "https://127.0.0.1:1", "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": name}
    with pytest.raises(ConfigurationError, match=message):
        open_sender(endpoint_from_environment(environ))


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


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_closing_ends_a_request_that_hangs(protocol: str) -> None:
    """close() of a session must not wait for an endpoint; over HTTP it once took the whole time-out."""
    with MemoryCollector(hang=True) as collector:
        sender = open_sender(endpoint_from_environment(at(collector, protocol)))
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(sender.send(body(), 30.0)))
        thread.start()
        assert collector.wait_for(lambda c: c.attempts == 1)
        started = time.monotonic()
        sender.close()
        thread.join(5.0)
        assert time.monotonic() - started < 1.0
        closed = Outcome(Result.TEMPORARY, "the session was closed before the endpoint answered")
        assert outcomes == [closed]
        assert sender.send(body(), 1.0) == closed
        sender.close()
