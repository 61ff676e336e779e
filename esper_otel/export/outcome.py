"""The outcome of a request: a fixed result for the program, and a reason in plain words for the user."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

MAX_ANSWER_BYTES = 1024 * 1024
_MOST_CHARACTERS = 300
_FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 5.0  # short, so that the end of an outage or a corrected token is noticed soon
_LONGEST_ASKED_S = 30.0


class Result(Enum):
    """The result of a request. The value is the word under which it is counted."""

    DELIVERED = "delivered"
    TEMPORARY = "failed for now"  # keep the data and try again
    UNAUTHENTICATED = "credentials refused"  # keep the data until the credentials are corrected
    TOO_LARGE = "too large"
    REFUSED = "refused"  # permanently


class Outcome(NamedTuple):
    """The result of a request and the reason for it.

    Attributes:
        result: the result, which decides what happens to the data.
        reason: the reason in words. Empty after full success, unless the endpoint added a remark.
        retry_after_s: how long the endpoint asks to wait before a retry; None when it does not ask.
        rejected_points: points, or log records, that the endpoint rejected from a request that it otherwise accepted.
        is_missing: whether the endpoint is there, but does not take this kind of telemetry.
    """

    result: Result
    reason: str = ""
    retry_after_s: float | None = None
    rejected_points: int = 0
    is_missing: bool = False


CLOSED = Outcome(Result.TEMPORARY, "the session was closed before the endpoint answered")


def delivered(body: bytes, said: Callable[[str], str]) -> Outcome:
    """Returns the outcome in the body of a successful answer; ``said`` cleans the endpoint's text for display.

    An ExportLogsServiceResponse has the same fields under other names.
    """
    try:
        partial = ExportMetricsServiceResponse.FromString(body).partial_success
    except DecodeError:  # the status was a success, so the request was accepted
        return Outcome(Result.DELIVERED)
    # A negative number would lower the counter of rejected points.
    return Outcome(Result.DELIVERED, said(partial.error_message), rejected_points=max(partial.rejected_data_points, 0))


def pause_s(failures: int, outcome: Outcome | None = None, longest_s: float = LONGEST_PAUSE_S) -> float:
    """Returns how long to wait after so many failures: what the endpoint asked for, or an exponential back-off."""
    if outcome is not None and outcome.retry_after_s is not None:
        return min(outcome.retry_after_s, _LONGEST_ASKED_S)
    return min(_FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), longest_s) * random.uniform(0.5, 1.0)  # noqa: S311


def one_line(text: str) -> str:
    """Shortens a foreign text to one printable line."""
    return "".join(each for each in " ".join(text.split())[:_MOST_CHARACTERS] if each.isprintable())


def hint_s(delay_s: float) -> float | None:
    """Ignores a zero, negative or infinite retry hint; the caller then backs off."""
    return delay_s if 0.0 < delay_s < float("inf") else None
