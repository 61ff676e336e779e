"""Sends OTLP over HTTP, as protobuf or as JSON."""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import re
import socket
import threading
import time
import zlib
from functools import partial
from http.client import HTTPException
from typing import Any, NamedTuple, cast

import requests
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # has .pyi, no py.typed
from requests.adapters import HTTPAdapter

from esper_otel.errors import ConfigurationError
from esper_otel.export.credentials import provided
from esper_otel.export.endpoint import USER_AGENT, Endpoint
from esper_otel.export.failure import meaning
from esper_otel.export.otlp_json import answer_of_json, json_of, message_of_json
from esper_otel.export.outcome import CLOSED, MAX_ANSWER_BYTES, Outcome, Result, delivered, hint_s, one_line
from esper_otel.export.proxies import proxy_of, way_of
from esper_otel.export.token import Headers
from esper_otel.native import has_greenlet_sockets, threads
from esper_otel.untraced import untraced

_OTHER_PATH = ": it takes no OTLP {signal} at this path (usual is /v1/{signal})"
_MISSING = (404, 405, 501)
_STATUS = {
    **dict.fromkeys((408, 429, 502, 503, 504), (Result.TEMPORARY, "")),
    **dict.fromkeys(_MISSING, (Result.TEMPORARY, _OTHER_PATH)),
    **dict.fromkeys((401, 403), (Result.UNAUTHENTICATED, ": credentials refused ({variable})")),
    407: (Result.UNAUTHENTICATED, ": the proxy refuses the credentials ({proxy})"),
    413: (Result.TOO_LARGE, ""),
}


class _HttpRequest(NamedTuple):
    body: bytes
    headers: dict[str, str]
    deadline_s: float


class HttpSender:
    """OTLP over HTTP: see ``Sender``.

    A separate thread sends the requests, so that ``send`` can return in time: the time-out of ``requests`` limits each
    read and not the whole request, and a name lookup cannot be aborted.

    Raises:
        ConfigurationError: the credential provider or the process's sockets cannot be used.
    """

    def __init__(self, endpoint: Endpoint, headers: Headers) -> None:
        if has_greenlet_sockets():
            raise ConfigurationError(
                "eventlet has replaced Python's sockets with its own, and OTLP over HTTP does not work with "
                "them: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"
            )
        self._endpoint = endpoint
        self._headers = headers
        self._connection: list[Any] = []
        self._session = _session(endpoint, self._connection)
        self._settings = _settings(endpoint)
        self._changed: threading.Condition = threads().Condition()
        self._request: _HttpRequest | None = None
        self._outcome: Outcome | None = None
        self._is_busy = False
        self._is_closed = False
        # Started here, since the first request may be sent at exit, when Python no longer starts threads.
        threads().Thread(target=self._work, name="esper-otel-http", daemon=True).start()

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        deadline_s = time.monotonic() + timeout_s
        if self._endpoint.protocol == "http/json":
            body = json_of(body, self._endpoint.signal)
        if self._endpoint.compression == "gzip":
            body = gzip.compress(body, 1)
        elif self._endpoint.compression == "deflate":
            body = zlib.compress(body, 1)
        request = _HttpRequest(body, dict(self._headers.now()), deadline_s)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not self._is_busy, timeout_s)
            if not self._is_closed and not self._is_busy:
                self._request, self._outcome, self._is_busy = request, None, True
                self._changed.notify_all()
                left_s = max(deadline_s - time.monotonic(), 0.0)
                answered = self._changed.wait_for(lambda: self._outcome or self._is_closed, left_s)
                if isinstance(answered, Outcome) and (answered.result is Result.DELIVERED or not self._is_closed):
                    return answered
            if self._is_closed:
                return CLOSED
        self._cut()
        way = way_of(self._endpoint)
        return Outcome(Result.TEMPORARY, f"no answer from {self._endpoint.target}{way} within {timeout_s:g} s")

    def close(self) -> None:
        """See ``Sender``."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._cut()

    def _cut(self) -> None:
        """Shuts down the connection, so that the sending thread stops waiting for it."""
        for connection in self._connection:
            sock = getattr(connection, "sock", None)  # read once: the sending thread sets it to None when it is done
            if isinstance(sock, socket.socket):
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._request is not None)
                request, self._request = self._request, None
            if request is None:
                break
            with untraced():  # here too: this thread has a context of its own
                outcome = self._exchanged(request)
            with self._changed:
                self._outcome, self._is_busy = outcome, False
                self._changed.notify_all()
        self._session.close()

    def _exchanged(self, request: _HttpRequest) -> Outcome:
        left_s = max(request.deadline_s - time.monotonic(), 0.0) + 0.5  # so that send gives up first
        settings = {**self._settings, "headers": {**self._settings["headers"], **request.headers}}
        if "authorization" in request.headers and self._endpoint.credential_provider is None:
            settings["auth"] = partial(_with_authorization, request.headers["authorization"])
        try:
            response = self._session.post(self._endpoint.address, request.body, timeout=left_s, **settings)
        except Exception as error:  # noqa: BLE001 - a provider's session may raise its own, and this thread must live
            return Outcome(Result.TEMPORARY, _of_exception(error, self._endpoint))
        answer = b""
        with contextlib.suppress(Exception), contextlib.closing(response):
            answer = response.raw.read(MAX_ANSWER_BYTES, decode_content=True)
        return self._answered(response, answer)

    def _answered(self, response: requests.Response, answer: bytes) -> Outcome:
        """Decides whether to retry, see https://opentelemetry.io/docs/specs/otlp/#otlphttp-response (OTLP 1.9).

        Unlike the specification, data is kept when credentials are refused or the path does not accept metrics. This
        is the same as over gRPC.
        """
        status, target = response.status_code, self._endpoint.target
        is_page = response.headers.get("Content-Type", "").startswith("text/html")
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        if 200 <= status < 300 and not is_page:
            return delivered(answer_of_json(answer) if is_json else answer, self._headers.said)
        said = "" if is_page else self._headers.said(_message(answer, is_json=is_json))
        if status == 400 and re.search("to an https server|to https port", said.lower()):  # Go's servers, nginx
            return Outcome(Result.TEMPORARY, f"{target} speaks TLS: give https://")
        usual = (Result.REFUSED, "") if status >= 400 else (Result.TEMPORARY, _OTHER_PATH)  # redirects, and web pages
        result, hint = _STATUS.get(status, usual)
        # Over plain text a proxy may have answered instead of the endpoint, so the message names the proxy.
        proxy, way = proxy_of(self._endpoint), way_of(self._endpoint) if status >= 400 else ""
        reason = " ".join(
            filter(None, (f"{target}{way}", "answered", str(status), self._headers.said(response.reason or "")))
        )
        is_busy = result is Result.TEMPORARY and not hint
        return Outcome(
            result,
            (f"{reason}: {said}" if said else reason)
            + hint.format(
                signal=self._endpoint.signal,
                variable=self._headers.variable,
                proxy=proxy.variable if proxy else "HTTP_PROXY, HTTPS_PROXY",
            ),
            _retry_after_s(response.headers.get("Retry-After", "")) if is_busy else None,
            is_missing=status in _MISSING,
        )


def _session(endpoint: Endpoint, connection: list[Any]) -> requests.Session:
    """Returns the provider's session, or a session that stores its newest connection in the list."""
    if endpoint.credential_provider:
        return provided(endpoint.credential_provider, requests.Session, "a requests.Session")

    def connected(kind: Any, **settings: Any) -> Any:
        connection[:] = [kind(**settings)]
        return connection[0]

    class Adapter(HTTPAdapter):
        def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
            pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
            pool.ConnectionCls = partial(connected, type(pool).ConnectionCls)
            return pool

    session = requests.Session()
    session.mount("http://", Adapter())
    session.mount("https://", Adapter())
    return session


