"""Transport: sends serialized requests over OTLP and says what became of each, in words for the user."""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import re
import socket
import threading
import time
import zlib
from enum import Enum, auto
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from esper_otel.export.endpoint import USER_AGENT, Endpoint, grpc_credentials, http_session, http_settings

if TYPE_CHECKING:
    import grpc
    import requests

_METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_CONNECT_AGAIN_MS = 1_000
_MAX_ANSWER_BYTES = 1024 * 1024
_MOST_CHARACTERS = 300


class Result(Enum):
    """What became of a request."""

    DELIVERED = auto()
    TEMPORARY = auto()  # keep the data and try again
    UNAUTHENTICATED = auto()  # keep the data: somebody has to put the credentials right
    TOO_LARGE = auto()
    REFUSED = auto()  # for good


class Outcome(NamedTuple):
    """What became of a request, and why.

    Attributes:
        result: what to do with the data.
        reason: why, in words; empty when all was taken.
        retry_after_s: when the endpoint wants to hear of it again; None when it does not say.
        rejected_points: points that were not taken of a request that was.
    """

    result: Result
    reason: str = ""
    retry_after_s: float | None = None
    rejected_points: int = 0


_CLOSED = Outcome(Result.TEMPORARY, "the session was closed before the endpoint answered")


class Sender(Protocol):
    """Sends requests to one endpoint. Threads: one sends; ``close`` may be called from another."""

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """Sends a serialized ExportMetricsServiceRequest, in ``timeout_s`` at most, whatever it has to wait for.

        Raises nothing that depends on the endpoint.
        """

    def close(self) -> None:
        """Ends connections; a request that is being sent then ends at once, with a temporary failure."""


def open_sender(endpoint: Endpoint) -> Sender:
    """A sender for the endpoint; connects when the first request is sent.

    Raises:
        ConfigurationError: certificates or credential provider cannot be used.
    """
    return GrpcSender(endpoint) if endpoint.protocol == "grpc" else HttpSender(endpoint)


def _delivered(body: bytes) -> Outcome:
    try:
        partial = ExportMetricsServiceResponse.FromString(body).partial_success
    except DecodeError:  # it was taken all the same
        return Outcome(Result.DELIVERED)
    return Outcome(Result.DELIVERED, _words(partial.error_message), rejected_points=partial.rejected_data_points)


def _words(text: str) -> str:
    """One line of what somebody else says."""
    return "".join(each for each in " ".join(text.split())[:_MOST_CHARACTERS] if each.isprintable())


def _hint_s(delay_s: float) -> float | None:
    """No hint in a delay that is none: the caller's own pause is then the longer one."""
    return delay_s if 0.0 < delay_s < float("inf") else None


class GrpcSender:
    """OTLP over gRPC."""

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc

        self._endpoint = endpoint
        options = [
            ("grpc.primary_user_agent", USER_AGENT),
            *((f"grpc.{which}_reconnect_backoff_ms", _CONNECT_AGAIN_MS) for which in ("initial", "min", "max")),
            ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
        ]
        compression = grpc.Compression.Gzip if endpoint.compression == "gzip" else grpc.Compression.NoCompression
        if endpoint.is_insecure:
            self._channel = grpc.insecure_channel(endpoint.address, options, compression)
        else:
            self._channel = grpc.secure_channel(endpoint.address, grpc_credentials(endpoint), options, compression)
        self._is_closed = False
        self._call: Any = self._channel.unary_unary(_METHOD, bytes, bytes)

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        import grpc

        try:
            return _delivered(self._call(body, timeout=timeout_s, metadata=self._endpoint.headers))
        except grpc.RpcError as error:
            return _CLOSED if self._is_closed else _of_grpc(error, self._endpoint, timeout_s)
        except ValueError:  # what gRPC raises on a closed channel
            return _CLOSED

    def close(self) -> None:
        """See ``Sender``."""
        self._is_closed = True
        self._channel.close()


