"""Frames as OTLP: serialized ExportMetricsServiceRequests (opentelemetry-proto 1.x)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
    Gauge,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as MetricMessage
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.metrics.export import ResourceMetrics as SdkResourceMetrics
from opentelemetry.sdk.resources import Resource

from esper_otel._version import __version__
from esper_otel.export.points import PLAIN_BYTES, Times, largest_seed_point, seed_points, step_points
from esper_otel.frame import ABSENT_BITS, NO_SEEDS, Frame, Run, SeedTable, is_absent
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, Metric

SCHEMA_VERSION = "1"
FRAME_SCOPE = "esper_otel"
HEALTH_SCOPE = "esper_otel.health"

# Receivers refuse more than 4 MiB (gRPC's default): half a MiB is left for names, descriptions and the Resource.
MAX_POINTS = 20_000
_MAX_POINTS_BYTES = 3_500_000

# Field numbers of the messages that are put together from bytes; all of them hold a length and as many bytes.
_REQUEST_RESOURCE_METRICS = 1
_RESOURCE_SCOPE_METRICS = 2
_SCOPE_METRICS = 2
_METRIC_GAUGE = 5


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


class _Part(NamedTuple):
    """What one request holds of a frame: all of it, unless it is too large for a request of its own.

    Attributes:
        frame: the frame.
        names: of the step values.
        values: the step values, shape (names,), float64.
        seeds: seed rows.
        points: how many points these make.
        size: the most bytes that they take.
        is_last: whether the frame ends with it.
    """

    frame: Frame
    names: list[str]
    values: npt.NDArray[np.float64]
    seeds: SeedTable
    points: int
    size: int
    is_last: bool


class Encoder:
    """Encodes frames, and what is said beside them.

    A frame is: one Gauge point per value present, NaN and infinities included; one per present cell of its
    seed rows, with the attribute ``seed_id``; and two of its own, ``esper.frame.sequence`` and
    ``esper.frame.points``. All of them carry the frame's time, no start time, and a double, counts too, so
    that a receiver meets one shape only. Frames of one run that follow each other share a ResourceMetrics,
    where each metric stands once, in the catalogue's order, with each stream's points in the frames' order.

    Threads: one at a time.

    Args:
        catalogue: ``METRICS`` and the user's own, by name; a value under another name is left out.
        resource: gives a run's Resource; asked once for equal runs that follow each other.
        fault: told when a processor's reading fails or is no number; that frame goes without derived values.
        max_points: most points in a request; at least as many as a seed has cells.
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
        self._heads = {
            name: MetricMessage(name=name, description=metric.description, unit=metric.unit).SerializeToString()
            for name, metric in catalogue.items()
        }

    def shrink(self, max_points: int) -> bool:
        """Makes requests smaller from now on, for an endpoint that takes no larger ones; False when it cannot."""
        if max_points < len(SEED_CELLS):
            return False
        self._max_points = max_points
        return True

    def requests(self, frames: Iterable[Frame]) -> Iterator[Request]:
        """The frames as requests, each encoded when it is asked for.

        A frame is cut only when it is too large for a request of its own; each of its points still carries
        the frame's time, and ``esper.frame.points`` counts those of the whole frame.
        """
        parts: list[_Part] = []
        points = size = 0
        for part in (part for frame in frames for part in self._parts(frame)):
            if parts and (points + part.points > self._max_points or size + part.size > _MAX_POINTS_BYTES):
                yield self._request(parts)
                parts, points, size = [], 0, 0
            parts.append(part)
            points, size = points + part.points, size + part.size
        if parts:
            yield self._request(parts)

    def _parts(self, frame: Frame) -> list[_Part]:
        names, values = self._values(frame)
        seeds = frame.seeds
        cells = cell_size = 0
        if seeds.ids:
            cells = int(np.count_nonzero(seeds.cells.view(np.uint64) != ABSENT_BITS))
            cell_size = largest_seed_point(seeds.ids)
        points = len(names) + cells
        values[-2:] = frame.sequence, points
        size = len(names) * PLAIN_BYTES + cells * cell_size
        if points <= self._max_points and size <= _MAX_POINTS_BYTES:
            return [_Part(frame, names, values, seeds, points, size, is_last=True)]
        return self._cut(_Part(frame, names, values, seeds, points, size, is_last=True), cell_size)

    def _cut(self, whole: _Part, cell_size: int) -> list[_Part]:
        parts = []
        frame, names, values, seeds, *_ = whole
        for start in range(0, len(names), self._max_points):
            some = slice(start, start + self._max_points)
            count = len(names[some])
            parts.append(_Part(frame, names[some], values[some], NO_SEEDS, count, count * PLAIN_BYTES, is_last=False))
        present = np.count_nonzero(~is_absent(seeds.cells), axis=1)
        most = max(int(present.max(initial=0)), 1)
        rows = max(min(self._max_points // most, _MAX_POINTS_BYTES // (most * cell_size)), 1) if cell_size else 1
        for start in range(0, len(seeds.ids), rows):
            some_seeds = SeedTable(seeds.ids[start : start + rows], seeds.cells[start : start + rows])
            cells = int(present[start : start + rows].sum())
            parts.append(_Part(frame, [], _NO_VALUES, some_seeds, cells, cells * cell_size, is_last=False))
        return [*parts[:-1], parts[-1]._replace(is_last=True)]

    def _values(self, frame: Frame) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Names and step values; the last two, sequence and points of the frame, are to be filled in."""
        values: dict[str, float] = {}
        try:
            values = frame.values()
            if not self._catalogue.keys() >= values.keys():
                values = {name: value for name, value in values.items() if name in self._catalogue}
            numbers = _numbers(values)
        except Exception as error:  # noqa: BLE001 - a user's processor must not hold up all later frames
            self._fault(f"readings of frame {frame.sequence}", error)
            values = frame._replace(derived=()).values()
            numbers = _numbers(values)
        return [*values, FRAME_SEQUENCE.name, FRAME_POINTS.name], numbers

    def _request(self, parts: Sequence[_Part]) -> Request:
        wire = []
        for run, following in groupby(parts, lambda part: part.frame.run):
            points = self._points(list(following))
            metrics = [
                _field(_SCOPE_METRICS, self._heads[name] + _field(_METRIC_GAUGE, b"".join(points[name])))
                for name in self._catalogue
                if name in points
            ]
            origin = self._origin_of(run)
            scope = ScopeMetrics()
            _set_scope(scope, FRAME_SCOPE)
            scoped = _field(_RESOURCE_SCOPE_METRICS, b"".join((scope.SerializeToString(), *metrics)))
            wire.append(_field(_REQUEST_RESOURCE_METRICS, origin.SerializeToString() + scoped))
        return Request(b"".join(wire), sum(part.points for part in parts), sum(part.is_last for part in parts))

    @staticmethod
    def _points(parts: Sequence[_Part]) -> dict[str, list[bytes]]:
        """The serialized points of parts of one run, by metric name."""
        points: dict[str, list[bytes]] = {}
        for names, following in groupby(parts, lambda part: part.names):
            if names:
                alike = list(following)
                values = np.array([part.values for part in alike])
                for name, of_metric in zip(names, step_points(_times(alike), values.T), strict=True):
                    points.setdefault(name, []).append(of_metric)
        for ids, following in groupby(parts, lambda part: part.seeds.ids):
            if ids:
                alike = list(following)
                cells = np.stack([part.seeds.cells for part in alike])
                for column, of_metric in seed_points(_times(alike), ids, cells).items():
                    points.setdefault(SEED_CELLS[column].name, []).append(of_metric)
        return points

    def health(
        self,
        run: Run,
        values: Mapping[tuple[str, str], float],
        *,
        start_unix_ns: int,
        time_unix_ns: int,
    ) -> bytes:
        """A request with the session's own metrics, in a scope of their own: they belong to no frame.

        Args:
            run: whose they are.
            values: by name and reason, which is empty for a metric that is not split.
            start_unix_ns: when the counters were 0.
            time_unix_ns: when the values were read.
        """
        request = ExportMetricsServiceRequest()
        scope = self._scope(request, run, HEALTH_SCOPE)
        by_name: dict[str, list[tuple[str, float]]] = {}
        for (name, reason), number in values.items():
            by_name.setdefault(name, []).append((reason, number))
        for name, by_reason in by_name.items():
            metric = self._catalogue[name]
            points = _stream(scope, metric).data_points
            for reason, number in by_reason:
                point = points.add(time_unix_nano=time_unix_ns, as_double=number)
                if metric.kind == "counter":
                    point.start_time_unix_nano = start_unix_ns
                if reason:
                    point.attributes.append(_attribute(metric.split_by, reason))
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

    def _scope(self, request: ExportMetricsServiceRequest, run: Run, name: str) -> ScopeMetrics:
        of_run = request.resource_metrics.add()
        of_run.CopyFrom(self._origin_of(run))
        scope = of_run.scope_metrics.add()
        _set_scope(scope, name)
        return scope

    def _origin_of(self, run: Run) -> ResourceMetrics:
        if self._origin is None or self._origin[0] != run:
            without_metrics = MetricsData([SdkResourceMetrics(self._resource(run), [], "")])
            self._origin = (run, encode_metrics(without_metrics).resource_metrics[0])
        return self._origin[1]


_NO_VALUES = np.empty(0)


def _numbers(values: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """The values, and room for two more."""
    if None in values.values():
        raise TypeError("a reading is None, which NumPy would take for NaN")
    return np.fromiter((*values.values(), 0.0, 0.0), np.float64, len(values) + 2)


def _times(parts: Sequence[_Part]) -> Times:
    return np.array([part.frame.time_unix_ns for part in parts], np.uint64)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes or of a message, serialized: tag, length, content."""
    header = bytearray((number << 3 | 2,))
    length = len(content)
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return bytes(header) + content


def _set_scope(scope: ScopeMetrics, name: str) -> None:
    scope.scope.name = name
    scope.scope.version = __version__
    scope.scope.attributes.append(_attribute("esper.schema.version", SCHEMA_VERSION))


def _stream(scope: ScopeMetrics, metric: Metric) -> Gauge | Sum:
    added = scope.metrics.add(name=metric.name, unit=metric.unit, description=metric.description)
    if metric.kind == "gauge":
        return added.gauge
    added.sum.is_monotonic = True
    added.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
    return added.sum


def _attribute(key: str, text: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=text))
