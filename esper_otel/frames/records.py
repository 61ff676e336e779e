"""Records: steps as bytes. Spools, black boxes and the blocks of a gateway's store consist of them.

A record is a magic number, whose last byte is the version of the format, then length and CRC-32 of the content, then
the content. The content's first byte is its kind:

- ``H``: what the file is about, as a line of JSON; a black box begins with it.
- ``R``, ``L``, ``S``: a run, a layout, seed ids. Each has a number, by which later records of the file refer to it.
- ``F``: a row, with the bytes that it has in the chunk of a ring: step, epoch, time and what is said of the live seeds,
  then the values, then the cells of the recorded seeds, all of fixed size.
- ``A``: the live seeds after the rows that follow, until the next such record or a row that recorded every live seed. A
  session does not write it, since there the live seeds follow from the rows.

What was cut short or damaged is left out, and reading goes on with the next whole record.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

from esper_otel.frames.block import Chunk, frame_of, table_of
from esper_otel.frames.digest import DIGEST_LIMIT, digest_of
from esper_otel.frames.frame import NARROW, NO_SEEDS, WIDTH, Frame, Run, SeedTable, checked_run
from esper_otel.frames.layout import HEAD, NUMBERS, NUMBERS_PLACE, WHOLE, Layout
from esper_otel.schema import METRICS, Metric

_MARK, _VERSION = b"\xe5\x9e\x0f", b"3"
_MAGIC = _MARK + _VERSION
MAGIC_BYTES = len(_MAGIC)
MOST_BYTES = 32 * 1024 * 1024  # of the records of one block; more than a step with 20,000 seeds takes
_HEAD = struct.Struct("<4sII")
_ABOUT, _RUN, _LAYOUT, _SEEDS, _ROW, _LIVE = b"H", b"R", b"L", b"S", b"F", b"A"
_NUMBER = struct.Struct("<I")
# Sequence; numbers of the run, the layout and the seed ids, 0 for no seeds; how many bytes of retired ids follow.
_FIELDS = struct.Struct("<QIIII")
_MOST_SEQUENCE = _MOST_TIME = 2**63
_MOST_TEXT = 16 * 1024 * 1024  # bytes of names, of seed ids, of a Resource
_MOST_TEXTS = 500_000  # names or ids in one record
_CHUNK_BYTES = 512 * 1024  # of rows that are read; more where one row takes more
_MOST_DAMAGE, _MOST_DAMAGE_BYTES = 1_000, 1024 * 1024  # that is kept of one file
# Damaged lengths may make a reader compute checksums of the same bytes again and again, up to this many times.
_MOST_CHECKED = 8
_MANY_NAMES, _LONG_TEXT = 256, 16 * 1024  # what has more is not kept for the next block
_OURS = frozenset(metric.name for metric in METRICS)
_FAULTS = (ValueError, TypeError, LookupError, struct.error, RecursionError)  # of content that we did not write

_Ids: TypeAlias = tuple[tuple[str, ...], int]  # ids of seeds, and how many columns their cells have


def is_of_another_version(beginning: bytes) -> bool:
    """Whether a file that begins with these ``MAGIC_BYTES`` bytes has another version of this format."""
    return len(beginning) == MAGIC_BYTES and beginning.startswith(_MARK) and beginning != _MAGIC


class DamagedRecord(Exception):
    """Bytes that a ``RecordWriter`` cannot have written; the message says where, and what is wrong."""


class Damage(NamedTuple):
    """A part of a file that could not be used.

    Attributes:
        place: where it begins, in bytes from the beginning of the file.
        why: what is wrong.
        content: the bytes.
    """

    place: int
    why: str
    content: bytes

    def __str__(self) -> str:
        return f"byte {self.place}: {self.why}"


class StoredResource(NamedTuple):
    """The Resource of a run as a file has it.

    Attributes:
        attributes: its attributes.
        schema_url: its schema URL; empty if it has none.
    """

    attributes: Mapping[str, Any]
    schema_url: str


@dataclasses.dataclass(slots=True)
class StoredContext:
    """What files contain in addition to rows.

    Attributes:
        about: what the file read last is about; empty if it does not say that.
        resources: of the runs in them.
        metrics: the user's own metrics in them, by name.
        skipped: how many records were whole, but cannot be used.
        lost: how many of these were rows.
        is_torn: whether the file read last ends in the middle of what was written with a row.
        damage: what could not be used, up to a limit; a file that only ends too early is not damaged.
    """

    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resources: dict[Run, StoredResource] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    lost: int = 0
    is_torn: bool = False
    damage: list[Damage] = dataclasses.field(default_factory=list)

    def note(self, place: int, why: str, content: memoryview) -> None:
        """Adds damage, unless there is too much of it."""
        if len(self.damage) < _MOST_DAMAGE:
            room = _MOST_DAMAGE_BYTES - sum(len(each.content) for each in self.damage)
            self.damage.append(Damage(place, why, bytes(content[: max(room, 0)])))


class _Resource(Protocol):
    """The Resource of OpenTelemetry's SDK, as far as it is written."""

    @property
    def attributes(self) -> Mapping[str, Any]: ...
    @property
    def schema_url(self) -> str: ...


