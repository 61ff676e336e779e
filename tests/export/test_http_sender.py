"""Sending over HTTP: what each of a server's answers means."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from endpoints import E, at, body, http_answer, http_request, http_server, opened, sent, server, to
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # has .pyi, no py.typed
from patience import patience

from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.transport import Outcome, Result, open_sender
from esper_otel.testing import MemoryCollector


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
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200, "TEMPORARY", "are too many or too long"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "TEMPORARY", "are too many or too long"),
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
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Busy"])
def test_a_hint_that_is_none_leaves_the_pause_to_the_caller(
    status: str, text: str, expected: float | str | None
) -> None:
    """A wait of nan seconds would end the exporting thread, one of 0 would hammer the endpoint."""
    answer = http_answer(status, f"Retry-After: {text}\r\n")
    with http_server(answer) as (address, _):
        outcome = sent({f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": f"http://{address}"})
    if expected == "later":
        assert outcome.retry_after_s is not None
        assert outcome.retry_after_s > 1e9
    else:
        assert outcome.retry_after_s == expected


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
        assert time.monotonic() - started < patience(1.0)
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
    assert time.monotonic() - started < patience(1.5)
    released.set()
    assert "cannot be resolved" in sender.send(body(), 5.0).reason
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


def test_a_hint_may_be_a_date() -> None:
    """Half a minute from now, to the second."""
    then = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    with http_server(http_answer("429 Too Many Requests", f"Retry-After: {then}\r\n")) as (address, _):
        outcome = sent(to("http/protobuf", f"http://{address}"))
    assert outcome.retry_after_s == pytest.approx(29.0, abs=2.0)


@pytest.mark.parametrize(("status", "result"), [("200 OK", Result.DELIVERED), ("503 Busy", Result.TEMPORARY)])
def test_an_endless_answer_is_read_so_far_and_no_further(status: str, result: Result) -> None:
    """What counts stands in its first line."""

    def talk(connection: socket.socket) -> None:
        http_request(connection)
        connection.sendall(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with suppress(OSError):
            while True:
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")

    with server(talk) as address:
        outcome = sent(to("http/protobuf", f"http://{address}"))
    assert outcome.result is result
    assert len(outcome.reason) < 500


def test_an_answer_that_unpacks_to_a_thousand_times_its_size_is_unpacked_so_far_only() -> None:
    """256 MiB of zeros are a quarter of a MiB on the way."""
    tracemalloc.start()
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = b"".join(packed.compress(bytes(1 << 20)) for _ in range(256)) + packed.flush()
    with http_server(http_answer("200 OK", "Content-Encoding: gzip\r\n", content)) as (address, _):
        tracemalloc.reset_peak()
        assert sent(to("http/protobuf", f"http://{address}")).result is Result.DELIVERED
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 1024 * 1024


def test_an_answer_that_drips_costs_the_timeout_and_the_next_request_goes_through() -> None:
    """Whether all was taken stands at its end; what may have been taken is sent again."""
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", http_answer("200 OK")]

    def talk(connection: socket.socket) -> None:
        with suppress(OSError):
            http_request(connection)
            answer = answers.pop(0)
            connection.sendall(answer)
            while answers and not stop.wait(0.05):
                connection.sendall(b"x")

    stop = threading.Event()
    with server(talk) as address, opened(to("http/protobuf", f"http://{address}")) as sender:
        assert "within 0.3 s" in sender.send(body(), 0.3).reason
        assert sender.send(body(), 5.0).result is Result.DELIVERED
        stop.set()


def test_a_name_may_vanish_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection was closed; the name is looked up again."""
    with (
        http_server(http_answer("200 OK"), http_answer("200 OK")) as (address, _),
        opened(to("http/protobuf", f"http://localhost:{address.partition(':')[2]}")) as sender,
    ):
        assert sender.send(body(), 5.0).result is Result.DELIVERED
        with monkeypatch.context() as patched:
            patched.setattr(socket, "getaddrinfo", unknown)
            assert sender.send(body(), 5.0).reason.endswith("cannot be resolved")
        assert sender.send(body(), 5.0).result is Result.DELIVERED


def unknown(*arguments: Any, **settings: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_header_that_was_set_is_not_replaced_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``requests`` prefers what a forgotten ~/.netrc has for the host, and a name in the URL."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login old password forgotten\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with http_server(http_answer("200 OK"), http_answer("200 OK")) as (address, received):
        url = f"http://me:other@{address}"
        assert sent(to("http/protobuf", url, HEADERS="authorization=Bearer%20ours")).result is Result.DELIVERED
        assert sent(to("http/protobuf", f"http://{address}")).result is Result.DELIVERED
    assert b"authorization: Bearer ours\r\n" in received[0]
    assert b"Basic" not in received[0]
    assert b"Authorization: Basic" in received[1]


def test_a_connection_that_vanishes_while_it_is_cut_harms_nobody() -> None:
    """The sending thread gives it up between two looks at it."""

    class Vanishing:
        def __init__(self, sock: socket.socket) -> None:
            self._looks = [sock]

        @property
        def sock(self) -> socket.socket | None:
            return self._looks.pop() if self._looks else None

    ours, theirs = socket.socketpair()
    with ours, theirs, MemoryCollector() as collector, opened(at(collector, "http/protobuf")) as sender:
        inner: Any = sender
        inner._sender._connection.append(Vanishing(ours))
        inner._sender._cut()
        assert theirs.recv(1) == b""
