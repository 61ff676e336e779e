"""The fast decoder: numpy on the bytes of a request. Requests it cannot decode exactly go to the plain decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive import points as records
from esper_otel.gateway.receive.attributes import label_of, sender_of
from esper_otel.gateway.receive.bounds import pieces
from esper_otel.gateway.receive.envelope import POINTS, Envelope, field, read_data, read_points, read_resource
from esper_otel.gateway.receive.plain import is_delta, plain_columns, plain_row
from esper_otel.gateway.receive.point_columns import PointColumns, RawPoints, Row
from esper_otel.gateway.receive.request import Malformed, PointSender
from esper_otel.parts.levels import scope_of
from esper_otel.parts.senders import Label

# Bounds of the caches: the same attributes and Resources occur in many requests.
_MOST_LABELS, _MOST_LABEL_BYTES = 50_000, 16 * 1024 * 1024
_MOST_SENDERS = 5_000
_LONGEST_REMEMBERED = 2_048


class FastDecoder:
    """Reads requests into columns.

    Threads: not thread-safe; use it from one thread at a time.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._labels: dict[bytes, Label] = {}
        self._label_bytes = 0
        self._senders: dict[bytes, PointSender | str] = {}

    def columns(self, body: bytes) -> tuple[RawPoints, PointColumns]:
        """Returns a request's points in columns, and the metrics and labels that the columns refer to.

        Raises:
            Malformed: the bytes are not a request.
            TooLarge: decoding it would cost too much.
        """
        raw = RawPoints(self._limits)
        request = _RequestMetrics(raw)
        for piece in pieces(body, Envelope):
            if not self._read(piece, request, raw):
                return plain_columns(body, self._limits)
        return raw, request.columns(_Places(self, raw))

    def _read(self, body: bytes, request: _RequestMetrics, raw: RawPoints) -> bool:
        """Adds the metrics of a request; returns False if the plain decoder must decode it."""
        try:
            envelope = Envelope.FromString(body)
        except DecodeError as error:
            raise Malformed(f"not an ExportMetricsServiceRequest: {error}") from None
        # An equal size proves that no field occurred twice: protobuf merges two gauges, but an envelope keeps only one.
        if envelope.ByteSize() != len(body):
            return False
        raw.note_parts(len(envelope.resource_metrics))
        for of_resource in envelope.resource_metrics:
            sender = self.sender(of_resource.resource)
            raw.note_parts(len(of_resource.scope_metrics))
            for of_scope in of_resource.scope_metrics:
                scope = scope_of(of_scope.scope.name)
                raw.note_parts(len(of_scope.metrics))
                for metric in of_scope.metrics:
                    match metric.WhichOneof("data"):
                        case "gauge":
                            request.add(sender, scope, metric, "gauge", metric.gauge)
                        case "sum":
                            request.add(sender, scope, metric, "sum", metric.sum)
                        case None:
                            pass
                        case _:  # packed numbers: for these an equal size proves nothing
                            return False
        return True

    def sender(self, resource: bytes) -> PointSender | str:
        """Returns the sender that a serialized Resource describes, or why its points are rejected.

        Raises:
            Malformed: the bytes are not a Resource.
            TooLarge: decoding it would cost too much.
        """
        sender = self._senders.pop(resource, None)
        if sender is None:
            sender = sender_of(read_resource(resource).attributes, self._limits)
            if len(resource) > _LONGEST_REMEMBERED:
                return sender
            if len(self._senders) >= _MOST_SENDERS:
                del self._senders[next(iter(self._senders))]
        self._senders[resource] = sender  # the most recently used last
        return sender

    def label(self, attributes: bytes) -> Label:
        """Returns the label that a point's serialized attributes stand for."""
        label = self._labels.get(attributes)
        if label is None:
            (point,) = read_points([field(POINTS, attributes)])
            label = label_of(point.attributes, self._limits)
            if len(attributes) <= _LONGEST_REMEMBERED:
                if len(self._labels) >= _MOST_LABELS or self._label_bytes > _MOST_LABEL_BYTES:
                    self._labels.clear()
                    self._label_bytes = 0
                self._labels[attributes] = label
                self._label_bytes += len(attributes)
        return label


class _Places(dict[bytes, int]):
    """Maps serialized attributes to the index of their label in one request; filled in on first use."""

    def __init__(self, decoder: FastDecoder, raw: RawPoints) -> None:
        super().__init__()
        self._decoder = decoder
        self._raw = raw

    def __missing__(self, attributes: bytes) -> int:
        place = self[attributes] = self._raw.label(self._decoder.label(attributes))
        return place


class _EqualRecords(NamedTuple):
    """Consecutive records of equal length in one metric; ``first`` is the index of the first one among all points."""

    records: bytes
    metric: int
    first: int
    points: int


class _RequestMetrics:
    """The metrics of one request: added one by one, then read together."""

    def __init__(self, raw: RawPoints) -> None:
        self._raw = raw
        self._count = 0
        self._chunks: dict[int, list[_EqualRecords]] = {}
        self._rows: list[tuple[int, Row]] = []

    def add(self, sender: PointSender | str, scope: int, metric: Any, kind: str, payload: bytes) -> None:
        """Adds a metric.

        Raises:
            Malformed: the payload is not a gauge or sum.
        """
        found = records.find(payload, is_sum=kind == "sum")
        name, unit = metric.name, metric.unit
        if found is None:
            data = read_data(kind, payload)
            place = self._raw.metric(sender, scope, name, len(data.data_points), is_delta=is_delta(data), unit=unit)
            if place is not None:
                for point in data.data_points:
                    self._rows.append((self._count, plain_row(place, point, self._raw)))
                    self._count += 1
            return
        place = self._raw.metric(sender, scope, name, found.points, is_delta=found.is_delta, unit=unit)
        if place is None:
            read_data(kind, payload)  # a malformed part invalidates the whole request, even a part that is not used
            return
        for start, size, count in found.runs:
            of_run = payload if size * count == len(payload) else payload[start : start + size * count]
            self._chunks.setdefault(size, []).append(_EqualRecords(of_run, place, self._count, count))
            self._count += count

    def columns(self, places: _Places) -> PointColumns:
        """Returns all points, in the order of the request.

        Raises:
            Malformed: a point cannot be decoded.
        """
        columns = PointColumns.empty(self._count)
        for size, chunks in self._chunks.items():
            bodies, metrics, firsts, counts = zip(*chunks, strict=True)
            body = bodies[0] if len(bodies) == 1 else b"".join(bodies)
            rows = np.frombuffer(body, np.uint8).reshape(-1, size)
            number = np.array(counts)
            # The target index of each row: the first index of its chunk plus its position within the chunk.
            begins = np.cumsum(number) - number
            where = np.arange(len(rows)) + np.repeat(np.array(firsts) - begins, number)
            columns.metric[where] = np.repeat(np.array(metrics, np.int32), number)
            parts, left = records.read(rows, places.__getitem__)
            for part in parts:
                _fill(columns, where[part.places], part)
            if len(left):
                points = read_points(rows[place].tobytes() for place in left)
                self._rows += [
                    (position, plain_row(int(columns.metric[position]), point, self._raw))
                    for position, point in zip(where[left].tolist(), points, strict=True)
                ]
        for position, row in self._rows:
            columns.set(position, row)
        return columns


def _fill(columns: PointColumns, where: records.Places, part: records.RecordColumns) -> None:
    columns.holds[where] = part.holds
    if part.times is not None:
        columns.times[where] = part.times
    if part.values is not None:
        columns.values[where] = part.values
    if part.labels is not None:
        columns.label[where] = part.labels
