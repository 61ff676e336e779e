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
from typing import Any

import numpy as np
from opentelemetry.sdk.resources import Resource

from esper_otel.frame import ABSENT, NARROW, NO_SEEDS, WIDTH, Frame, Run, SeedTable
from esper_otel.schema import METRICS, Metric

_MAGIC = b"\xe5\x9e\x0f1"
_HEAD = struct.Struct("<4sII")
_RUN, _NAMES, _SEEDS, _FRAME = b"R", b"N", b"S", b"F"
_NUMBER = struct.Struct("<I")
# Sequence, step, epoch, time; numbers of the run, the names, the seed ids recorded and those alive, 0 for none;
# how many bytes of retired ids follow.
_FIELDS = struct.Struct("<QQQQIIIII")
_COUNTED = ("esper.global_step", "esper.epoch", "esper.seeds")
_OURS = frozenset(metric.name for metric in METRICS)


@dataclasses.dataclass(slots=True)
class Stored:
    """What files say beside their frames.

    Attributes:
        resources: of the runs in them.
        metrics: the user's own metrics in them, by name.
        is_torn: whether the file read last ends in the middle of what was written with a frame.
    """

    resources: dict[Run, Resource] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
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
        try:
            names, numbers = self._values(frame)
            packed = struct.pack(f"<{len(numbers)}d", *numbers)
        except Exception:  # noqa: BLE001 - a user's processor gave what is no number; the rest must not be lost with it
            names, numbers = self._values(frame._replace(derived=()))
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


def frames_in(content: bytes, stored: Stored) -> Iterator[Frame]:
    """The frames of a file, as an exporter needs them: of seeds alive and silent it has the ids and no cells.

    Args:
        content: the file.
        stored: filled with what the frames refer to.
    """
    known: dict[int, Any] = {0: ()}
    for record in _records(content, stored):
        kind, body = record[:1], record[1:]
        if kind == _FRAME:
            frame = _frame(body, known)
            if frame is not None:
                yield frame
            continue
        (number,) = _NUMBER.unpack_from(body)
        said = json.loads(body[_NUMBER.size :])
        if kind == _RUN:
            known[number] = run = Run(**said[0])
            stored.resources[run] = Resource(said[1], said[2])
        elif kind == _NAMES:
            known[number] = tuple(said[0])
            stored.metrics.update({name: Metric(name, unit=unit, description=text) for name, unit, text in said[1]})
        else:
            known[number] = tuple(said)


def _records(content: bytes, stored: Stored) -> Iterator[bytes]:
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


def _frame(body: bytes, known: Mapping[int, Any]) -> Frame | None:
    """The frame; None when what it refers to has been lost."""
    sequence, step, epoch, time_unix_ns, *numbers, retired_bytes = _FIELDS.unpack_from(body)
    if not known.keys() >= set(numbers):
        return None
    run, names, ids, live_ids = (known[number] for number in numbers)
    place = _FIELDS.size + retired_bytes
    retired = tuple(json.loads(body[_FIELDS.size : place])) if retired_bytes else ()
    of_names = 8 * len(names)
    sizes = {place + of_names + 8 * len(ids) * columns: columns for columns in (NARROW, WIDTH)}
    if not isinstance(run, Run) or len(body) not in sizes:
        return None
    values = np.frombuffer(body, np.float64, len(names), place).tolist()
    seeds = live = NO_SEEDS
    if ids:
        cells = np.frombuffer(body, np.float64, offset=place + of_names)
        seeds = live = SeedTable(ids, cells.reshape(len(ids), sizes[len(body)]))
    if live_ids != ids:
        live = SeedTable(live_ids, np.full((len(live_ids), WIDTH), ABSENT))
    return Frame(run, sequence, step, epoch, time_unix_ns, names, tuple(values), {}, seeds, live, retired)