# What gRPC (1.72 to 1.85) or Python say of a connection that fails, in lower case, and what it means; the first that
# fits. Those that come with the host's name stand first: it may hold any other word.
_HUNG_UP = "socket closed|connection reset|broken pipe|remotedisconnected|ssleoferror"
_WORDS = (
    ("^dns resolution failed|^errors resolving|gaierror", "the name in {target} cannot be resolved"),
    ("hostname verif|peer name|mismatch", "the certificate of {target} is for another host name: give its own"),
    ("proxyerror", "the proxy on the way to {target} does not let us through"),
    ("connection refused", "nothing listens on {target} (connection refused)"),
    ("no such file", "nothing listens on {target} (no such file)"),
    ("certificate_verify_failed", "the certificate of {target} is not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)"),
    ("wrong_version_number|record_layer", "{target} does not speak TLS; for plain text give http://"),
    ("alpn", "{target} speaks TLS, but not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("certificate_required|unknown_ca", "{target} wants a certificate of ours (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)"),
    ("alert|handshake", "the TLS handshake with {target} failed"),
    ("parsing http/2|http1", "{target} speaks HTTP/1.1, not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    (_HUNG_UP, "{target} closed the connection: it may {want}, or speak {other}"),
    ("badstatusline", "{target} does not speak HTTP/1.1: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use port 4318"),
    ("unreachable|no route to host", "{target} cannot be reached from here"),
)
_GRPC_CONNECTING = re.compile("failed to connect to all|errors resolving|dns resolution failed|socket closed")
_GRPC_TEMPORARY = frozenset({"CANCELLED", "RESOURCE_EXHAUSTED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"})
# As servers in C++, Python and Go, in Java, .NET and Rust say it, and a proxy.
_TOO_LARGE = re.compile("larger than max|exceeds maximum size|maximum configured|length too large|with status: 413")


def _meaning(said: str, endpoint: Endpoint) -> str | None:
    found = next((meaning for words, meaning in _WORDS if re.search(words, said.lower())), None)
    other = "HTTP/1.1, not gRPC" if endpoint.protocol == "grpc" else "gRPC, not HTTP/1.1"
    want = "speak TLS (https://)" if endpoint.is_insecure else "want OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"
    return None if found is None else found.format(target=endpoint.target, want=want, other=other)


def _of_grpc(error: grpc.RpcError, endpoint: Endpoint, timeout_s: float) -> Outcome:
    """Retryable or not, by the OTLP specification 1.9, https://opentelemetry.io/docs/specs/otlp/#otlpgrpc-response.

    Unlike there, data is kept when credentials are refused or the service is not there: nobody sends it again, and
    somebody may put that right.
    """
    from grpc import StatusCode

    code, details, target = error.code(), _words(error.details() or ""), endpoint.target
    result, reason = Result.REFUSED, f"{target} answered {code.name}: {details}"
    if code is StatusCode.DEADLINE_EXCEEDED:
        result = Result.TEMPORARY
        if details.startswith("Deadline Exceeded"):  # gRPC's own words
            reason = f"no answer from {target} within {timeout_s:g} s"
    elif code in {StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED}:
        reason = f"{target} refuses the credentials: {details} (OTEL_EXPORTER_OTLP_HEADERS)"
        result = Result.UNAUTHENTICATED
    elif code.name in {"RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "UNKNOWN"} and _TOO_LARGE.search(details.lower()):
        result = Result.TOO_LARGE
    elif code is StatusCode.UNIMPLEMENTED:
        result, reason = Result.TEMPORARY, f"{target} takes no OTLP metrics over gRPC: {details}"
    elif code.name in _GRPC_TEMPORARY:
        result = Result.TEMPORARY
        if _GRPC_CONNECTING.match(details.lower()):  # a server's own words are about something else
            reason = _meaning(details, endpoint) or reason
    return Outcome(result, reason, _retry_delay_s(error) if result is Result.TEMPORARY else None)


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above

    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-status-details-bin":
            info = RetryInfo()
            with contextlib.suppress(DecodeError):
                for detail in Status.FromString(value).details:
                    if detail.Unpack(info):
                        return _hint_s(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


class HttpSender:
    """OTLP over HTTP with protobuf bodies.

    A thread of our own sends: ``requests`` limits each read, not the whole, and nothing ends the look-up of a name.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._connection: list[Any] = []
        self._session = http_session(endpoint, self._connection)
        self._settings = {**http_settings(endpoint), "allow_redirects": False, "stream": True}
        self._changed = threading.Condition()
        self._request: tuple[bytes, float] | None = None
        self._outcome: Outcome | None = None
        self._is_busy = False
        self._is_closed = False
        # Started here and not with the first request: that may be at exit, when Python starts no more threads.
        threading.Thread(target=self._work, name="esper-otel-http", daemon=True).start()

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        deadline_s = time.monotonic() + timeout_s
        if self._endpoint.compression == "gzip":
            body = gzip.compress(body, 1)
        elif self._endpoint.compression == "deflate":
            body = zlib.compress(body, 1)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not self._is_busy, timeout_s)
            if not self._is_closed and not self._is_busy:
                self._request, self._outcome, self._is_busy = (body, deadline_s), None, True
                self._changed.notify_all()
                left_s = max(deadline_s - time.monotonic(), 0.0)
                answered = self._changed.wait_for(lambda: self._outcome or self._is_closed, left_s)
                if isinstance(answered, Outcome) and (answered.result is Result.DELIVERED or not self._is_closed):
                    return answered
            if self._is_closed:
                return _CLOSED
        self._cut()
        return Outcome(Result.TEMPORARY, f"no answer from {self._endpoint.target} within {timeout_s:g} s")

    def close(self) -> None:
        """See ``Sender``."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._cut()

    def _cut(self) -> None:
        """Ends the connection under the thread that waits for it."""
        for connection in self._connection:
            if isinstance(getattr(connection, "sock", None), socket.socket):
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._request is not None)
                request, self._request = self._request, None
            if request is None:
                break
            outcome = self._exchanged(*request)
            with self._changed:
                self._outcome, self._is_busy = outcome, False
                self._changed.notify_all()
        self._session.close()

    def _exchanged(self, body: bytes, deadline_s: float) -> Outcome:
        left_s = max(deadline_s - time.monotonic(), 0.0) + 0.5  # so that send gives up first
        try:
            response = self._session.post(self._endpoint.address, body, timeout=left_s, **self._settings)
        except Exception as error:  # noqa: BLE001 - a provider's session may raise its own, and this thread must live
            return Outcome(Result.TEMPORARY, _of_exception(error, self._endpoint))
        answer = b""
        with contextlib.suppress(Exception), contextlib.closing(response):
            answer = response.raw.read(_MAX_ANSWER_BYTES, decode_content=True)
        return _of_http(response, answer, self._endpoint.target)


def _of_exception(error: Exception, endpoint: Endpoint) -> str:
    """In words; what ``requests`` and urllib3 add is left out, since it holds the host's name, or a header."""
    said, each = "", cast("BaseException | None", error)
    while each is not None:
        if isinstance(each, OSError | HTTPException):
            is_python = type(each).__module__ in {"builtins", "ssl", "socket"}
            said += f"{type(each).__name__} {each if is_python else ''} "
        each = each.__cause__ or each.__context__
    return _meaning(said, endpoint) or f"{endpoint.target}: {_words(said) or type(error).__name__}"


_OTHER_PATH = ": it takes no OTLP metrics at this path"
_HTTP_STATUS = {
    **dict.fromkeys((408, 429, 502, 503, 504), (Result.TEMPORARY, "")),
    **dict.fromkeys((404, 405), (Result.TEMPORARY, _OTHER_PATH)),
    **dict.fromkeys((401, 403), (Result.UNAUTHENTICATED, ": credentials refused (OTEL_EXPORTER_OTLP_HEADERS)")),
    407: (Result.UNAUTHENTICATED, ": the proxy refuses the credentials (HTTP_PROXY, HTTPS_PROXY)"),
    413: (Result.TOO_LARGE, ""),
}


def _of_http(response: requests.Response, answer: bytes, target: str) -> Outcome:
    """Retryable or not, by the OTLP specification 1.9, https://opentelemetry.io/docs/specs/otlp/#otlphttp-response.

    Unlike there, data is kept when credentials are refused or metrics are not taken at this path, as over gRPC.
    """
    status = response.status_code
    is_page = response.headers.get("Content-Type", "").startswith("text/html")
    if 200 <= status < 300 and not is_page:
        return _delivered(answer)
    said = "" if is_page else _said(answer)
    if status == 400 and re.search("to an https server|to https port", said.lower()):  # Go's servers, nginx
        return Outcome(Result.TEMPORARY, f"{target} speaks TLS: give https://")
    usual = (Result.REFUSED, "") if status >= 400 else (Result.TEMPORARY, _OTHER_PATH)  # redirects, and web pages
    result, hint = _HTTP_STATUS.get(status, usual)
    reason = " ".join(filter(None, (target, "answered", str(status), response.reason)))
    hint_s = (
        _retry_after_s(response.headers.get("Retry-After", "")) if result is Result.TEMPORARY and not hint else None
    )
    return Outcome(result, f"{reason}: {said}{hint}" if said else reason + hint, hint_s)


def _said(answer: bytes) -> str:
    """The message of a google.rpc.Status, or the text that there is instead of one."""
    from google.rpc.status_pb2 import Status

    try:
        return _words(Status.FromString(answer).message)
    except DecodeError:
        return _words(answer.decode("utf-8", "replace"))


def _retry_after_s(text: str) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3)."""
    with contextlib.suppress(ValueError):
        return _hint_s(float(text))
    with contextlib.suppress(ValueError, OverflowError):
        return _hint_s(email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None
