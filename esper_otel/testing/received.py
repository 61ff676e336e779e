"""Reads received requests as points, and counts complete frames."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK, NumberDataPoint

from esper_otel.export.encode import FRAME_SCOPE
from esper_otel.schema import FRAME_POINTS

FOLLOWED_FRAMES = 10_000


class Point(NamedTuple):
    """A received number. ``value`` is None if the sender has set the flag "no recorded value"."""

    name: str
    unit: str
    value: float | None
    time_unix_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    scope: str
    flags: int


def points_of(request: ExportMetricsServiceRequest) -> Iterator[Point]:
    """Returns the gauge and sum points of a request, in order. Histograms and summaries are left out."""
    for of_run in request.resource_metrics:
        resource = _attributes(of_run.resource.attributes)
        for scoped in of_run.scope_metrics:
            for metric in scoped.metrics:
                stream = metric.sum if metric.HasField("sum") else metric.gauge
                for point in stream.data_points:
                    yield Point(
                        metric.name,
                        metric.unit,
                        _value(point),
                        point.time_unix_nano,
                        _attributes(point.attributes),
                        resource,
                        scoped.scope.name,
                        point.flags,
                    )


class CompleteFrames:
    """Counts frames of which all points have been received, in any division, repetition or order.

    Follows the newest 10,000 frames. Threads: one at a time.
    """

    def __init__(self) -> None:
        self.count: int = 0
        # The received streams of each frame; None once all have been received.
        self._streams: dict[Hashable, set[tuple[str, str]] | None] = {}
        self._expected: dict[Hashable, float] = {}

    def add(self, request: ExportMetricsServiceRequest) -> None:
        """Adds the points of a request. Points outside the scope of frames and ends of series are ignored."""
        for of_run in request.resource_metrics:
            resource = _attributes(of_run.resource.attributes)
            run = tuple(resource.get(name) for name in ("esper.run.id", "esper.run.attempt", "esper.rank"))
            for scoped in of_run.scope_metrics:
                if scoped.scope.name == FRAME_SCOPE:
                    for metric in scoped.metrics:
                        for point in metric.gauge.data_points:
                            if not point.flags & DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK:
                                self._add_point((run, point.time_unix_nano), metric.name, point)

    def _add_point(self, frame: Hashable, name: str, point: NumberDataPoint) -> None:
        if frame not in self._streams:
            self._follow(frame)
        streams = self._streams[frame]
        if streams is None:
            return
        streams.add((name, point.attributes[0].value.string_value if point.attributes else ""))
        if name == FRAME_POINTS.name:
            self._expected[frame] = point.as_double
        if len(streams) == self._expected.get(frame):
            self.count += 1
            self._streams[frame] = None
            del self._expected[frame]

    def _follow(self, frame: Hashable) -> None:
        self._streams[frame] = set()
        if len(self._streams) > FOLLOWED_FRAMES:
            oldest = next(iter(self._streams))
            del self._streams[oldest]
            self._expected.pop(oldest, None)


def _attributes(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(holder: AnyValue | NumberDataPoint) -> Any:
    kind = holder.WhichOneof("value")
    if kind is None:
        return None
    value = getattr(holder, kind)
    if kind == "array_value":
        return [_value(item) for item in value.values]
    return _attributes(value.values) if kind == "kvlist_value" else value
