"""Records: frames as the files of a spool hold them.

A file is a sequence of records: magic, length and CRC-32 of the content, content. The content's first byte says what
it is: a run, names, seed ids (each with a number), or a frame, which refers to those before it in the same file by
their numbers. A file that was cut short or damaged is read from the next whole record on.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from opentelemetry.sdk.resources import Resource

from esper_otel.frames.frame import ABSENT, NARROW, NO_SEEDS, WIDTH, Frame, Run, SeedTable, checked_run
from esper_otel.schema import METRICS, Metric

_MAGIC = b"\xe5\x9e\x0f1"
_HEAD = struct.Struct("<4sII")
_RUN, _NAMES, _SEEDS, _FRAME = b"R", b"N", b"S", b"F"
_NUMBER = struct.Struct("<I")
# Sequence, step, epoch, time; numbers of the run, the names, the seed ids recorded and those alive, 0 for none;
# how many bytes of retired ids follow.
_FIELDS = struct.Struct("<QQQQIIIII")
_COUNTED = ("esper.global_step", "esper.epoch", "esper.seeds")
_MOST_NUMBER = 2**63
_MOST_SAID = 16 * 1024 * 1024  # bytes of names, of seed ids, of a Resource
_OURS = frozenset(metric.name for metric in METRICS)


@dataclasses.dataclass(slots=True)
class StoredContext:
    """What files contain in addition to frames.

    Attributes:
        resources: of the runs in them.
        metrics: the user's own metrics in them, by name.
        skipped: how many records were whole, but cannot be used.
        lost: how many of these were frames.
        is_torn: whether the file read last ends in the middle of what was written with a frame.
    """

    resources: dict[Run, Resource] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    lost: int = 0
    is_torn: bool = False


class RecordWriter:
    """Makes the records of one file.

    Args:
        catalogue: every metric that frames may have, by name.
        resource_of: gives a run's Resource.
    """

    def __init__(self, catalogue: Mapping[str, Metric], resource_of: Callable[[Run], Resource]) -> None:
        self._catalogue = catalogue
        self._resource_of = resource_of
        self._runs: dict[Run, int] = {}
        self._names: dict[tuple[str, ...], int] = {(): 0}
        self._seeds: dict[tuple[str, ...], int] = {(): 0}
        self._last = 0

    def record(self, frame: Frame) -> bytes:
        """The frame's record, behind those of what it refers to and no frame before it did."""
        names, numbers = self._values(frame)
        packed = struct.pack(f"<{len(numbers)}d", *numbers)
        before: list[bytes] = []
        seeds, live = frame.seeds, frame.live
        retired = json.dumps(frame.retired).encode() if frame.retired else b""
        content = (
            _FRAME
            + _FIELDS.pack(
                frame.sequence,
                frame.global_step,
                frame.epoch,
                frame.time_unix_ns,
                self._runs.get(frame.run) or self._told(_RUN, self._runs, frame.run, before),
                self._names.get(names) or self._told(_NAMES, self._names, names, before),
                self._number_of(seeds.ids, before),
                self._number_of(live.ids, before),
                len(retired),
            )
            + retired
            + packed
        )
        if seeds.ids:
            content += seeds.cells.tobytes()
        before.append(_record(content))
        return b"".join(before)

    @staticmethod
    def _values(frame: Frame) -> tuple[tuple[str, ...], tuple[float, ...]]:
        values = frame.values()
        for name in _COUNTED:
            del values[name]
        return tuple(values), tuple(values.values())

    def _number_of(self, ids: tuple[str, ...], before: list[bytes]) -> int:
        number = self._seeds.get(ids)
        return self._told(_SEEDS, self._seeds, ids, before) if number is None else number

    def _told(self, kind: bytes, numbers: dict[Any, int], what: Any, before: list[bytes]) -> int:
        """Numbers what frames refer to, and adds the record that says it."""
        self._last += 1
        numbers[what] = self._last
        said: Any = what
        if kind == _RUN:
            resource = self._resource_of(what)
            said = [dataclasses.asdict(what), dict(resource.attributes), resource.schema_url]
        elif kind == _NAMES:
            own = [self._catalogue[name] for name in what if name not in _OURS and name in self._catalogue]
            said = [what, [[metric.name, metric.unit, metric.description] for metric in own]]
        before.append(_record(kind + _NUMBER.pack(self._last) + json.dumps(said).encode()))
        return self._last


