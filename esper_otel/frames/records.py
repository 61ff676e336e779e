"""Records: rows of a session as the files of a spool hold them.

A file is a sequence of records: magic, length and CRC-32 of the content, content. The magic ends with the version of
the format. The content's first byte is its kind: a run, a layout, seed ids (each with a number), or a row, which
refers to those before it in the same file by their numbers. A row has the bytes that it has in the chunk of a ring. A
file that was cut short or damaged is read from the next whole record on.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from opentelemetry.sdk.resources import Resource

from esper_otel.frames.block import Chunk
from esper_otel.frames.digest import DIGEST_LIMIT
from esper_otel.frames.frame import NARROW, WIDTH, Run, checked_run
from esper_otel.frames.layout import HEAD, NUMBERS, NUMBERS_PLACE, WHOLE, Layout
from esper_otel.schema import METRICS, Metric

_MARK, _VERSION = b"\xe5\x9e\x0f", b"2"
_MAGIC = _MARK + _VERSION
MAGIC_BYTES = len(_MAGIC)
_HEAD = struct.Struct("<4sII")
_RUN, _LAYOUT, _SEEDS, _ROW = b"R", b"L", b"S", b"F"
_NUMBER = struct.Struct("<I")
# Sequence; numbers of the run, the layout and the seed ids, 0 for no seeds; how many bytes of retired ids follow.
_FIELDS = struct.Struct("<QIIII")
_MOST_NUMBER = 2**63
_MOST_SAID = 16 * 1024 * 1024  # bytes of names, of seed ids, of a Resource
_CHUNK_BYTES = 512 * 1024  # of rows that are read; more where one row takes more
_OURS = frozenset(metric.name for metric in METRICS)


def is_of_another_version(beginning: bytes) -> bool:
    """Whether a file that begins with these ``MAGIC_BYTES`` bytes has another version of this format."""
    return len(beginning) == MAGIC_BYTES and beginning.startswith(_MARK) and beginning != _MAGIC


@dataclasses.dataclass(slots=True)
class StoredContext:
    """What files contain in addition to rows.

    Attributes:
        resources: of the runs in them.
        metrics: the user's own metrics in them, by name.
        skipped: how many records were whole, but cannot be used.
        lost: how many of these were rows.
        is_torn: whether the file read last ends in the middle of what was written with a row.
    """

    resources: dict[Run, Resource] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    lost: int = 0
    is_torn: bool = False


class RecordWriter:
    """Makes the records of one file.

    Args:
        catalogue: every metric that rows may have, by name.
        resource_of: gives a run's Resource.
    """

    def __init__(self, catalogue: Mapping[str, Metric], resource_of: Callable[[Run], Resource]) -> None:
        self._catalogue = catalogue
        self._resource_of = resource_of
        self._numbers: dict[Run | Layout | tuple[tuple[str, ...], int], int] = {}
        self._run: tuple[Run | None, int] = (None, 0)  # the last one, since comparing runs takes long

    def record(self, chunk: Chunk, row: int) -> bytes:
        """Returns a row's record, after those of what it refers to and no row before it did."""
        start = chunk.offsets[row]
        layout_number, seeds_number = NUMBERS.unpack_from(chunk.buffer, start + NUMBERS_PLACE)
        layout, numbers = chunk.layouts[layout_number], self._numbers
        before: list[bytes] = []
        run, of_run = self._run
        if run is not chunk.run:
            of_run = numbers.get(chunk.run) or self._told(chunk.run, before)
            self._run = chunk.run, of_run
        of_layout = numbers.get(layout) or self._told(layout, before)
        of_seeds, end = 0, start + layout.size
        if seeds_number:
            seeds = chunk.seeds[seeds_number], chunk.widths[seeds_number]
            of_seeds = numbers.get(seeds) or self._told(seeds, before)
            end += 8 * len(seeds[0]) * seeds[1]
        retired = b""
        if chunk.retired and row in chunk.retired:
            retired = json.dumps(chunk.retired[row]).encode()
        fields = _FIELDS.pack(chunk.first + row, of_run, of_layout, of_seeds, len(retired))
        record = _record(b"".join((_ROW, fields, retired, memoryview(chunk.buffer)[start:end])))
        return b"".join((*before, record)) if before else record

    def _told(self, what: Run | Layout | tuple[tuple[str, ...], int], before: list[bytes]) -> int:
        """Gives a number to what rows refer to, and adds a record with that number and its content."""
        self._numbers[what] = number = len(self._numbers) + 1
        said: list[Any]
        if isinstance(what, Run):
            resource = self._resource_of(what)
            kind, said = _RUN, [dataclasses.asdict(what), dict(resource.attributes), resource.schema_url]
        elif isinstance(what, Layout):
            own = [self._catalogue[name] for name in what.places if name not in _OURS and name in self._catalogue]
            groups = (what.derived, what.context, what.probed, what.recorded)
            kind, said = _LAYOUT, [groups, [[metric.name, metric.unit, metric.description] for metric in own]]
        else:
            kind, said = _SEEDS, [*what]
        before.append(_record(kind + _NUMBER.pack(number) + json.dumps(said).encode()))
        return number


