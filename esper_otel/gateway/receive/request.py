"""Requests: the decoded content of a request, and the reasons for rejecting points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.errors import EsperOtelError
from esper_otel.frames.frame import Run
from esper_otel.parts import senders

# Reasons for rejecting a point. These texts appear in answers and counters.
NO_NAME = "no metric name"
UNKNOWN_METRIC = "unknown metric"
NOT_A_NUMBER = "neither gauge nor sum"
DELTA = "delta sum"
NO_VALUE = "no value"
NO_TIME = "no time"
WRONG_TIME = "time before 2000 or after 2100"
NO_SEED = senders.NO_SEED
INVALID_TEXT = senders.INVALID_TEXT
TOO_MANY_SETS = senders.TOO_MANY_SETS
TOO_MANY_ATTRIBUTES = "too many attributes"
TOO_MANY_POINTS = "too many points in the request"
TOO_MANY_SEEDS = "too many seeds"
TOO_MANY_METRICS = "too many metrics in a step"
TOO_SPARSE = "too many live seeds for steps of so few points: send all seed values of a step with the same time"
TOO_MANY_RUNS = "too many runs"
NO_ROOM_FOR_PHASES = "no room for further phases of this sender"
# The limits, by the reason for which points are rejected because of them; see ``Limits``.
OF_REASONS = {
    NO_ROOM_FOR_PHASES: "all_phases",
    TOO_MANY_ATTRIBUTES: "attributes",
    TOO_MANY_METRICS: "metrics",
    TOO_MANY_POINTS: "points",
    TOO_MANY_RUNS: "runs",
    TOO_MANY_SEEDS: "seeds",
}
REASONS = (
    *(NO_NAME, UNKNOWN_METRIC, NOT_A_NUMBER, DELTA, NO_VALUE, NO_TIME, WRONG_TIME, NO_SEED, INVALID_TEXT),
    *(TOO_MANY_ATTRIBUTES, TOO_MANY_POINTS, TOO_MANY_METRICS, TOO_MANY_SEEDS, TOO_MANY_RUNS, TOO_MANY_SETS, TOO_SPARSE),
    NO_ROOM_FOR_PHASES,
)


# 2000-01-01 and 2100-01-01: a time outside this range comes from a clock that is not set.
EARLIEST_UNIX_NS = 946_684_800 * 10**9
LATEST_UNIX_NS = 4_102_444_800 * 10**9


# How many metrics are named with each reason, and how many characters of a name are shown.
_MOST_NAMES, _NAME_LENGTH = 5, 64
OTHER_METRICS = "others"


class RejectedPoints:
    """Counts of rejected points by reason, and for each reason by metric (the first few metrics only).

    Attributes:
        counts: points by reason.
        metrics: by reason, points by metric; points of further metrics are counted under ``OTHER_METRICS``.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.metrics: dict[str, Counter[str]] = {}

    def add(self, reason: str, metric: str, count: int) -> None:
        """Adds points of a metric; its name may contain any characters."""
        self.counts[reason] += count
        of_reason = self.metrics.setdefault(reason, Counter())
        name = "".join(character if character.isprintable() else "?" for character in metric[:_NAME_LENGTH])
        of_reason[name if name in of_reason or len(of_reason) < _MOST_NAMES else OTHER_METRICS] += count

    def merge(self, other: DecodedRequest) -> None:
        """Adds the counts of another part of the request."""
        for reason, of_reason in other.metrics.items():
            for metric, count in of_reason.items():
                self.add(reason, metric, count)


class Malformed(EsperOtelError):
    """The request is not an ExportMetricsServiceRequest."""


class TooLarge(EsperOtelError):
    """The request is larger, or would cost more to decode, than is allowed."""


class Unsupported(EsperOtelError):
    """The content type or the compression of the request is not supported."""


class PointSender(NamedTuple):
    """The sender of points, from the attributes of the Resource or of the point itself.

    Attributes:
        run: the run and the rank. The run id is ``esper.run.id``, else ``service.instance.id``, else ``service.name``,
            else ``unknown``; the attempt is 0 if the Resource does not give one.
        process: instance, host and process id; tells apart two processes that claim the same rank.
        host: name of the host; empty if it is not given.
        revision: revision of the code; empty if it is not given.
        settings: the session's settings that differ from the defaults, as text; empty if they are not given.
        location: where the process runs, in words: job, pod, node, local rank; empty if it is not given.
    """

    run: Run
    process: str = ""
    host: str = ""
    revision: str = ""
    settings: str = ""
    location: str = ""


