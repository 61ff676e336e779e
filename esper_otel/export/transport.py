"""Transport: sends serialized requests over OTLP and says what became of each, in words for the user."""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import time
import zlib
from enum import Enum, auto
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from esper_otel._version import __version__
from esper_otel.errors import ConfigurationError

if TYPE_CHECKING:
    import grpc
    import requests

    from esper_otel.export.endpoint import Endpoint

_USER_AGENT = f"esper_otel/{__version__}"
_METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_PROVIDERS = "opentelemetry_otlp_credential_provider"
_CONNECT_AGAIN_MS = 1_000


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


class Sender(Protocol):
    """Sends requests to one endpoint. Threads: one sends; ``close`` may be called from another."""

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """Sends a serialized ExportMetricsServiceRequest; raises nothing that depends on the endpoint."""

    def close(self) -> None:
        """Ends connections, also under a request that is being sent."""


def open_sender(endpoint: Endpoint) -> Sender:
    """A sender for the endpoint; connects when the first request is sent.

    Raises:
        ConfigurationError: certificates or credential provider cannot be used.
    """
    return GrpcSender(endpoint) if endpoint.protocol == "grpc" else HttpSender(endpoint)


def _provided(name: str) -> Any:
    found = list(entry_points(group=_PROVIDERS, name=name))
    if not found:
        raise ConfigurationError(f"credential provider {name!r} is not among the entry points {_PROVIDERS!r}")
    return found[0].load()()


def _delivered(body: bytes) -> Outcome:
    try:
        partial = ExportMetricsServiceResponse.FromString(body).partial_success
    except DecodeError:  # it was taken all the same
        return Outcome(Result.DELIVERED)
    return Outcome(Result.DELIVERED, partial.error_message, rejected_points=partial.rejected_data_points)


class GrpcSender:
    """OTLP over gRPC."""

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc

        self._endpoint = endpoint
        options = [
            ("grpc.primary_user_agent", _USER_AGENT),
            ("grpc.initial_reconnect_backoff_ms", _CONNECT_AGAIN_MS),
            ("grpc.min_reconnect_backoff_ms", _CONNECT_AGAIN_MS),
            ("grpc.max_reconnect_backoff_ms", _CONNECT_AGAIN_MS),
        ]
        compression = grpc.Compression.Gzip if endpoint.compression == "gzip" else grpc.Compression.NoCompression
        if endpoint.is_insecure:
            self._channel = grpc.insecure_channel(endpoint.address, options, compression)
        else:
            self._channel = grpc.secure_channel(endpoint.address, _credentials(endpoint), options, compression)
        self._call: Any = self._channel.unary_unary(_METHOD, bytes, bytes)

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        import grpc

        try:
            return _delivered(self._call(body, timeout=timeout_s, metadata=self._endpoint.headers))
        except grpc.RpcError as error:
            return _of_grpc(error, self._endpoint.target, timeout_s)
        except ValueError as error:  # the channel has been closed
            return Outcome(Result.TEMPORARY, f"{self._endpoint.target}: {error}")

    def close(self) -> None:
        """See ``Sender``."""
        self._channel.close()


def _credentials(endpoint: Endpoint) -> grpc.ChannelCredentials:
    import grpc

    if endpoint.credential_provider:
        provided = _provided(endpoint.credential_provider)
        if not isinstance(provided, grpc.ChannelCredentials):
            raise ConfigurationError(
                f"credential provider {endpoint.credential_provider!r} gives a {type(provided).__name__}, "
                "not grpc.ChannelCredentials"
            )
        return provided
    files = (endpoint.certificate, endpoint.client_key, endpoint.client_certificate)
    return grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))


_GRPC_TEMPORARY = frozenset({"CANCELLED", "RESOURCE_EXHAUSTED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"})

