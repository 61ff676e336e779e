"""Sends OTLP over gRPC."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above
from grpc import StatusCode

from esper_otel.export.credentials import provided
from esper_otel.export.endpoint import USER_AGENT, Endpoint
from esper_otel.export.failure import meaning
from esper_otel.export.forks import ForkGate
from esper_otel.export.outcome import CLOSED, MAX_ANSWER_BYTES, Outcome, Result, delivered, hint_s
from esper_otel.export.proxies import way_of
from esper_otel.export.token import Headers
from esper_otel.native import threads

_METHODS = {
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}

_CONNECTING = re.compile("failed to connect to all|errors resolving|dns resolution failed|socket closed")
# Texts of gRPC itself. INTERNAL or UNKNOWN with another text is from the endpoint and means that it refuses the data.
_BROKEN_OFF = re.compile("stream removed|received rst_stream")
_TEMPORARY = frozenset({"CANCELLED", "RESOURCE_EXHAUSTED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"})
# Texts of servers in C++, Python, Go, Java, .NET and Rust, and of a proxy.
_TOO_LARGE = re.compile("larger than max|exceeds maximum size|maximum configured|length too large|with status: 413")
_LONG_ANSWER = re.compile(rf"larger than max \(\d+ vs\. {MAX_ANSWER_BYTES}\)")  # our own limit, not the endpoint's


class GrpcSender:
    """OTLP over gRPC: see ``Sender``.

    After a request that could not connect or got no answer, the next request uses a new channel. In the old channel
    gRPC would wait a quarter of an hour for a dead connection, repeat a name lookup only every half minute, pause for
    up to 2 minutes before it reconnects, and not read certificates that were renewed since the start.

    Raises:
        ConfigurationError: the credential provider cannot be used.
    """

    def __init__(self, endpoint: Endpoint, headers: Headers) -> None:
        self._endpoint = endpoint
        self._headers = headers
        self._credentials = None if endpoint.is_insecure else _credentials(endpoint)
        self._closing = threads().Lock()
        self._is_closed = False
        self._is_cut = False
        self._gate = ForkGate(self._cut)
        with self._gate:
            self._channel = self._opened()

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        deadline_s = time.monotonic() + timeout_s
        self._gate.begin(timeout_s)
        while True:
            with self._gate:
                outcome = self._exchanged(body, timeout_s, max(deadline_s - time.monotonic(), 0.0))
                if not self._is_cut:
                    return outcome
                self._is_cut = False
                self._open_again()
            if self._is_closed or outcome.result is Result.DELIVERED:
                return outcome

    def _cut(self) -> None:
        """Aborts the current request because the process is about to fork; ``send`` then repeats it."""
        self._is_cut = True
        self._channel.close()

    def _exchanged(self, body: bytes, timeout_s: float, left_s: float) -> Outcome:
        call: Any = self._channel.unary_unary(_METHODS[self._endpoint.signal], bytes, bytes)
        try:
            answer = call(body, timeout=left_s, metadata=self._headers.now())
        except grpc.RpcError as error:
            return CLOSED if self._is_closed else self._failed(error, timeout_s)
        except ValueError:  # what gRPC raises on a closed channel
            return CLOSED
        return delivered(answer, self._headers.said)

    def close(self) -> None:
        """See ``Sender``."""
        with self._closing:
            self._is_closed = True
        self._channel.close()

    def _opened(self) -> grpc.Channel:
        endpoint = self._endpoint
        options = [
            ("grpc.primary_user_agent", USER_AGENT),
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.use_local_subchannel_pool", 1),  # otherwise a new channel shares the connection of another session
        ]
        compression = grpc.Compression.Gzip if endpoint.compression == "gzip" else grpc.Compression.NoCompression
        if self._credentials is None:
            return grpc.insecure_channel(endpoint.address, options, compression)
        return grpc.secure_channel(endpoint.address, self._credentials, options, compression)

    def _open_again(self) -> None:
        if self._credentials is not None and self._endpoint.credential_provider is None:
            with contextlib.suppress(OSError):  # the files are being replaced
                self._credentials = _credentials(self._endpoint)
        stale = fresh = self._opened()
        with self._closing:
            if not self._is_closed:
                stale, self._channel = self._channel, fresh
        stale.close()

    def _failed(self, error: grpc.RpcError, timeout_s: float) -> Outcome:
        """Decides whether to retry, see https://opentelemetry.io/docs/specs/otlp/#otlpgrpc-response (OTLP 1.9).

        Unlike the specification, data is kept when credentials are refused or the service is missing, since an
        operator may correct that. It is also kept when the endpoint is exhausted and gives no retry hint, since
        dropped data would be lost.
        """
        code, target = error.code(), self._endpoint.target
        words = self._headers.said(error.details() or "")
        result, reason = Result.REFUSED, f"{target} answered {code.name}: {words}"
        if code is StatusCode.DEADLINE_EXCEEDED:
            result = Result.TEMPORARY
            if words.startswith("Deadline Exceeded"):  # the text of gRPC itself, not of the endpoint
                self._open_again()
                reason = f"no answer from {target}{way_of(self._endpoint)} within {timeout_s:g} s"
        elif code in {StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED}:
            reason = f"{target} refuses the credentials: {words} ({self._headers.variable})"
            result = Result.UNAUTHENTICATED
        elif code.name in {"INTERNAL", "UNKNOWN"} and _BROKEN_OFF.match(words.lower()):
            result, reason = Result.TEMPORARY, f"{target} broke the request off: {words}"
        elif code is StatusCode.RESOURCE_EXHAUSTED and _LONG_ANSWER.search(words):
            return Outcome(Result.DELIVERED)
        elif code.name in {"RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "UNKNOWN"} and _TOO_LARGE.search(words.lower()):
            result = Result.TOO_LARGE
        elif code is StatusCode.UNIMPLEMENTED:
            result, reason = Result.TEMPORARY, f"{target} takes no OTLP {self._endpoint.signal} over gRPC: {words}"
        elif code.name in _TEMPORARY:
            result = Result.TEMPORARY
            if _CONNECTING.match(words.lower()):  # the text of gRPC itself: there is no connection
                self._open_again()
                reason = meaning(words, self._endpoint) or reason
        retry_after_s = _retry_delay_s(error) if result is Result.TEMPORARY else None
        return Outcome(result, reason, retry_after_s, is_missing=code is StatusCode.UNIMPLEMENTED)


def _credentials(endpoint: Endpoint) -> grpc.ChannelCredentials:
    """Returns credentials from the provider or from the files; raises OSError for an unreadable or empty file."""
    if endpoint.credential_provider:
        return provided(endpoint.credential_provider, grpc.ChannelCredentials, "grpc.ChannelCredentials")
    files = (endpoint.certificate, endpoint.client_key, endpoint.client_certificate)
    contents = [None if file is None else file.read_bytes() for file in files]
    if b"" in contents:
        raise OSError("gRPC would abort the process")
    return grpc.ssl_channel_credentials(*contents)


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-status-details-bin":
            info = RetryInfo()
            with contextlib.suppress(DecodeError):
                for detail in Status.FromString(value).details:
                    if detail.Unpack(info):
                        return hint_s(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None