def _no_resource(_: Run) -> _Resource:
    return _NO_RESOURCE


_NO_RESOURCE = StoredResource({}, "")
_NO_METRICS: Mapping[str, Metric] = MappingProxyType({})


class RecordWriter:
    """Makes the records of one file, or of one block of a store.

    Args:
        catalogue: every metric that rows may have, by name; the user's own are written with their units and meanings.
        resource_of: gives a run's Resource.
    """

    def __init__(
        self,
        catalogue: Mapping[str, Metric] = _NO_METRICS,
        resource_of: Callable[[Run], _Resource] = _no_resource,
    ) -> None:
        self._catalogue = catalogue
        self._resource_of = resource_of
        self._numbers: dict[Run | Layout | _Ids, int] = {}
        self._run: tuple[Run | None, int] = (None, 0)  # the last one, since comparing runs takes long
        self._live = NO_SEEDS

    def about(self, about: Mapping[str, Any]) -> bytes:
        """Returns the record that says what a file is about; a line that people can read, too."""
        return _record(_ABOUT + json.dumps(about).encode() + b"\n")

    def row(self, chunk: Chunk, row: int) -> bytes:
        """Returns a row's record, after those of what it refers to and no row before it did."""
        start = chunk.offsets[row]
        layout_number, seeds_number = NUMBERS.unpack_from(chunk.buffer, start + NUMBERS_PLACE)
        layout = chunk.layouts[layout_number]
        before: list[bytes] = []
        end, seeds = start + layout.size, None
        if seeds_number:
            seeds = chunk.seeds[seeds_number], chunk.widths[seeds_number]
            end += 8 * len(seeds[0]) * seeds[1]
        retired = chunk.retired.get(row, ()) if chunk.retired else ()
        content = memoryview(chunk.buffer)[start:end]
        return self._row(chunk.first + row, chunk.run, layout, seeds, retired, before, content)

    def frame(self, frame: Frame) -> bytes:
        """Returns the record of a step that comes from elsewhere than recording, after those of what it refers to."""
        seeds, live = frame.seeds, frame.live
        before: list[bytes] = []
        layout = _layout_of(tuple(frame.derived), tuple(frame.context), tuple(frame.probed), frame.names)
        others = (*frame.derived.values(), *frame.context.values(), *frame.probed.values())
        is_whole = live.cells is seeds.cells and live.ids == seeds.ids
        row = bytearray(layout.size)
        head = (frame.global_step, frame.epoch, frame.time_unix_ns, digest_of(live.ids), len(live.ids))
        layout.pack_into(row, 0, *head, 0, 0, WHOLE if is_whole else 0, *others, *frame.numbers)
        if not is_whole and not (live.cells is self._live.cells and live.ids == self._live.ids):
            width = live.cells.shape[1]
            of_live = (self._numbers.get((live.ids, width)) or self._told((live.ids, width), before)) if live.ids else 0
            before.append(_record(_LIVE + _NUMBER.pack(of_live) + live.cells.tobytes()))
        self._live = live
        ids = (seeds.ids, seeds.cells.shape[1]) if seeds.ids else None
        content = row + seeds.cells.tobytes() if ids else row
        return self._row(frame.sequence, frame.run, layout, ids, frame.retired, before, content)

    def _row(
        self,
        sequence: int,
        run: Run,
        layout: Layout,
        seeds: _Ids | None,
        retired: tuple[str, ...],
        before: list[bytes],
        content: bytes | bytearray | memoryview,
    ) -> bytes:
        """Returns a row's record, after those in ``before`` and those of what it refers to and no row before it did."""
        last, of_run = self._run
        if last is not run:
            of_run = self._numbers.get(run) or self._told(run, before)
            self._run = run, of_run
        of_layout = self._numbers.get(layout) or self._told(layout, before)
        of_seeds = (self._numbers.get(seeds) or self._told(seeds, before)) if seeds else 0
        gone = json.dumps(retired).encode() if retired else b""
        fields = _FIELDS.pack(sequence, of_run, of_layout, of_seeds, len(gone))
        record = _record(b"".join((_ROW, fields, gone, content)))
        return b"".join((*before, record)) if before else record

    def _told(self, what: Run | Layout | _Ids, before: list[bytes]) -> int:
        """Gives a number to what rows refer to, and adds a record with that number and its content."""
        self._numbers[what] = number = len(self._numbers) + 1
        if isinstance(what, Run):
            kind, text = _RUN, _run_text(what, self._resource_of(what))
        elif isinstance(what, Layout):
            kind, text = _LAYOUT, self._layout_text(what)
        else:
            kind, text = _SEEDS, (_ids_text if len(what[0]) <= _MANY_NAMES else _ids_text.__wrapped__)(what)
        before.append(_record(kind + _NUMBER.pack(number) + text))
        return number

    def _layout_text(self, layout: Layout) -> bytes:
        catalogue = self._catalogue
        own = catalogue and [catalogue[name] for name in layout.places if name in catalogue and name not in _OURS]
        if not own:
            return layout.text
        return json.dumps([layout.groups, [[each.name, each.unit, each.description] for each in own]]).encode()


