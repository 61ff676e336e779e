"""What a request says: points in columns, and what was said beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.errors import EsperOtelError
from esper_otel.frames.frame import Run
from esper_otel.leyline import senders

# Why a point was not taken. These words go into answers and counters.
NO_NAME = "no metric name"
UNKNOWN_METRIC = "unknown metric"
NOT_A_NUMBER = "neither gauge nor sum"
DELTA = "delta sum"
NO_VALUE = "no value"
NO_TIME = "no time"
WRONG_TIME = "time before 2000 or after 2100"
NO_SEED = "seed metric without seed_id"
INVALID_TEXT = senders.INVALID_TEXT
TOO_MANY_ATTRIBUTES = "too many attributes"
TOO_MANY_POINTS = "too many points in the request"
TOO_MANY_SEEDS = "too many seeds"
TOO_SPARSE = "too many live seeds for steps of so few points: send what a step says of its seeds with one time"
TOO_MANY_RUNS = "too many runs"
REASONS = (
    *(NO_NAME, UNKNOWN_METRIC, NOT_A_NUMBER, DELTA, NO_VALUE, NO_TIME, WRONG_TIME, NO_SEED, INVALID_TEXT),
    *(TOO_MANY_ATTRIBUTES, TOO_MANY_POINTS, TOO_MANY_SEEDS, TOO_MANY_RUNS),
)


# 2000-01-01 and 2100-01-01: whose clock says something else has none.
EARLIEST_UNIX_NS = 946_684_800 * 10**9
LATEST_UNIX_NS = 4_102_444_800 * 10**9


# How many metrics are named with each reason, and how much of a name is shown.
_MOST_NAMES, _NAME_LENGTH = 5, 64
OTHER_METRICS = "others"


class RejectedPoints:
    """Points that were not taken: how many for each reason, and of which metrics they are, of the first few.

    Attributes:
        counts: points by reason.
        metrics: by reason, points by metric; those of further metrics stand under ``OTHER_METRICS``.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.metrics: dict[str, Counter[str]] = {}

    def add(self, reason: str, metric: str, count: int) -> None:
        """Notes points of a metric, whose name may be anything."""
        self.counts[reason] += count
        of_reason = self.metrics.setdefault(reason, Counter())
        name = "".join(character if character.isprintable() else "?" for character in metric[:_NAME_LENGTH])
        of_reason[name if name in of_reason or len(of_reason) < _MOST_NAMES else OTHER_METRICS] += count


class Malformed(EsperOtelError):
    """A request that is no ExportMetricsServiceRequest."""


class TooLarge(EsperOtelError):
    """A request is larger, or would cost more, than any may."""


class PointSender(NamedTuple):
    """Who sent something, as its Resource says, or its point's own attributes.

    Attributes:
        run: the run and the rank. Without ``esper.run.id`` the run is called by ``service.instance.id``, else by
            ``service.name``, else ``unknown``; attempt 0 when the Resource does not say it.
        process: instance, host and process id: two processes that claim one rank differ here.
    """

    run: Run
    process: str = ""


class PointBlock(NamedTuple):
    """Points of one sender that can become frames, in the order of their times; of equal times, as they came.

    Attributes:
        sender: whose they are.
        names: metric names of the request.
        seeds: seed ids of the request, sorted.
        streams: which stream a point belongs to: ``(seed + 1) * len(names) + name``, where seed is a place in
            ``seeds``, -1 for step metrics, and name one in ``names``.
        times: Unix nanoseconds.
        values: the values.
        is_ours: whether some are of our instrumentation scope.
    """

    sender: PointSender
    names: tuple[str, ...]
    seeds: tuple[str, ...]
    streams: npt.NDArray[np.int64]
    times: npt.NDArray[np.uint64]
    values: npt.NDArray[np.float64]
    is_ours: bool = False


class Marker(NamedTuple):
    """The end of a stream of a seed.

    Attributes:
        sender: whose seed it is.
        name: the metric.
        seed: the seed's id.
        time_unix_ns: from when on the stream has no value.
    """

    sender: PointSender
    name: str
    seed: str
    time_unix_ns: int


class RunEnd(NamedTuple):
    """A run's rank says that it has ended, and how."""

    sender: PointSender
    outcome: str


class DecodedRequest(NamedTuple):
    """One request.

    Attributes:
        blocks: points that can become frames, by sender.
        markers: ends of seeds' streams.
        ended: ranks that have ended.
        points: all points of the request, rejected ones too.
        rejected: how many points were not taken, by reason.
        metrics: by reason, how many of which metrics, of the first few.
    """

    blocks: tuple[PointBlock, ...]
    markers: tuple[Marker, ...]
    ended: tuple[RunEnd, ...]
    points: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, int]] = MappingProxyType({})