class PointBlock(NamedTuple):
    """Points of one sender that can become frames, ordered by time; points with equal times keep their order.

    A request may have several blocks of one sender; what comes first in the request is in the first of them.

    Attributes:
        sender: the sender of the points.
        names: metric names of the request.
        seeds: seed ids of the request, sorted.
        streams: the stream of each point: ``(seed + 1) * len(names) + name``, where ``seed`` is an index into
            ``seeds`` (-1 for step metrics) and ``name`` an index into ``names``.
        times: Unix nanoseconds.
        values: the values.
        is_ours: whether some points come from our instrumentation scope.
        has_further: whether some points have attributes that are unknown here.
        kind: the same object for all blocks with the same streams and the same changes of time; None if not known.
        units: units of the user's own metrics, by name.
    """

    sender: PointSender
    names: tuple[str, ...]
    seeds: tuple[str, ...]
    streams: npt.NDArray[np.int64]
    times: npt.NDArray[np.uint64]
    values: npt.NDArray[np.float64]
    is_ours: bool = False
    has_further: bool = False
    kind: object = None
    units: tuple[tuple[str, str], ...] = ()


class Marker(NamedTuple):
    """The end of a stream of a seed.

    Attributes:
        sender: the sender of the seed.
        name: the metric.
        seed: the seed's id.
        time_unix_ns: time from which the stream has no value.
    """

    sender: PointSender
    name: str
    seed: str
    time_unix_ns: int


class RunEnd(NamedTuple):
    """A rank's report that it has ended, with the outcome."""

    sender: PointSender
    outcome: str


class PhasePoint(NamedTuple):
    """A point of one of the metrics of phases: what it says of the phase that ended at its time."""

    sender: PointSender
    metric: str
    phase: str
    time_unix_ns: int
    value: float


class DeviceOfSender(NamedTuple):
    """What a sender says of its device, in words."""

    sender: PointSender
    device: str


class CutFrame(NamedTuple):
    """A frame that lacks values: its sender's SDK could not tell them apart any more."""

    sender: PointSender
    time_unix_ns: int


class RequestPart(NamedTuple):
    """A part of a request's bytes, which is a request by itself; without a sender, anything may be in it."""

    start: int
    end: int
    sender: PointSender | None


class DecodedRequest(NamedTuple):
    """A decoded request.

    Attributes:
        blocks: points that can become frames, by sender, in the order of the request.
        markers: ends of seeds' streams.
        ended: ranks that have ended.
        points: number of points in the request, including rejected ones.
        rejected: number of rejected points, by reason.
        metrics: by reason, number of rejected points by metric (the first few metrics only).
        parts: what it consists of, if it can be divided.
        cut: frames that lack values.
        phases: points of phases.
        alive: senders of which nothing but counts, ends or phases is in the request: they live, even without steps.
        devices: what senders say of their devices.
    """

    blocks: tuple[PointBlock, ...]
    markers: tuple[Marker, ...]
    ended: tuple[RunEnd, ...]
    points: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, int]] = MappingProxyType({})
    parts: tuple[RequestPart, ...] = ()
    cut: tuple[CutFrame, ...] = ()
    phases: tuple[PhasePoint, ...] = ()
    alive: tuple[PointSender, ...] = ()
    devices: tuple[DeviceOfSender, ...] = ()

    def needed(self, body: bytes, waiting: Collection[tuple[str, int, int]]) -> bytes:
        """Returns the parts of the request's bytes that may be needed for waiting points.

        Args:
            body: the request.
            waiting: run id, attempt and rank of the senders that have waiting points.
        """
        if not self.parts:
            senders = (block.sender.run for block in self.blocks)
            has_waiting = any((run.run_id, run.attempt, run.rank) in waiting for run in senders)
            return body if has_waiting or self.markers or self.ended or self.cut else b""
        return b"".join(
            body[start:end]
            for start, end, sender in self.parts
            if sender is None or (sender.run.run_id, sender.run.attempt, sender.run.rank) in waiting
        )
