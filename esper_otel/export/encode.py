"""Encodes frames as OTLP: serialized ExportMetricsServiceRequests (opentelemetry-proto 1.x)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
    Gauge,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as MetricMessage
from opentelemetry.sdk.resources import Resource

from esper_otel.export.blocks import Points, points_of
from esper_otel.export.gauge_points import (
    PLAIN_BYTES,
    Times,
    flags_of_seeds,
    largest_seed_point,
    seed_points,
    step_points,
)
from esper_otel.export.scopes import attribute, origin_of, set_scope, stream
from esper_otel.export.streams import Stream
from esper_otel.frames.block import Block
from esper_otel.frames.frame import WIDTH, Run
from esper_otel.schema import SEED_CELLS, SEED_RETIRED, Metric
from esper_otel.varint import field_head

FRAME_SCOPE = "esper_otel"
HEALTH_SCOPE = "esper_otel.health"

# Receivers refuse requests of more than 4 MiB (gRPC's default); the rest is for names, descriptions and the Resource.
MAX_POINTS = 20_000
_MAX_POINTS_BYTES = 3_500_000

# Field numbers of the messages that are assembled from bytes; each field is a length followed by that many bytes.
_REQUEST_RESOURCE_METRICS = 1
_RESOURCE_SCOPE_METRICS = 2
_SCOPE_METRICS = 2
_METRIC_GAUGE = 5

_MS = 1_000_000


class Request(NamedTuple):
    """One request, ready to be sent.

    Attributes:
        body: a serialized ExportMetricsServiceRequest of less than 4 MiB.
        points: how many points it contains.
        frames: how many frames end in it; a frame counts as sent once its last point is sent.
        names: names of the step metrics in it.
        has_health: whether it also contains the session's own metrics.
        is_goodbye: whether it ends every series.
        last_phase: number of the last phase in it; 0 without one.
    """

    body: bytes
    points: int
    frames: int
    names: frozenset[str]
    has_health: bool = False
    is_goodbye: bool = False
    last_phase: int = 0


def _no_health(_time_unix_ns: int, _frames: int, _is_end: bool) -> Sequence[ScopeMetrics]:
    """The default for ``AccompanyingData.health_of``: no health is sent."""
    return ()


def _no_phases(_time_unix_ns: int) -> PhasesAlong:
    """The default for ``AccompanyingData.phases_of``: no phase is sent."""
    return NO_PHASES


class PhasesAlong(NamedTuple):
    """Phases to send with a request, and the number of the last one; None and 0 without any."""

    scope: ScopeMetrics | None
    last: int


NO_PHASES = PhasesAlong(None, 0)


class AccompanyingData(NamedTuple):
    """Data that is sent in the same requests as the frames, since a collector might reorder separate requests.

    Attributes:
        ended: the series that end with a frame, by the frame's number.
        health_of: returns the session's own metrics to send with a request, in scopes of their own. Its arguments are
            the time of the request's last point, the number of frames that end in it, and whether the request ends all
            series.
        all_ended: returns every series of the run, including those of the given step metrics. It is called after the
            last frame of a run, and the series end one millisecond after that frame. None when more frames follow.
        phases_of: returns the phases to send with a request whose last point has the given time.
    """

    ended: Mapping[int, Sequence[Stream]] = MappingProxyType({})
    health_of: Callable[[int, int, bool], Sequence[ScopeMetrics]] = _no_health
    all_ended: Callable[[Iterable[str]], Iterable[Stream]] | None = None
    phases_of: Callable[[int], PhasesAlong] = _no_phases


_NOTHING_ALONG = AccompanyingData()


_NONE_RETIRED: Mapping[int, tuple[str, ...]] = MappingProxyType({})


class _Piece(NamedTuple):
    """A part of a block that goes into one request: whole frames, or a part of a frame too large for one request.

    A piece may also hold only markers that end series, without a frame.

    Attributes:
        run: the run that the frames belong to.
        times: the frames' times, Unix nanoseconds.
        names: names of the step values.
        values: the step values, shape (frames, names), float64.
        there: mask of the values that there are, same shape as ``values``.
        ids: ids of the seeds.
        cells: the seeds' cells, shape (frames, seeds, 10 or 19), float64.
        present: mask of the cells that there are, same shape as ``cells``.
        points: how many points the piece contains.
        size: upper bound of their serialized size in bytes.
        ends: how many frames end in this piece.
        retired: the seeds that were retired before a frame, by its row.
        markers: serialized metrics that end series.
    """

    run: Run
    times: Times
    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    there: npt.NDArray[np.bool_]
    ids: tuple[str, ...]
    cells: npt.NDArray[np.float64]
    present: npt.NDArray[np.bool_]
    points: int
    size: int
    ends: int
    retired: Mapping[int, tuple[str, ...]] = _NONE_RETIRED
    markers: Sequence[bytes] = ()


class Encoder:
    """Encodes frames, the session's own metrics, and the markers that end series.

    A frame is encoded as Gauge points: one for each value that is present, including NaN and infinities; one for each
    present cell of its seed rows, with the attribute ``seed_id``; one ``esper.seed.retired`` for each seed that was
    retired before the frame; and the two points ``esper.frame.sequence`` and ``esper.frame.points``. Every point has
    the frame's time, no start time, and a double as its value, even for counts, so that receivers handle a single form.
    Consecutive frames of one run share a ResourceMetrics. In it each metric occurs once, in the catalogue's order, and
    the points of each stream are in the order of the frames.

    Threads: one at a time.

    Args:
        catalogue: ``METRICS`` and the user's own metrics, by name; values with other names are left out.
        resource: returns a run's Resource; called once for consecutive frames of the same run.
        max_points: the most points in a request; at least the number of cells of a seed.
    """

    def __init__(
        self,
        catalogue: Mapping[str, Metric],
        resource: Callable[[Run], Resource],
        *,
        max_points: int = MAX_POINTS,
    ) -> None:
        self._catalogue = catalogue
        self._resource = resource
        self._max_points = max_points
        self._origin: tuple[Run, ResourceMetrics] | None = None
        self._heads = {
            name: MetricMessage(name=name, description=metric.description, unit=metric.unit).SerializeToString()
            for name, metric in catalogue.items()
        }

    def resource(self, run: Run) -> Resource:
        """Returns a run's Resource."""
        return self._resource(run)

    @property
    def catalogue(self) -> Mapping[str, Metric]:
        """The metrics that may be sent, by name."""
        return self._catalogue

    def shrink(self, max_points: int) -> bool:
        """Limits later requests to ``max_points`` points. Returns False when that is too few for one seed's cells."""
        if max_points < len(SEED_CELLS):
            return False
        self._max_points = max_points
        return True

    def requests(self, blocks: Iterable[Block], along: AccompanyingData = _NOTHING_ALONG) -> Iterator[Request]:
        """Yields the frames of blocks as requests; each request is encoded when the iterator reaches it.

        A frame is split only when it does not fit into one request. Each of its points still has the frame's time, and
        ``esper.frame.points`` counts the points of the whole frame.

        No point is older than any point of an earlier request, in whichever scope. Prometheus writes a sample for the
        Resource at the times of a request's oldest and newest point, and refuses the request when that sample is older
        than the previous one.
        """
        parts: list[_Piece] = []
        points = size = 0
        names: set[str] = set()
        for part in self._parts(blocks, along.ended):
            if parts and not self._fits(points + part.points, size + part.size):
                yield self._request(parts, _health(parts, along, is_end=False), _phases(parts, along))
                parts, points, size = [], 0, 0
            parts.append(part)
            names.update(part.names)
            points, size = points + part.points, size + part.size
        if parts:
            last, goodbye = parts[-1], list[_Piece]()
            if along.all_ended is not None:
                end_unix_ns = int(last.times[-1]) + _MS
                goodbye = list(self._markers(last.run, along.all_ended(names), time_unix_ns=end_unix_ns))
            if len(goodbye) == 1 and self._fits(points + goodbye[0].points, size + goodbye[0].size):
                parts += goodbye
            is_goodbye = parts[-1] is not last
            health = _health(parts, along, is_end=is_goodbye)
            yield self._request(parts, health, _phases(parts, along))._replace(is_goodbye=is_goodbye)

    def _fits(self, points: int, size: int) -> bool:
        return points <= self._max_points and size <= _MAX_POINTS_BYTES

    def _parts(self, blocks: Iterable[Block], ended: Mapping[int, Sequence[Stream]]) -> Iterator[_Piece]:
        """Yields pieces that each fit into one request."""
        for block in blocks:
            points = points_of(block, self._catalogue)
            longest = max([largest_seed_point(block.ids), *map(largest_seed_point, block.retired.values())])
            sizes = longest * points.counts + (PLAIN_BYTES - longest) * np.count_nonzero(points.there, axis=1)
            markers = {
                row: list(self._markers(block.run, over, time_unix_ns=int(block.times[row])))
                for row in sorted(block.retired)
                if (over := ended.get(block.first + row))
            }
            counts = points.counts.copy()
            for row, pieces in markers.items():
                counts[row] += sum(piece.points for piece in pieces)
                sizes[row] += sum(piece.size for piece in pieces)
            yield from self._pieces(block, points, counts, sizes, markers, longest)

    def _pieces(
        self,
        block: Block,
        points: Points,
        counts: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        markers: Mapping[int, Sequence[_Piece]],
        longest: int,
    ) -> Iterator[_Piece]:
        """Yields the rows of a block in pieces, each with as many rows as fit into one request.

        Args:
            block: the rows.
            points: their points.
            counts: how many points each row has with its markers, shape (rows,).
            sizes: upper bounds of their serialized sizes, same shape.
            markers: what ends series with a row, by the row.
            longest: size of the largest point with the id of a seed.
        """
        counts_to, sizes_to = (np.concatenate([[0], np.cumsum(of_rows)]) for of_rows in (counts, sizes))
        start = 0
        while start < block.rows:
            by_count = np.searchsorted(counts_to, counts_to[start] + self._max_points, "right") - 1
            by_size = np.searchsorted(sizes_to, sizes_to[start] + _MAX_POINTS_BYTES, "right") - 1
            end = min(int(by_count), int(by_size))
            if end == start:
                yield from markers.get(start, ())
                yield from self._cut(block, points, start, longest)
                start += 1
                continue
            count, size = counts_to[end] - counts_to[start], sizes_to[end] - sizes_to[start]
            ending = [piece for row, pieces in markers.items() if start <= row < end for piece in pieces]
            rows = _some(block, points, start, end, int(count), int(size))
            yield rows._replace(markers=[marker for piece in ending for marker in piece.markers])
            start = end

    def _cut(self, block: Block, points: Points, row: int, cell_bytes: int) -> Iterator[_Piece]:
        """Splits a frame that is too large for one request; the frame ends in the last piece."""
        run, times = block.run, block.times[row : row + 1]
        pieces = []
        names = [column for column in range(len(points.names)) if points.there[row, column]]
        for start in range(0, len(names), self._max_points):
            some = names[start : start + self._max_points]
            values, there = points.values[row : row + 1, some], points.there[row : row + 1, some]
            none = ((), _NO_CELLS, _NONE_PRESENT)
            of_some = tuple(points.names[column] for column in some)
            pieces.append(_Piece(run, times, of_some, values, there, *none, len(some), len(some) * PLAIN_BYTES, 0))
        of_seeds = np.count_nonzero(points.present[row], axis=1)
        most = max(int(of_seeds.max(initial=0)), 1)
        rows = max(min(self._max_points // most, _MAX_POINTS_BYTES // (most * cell_bytes)), 1) if cell_bytes else 1
        for start in range(0, len(block.ids), rows):
            part = slice(start, start + rows)
            cells, present = block.cells[row : row + 1, part], points.present[row : row + 1, part]
            count = int(of_seeds[part].sum())
            none_there = ((), _NO_VALUES, _NONE_THERE)
            size = count * cell_bytes
            pieces.append(_Piece(run, times, *none_there, block.ids[part], cells, present, count, size, 0))
        rows = max(min(self._max_points, _MAX_POINTS_BYTES // cell_bytes), 1) if cell_bytes else 1
        retired = block.retired.get(row, ())
        for start in range(0, len(retired), rows):
            over = retired[start : start + rows]
            nothing = ((), _NO_VALUES, _NONE_THERE, (), _NO_CELLS, _NONE_PRESENT)
            pieces.append(_Piece(run, times, *nothing, len(over), len(over) * cell_bytes, 0, {0: over}))
        yield from pieces[:-1]
        yield pieces[-1]._replace(ends=1)

    def _request(
        self, parts: Sequence[_Piece], health: Sequence[ScopeMetrics] = (), phases: PhasesAlong = NO_PHASES
    ) -> Request:
        wire: list[bytes] = []
        for run, following in groupby(parts, lambda part: part.run):
            of_run = list(following)
            points = self._points(of_run)
            scoped = [_SCOPE_HEAD]
            for name in self._catalogue:
                if name in points:
                    scoped += _field(_SCOPE_METRICS, [self._heads[name], *_field(_METRIC_GAUGE, points[name])])
            for part in of_run:
                scoped += part.markers
            scoped.append(_SCOPE_TAIL)
            scopes = _field(_RESOURCE_SCOPE_METRICS, scoped)
            if of_run[-1] is parts[-1]:
                for beside in (*health, *filter(None, [phases.scope])):
                    scopes += _field(_RESOURCE_SCOPE_METRICS, [beside.SerializeToString()])
            wire += _field(_REQUEST_RESOURCE_METRICS, [self._origin_of(run).SerializeToString(), *scopes])
        names = frozenset(name for part in parts for name in part.names)
        count = sum(part.points for part in parts)
        has_health = bool(health)
        return Request(b"".join(wire), count, _frames_in(parts), names, has_health=has_health, last_phase=phases.last)

    @staticmethod
    def _points(parts: Sequence[_Piece]) -> dict[str, list[bytes]]:
        """Returns the serialized points of pieces of one run, by metric name."""
        points: dict[str, list[bytes]] = {}
        for part in parts:
            if part.names:
                of_part = step_points(part.times, part.values.T, part.there.T)
                for name, of_metric in zip(part.names, of_part, strict=True):
                    points.setdefault(name, []).append(of_metric)
            if part.ids:
                for column, pieces in seed_points(part.times, part.ids, part.cells, part.present).items():
                    points.setdefault(SEED_CELLS[column].name, []).extend(pieces)
            for row, ids in sorted(part.retired.items()):
                points.setdefault(SEED_RETIRED.name, []).append(flags_of_seeds(int(part.times[row]), ids))
        return points

    def health(
        self, run: Run, values: Mapping[tuple[str, str], float], *, start_unix_ns: int, time_unix_ns: int
    ) -> bytes:
        """Returns a request that contains only the session's own metrics; see ``health_scope``."""
        return self.alone(run, self.health_scope(values, start_unix_ns=start_unix_ns, time_unix_ns=time_unix_ns))

    def alone(self, run: Run, *scopes: ScopeMetrics) -> bytes:
        """Returns a request that contains only the given scopes."""
        request = ExportMetricsServiceRequest()
        of_run = request.resource_metrics.add()
        of_run.CopyFrom(self._origin_of(run))
        of_run.scope_metrics.extend(scopes)
        return request.SerializeToString()

    def health_scope(
        self, values: Mapping[tuple[str, str], float], *, start_unix_ns: int, time_unix_ns: int
    ) -> ScopeMetrics:
        """Encodes the session's own metrics in a separate scope, since they do not belong to a frame.

        Args:
            values: the metrics by name and reason; the reason is empty for a metric that is not split.
            start_unix_ns: when the counters were 0.
            time_unix_ns: the time of the points.
        """
        scope = ScopeMetrics()
        set_scope(scope, HEALTH_SCOPE)
        by_name: dict[str, list[tuple[str, float]]] = {}
        for (name, reason), number in values.items():
            by_name.setdefault(name, []).append((reason, number))
        for name, by_reason in by_name.items():
            metric = self._catalogue[name]
            points = stream(scope, metric).data_points
            for reason, number in by_reason:
                point = points.add(time_unix_nano=time_unix_ns, as_double=number)
                if metric.kind == "counter":
                    point.start_time_unix_nano = start_unix_ns
                if reason:
                    point.attributes.append(attribute(metric.split_by, reason))
        return scope

    def stale(
        self, run: Run, streams: Iterable[Stream], *, time_unix_ns: int, health: Sequence[ScopeMetrics] = ()
    ) -> Iterator[bytes]:
        """Yields requests that end the given series.

        Args:
            run: the run that the series belong to.
            streams: the series, by metric name and attributes.
            time_unix_ns: the time at which they end; must be later than the last point of each series.
            health: the session's own metrics, sent with the first request.
        """
        for part in self._markers(run, streams, time_unix_ns=time_unix_ns):
            yield self._request([part], health).body
            health = ()

    def _markers(self, run: Run, streams: Iterable[Stream], *, time_unix_ns: int) -> Iterator[_Piece]:
        """Yields pieces of "no recorded value" points, which end series; each piece fits into one request.

        A marker has the scope, name, unit and attributes of the series that it ends. Each marker is a separate metric,
        because the collector's Prometheus exporter reads only the first marker of a metric and ignores the rest.
        """
        markers: list[bytes] = []
        size = 0
        times = np.array([time_unix_ns], np.uint64)
        for name, attributes in streams:
            marker = b"".join(_field(_SCOPE_METRICS, [self._heads[name], _ending(time_unix_ns, *attributes.items())]))
            if markers and (len(markers) == self._max_points or size + len(marker) > _MAX_POINTS_BYTES):
                yield _markers_part(run, times, markers, size)
                markers, size = [], 0
            markers.append(marker)
            size += len(marker)
        if markers:
            yield _markers_part(run, times, markers, size)

    def _origin_of(self, run: Run) -> ResourceMetrics:
        if self._origin is None or self._origin[0] != run:
            self._origin = (run, origin_of(self._resource(run)))
        return self._origin[1]


def _scope_ends() -> tuple[bytes, bytes]:
    """Returns what a serialized scope of frames has before and after its metrics, in the order of the fields."""
    scope = ScopeMetrics()
    set_scope(scope, FRAME_SCOPE)
    tail = ScopeMetrics(schema_url=scope.schema_url).SerializeToString()
    scope.ClearField("schema_url")
    return scope.SerializeToString(), tail


_SCOPE_HEAD, _SCOPE_TAIL = _scope_ends()
_NO_VALUES = np.empty((1, 0))
_NONE_THERE = np.empty((1, 0), np.bool_)
_NO_CELLS = np.empty((1, 0, WIDTH))
_NONE_PRESENT = np.empty((1, 0, WIDTH), np.bool_)


def _some(block: Block, points: Points, first: int, end: int, count: int, size: int) -> _Piece:
    """Makes a piece of whole frames of a block, with the names of which there is a value."""
    some = slice(first, end)
    names, values, there = points.names, points.values[some], points.there[some]
    used = np.logical_or.reduce(there, axis=0)
    if not used.all():
        names = tuple(itertools.compress(names, used.tolist()))
        values, there = values[:, used], there[:, used]
    cells, present = block.cells[some], points.present[some]
    retired = {row - first: ids for row, ids in block.retired.items() if first <= row < end} if block.retired else {}
    return _Piece(
        block.run, block.times[some], names, values, there, block.ids, cells, present, count, size, end - first, retired
    )


def _frames_in(parts: Sequence[_Piece]) -> int:
    return sum(part.ends for part in parts)


def _health(parts: Sequence[_Piece], along: AccompanyingData, *, is_end: bool) -> Sequence[ScopeMetrics]:
    """Returns the session's own metrics to send with these pieces, if any."""
    return along.health_of(int(parts[-1].times[-1]), _frames_in(parts), is_end)


def _phases(parts: Sequence[_Piece], along: AccompanyingData) -> PhasesAlong:
    """Returns the phases to send with these pieces: those that ended before their last frame."""
    return along.phases_of(int(parts[-1].times[-1])) if _frames_in(parts) else NO_PHASES


def _markers_part(run: Run, times: Times, markers: Sequence[bytes], size: int) -> _Piece:
    """Makes a piece that holds only markers."""
    nothing = ((), _NO_VALUES, _NONE_THERE, (), _NO_CELLS, _NONE_PRESENT)
    return _Piece(run, times, *nothing, len(markers), size, 0, markers=markers)


@lru_cache(maxsize=16)  # the series of a seed follow each other
def _ending(time_unix_ns: int, *attributes: tuple[str, str]) -> bytes:
    """Serializes a metric's Gauge with the point that ends a series with these attributes."""
    point = NumberDataPoint(
        time_unix_nano=time_unix_ns,
        flags=DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
        attributes=[attribute(key, text) for key, text in attributes],
    )
    return b"".join(_field(_METRIC_GAUGE, [Gauge(data_points=[point]).SerializeToString()]))


def _field(number: int, content: Sequence[bytes]) -> list[bytes]:
    """Serializes a bytes or message field: tag, length, content. As a list, so that large contents are copied once."""
    return [_head(number, sum(map(len, content))), *content]


_head = lru_cache(maxsize=1024)(field_head)
