"""The points of one request in columns, before they are checked."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.attributes import PLAIN
from esper_otel.gateway.receive.bounds import check_counts
from esper_otel.gateway.receive.request import (
    DELTA,
    INVALID_TEXT,
    NO_NAME,
    NOT_A_NUMBER,
    TOO_MANY_POINTS,
    UNKNOWN_METRIC,
    PointSender,
    RejectedPoints,
)
from esper_otel.parts.levels import LEVELS, level_of
from esper_otel.parts.senders import Label, is_valid
from esper_otel.text import printable

_MOST_UNIT = 63  # characters, as OpenTelemetry allows

# Contents of a point: a value, nothing, or the end of its stream.
A_VALUE, NOTHING, AN_END = range(3)


class MetricPoints(NamedTuple):
    """One metric of a request whose points are checked one by one. The unit is that of a user's own metric."""

    sender: PointSender
    scope: int
    name: str
    level: int
    unit: str = ""


# The entries of one point in the columns.
Row: TypeAlias = tuple[int, int, int, float, int]


class PointColumns(NamedTuple):
    """Points, one per entry, in the order of the request.

    Attributes:
        metric: indices into ``RawPoints.metrics``.
        label: indices into ``RawPoints.labels``.
        times: Unix nanoseconds.
        values: the values.
        holds: ``A_VALUE``, ``NOTHING`` or ``AN_END``.
    """

    metric: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    times: npt.NDArray[np.uint64]
    values: npt.NDArray[np.float64]
    holds: npt.NDArray[np.uint8]

    @classmethod
    def empty(cls, count: int) -> PointColumns:
        """Returns columns for ``count`` points that hold nothing yet."""
        return cls(
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            np.zeros(count, np.uint64),
            np.zeros(count, np.float64),
            np.full(count, NOTHING, np.uint8),
        )

    def set(self, position: int, row: Row) -> None:
        """Writes one point."""
        metric, label, times, values, holds = self
        metric[position], label[position], times[position], values[position], holds[position] = row


class RawPoints:
    """Metrics, labels and counts of rejected points, collected by both decoders."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.metrics: list[MetricPoints] = []
        self.labels: dict[Label, int] = {PLAIN: 0}
        self.rejected: RejectedPoints = RejectedPoints()
        self.points: int = 0
        self.taken: int = 0
        self._parts = 0

    def note_parts(self, count: int) -> None:
        """Adds to the count of resources, scopes and metrics.

        Raises:
            TooLarge: there are too many in this request.
        """
        self._parts += count
        check_counts(metrics=self._parts)

    def metric(
        self,
        sender: PointSender | str,
        scope: int,
        name: str,
        count: int,
        *,
        is_number: bool = True,
        is_delta: bool,
        unit: str = "",
    ) -> int | None:
        """Adds a metric and returns its index, or None if all of its points are rejected.

        Raises:
            TooLarge: there are too many points in this request.
        """
        self.points += count
        check_counts(points=self.points)
        level = LEVELS.get(name)
        is_plain = is_number and not is_delta and self.taken + count <= self.limits.points
        if level is not None and is_plain and not isinstance(sender, str):  # the usual case
            self.taken += count
            self.metrics.append(MetricPoints(sender, scope, name, level))
            return len(self.metrics) - 1
        level = level_of(name, scope)
        reason = ""
        if isinstance(sender, str):
            reason = sender
        elif not name:
            reason = NO_NAME
        elif level is None:
            reason = UNKNOWN_METRIC
        elif not is_number:
            reason = NOT_A_NUMBER
        elif is_delta:
            reason = DELTA
        elif not is_valid(name, self.limits.text_bytes):
            reason = INVALID_TEXT
        elif self.taken + count > self.limits.points:
            reason = TOO_MANY_POINTS
        if reason or isinstance(sender, str) or level is None:
            if count:
                self.rejected.add(reason, name, count)
            return None
        self.taken += count
        own = "" if name in LEVELS else printable(unit, _MOST_UNIT)
        self.metrics.append(MetricPoints(sender, scope, name, level, own))
        return len(self.metrics) - 1

    def label(self, label: Label) -> int:
        """Returns the index of a label, which is added if it is new."""
        return self.labels.setdefault(label, len(self.labels))
