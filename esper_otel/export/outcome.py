"""Outcome: what became of a request, in a fixed word for the program and in plain ones for the user."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

MAX_ANSWER_BYTES = 1024 * 1024
_MOST_CHARACTERS = 300


class Result(Enum):
    """What became of a request; the value is a word to count it by."""

    DELIVERED = "delivered"
    TEMPORARY = "failed for now"  # keep the data and try again
    UNAUTHENTICATED = "credentials refused"  # keep the data: somebody has to put the credentials right
    TOO_LARGE = "too large"
    REFUSED = "refused"  # for good


class Outcome(NamedTuple):
    """What became of a request, and why.

    Attributes:
        result: what to do with the data.
        reason: why, in words; empty when all was taken. An endpoint that has taken all may have a remark.
        retry_after_s: when the endpoint wants to hear of it again; None when it does not say.
        rejected_points: points that were not taken of a request that was.
    """

    result: Result
    reason: str = ""
    retry_after_s: float | None = None
    rejected_points: int = 0


CLOSED = Outcome(Result.TEMPORARY, "the session was closed before the endpoint answered")


def delivered(body: bytes, said: Callable[[str], str]) -> Outcome:
    """The outcome that the body of a successful answer tells; ``said`` makes the endpoint's words fit to be shown."""
    try:
        partial = ExportMetricsServiceResponse.FromString(body).partial_success
    except DecodeError:  # it was taken all the same
        return Outcome(Result.DELIVERED)
    # A number below zero would take back what was counted before.
    return Outcome(Result.DELIVERED, said(partial.error_message), rejected_points=max(partial.rejected_data_points, 0))


def one_line(text: str) -> str:
    """One line of what somebody else says."""
    return "".join(each for each in " ".join(text.split())[:_MOST_CHARACTERS] if each.isprintable())


def hint_s(delay_s: float) -> float | None:
    """No hint in a delay that is none: the caller's own pause is then the longer one."""
    return delay_s if 0.0 < delay_s < float("inf") else None
