"""Points: finds and reads the points of serialized gauges and sums in bulk.

A record is a point with its tag and length. Records of equal length usually share a layout: the tags and lengths of
the first record are compared with those of all others at once. Where they match, times and values are read as columns.
Records that differ are left to protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_DELTA,
    DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
)

from esper_otel.gateway.receive.point_columns import A_VALUE, AN_END, NOTHING

Bytes: TypeAlias = npt.NDArray[np.uint8]
Places: TypeAlias = npt.NDArray[np.intp]

_POINT = 0x0A
_TEMPORALITY, _MONOTONIC = 0x10, 0x18
_FEW = 8
_MOST_RUNS = 200_000

# The tags of a point's fields.
_START, _TIME, _DOUBLE, _INTEGER = 0x11, 0x19, 0x21, 0x31
_ATTRIBUTE, _FLAGS = 0x3A, 0x40
_FIXED = (_START, _TIME, _DOUBLE, _INTEGER)


class RecordRun(NamedTuple):
    """Consecutive records of equal length."""

    start: int
    size: int
    records: int


class MetricRecords(NamedTuple):
    """The records of one gauge or sum."""

    runs: list[RecordRun]
    points: int
    is_delta: bool


def find(payload: bytes, *, is_sum: bool) -> MetricRecords | None:
    """Finds the records of a serialized gauge or sum; returns None if protobuf must decode it."""
    end = len(payload)
    if 2 <= end < 0x82 and payload[0] == _POINT and payload[1] == end - 2:
        return MetricRecords([RecordRun(0, end, 1)], 1, is_delta=False)
    runs: list[RecordRun] = []
    position = count = 0
    is_delta = False
    while position < end:
        tag = payload[position]
        if end - position < 2:
            return None
        length = payload[position + 1]
        if tag == _POINT:
            head = 2
            if length >= 0x80:
                if end - position < 3 or payload[position + 2] >= 0x80:
                    return None
                head = 3
                length += (payload[position + 2] - 1) << 7
            size = head + length
            if position + size > end or len(runs) == _MOST_RUNS:
                return None
            run = RecordRun(position, size, _repeats(payload, position, size, head))
            runs.append(run)
            count += run.records
            position += size * run.records
        elif is_sum and tag in (_TEMPORALITY, _MONOTONIC) and length < 0x80:
            if tag == _TEMPORALITY:
                is_delta = length == AGGREGATION_TEMPORALITY_DELTA
            position += 2
        else:
            return None
    return MetricRecords(runs, count, is_delta)


def _repeats(payload: bytes, start: int, size: int, head: int) -> int:
    """Counts the consecutive records with the same tag and length, including the one at ``start``."""
    room = (len(payload) - start) // size
    header = payload[start : start + head]
    position = start
    for count in range(1, min(room, _FEW)):
        position += size
        if payload[position : position + head] != header:
            return count
    if room <= _FEW:
        return room
    records = np.frombuffer(payload, np.uint8, room * size, start).reshape(room, size)
    same = records[:, 1] == header[1]
    same &= records[:, 0] == header[0]
    if head == 3:
        same &= records[:, 2] == header[2]
    return room if same.all() else int(same.argmin())


class PointLayout(NamedTuple):
    """The positions of the parts of a record.

    Attributes:
        fixed: positions of tags, lengths and flags, which must be the same in all records.
        fields: a structured type with ``time`` and ``value``, or only those that the record has.
        holds: ``A_VALUE``, ``NOTHING`` or ``AN_END``.
        labels: the range of bytes of the attributes.
    """

    fixed: list[int]
    fields: np.dtype[np.void]
    holds: int
    labels: slice


def layout_of(record: bytes) -> PointLayout | None:
    """Returns the layout of a record, or None if it contains something unusual."""
    head = 2 if record[1] < 0x80 else 3
    fixed, places = list(range(head)), dict[int, int]()
    attributes_start = attributes_end = 0
    flags = 0
    position, end = head, len(record)
    while position < end:
        tag = record[position]
        fixed.append(position)
        if tag in places:
            return None
        if tag in _FIXED:
            places[tag] = position + 1
            position += 9
        elif tag == _ATTRIBUTE:
            if attributes_end not in (0, position) or position + 1 >= end or record[position + 1] >= 0x80:
                return None
            fixed.append(position + 1)
            attributes_start = attributes_start or position
            position += 2 + record[position + 1]
            attributes_end = position
        elif tag == _FLAGS and position + 1 < end and record[position + 1] < 0x80:
            flags = record[position + 1]
            fixed.append(position + 1)
            places[tag] = position + 1
            position += 2
        else:
            return None
    if position != end or (_DOUBLE in places and _INTEGER in places):
        return None
    return PointLayout(fixed, _fields(places, end), _holding(places, flags), slice(attributes_start, attributes_end))


def _fields(places: dict[int, int], size: int) -> np.dtype[np.void]:
    named = {_TIME: ("time", "<u8"), _DOUBLE: ("value", "<f8"), _INTEGER: ("value", "<i8")}
    there = [(*named[tag], place) for tag, place in places.items() if tag in named]
    return np.dtype(
        {
            "names": [name for name, _, _ in there],
            "formats": [kind for _, kind, _ in there],
            "offsets": [place for _, _, place in there],
            "itemsize": size,
        }
    )


def _holding(places: dict[int, int], flags: int) -> int:
    if flags & DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK:
        return AN_END
    return A_VALUE if _DOUBLE in places or _INTEGER in places else NOTHING


class RecordColumns(NamedTuple):
    """Columns of records that all hold the same: values, nothing, or ends of streams."""

    places: Places
    times: npt.NDArray[np.uint64] | None
    values: npt.NDArray[np.float64] | None
    holds: int
    labels: npt.NDArray[np.int32] | None


_MOST_LAYOUTS = 8


def read(records: Bytes, label: Callable[[bytes], int]) -> tuple[list[RecordColumns], Places]:
    """Reads records of equal length; returns columns, and the positions of records that are left to protobuf.

    Args:
        records: shape (records, length).
        label: returns the label index for serialized attributes.
    """
    read_so_far: list[RecordColumns] = []
    places = np.arange(len(records))
    for _ in range(_MOST_LAYOUTS):
        if not len(places):
            break
        layout = layout_of(records[0].tobytes())
        if layout is None:
            break
        fits = (records[:, layout.fixed] == records[0, layout.fixed]).all(axis=1)
        all_fit = fits.all()
        alike = records if all_fit else records[fits]
        read_so_far.append(_columns(alike, layout, places if all_fit else places[fits], label))
        places, records = (places[:0], records[:0]) if all_fit else (places[~fits], records[~fits])
    return read_so_far, places


def _columns(records: Bytes, layout: PointLayout, places: Places, label: Callable[[bytes], int]) -> RecordColumns:
    fields = records.view(layout.fields)[:, 0]
    names = layout.fields.names or ()
    labels = None
    if layout.labels.stop:
        attributes = np.ascontiguousarray(records[:, layout.labels])
        each = attributes.view(f"V{attributes.shape[1]}")[:, 0].tolist()
        labels = np.fromiter(map(label, each), np.int32, len(each))
    return RecordColumns(
        places,
        fields["time"] if "time" in names else None,
        fields["value"].astype(np.float64) if "value" in names and layout.holds == A_VALUE else None,
        layout.holds,
        labels,
    )