def _settings(endpoint: Endpoint) -> dict[str, Any]:
    """Returns the arguments for each request; REQUESTS_CA_BUNDLE would override them as attributes of the session."""
    form = "json" if endpoint.protocol == "http/json" else "x-protobuf"
    headers = {"User-Agent": USER_AGENT, "Content-Type": f"application/{form}"}
    if endpoint.compression != "none":
        headers["Content-Encoding"] = endpoint.compression
    settings: dict[str, Any] = {"headers": headers, "allow_redirects": False, "stream": True}
    if endpoint.certificate is not None:
        settings["verify"] = str(endpoint.certificate)
    if endpoint.client_certificate is not None:
        settings["cert"] = (str(endpoint.client_certificate), str(endpoint.client_key))
    return settings


def _with_authorization(text: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Sets the header last, since ``requests`` would replace it with credentials from ~/.netrc or the URL."""
    request.headers["authorization"] = text
    return request


def _of_exception(error: Exception, endpoint: Endpoint) -> str:
    """Describes an error, without the texts of ``requests`` and urllib3, which contain the host's name or a header."""
    said, each = "", cast("BaseException | None", error)
    while each is not None:
        if isinstance(each, OSError | HTTPException):
            is_python = type(each).__module__ in {"builtins", "ssl", "socket"}
            said += f"{type(each).__name__} {each if is_python else ''} "
        each = each.__cause__ or each.__context__
    return meaning(said, endpoint) or f"{endpoint.target}: {one_line(said) or type(error).__name__}"


def _message(answer: bytes, *, is_json: bool) -> str:
    """Returns the message of a google.rpc.Status, or the body as text if it is not one."""
    if is_json:
        return message_of_json(answer)
    try:
        return str(Status.FromString(answer).message)
    except DecodeError:
        return answer.decode("utf-8", "replace")


def _retry_after_s(text: str) -> float | None:
    """Parses a Retry-After header: seconds or a date (RFC 9110, 10.2.3)."""
    with contextlib.suppress(ValueError):
        return hint_s(float(text))
    with contextlib.suppress(ValueError, OverflowError):
        return hint_s(email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None
