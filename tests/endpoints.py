"""Endpoints for tests: how to send to one, and servers that answer as a test likes. Real sockets only."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import certificates
import grpc
import pytest
from certificates import Authority, Pair
from frame_examples import make_frame

from esper_otel.export.encode import Encoder
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.resource import resource_for
from esper_otel.export.transport import Outcome, Sender, open_sender
from esper_otel.frames.ring import blocks_of
from esper_otel.schema import METRICS
from esper_otel.testing import MemoryCollector

PROTOCOLS = ["grpc", "http/protobuf"]
E = "OTEL_EXPORTER_OTLP_"


def body() -> bytes:
    """A request with one frame."""

    def fail(where: str, error: Exception) -> None:
        raise AssertionError(where) from error

    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    [request] = encoder.requests(blocks_of([make_frame()]))
    return request.body


def at(collector: MemoryCollector, protocol: str, **settings: str) -> dict[str, str]:
    """The variables that lead to the collector; settings without their prefix."""
    return to(protocol, collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint, **settings)


def to(protocol: str, url: str, **settings: str) -> dict[str, str]:
    """The variables that lead to the URL."""
    return {f"{E}{name}": text for name, text in {"PROTOCOL": protocol, "ENDPOINT": url, **settings}.items()}


@contextmanager
def opened(environ: dict[str, str], token_file: Path | None = None) -> Iterator[Sender]:
    """A sender, closed at the end."""
    sender = open_sender(endpoint_from_environment(environ), token_file)
    try:
        yield sender
    finally:
        sender.close()


def sent(environ: dict[str, str], timeout_s: float = 5.0, times: int = 1) -> Outcome:
    """What becomes of a request, the last of so many."""
    with opened(environ) as sender:
        for _ in range(times):
            outcome = sender.send(body(), timeout_s)
    return outcome


def unused_address() -> str:
    """Host and port where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


@contextmanager
def server(talk: Callable[[socket.socket], None], port: int = 0) -> Iterator[str]:
    """A server that does as it likes with each connection, one after the other; gives host and port."""
    listening = socket.create_server(("127.0.0.1", port))
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
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(120)
        for connection in connections:
            connection.close()


@contextmanager
def grpc_server(answer: Any, address: str = "127.0.0.1:0", credentials: Any = None) -> Iterator[int]:
    """A gRPC server that answers each Export as it likes; gives the port."""
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


@contextmanager
def http_server(*answers: bytes, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP server that gives each connection the next answer; gives host and port, and what it was sent."""
    received: list[bytes] = []
    left = list(answers)

    def talk(connection: socket.socket) -> None:
        with suppress(OSError):  # whoever does not trust our certificate hangs up
            secured = connection if tls is None else tls.wrap_socket(connection, server_side=True)
            received.append(http_request(secured))
            secured.sendall(left.pop(0))
            secured.shutdown(socket.SHUT_RDWR)
            secured.close()

    with server(talk, port) as address:
        yield address, received


@contextmanager
def relay(port: int) -> Iterator[tuple[str, threading.Event]]:
    """Passes connections on to the port; those that are open when the event is set fall silent, but stay open."""
    silenced = threading.Event()
    onward: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        silence = threading.Event()
        other = socket.create_connection(("127.0.0.1", port))
        onward.append(other)
        for source, target in ((connection, other), (other, connection)):
            threading.Thread(target=pass_on, args=(source, target, silence), daemon=True).start()

    def pass_on(source: socket.socket, target: socket.socket, silence: threading.Event) -> None:
        with suppress(OSError):
            while got := source.recv(65536):
                if silenced.is_set():
                    silence.set()
                if not silence.is_set():
                    target.sendall(got)

    with server(talk) as address:
        try:
            yield address, silenced
        finally:
            for each in onward:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()


@contextmanager
def proxy(answer: bytes = b"") -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP proxy that opens tunnels, or gives each request the same answer; gives host and port, and requests."""
    received: list[bytes] = []
    onward: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        with suppress(OSError):
            received.append(http_request(connection))
            method, target, _ = received[-1].split(b" ", 2)
            if answer or method != b"CONNECT":
                connection.sendall(answer or http_answer("200 OK"))
                connection.shutdown(socket.SHUT_RDWR)
                return
            host, _, port = target.decode().rpartition(":")
            onward.append(socket.create_connection((host.strip("[]"), int(port))))
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for source, sink in ((connection, onward[-1]), (onward[-1], connection)):
                threading.Thread(target=pass_on, args=(source, sink), daemon=True).start()

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while got := source.recv(65536):
                sink.sendall(got)

    with server(talk) as address:
        try:
            yield address, received
        finally:
            for each in onward:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()


def http_request(connection: socket.socket) -> bytes:
    """One whole request.

    Raises:
        OSError: the connection ended before.
    """
    got = b""
    while not (head := re.match(rb"(?s).*?\r\n\r\n", got)) or len(got) < head.end() + _length(head[0]):
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("the client has hung up")
        got += more
    return got


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)content-length: (\d+)", head)
    return int(found[1]) if found else 0


def http_answer(status: str, headers: str = "", content: bytes = b"") -> bytes:
    """One whole answer; headers with their line ends."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(content)}\r\n\r\n".encode() + content


def expired_pair(authority: Authority) -> Pair:
    """A certificate that was valid until an hour ago."""
    two_hours_ago = datetime.now(UTC) - timedelta(hours=2)
    past = SimpleNamespace(UTC=UTC, timedelta=timedelta, datetime=SimpleNamespace(now=lambda _: two_hours_ago))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(certificates, "datetime", past)
        return authority.pair("expired")
