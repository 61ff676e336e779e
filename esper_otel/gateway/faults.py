"""Faults: error answers to senders and pullers, over gRPC and HTTP."""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.gateway.limits import Crowded
from esper_otel.gateway.receive.request import Malformed, TooLarge, Unsupported
from esper_otel.gateway.security import BadRequest, NotAllowed, TokenRefused
from esper_otel.gateway.store.base import StoreFull
from esper_otel.log import Warnings

_RETRY_S = 1.0
_RETRY_ROOM_S = 5.0
_MOST_CHARACTERS = 500  # gRPC rejects an answer with long headers

# Reasons for refusing requests, as they appear in counters.
CREDENTIALS = UNKNOWN_SENDER, OTHER_RUN = "credentials missing or unknown", "credentials not for the run"
UNSUPPORTED, FAULT = "content type or encoding", "fault of the gateway"
REFUSED = ("malformed", UNKNOWN_SENDER, OTHER_RUN, "too large", UNSUPPORTED, FAULT)
DEFERRED = ("busy", "not stored", "too many runs")


class Busy(Exception):
    """More data is in flight than there is room for."""


class Fault(NamedTuple):
    """An error answer, for both protocols.

    Attributes:
        code: status code of gRPC.
        status: status code of HTTP.
        message: the explanation for the client.
        retry_s: seconds after which to retry; None if the same request must not be retried.
        reason: one of a few fixed texts, for counters.
    """

    code: grpc.StatusCode
    status: int
    message: str
    retry_s: float | None
    reason: str

    def body(self) -> Status:
        """Returns a ``google.rpc.Status``: the body of an HTTP answer, and the details of a gRPC error."""
        status = Status(code=self.code.value[0], message=self.message)
        if self.retry_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_s * 1e9))
            status.details.add().Pack(RetryInfo(retry_delay=delay))
        return status


_TABLE: dict[type[Exception], tuple[grpc.StatusCode, int, float | None, str]] = {
    Malformed: (grpc.StatusCode.INVALID_ARGUMENT, 400, None, "malformed"),
    BadRequest: (grpc.StatusCode.INVALID_ARGUMENT, 400, None, "malformed"),
    TokenRefused: (grpc.StatusCode.UNAUTHENTICATED, 401, None, UNKNOWN_SENDER),
    NotAllowed: (grpc.StatusCode.PERMISSION_DENIED, 403, None, OTHER_RUN),
    UnknownRun: (grpc.StatusCode.NOT_FOUND, 404, None, "unknown run"),
    StaleCursor: (grpc.StatusCode.FAILED_PRECONDITION, 409, None, "stale cursor"),
    TooLarge: (grpc.StatusCode.RESOURCE_EXHAUSTED, 413, None, "too large"),
    Unsupported: (grpc.StatusCode.INVALID_ARGUMENT, 415, None, UNSUPPORTED),
    Busy: (grpc.StatusCode.UNAVAILABLE, 503, _RETRY_S, "busy"),
    StoreFull: (grpc.StatusCode.UNAVAILABLE, 503, _RETRY_S, "not stored"),
    Crowded: (grpc.StatusCode.UNAVAILABLE, 503, _RETRY_ROOM_S, "too many runs"),
}


def fault_of(error: Exception, warnings: Warnings) -> Fault:
    """Returns the answer to an error. An internal fault is logged, and its request is refused for good."""
    known = _TABLE.get(type(error))
    if known is None:
        warnings.say(
            f"fault {type(error).__name__}", "a request failed (%s: %s)", type(error).__name__, error, exc_info=error
        )
        # Do not ask for a retry: the request would fail again, and block everything its sender has queued after it.
        message = "the gateway failed on this request; see its log"
        return Fault(grpc.StatusCode.INVALID_ARGUMENT, 400, message, None, FAULT)
    code, status, retry_s, reason = known
    return Fault(code, status, str(error)[:_MOST_CHARACTERS], retry_s, reason)