def _record(content: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content


def _layout_of(*groups: tuple[str, ...]) -> Layout:
    """Returns a layout that is not written to a chunk."""
    is_small = sum(map(len, groups)) <= _MANY_NAMES
    return _known_layout(*groups) if is_small else Layout(*groups)


@lru_cache(maxsize=512)
def _known_layout(*groups: tuple[str, ...]) -> Layout:
    return Layout(*groups)


def _run_text(run: Run, resource: _Resource) -> bytes:
    if resource is _NO_RESOURCE:
        return _bare_run_text(run)
    return json.dumps([dataclasses.asdict(run), dict(resource.attributes), resource.schema_url]).encode()


@lru_cache(maxsize=512)
def _ids_text(ids: _Ids) -> bytes:
    return json.dumps(ids).encode()


@lru_cache(maxsize=4096)
def _bare_run_text(run: Run) -> bytes:
    return json.dumps([dataclasses.asdict(run), {}, ""]).encode()


# -- reading ---------------------------------------------------------------------------------------------


def chunks_in(content: bytes, stored: StoredContext) -> Iterator[Chunk]:
    """Yields the rows of a file. A chunk has rows of one run without a gap between them.

    A checksum shows that a record is whole, not that we wrote it: its content is checked like a request, and a record
    that cannot be used is skipped and counted. A chunk is never larger than what is left of the file.

    Args:
        content: the file.
        stored: filled with what the rows refer to, and with what could not be used.
    """
    rows = _rows_in(content, stored, is_sent=True)
    row = next(rows, None)
    while row is not None:
        capacity = max(min(_CHUNK_BYTES, len(content) - row.start), row.end - row.start)
        chunk = Chunk(row.run, row.sequence, capacity)
        while row is not None and row[:2] == (chunk.run, chunk.last + 1):
            if chunk.end + row.end - row.start > chunk.capacity:
                break
            chunk.put(content[row.start : row.end], row.layout, row.seeds, row.retired)
            row = next(rows, None)
        chunk.forget_layouts()
        yield chunk


def frames_in(content: bytes) -> list[Frame]:
    """Returns the frames that a ``RecordWriter`` was given, in their order, with their live seeds.

    Raises:
        DamagedRecord: the bytes are something else.
    """
    if len(content) > MOST_BYTES:
        raise DamagedRecord(f"{len(content)} bytes are more than a block has")
    stored, frames = StoredContext(), list[Frame]()
    for run, sequence, layout, _, retired, start, _, seeds, live in _rows_in(content, stored, is_sent=False):
        frames.append(frame_of(run, sequence, content, start, layout, seeds, live, retired))
    if stored.damage or stored.is_torn:
        raise DamagedRecord(str(stored.damage[0]) if stored.damage else f"it ends after {len(content)} bytes")
    return frames


class _References:
    """What rows of a file refer to, by its number, and the live seeds before the next row.

    Args:
        content: the file.
        is_sent: whether the rows will be sent, as those of a session.
    """

    def __init__(self, content: bytes, *, is_sent: bool) -> None:
        self.content = content
        self.is_sent = is_sent
        self.runs: dict[int, Run] = {}
        self.layouts: dict[int, Layout] = {}
        self.seeds: dict[int, _Ids] = {0: ((), NARROW)}
        self.live = NO_SEEDS


class _StoredRow(NamedTuple):
    """A row with what it refers to, and where its bytes are; without tables of seeds if it will be sent."""

    run: Run
    sequence: int
    layout: Layout
    seeds: _Ids
    retired: tuple[str, ...]
    start: int
    end: int
    table: SeedTable
    live: SeedTable


def _rows_in(content: bytes, stored: StoredContext, *, is_sent: bool) -> Iterator[_StoredRow]:
    """Yields the rows of a file, with the checks of what will be sent if they are."""
    known, stored.about = _References(content, is_sent=is_sent), {}
    for start, end in _records(content, stored):
        kind = content[start : start + 1]
        try:
            if kind == _ROW:
                row = _row(start + 1, end, known)
            else:
                row = None
                _learn(kind, start + 1, end, known, stored)
        except _FAULTS as error:
            stored.skipped += 1
            stored.lost += kind == _ROW
            place = start - _HEAD.size
            stored.note(place, f"{type(error).__name__}: {str(error)[:200]}", memoryview(content)[place:end])
        else:
            if row is not None:
                yield row


def _records(content: bytes, stored: StoredContext) -> Iterator[tuple[int, int]]:
    """Yields where the content of each whole record begins and ends."""
    view, size, head_size = memoryview(content), len(content), _HEAD.size
    place = whole = checked = 0
    while place + head_size <= size and checked <= _MOST_CHECKED * size:
        magic, length, checksum = _HEAD.unpack_from(content, place)
        start, end = place + head_size, place + head_size + length
        if magic == _MAGIC and end <= size:
            if zlib.crc32(view[start:end]) == checksum:
                yield start, end
                place = end
                if content[start : start + 1] in (_ROW, _ABOUT):  # a row's record comes last of those written with it
                    whole = place
                continue
            checked += length
        following = content.find(_MAGIC, place + 1)
        if following < 0:
            break
        stored.note(place, "these bytes are not a whole record", view[place:following])
        place = following
    stored.is_torn = whole < size


def _row(start: int, end: int, known: _References) -> _StoredRow:
    """Returns a row; raises when what it refers to has been lost, or when we did not write it."""
    content = known.content
    sequence, of_run, of_layout, of_seeds, retired_bytes = _FIELDS.unpack_from(content, start)
    start += _FIELDS.size
    retired: tuple[str, ...] = ()
    if retired_bytes:
        retired = _texts(_json(content[start : start + retired_bytes]))
        start += retired_bytes
    if end - start < HEAD.size:
        raise ValueError("it has not as many bytes as numbers")
    _, _, time_unix_ns, digest, _, _, _, flags = HEAD.unpack_from(content, start)
    if sequence >= _MOST_SEQUENCE or (known.is_sent and not (sequence and 0 < time_unix_ns < _MOST_TIME)):
        raise ValueError("no step has such a number or time")
    if digest >= DIGEST_LIMIT or flags > WHOLE:
        raise ValueError("no step has such a digest or flag")
    layout, seeds = known.layouts[of_layout], known.seeds[of_seeds]
    ids, columns = seeds
    if end - start != layout.size + 8 * len(ids) * columns:
        raise ValueError("it has not as many bytes as numbers")
    table = NO_SEEDS if known.is_sent else table_of(content, start + layout.size, ids, columns)
    if flags == WHOLE:
        known.live = table
    return _StoredRow(known.runs[of_run], sequence, layout, seeds, retired, start, end, table, known.live)


def _learn(kind: bytes, start: int, end: int, known: _References, stored: StoredContext) -> None:
    """Notes what later rows refer to; raises when it is not what we write."""
    if kind == _ABOUT:
        about = _json(known.content[start:end])
        if not isinstance(about, dict):
            raise TypeError("it is not an object with names and values")
        stored.about = about
        return
    if end - start < _NUMBER.size:
        raise ValueError("it has no number")
    (number,) = _NUMBER.unpack_from(known.content, start)
    start += _NUMBER.size
    if kind == _LIVE:
        ids, columns = known.seeds[number]
        if end - start != 8 * len(ids) * columns:
            raise ValueError("it has not as many bytes as numbers")
        known.live = table_of(known.content, start, ids, columns)
        return
    if number in known.runs or number in known.layouts or number in known.seeds:
        raise ValueError("its number is taken")
    text = known.content[start:end]
    if kind == _RUN:
        run, attributes, schema_url = _kept(_known_run, text)
        known.runs[number] = run
        if known.is_sent:
            stored.resources[run] = StoredResource(dict(attributes), schema_url)
    elif kind == _LAYOUT:
        groups, own = _kept(_known_names, text)
        known.layouts[number] = Layout(*groups) if known.is_sent else _layout_of(*groups)
        stored.metrics.update(own)
    elif kind == _SEEDS:
        known.seeds[number] = _kept(_known_ids, text)
    else:
        raise ValueError("its kind is not known")


def _kept(parsed: Any, text: bytes) -> Any:
    """Returns a text parsed by a function that remembers its results; long texts are not remembered."""
    return parsed(text) if len(text) <= _LONG_TEXT else parsed.__wrapped__(text)


@lru_cache(maxsize=4096)
def _known_run(text: bytes) -> tuple[Run, dict[str, Any], str]:
    of_run, attributes, schema_url = _json(text)
    run = checked_run(of_run)
    "".join(each for each in of_run.values() if isinstance(each, str)).encode()  # raises where it cannot be sent
    if not run.run_id:
        raise ValueError("it is not a run")
    [url] = _texts([schema_url])
    return run, _attributes(attributes), url


@lru_cache(maxsize=512)
def _known_names(text: bytes) -> tuple[tuple[tuple[str, ...], ...], dict[str, Metric]]:
    groups, of_metrics = _json(text)
    derived, context, probed, recorded = map(_texts, groups)
    own = {}
    for name, unit, meaning in (_texts(each, can_repeat=True) for each in of_metrics):
        own[name] = Metric(name, unit=unit, description=meaning)
    return (derived, context, probed, recorded), {name: own[name] for name in own.keys() - _OURS}


@lru_cache(maxsize=512)
def _known_ids(text: bytes) -> _Ids:
    ids, columns = _json(text)
    if columns not in (NARROW, WIDTH) or not ids:
        raise ValueError("no step has such seeds")
    return _texts(ids), int(columns)


def _json(text: bytes) -> Any:
    """Parses JSON that has no more parts than we write."""
    if len(text) > _MOST_TEXT or text.count(b",") + text.count(b"[") + text.count(b"{") > _MOST_TEXTS:
        raise ValueError("it is longer than we write")
    return json.loads(text.decode())


def _texts(said: Any, *, can_repeat: bool = False) -> tuple[str, ...]:
    if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
        raise TypeError("it is not a list of texts")
    "".join(said).encode()  # raises where a text cannot be sent
    if not can_repeat and len(set(said)) < len(said):
        raise ValueError("a text is there twice")
    return tuple(said)


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