def _record(content: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content


def frames_in(content: bytes, stored: StoredContext) -> Iterator[Frame]:
    """The frames of a file, as an exporter needs them: of seeds alive and silent it has the ids and no cells.

    A checksum says that a record is whole, not that we wrote it: what it says is checked like a request, and a record
    that cannot be used is skipped and counted.

    Args:
        content: the file.
        stored: filled with what the frames refer to.
    """
    known = _Known({}, {0: ()}, {0: ()})
    for record in _records(content, stored):
        kind, body = record[:1], record[1:]
        frame = None
        try:
            if kind == _FRAME:
                frame = _frame(body, known)
            else:
                _learn(kind, body, known, stored)
        except (ValueError, TypeError, LookupError, struct.error, RecursionError):
            stored.skipped += 1
            stored.lost += kind == _FRAME
        if frame is not None:
            yield frame


class _Known(NamedTuple):
    """What frames of a file refer to, by its number."""

    runs: dict[int, Run]
    names: dict[int, tuple[str, ...]]
    seeds: dict[int, tuple[str, ...]]


def _learn(kind: bytes, body: bytes, known: _Known, stored: StoredContext) -> None:
    """Notes what later frames refer to; raises when it is not what we write."""
    if len(body) > _MOST_SAID:
        raise ValueError("it is longer than we write")
    (number,) = _NUMBER.unpack_from(body)
    if number in known.runs or number in known.names or number in known.seeds:
        raise ValueError("its number is taken")
    said = json.loads(body[_NUMBER.size :].decode())
    if kind == _RUN:
        of_run, attributes, schema_url = said
        run = checked_run(of_run)
        "".join(each for each in of_run.values() if isinstance(each, str)).encode()  # raises as above
        if not run.run_id:
            raise ValueError("it is not a run")
        stored.resources[run] = Resource(_attributes(attributes), *_texts([schema_url]))
        known.runs[number] = run
    elif kind == _NAMES:
        names = _texts(said[0])
        own = [Metric(name, unit=unit, description=text) for name, unit, text in map(_texts_of_metric, said[1])]
        stored.metrics.update({metric.name: metric for metric in own if metric.name not in _OURS})
        known.names[number] = names
    elif kind == _SEEDS:
        known.seeds[number] = _texts(said)
    else:
        raise ValueError("its kind is not known")


def _texts(said: Any, *, can_repeat: bool = False) -> tuple[str, ...]:
    if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
        raise TypeError("it is not a list of texts")
    "".join(said).encode()  # raises where a text cannot be sent
    if not can_repeat and len(set(said)) < len(said):
        raise ValueError("a text is there twice")
    return tuple(said)


def _texts_of_metric(said: Any) -> tuple[str, ...]:
    return _texts(said, can_repeat=True)


def _attributes(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise TypeError("it is not an object with names and values")
    for name, value in said.items():
        _texts([name])
        if not all(map(_is_plain, value if isinstance(value, list) else [value])):
            raise ValueError("an attribute is neither text nor a number")
    return dict(said)


def _is_plain(value: object) -> bool:
    """Whether it is text, or a number that OTLP has."""
    if isinstance(value, str):
        value.encode()
        return True
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _records(content: bytes, stored: StoredContext) -> Iterator[bytes]:
    place = end = 0
    while (place := content.find(_MAGIC, place)) >= 0 and place + _HEAD.size <= len(content):
        _, length, crc = _HEAD.unpack_from(content, place)
        start = place + _HEAD.size
        record = content[start : start + length]
        if len(record) == length and zlib.crc32(record) == crc:
            yield record
            place = start + length
            if record[:1] == _FRAME:  # a frame's record comes last of those written with it
                end = place
        else:
            place += 1
    stored.is_torn = end < len(content)


def _frame(body: bytes, known: _Known) -> Frame:
    """The frame; raises when what it refers to has been lost, or when we did not write it."""
    sequence, step, epoch, time_unix_ns, of_run, of_names, of_ids, of_live, retired_bytes = _FIELDS.unpack_from(body)
    if not 0 < sequence < _MOST_NUMBER or not 0 < time_unix_ns < _MOST_NUMBER:
        raise ValueError("no frame has such a number or time")
    run, names, ids, live_ids = known.runs[of_run], known.names[of_names], known.seeds[of_ids], known.seeds[of_live]
    place = _FIELDS.size + retired_bytes
    retired = _texts(json.loads(body[_FIELDS.size : place].decode())) if retired_bytes else ()
    behind_names = place + 8 * len(names)
    sizes = {behind_names + 8 * len(ids) * columns: columns for columns in (NARROW, WIDTH)}
    if len(body) not in sizes:
        raise ValueError("it has not as many bytes as numbers")
    values = np.frombuffer(body, np.float64, len(names), place).tolist()
    seeds = live = NO_SEEDS
    if ids:
        cells = np.frombuffer(body, np.float64, offset=behind_names)
        seeds = live = SeedTable(ids, cells.reshape(len(ids), sizes[len(body)]))
    if live_ids != ids:  # these cells are one number in memory, however many seeds there are
        live = SeedTable(live_ids, np.broadcast_to(np.float64(ABSENT), (len(live_ids), WIDTH)))
    return Frame(run, sequence, step, epoch, time_unix_ns, names, tuple(values), {}, seeds, live, retired)