def _record(content: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content


def chunks_in(content: bytes, stored: StoredContext) -> Iterator[Chunk]:
    """Yields the rows of a file. A chunk has rows of one run without a gap between them.

    A checksum shows that a record is whole, not that we wrote it: its content is checked like a request, and a record
    that cannot be used is skipped and counted.

    Args:
        content: the file.
        stored: filled with what the rows refer to.
    """
    rows = _rows_in(content, stored)
    row = next(rows, None)
    while row is not None:
        chunk = Chunk(row.run, row.sequence, max(_CHUNK_BYTES, len(row.content)))
        while row is not None and row[:2] == (chunk.run, chunk.last + 1):
            if chunk.end + len(row.content) > chunk.capacity:
                break
            chunk.put(row.content, row.layout, row.seeds, row.retired)
            row = next(rows, None)
        for layout in chunk.layouts:
            layout.chunk = None  # so that the two do not keep each other alive
        yield chunk


class _Known(NamedTuple):
    """What rows of a file refer to, by its number."""

    runs: dict[int, Run]
    layouts: dict[int, Layout]
    seeds: dict[int, tuple[tuple[str, ...], int]]


class _Row(NamedTuple):
    """A row with what it refers to."""

    run: Run
    sequence: int
    layout: Layout
    seeds: tuple[tuple[str, ...], int]
    retired: tuple[str, ...]
    content: bytes


def _rows_in(content: bytes, stored: StoredContext) -> Iterator[_Row]:
    known = _Known({}, {}, {0: ((), NARROW)})
    for record in _records(content, stored):
        kind, body, row = record[:1], record[1:], None
        try:
            if kind == _ROW:
                row = _row(body, known)
            else:
                _learn(kind, body, known, stored)
        except (ValueError, TypeError, LookupError, struct.error, RecursionError):
            stored.skipped += 1
            stored.lost += kind == _ROW
        if row is not None:
            yield row


def _learn(kind: bytes, body: bytes, known: _Known, stored: StoredContext) -> None:
    """Notes what later rows refer to; raises when it is not what we write."""
    if len(body) > _MOST_SAID:
        raise ValueError("it is longer than we write")
    (number,) = _NUMBER.unpack_from(body)
    if any(number in of_kind for of_kind in known):
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
    elif kind == _LAYOUT:
        groups, of_metrics = said
        derived, context, probed, recorded = map(_texts, groups)
        own = [Metric(name, unit=unit, description=text) for name, unit, text in map(_texts_of_metric, of_metrics)]
        stored.metrics.update({metric.name: metric for metric in own if metric.name not in _OURS})
        known.layouts[number] = Layout(derived, context, probed, recorded)
    elif kind == _SEEDS:
        ids, columns = said
        if columns not in (NARROW, WIDTH) or not ids:
            raise ValueError("no step has such seeds")
        known.seeds[number] = _texts(ids), int(columns)
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
            if record[:1] == _ROW:  # a row's record comes last of those written with it
                end = place
        else:
            place += 1
    stored.is_torn = end < len(content)


def _row(body: bytes, known: _Known) -> _Row:
    """Returns a row; raises when what it refers to has been lost, or when we did not write it."""
    sequence, of_run, of_layout, of_seeds, retired_bytes = _FIELDS.unpack_from(body)
    start = _FIELDS.size + retired_bytes
    retired = _texts(json.loads(body[_FIELDS.size : start].decode())) if retired_bytes else ()
    content = body[start:]
    _, _, time_unix_ns, digest, *_, flags = HEAD.unpack_from(content)
    if not 0 < sequence < _MOST_NUMBER or not 0 < time_unix_ns < _MOST_NUMBER:
        raise ValueError("no step has such a number or time")
    if digest >= DIGEST_LIMIT or flags > WHOLE:
        raise ValueError("no step has such a digest or flag")
    layout, seeds = known.layouts[of_layout], known.seeds[of_seeds]
    ids, columns = seeds
    if len(content) != layout.size + 8 * len(ids) * columns:
        raise ValueError("it has not as many bytes as numbers")
    return _Row(known.runs[of_run], sequence, layout, seeds, retired, content)
