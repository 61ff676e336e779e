"""Points that describe the device of a run, in a scope of their own, which makes no frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from opentelemetry.proto.metrics.v1.metrics_pb2 import DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK, ScopeMetrics

from esper_otel.export.scopes import attribute, set_scope, stream
from esper_otel.schema import DEVICE_INFO, Metric

DEVICE_SCOPE = "esper_otel.device"


class DevicePoint(NamedTuple):
    """The newest value of a metric about the device, with its attributes."""

    metric: Metric
    value: float
    attributes: Mapping[str, str | int]


class DeviceScopes:
    """The scope of the device's points, which remembers what was said last.

    Joins need one description at a time. So when another one replaces it, its series ends.

    Threads: only the exporter's.

    Args:
        points: returns the points now.
    """

    def __init__(self, points: Callable[[], Sequence[DevicePoint]]) -> None:
        self._points = points
        self._said: Mapping[str, str | int] | None = None

    def has_news(self) -> bool:
        """Whether the device is described and was not when this was sent last, or differently."""
        found = _description(self._points())
        return found is not None and found != self._said

    def scopes(self, time_unix_ns: int) -> Sequence[ScopeMetrics]:
        """Returns the points at this time, in one scope; nothing if there are none."""
        points = self._points()
        if not points:
            return ()
        said, self._said = self._said, _description(points) or self._said
        scope = ScopeMetrics()
        set_scope(scope, DEVICE_SCOPE)
        if said is not None and said != self._said:
            over = stream(scope, DEVICE_INFO).data_points.add(time_unix_nano=time_unix_ns)
            over.flags = DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
            over.attributes.extend(attribute(key, value) for key, value in said.items())
        for metric, value, attributes in points:
            point = stream(scope, metric).data_points.add(time_unix_nano=time_unix_ns, as_double=value)
            point.attributes.extend(attribute(key, text) for key, text in attributes.items())
        return (scope,)


def _description(points: Sequence[DevicePoint]) -> Mapping[str, str | int] | None:
    return next((point.attributes for point in points if point.metric is DEVICE_INFO), None)
