"""Frames as OTLP: serialized ExportMetricsServiceRequests (opentelemetry-proto 1.x)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
    Gauge,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.metrics.export import ResourceMetrics as SdkResourceMetrics
from opentelemetry.sdk.resources import Resource

from esper_otel._version import __version__
from esper_otel.frame import Frame, Run
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, Metric

SCHEMA_VERSION = "1"
FRAME_SCOPE = "esper_otel"
HEALTH_SCOPE = "esper_otel.health"

# Receivers refuse more than 4 MiB (gRPC's default). A point takes at most 300 bytes, its seed id's 256 among
# them, and half a MiB is left for names, descriptions and the Resource.
MAX_POINTS = 12_000

_METRIC_OF_FIELD = {metric.field: metric.name for metric in SEED_CELLS}

# A metric's name, its value, and the seed that it is about.
_Reading: TypeAlias = tuple[str, float, str | None]


class Request(NamedTuple):
    """One request, ready to be sent.

    Attributes:
        body: a serialized ExportMetricsServiceRequest of less than 4 MiB.
        points: the points in it.
        frames: how many frames end in it; a frame has been sent when its last point has.
    """

    body: bytes
    points: int
    frames: int


class Encoder:
    """Encodes frames, and what is said beside them.

    A frame is: one Gauge point per value present, NaN and infinities included; one per present cell of its
    seed rows, with the attribute ``seed_id``; and two of its own, ``esper.frame.sequence`` and
    ``esper.frame.points``. All of them carry the frame's time, no start time, and a double, counts too, so
    that a receiver meets one shape only. Frames of one run that follow each other share a ResourceMetrics,
    where each metric stands once, in the catalogue's order, with its points in the frames' order.

    Threads: one at a time.

    Args:
        catalogue: ``METRICS`` and the user's own, by name; a value under another name is left out.
        resource: gives a run's Resource; asked once for equal runs that follow each other.
        fault: told when a processor's reading fails or is no number; that frame goes without derived values.
        max_points: most points in a request.
    """

    def __init__(
        self,
        catalogue: Mapping[str, Metric],
        resource: Callable[[Run], Resource],
        fault: Callable[[str, Exception], None],
        *,
        max_points: int = MAX_POINTS,
    ) -> None:
        self._catalogue = catalogue
        self._resource = resource
        self._fault = fault
        self._max_points = max_points
        self._origin: tuple[Run, ResourceMetrics] | None = None

    def requests(self, frames: Iterable[Frame]) -> Iterator[Request]:
        """The frames as requests, each encoded when it is asked for.

        A frame is cut only when it is too large for a request of its own; each of its points still carries
        the frame's time, and ``esper.frame.points`` counts those of the whole frame.
        """
        parts: list[tuple[Frame, Sequence[_Reading]]] = []
        room = self._max_points
        for frame in frames:
            readings: Sequence[_Reading] = self._readings(frame)
            if parts and len(readings) > room:
                yield self._request(parts, len(parts))
                parts, room = [], self._max_points
            while len(readings) > room:
                yield self._request([(frame, readings[:room])], 0)
                readings = readings[room:]
            parts.append((frame, readings))
            room -= len(readings)
        if parts:
            yield self._request(parts, len(parts))

    def health(
        self,
        run: Run,
        values: Mapping[str, float | Mapping[str, float]],
        *,
        start_unix_ns: int,
        time_unix_ns: int,
    ) -> bytes:
        """A request with the session's own metrics, in a scope of their own: they belong to no frame.

        Args:
            run: whose they are.
            values: by name; of a metric that is split by ``reason``, a value for each.
            start_unix_ns: when the counters were 0.
            time_unix_ns: when the values were read.
        """
        request = ExportMetricsServiceRequest()
        scope = self._scope(request, run, HEALTH_SCOPE)
        for metric in self._catalogue.values():
            value = values.get(metric.name, {})
            by_reason = value if isinstance(value, Mapping) else {"": value}
            if not by_reason:
                continue
            points = _stream(scope, metric).data_points
            for reason, number in by_reason.items():
                point = points.add(time_unix_nano=time_unix_ns, as_double=number)
                if metric.kind == "counter":
                    point.start_time_unix_nano = start_unix_ns
                if reason:
                    point.attributes.append(_attribute("reason", reason))
        return request.SerializeToString()

    def stale(
        self, run: Run, streams: Sequence[tuple[str, Mapping[str, str]]], *, time_unix_ns: int
    ) -> Iterator[bytes]:
        """Requests that end streams, given by metric name and attributes, with "no recorded value" points.

        The time must be later than each stream's last point. The markers stand in the scope of ``health``, so
        that no receiver takes them for a frame. Prometheus' OTLP endpoint ends the series all the same: the
        scope is no part of a series' identity there, unless ``promote_scope_metadata`` is set.
        """
        for start in range(0, len(streams), self._max_points):
            request = ExportMetricsServiceRequest()
            scope = self._scope(request, run, HEALTH_SCOPE)
            ended: dict[str, list[Mapping[str, str]]] = {}
            for name, attributes in streams[start : start + self._max_points]:
                ended.setdefault(name, []).append(attributes)
            for name, ends in ended.items():
                points = _stream(scope, self._catalogue[name]).data_points
                for attributes in ends:
                    point = points.add(time_unix_nano=time_unix_ns, flags=DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK)
                    point.attributes.extend(_attribute(*attribute) for attribute in attributes.items())
            yield request.SerializeToString()

    def _readings(self, frame: Frame) -> list[_Reading]:
        try:
            values = {name: float(value) for name, value in frame.values().items()}
        except Exception as error:  # noqa: BLE001 - a user's processor must not hold up all later frames
            self._fault(f"readings of frame {frame.sequence}", error)
            values = frame._replace(derived=()).values()
        readings: list[_Reading] = [(name, value, None) for name, value in values.items() if name in self._catalogue]
        readings += [
            (_METRIC_OF_FIELD[field], cell, seed_id)
            for seed_id, cells in frame.seeds.rows()
            for field, cell in cells.items()
        ]
        readings.append((FRAME_SEQUENCE.name, frame.sequence, None))
        readings.append((FRAME_POINTS.name, len(readings) + 1, None))
        return readings

    def _request(self, parts: Sequence[tuple[Frame, Sequence[_Reading]]], frames: int) -> Request:
        request = ExportMetricsServiceRequest()
        total = 0
        seeds: dict[str, NumberDataPoint] = {}
        for run, following in groupby(parts, lambda part: part[0].run):
            streams: dict[str, list[tuple[int, float, str | None]]] = {}
            for frame, readings in following:
                total += len(readings)
                for name, value, seed_id in readings:
                    streams.setdefault(name, []).append((frame.time_unix_ns, value, seed_id))
            scope = self._scope(request, run, FRAME_SCOPE)
            for name, metric in self._catalogue.items():
                if name not in streams:
                    continue
                add = _stream(scope, metric).data_points.add
                for time_unix_ns, value, seed_id in streams[name]:
                    # Setting fields of an added point, and copying the seed's attribute with a whole point,
                    # takes half the time of constructors and of appending the attribute.
                    point = add()
                    if seed_id is not None:
                        if seed_id not in seeds:
                            seeds[seed_id] = NumberDataPoint(attributes=[_attribute("seed_id", seed_id)])
                        point.CopyFrom(seeds[seed_id])
                    point.time_unix_nano = time_unix_ns
                    point.as_double = value
        return Request(request.SerializeToString(), total, frames)

    def _scope(self, request: ExportMetricsServiceRequest, run: Run, name: str) -> ScopeMetrics:
        if self._origin is None or self._origin[0] != run:
            without_metrics = MetricsData([SdkResourceMetrics(self._resource(run), [], "")])
            self._origin = (run, encode_metrics(without_metrics).resource_metrics[0])
        of_run = request.resource_metrics.add()
        of_run.CopyFrom(self._origin[1])
        scope = of_run.scope_metrics.add()
        scope.scope.name = name
        scope.scope.version = __version__
        scope.scope.attributes.append(_attribute("esper.schema.version", SCHEMA_VERSION))
        return scope


def _stream(scope: ScopeMetrics, metric: Metric) -> Gauge | Sum:
    added = scope.metrics.add(name=metric.name, unit=metric.unit, description=metric.description)
    if metric.kind == "gauge":
        return added.gauge
    added.sum.is_monotonic = True
    added.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
    return added.sum


def _attribute(key: str, text: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=text))
