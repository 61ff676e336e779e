"""Sending over gRPC: what each of a server's answers means."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Self

import grpc
import pytest
from certificates import Authority
from endpoints import E, at, body, grpc_server, opened, sent, server, to, unused_address
from grpc import StatusCode
from patience import patience

from esper_otel.export.transport import Outcome, Result
from esper_otel.testing import MemoryCollector


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


def test_a_message_too_large_for_grpc_is_told_from_an_overload() -> None:
    """A receiver's limit is answered by smaller requests, not by waiting."""
    with MemoryCollector() as collector, opened(at(collector, "grpc")) as sender:
        outcome = sender.send(b"\x0a" + b"\xff\xff\xff\x02" + bytes(6 * 1024 * 1024), 5.0)
    assert outcome.result is Result.TOO_LARGE


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
        assert "may require a client certificate (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)" in outcome.reason
        files = {f"{E}CLIENT_CERTIFICATE": str(ours.certificate), f"{E}CLIENT_KEY": str(ours.key)}
        assert sent({**environ, **files}).result is Result.DELIVERED


def test_a_certificate_of_ours_may_be_renewed_in_its_files(tmp_path: Path) -> None:
    """Some live for an hour only. An empty one beside its key, as while it is written, makes gRPC abort the process."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    theirs, old = authority.pair("server"), stranger.pair("client")
    credentials = grpc.ssl_server_credentials(
        [(theirs.key.read_bytes(), theirs.certificate.read_bytes())],
        authority.certificate.read_bytes(),
        require_client_auth=True,
    )
    files = {"CLIENT_CERTIFICATE": str(old.certificate), "CLIENT_KEY": str(old.key)}
    with grpc_server(lambda request, context: b"", credentials=credentials) as port:
        environ = to("grpc", f"https://127.0.0.1:{port}", CERTIFICATE=str(authority.certificate), **files)
        with opened(environ) as sender:
            assert sender.send(body(), 5.0).result is Result.TEMPORARY
            old.certificate.write_bytes(b"")
            assert sender.send(body(), 5.0).result is Result.TEMPORARY
            assert authority.pair("client") == old  # the same files
            sender.send(body(), 5.0)
            assert sender.send(body(), 5.0).result is Result.DELIVERED


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


def test_no_delay_over_grpc_is_no_hint_either() -> None:
    """RetryInfo of 0 s."""
    with MemoryCollector(answer=lambda _: StatusCode.UNAVAILABLE, retry_after_s=0.0) as collector:
        assert sent(at(collector, "grpc")).retry_after_s is None


def test_an_answer_without_sense_or_end_was_an_answer() -> None:
    """The request was taken; the limit on what we read is not the endpoint's limit on what we send."""
    for answer in (b"\xff not protobuf", bytes(2 * 1024 * 1024)):
        with grpc_server(lambda request, context, answer=answer: answer) as port:
            assert sent(to("grpc", f"http://127.0.0.1:{port}")) == Outcome(Result.DELIVERED)


SETTINGS = bytes.fromhex("000000 04 00 00000000")


def reset(code: int) -> bytes:
    return bytes.fromhex("000004 03 00 00000001") + code.to_bytes(4, "big")


@pytest.mark.parametrize("frame", [*map(reset, (0, 1, 2, 7, 8, 11)), b"\xff" * 100], ids=bytes.hex)
def test_a_request_that_is_broken_off_is_no_reason_to_drop_data(frame: bytes) -> None:
    """gRPC says INTERNAL, or even "larger than max", when a proxy on the way loses what is behind it."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(SETTINGS)
        received = 0
        while received < 200:  # a request's head has come when gRPC has read the settings
            received += len(connection.recv(65536))
        connection.sendall(frame)

    with server(talk) as address:
        outcome = sent(to("grpc", f"http://{address}"), 3.0)
    assert outcome.result is Result.TEMPORARY
    assert outcome.reason.startswith(f"{address} ")


class Names:
    """A name server that knows every name, or none."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join(120)
        self._socket.close()

    def _serve(self) -> None:
        while len(asked := (received := self._socket.recvfrom(4096))[0]) > 12:
            end = asked.index(b"\0", 12) + 5
            is_found = self.address is not None and asked[end - 4 : end - 2] == b"\0\1"  # an IPv4 address is asked for
            flags = b"\x81\x80" if self.address else b"\x81\x83"
            answer = asked[:2] + flags + b"\0\1" + bytes([0, is_found]) + bytes(4) + asked[12:end]
            if is_found:
                answer += bytes.fromhex("c00c 0001 0001 00000001 0004") + socket.inet_aton(self.address or "")
            self._socket.sendto(answer, received[1])


def test_a_name_may_vanish_and_come_back_with_another_address() -> None:
    """As when Kubernetes moves a collector; one channel would ask again after half a minute."""
    port = int(unused_address().partition(":")[2])
    pause = threading.Event()
    with Names() as names:
        environ = to("grpc", f"dns://127.0.0.1:{names.port}/collector.test:{port}", INSECURE="true")
        with opened(environ) as sender:
            assert sender.send(body(), 3.0).reason.endswith("cannot be resolved")
            for address in ("127.0.0.1", "127.0.0.2"):
                names.address = address
                with grpc_server(lambda request, context: b"", f"{address}:{port}"):
                    started = time.monotonic()
                    while sender.send(body(), 1.0).result is not Result.DELIVERED:
                        assert time.monotonic() - started < patience(5.0)
                        pause.wait(0.05)
                names.address = None
                assert sender.send(body(), 1.0).result is Result.TEMPORARY