# What gRPC says, in lower case, and what it means; the first that fits.
_GRPC_WORDS = (
    ("connection refused", "nothing listens on {target} (connection refused)"),
    ("certificate_verify_failed", "the certificate of {target} is not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)"),
    ("wrong_version_number", "{target} does not speak TLS; for plain text give http://"),
    ("ssl handshake failed", "the TLS handshake with {target} failed"),
    ("dns resolution failed", "the name in {target} cannot be resolved"),
    ("domain name not found", "the name in {target} cannot be resolved"),
    ("name or service not known", "the name in {target} cannot be resolved"),
    ("expected settings frame", "{target} speaks HTTP/1.1, not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("failed parsing http/2", "{target} speaks HTTP/1.1, not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("http1.x server", "{target} speaks HTTP/1.1, not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("socket closed", "{target} closed the connection: it may speak TLS (https://), or HTTP/1.1 instead of gRPC"),
    ("connection reset", "{target} reset the connection"),
)


def _of_grpc(error: grpc.RpcError, target: str, timeout_s: float) -> Outcome:
    """Retryable or not, by the OTLP specification 1.9, "OTLP/gRPC Response"."""
    from grpc import StatusCode

    code, details = error.code(), error.details() or ""
    result, reason = Result.REFUSED, f"{target} answered {code.name}: {details}"
    if code is StatusCode.DEADLINE_EXCEEDED:
        result, reason = Result.TEMPORARY, f"no answer from {target} within {timeout_s:g} s"
    elif code in {StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED}:
        reason = f"{target} refuses the credentials: {details} (OTEL_EXPORTER_OTLP_HEADERS)"
        result = Result.UNAUTHENTICATED
    elif code is StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        result = Result.TOO_LARGE
    elif code is StatusCode.UNIMPLEMENTED:  # the wrong port or path: somebody has to put it right
        result, reason = Result.TEMPORARY, f"{target} takes no OTLP metrics over gRPC: {details}"
    elif code.name in _GRPC_TEMPORARY:
        meaning = next((meaning for words, meaning in _GRPC_WORDS if words in details.lower()), None)
        result, reason = Result.TEMPORARY, reason if meaning is None else meaning.format(target=target)
    return Outcome(result, reason, _retry_delay_s(error) if result is Result.TEMPORARY else None)


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above

    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-status-details-bin":
            info = RetryInfo()
            for detail in Status.FromString(value).details:
                if detail.Unpack(info):
                    return float(info.retry_delay.ToTimedelta().total_seconds())
    return None


class HttpSender:
    """OTLP over HTTP with protobuf bodies."""

    def __init__(self, endpoint: Endpoint) -> None:
        import requests

        self._endpoint = endpoint
        self._session = requests.Session()
        if endpoint.credential_provider:
            provided = _provided(endpoint.credential_provider)
            if not isinstance(provided, requests.Session):
                raise ConfigurationError(
                    f"credential provider {endpoint.credential_provider!r} gives a {type(provided).__name__}, "
                    "not a requests.Session"
                )
            self._session = provided
        # Given with each request: the session's own would lose against REQUESTS_CA_BUNDLE.
        self._files: dict[str, Any] = {}
        if endpoint.certificate is not None:
            self._files["verify"] = str(endpoint.certificate)
        if endpoint.client_certificate is not None:
            files = [str(file) for file in (endpoint.client_certificate, endpoint.client_key) if file is not None]
            self._files["cert"] = files[0] if len(files) == 1 else (files[0], files[1])
        self._headers = {"User-Agent": _USER_AGENT, "Content-Type": "application/x-protobuf", **dict(endpoint.headers)}
        if endpoint.compression != "none":
            self._headers["Content-Encoding"] = endpoint.compression

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        import requests

        if self._endpoint.compression == "gzip":
            body = gzip.compress(body, 1)
        elif self._endpoint.compression == "deflate":
            body = zlib.compress(body, 1)
        try:
            response = self._session.post(
                self._endpoint.address,
                data=body,
                headers=self._headers,
                timeout=timeout_s,
                allow_redirects=False,
                **self._files,
            )
        except (requests.RequestException, OSError, ValueError) as error:
            return Outcome(Result.TEMPORARY, _of_exception(error, self._endpoint.target, timeout_s))
        return _of_http(response, self._endpoint.target)

    def close(self) -> None:
        """See ``Sender``."""
        self._session.close()


_HTTP_WORDS = (
    ("connection refused", "nothing listens on {target} (connection refused)"),
    ("certificate_verify_failed", "the certificate of {target} is not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)"),
    ("wrong_version_number", "{target} does not speak TLS; give http://"),
    ("ssl", "the TLS handshake with {target} failed"),
    ("name or service not known", "the name in {target} cannot be resolved"),
    ("failed to resolve", "the name in {target} cannot be resolved"),
    ("badstatusline", "{target} speaks gRPC, not HTTP/1.1: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use port 4318"),
    ("timed out", "no answer from {target} within {timeout_s:g} s"),
    ("connection reset", "{target} reset the connection"),
    ("remote end closed", "{target} closed the connection"),
)


def _of_exception(error: Exception, target: str, timeout_s: float) -> str:
    text = str(error).lower()
    for words, meaning in _HTTP_WORDS:
        if words in text:
            return meaning.format(target=target, timeout_s=timeout_s)
    return f"{target}: {type(error).__name__}: {error}"


def _of_http(response: requests.Response, target: str) -> Outcome:
    """Retryable or not, by the OTLP specification 1.9, "OTLP/HTTP Response"."""
    status = response.status_code
    if 200 <= status < 300:
        return _delivered(response.content)
    reason = f"{target} answered {status} {response.reason}"
    if status in {401, 403}:
        return Outcome(Result.UNAUTHENTICATED, f"{reason}: it refuses the credentials (OTEL_EXPORTER_OTLP_HEADERS)")
    if status == 413:
        return Outcome(Result.TOO_LARGE, reason)
    if status in {408, 429, 502, 503, 504}:
        return Outcome(Result.TEMPORARY, reason, _retry_after_s(response.headers.get("Retry-After")))
    if status == 404 or 300 <= status < 400:  # the wrong port or path: somebody has to put it right
        return Outcome(Result.TEMPORARY, f"{reason}: it takes no OTLP metrics at this path")
    return Outcome(Result.REFUSED, reason)


def _retry_after_s(text: str | None) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3)."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return max(float(text), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return None
