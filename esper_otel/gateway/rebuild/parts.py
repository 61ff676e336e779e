"""Parts: the points of a frame in one request. Parts with the same streams share a shape, which maps the values."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import ABSENT, GUESSED_STEP, NARROW, NO_SEEDS, WIDTH, Frame, SeedTable
from esper_otel.gateway.receive.request import PointBlock
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, SEED_FIELDS, SEED_RETIRED

# A metric's name, and the seed's id or an empty string.
Stream: TypeAlias = tuple[str, str]

_COLUMNS = {metric.name: column for column, metric in enumerate(SEED_CELLS)}
_SEQUENCE: Stream = (FRAME_SEQUENCE.name, "")
_POINTS: Stream = (FRAME_POINTS.name, "")
_STEP: Stream = ("esper.global_step", "")
_EPOCH: Stream = ("esper.epoch", "")
_LIVE: Stream = ("esper.seeds", "")
_DIGEST: Stream = ("esper.seeds.digest", "")
_NOT_AMONG_THE_VALUES = (_SEQUENCE, _POINTS, _STEP, _EPOCH, _LIVE, _DIGEST)


@dataclass(frozen=True, slots=True, eq=False)
class PartShape:
    """The streams that the values of a part belong to.

    Attributes:
        streams: the stream of each value.
        has_repeats: whether a stream has several values.
        sequence: index of the value that holds the frame's number; None if there is none, as in the next five.
        points: index of the frame's number of points.
        step: index of its global step.
        epoch: index of its epoch.
        live: index of its number of live seeds.
        digest: index of the digest of its live seeds.
        retired: seeds whose lives ended before the frame, sorted.
        names: step metrics that are values of the frame.
        name_places: indices of their values.
        ids: seeds with cells, sorted.
        columns: number of columns of the table of cells.
        cells: indices into the flattened table of cells.
        cell_places: indices of the values that belong into these cells.
    """

    streams: tuple[Stream, ...]
    has_repeats: bool
    sequence: int | None
    points: int | None
    step: int | None
    epoch: int | None
    live: int | None
    digest: int | None
    retired: tuple[str, ...]
    names: tuple[str, ...]
    name_places: npt.NDArray[np.intp]
    ids: tuple[str, ...]
    columns: int
    cells: npt.NDArray[np.intp]
    cell_places: npt.NDArray[np.intp]

    @classmethod
    def of(cls, streams: Sequence[Stream]) -> PartShape:
        """Returns the shape for values of these streams."""
        place = {stream: number for number, stream in enumerate(streams)}
        of_cells = [(name, seed, number) for (name, seed), number in place.items() if seed and name in _COLUMNS]
        ids = tuple(sorted({seed for _, seed, _ in of_cells}))
        row = {seed: number for number, seed in enumerate(ids)}
        last = max((_COLUMNS[name] for name, _, _ in of_cells), default=0)
        columns = NARROW if last < NARROW else WIDTH
        cells = [(row[seed] * columns + _COLUMNS[name], number) for name, seed, number in of_cells]
        values = [
            (stream[0], number)
            for stream, number in place.items()
            if not stream[1] and stream not in _NOT_AMONG_THE_VALUES
        ]
        return cls(
            tuple(streams),
            len(place) < len(streams),
            place.get(_SEQUENCE),
            place.get(_POINTS),
            place.get(_STEP),
            place.get(_EPOCH),
            place.get(_LIVE),
            place.get(_DIGEST),
            tuple(sorted(seed for name, seed in place if name == SEED_RETIRED.name)),
            tuple(name for name, _ in values),
            np.array([number for _, number in values], np.intp),
            ids,
            columns,
            np.array([cell for cell, _ in cells], np.intp),
            np.array([number for _, number in cells], np.intp),
        )


class Part(NamedTuple):
    """Values of one frame.

    Attributes:
        shape: the streams that the values belong to.
        numbers: the values.
    """

    shape: PartShape
    numbers: npt.NDArray[np.float64]

    def number(self, place: int | None) -> float | None:
        """Returns the value at an index from the shape; None if the index is None."""
        return None if place is None else float(self.numbers[place])

    def values(self) -> dict[str, float]:
        """Returns the values of step metrics, by name."""
        return dict(zip(self.shape.names, self.numbers[self.shape.name_places].tolist(), strict=True))

    def seeds(self) -> SeedTable:
        """Returns the table of the seeds' cells."""
        shape = self.shape
        if not shape.ids:
            return NO_SEEDS
        cells = np.full(len(shape.ids) * shape.columns, ABSENT)
        cells[shape.cells] = self.numbers[shape.cell_places]
        return SeedTable(shape.ids, cells.reshape(-1, shape.columns))

    def without(self, is_gone: Callable[[str, str], bool]) -> Part:
        """Returns the part without the streams for which ``is_gone(metric, seed)`` is true."""
        keep = [place for place, stream in enumerate(self.shape.streams) if not is_gone(*stream)]
        if len(keep) == len(self.numbers):
            return self
        return Part(PartShape.of([self.shape.streams[place] for place in keep]), self.numbers[keep])


def part_of(frame: Frame, *, complete: bool) -> Part:
    """Returns the points that a stored frame was made from.

    The sender of an incomplete frame stated only what is recorded in it. For a complete frame, everything that the
    sender usually states is known. Values that the gateway derived are in the frame's context, and left out.
    """
    values = frame.values() if complete else {**frame.recorded, _STEP[0]: frame.global_step}
    if not frame.sequence and _LIVE[0] not in frame.names:
        values.pop(_LIVE[0], None)  # counted by the gateway; a plain sender did not state it
    if frame.epoch:  # an epoch of 0 may just be unknown; if the sender stated it, it is recorded
        values[_EPOCH[0]] = frame.epoch
    numbers: dict[Stream, float] = {
        (name, ""): value for name, value in values.items() if name in frame.names or name not in frame.context
    }
    if frame.global_step >= GUESSED_STEP:
        del numbers[_STEP]
    numbers |= dict.fromkeys([(SEED_RETIRED.name, seed) for seed in frame.retired], 1.0)
    for seed, cells in frame.seeds.rows():
        numbers |= {(SEED_CELLS[SEED_FIELDS.index(field)].name, seed): cell for field, cell in cells.items()}
    if frame.sequence:
        numbers[_SEQUENCE] = frame.sequence
        if complete:
            numbers[_DIGEST] = digest_of(frame.live.ids)
            numbers[_POINTS] = len(numbers) + 1
    return Part(PartShape.of(list(numbers)), np.fromiter(numbers.values(), np.float64, len(numbers)))


class MergedParts(NamedTuple):
    """The merged parts of one frame; ``differing`` counts values that arrived twice and differed.

    If two frames share a time, their values cannot be told apart; the merged part then has no number of points.
    """

    part: Part
    differing: int


def merged(parts: Iterable[Part], *, last_counts: bool = False) -> MergedParts:
    """Merges parts. If a stream occurs twice, the first value is used, or the last one if ``last_counts``."""
    numbers: dict[Stream, float] = {}
    differing = 0
    is_one = True
    for part in parts:
        for stream, number in zip(part.shape.streams, part.numbers.tolist(), strict=True):
            known = numbers.setdefault(stream, number)
            if known is not number and not is_equal(known, number):
                differing += 1
                is_one = is_one and stream != _SEQUENCE
                if last_counts:
                    numbers[stream] = number
    if not is_one:
        numbers.pop(_POINTS, None)
    return MergedParts(
        Part(PartShape.of(list(numbers)), np.fromiter(numbers.values(), np.float64, len(numbers))), differing
    )


def is_equal(one: float, other: float) -> bool:
    """Returns whether two values are equal; NaN equals NaN."""
    return one == other or (one != one and other != other)  # noqa: PLR0124 - NaN


# An empty shape takes as much memory as this many values.
_EMPTY_SHAPE = 16
# Computing the shape of this many values takes one or two milliseconds.
_LARGE = 1_000
# Kinds of blocks whose shapes are known.
_MOST_KINDS = 1_000


class PartShapes:
    """A cache of shapes, because most steps have the same streams. Its size is limited by the total number of values.

    Threads: call ``parts`` from one thread and ``prepare`` from another; they share the cache.
    """

    def __init__(self, most_values: int = 500_000) -> None:
        self._most_values = most_values
        self._values = 0
        self._words = 0
        self._known: dict[tuple[int, bytes], PartShape] = {}
        self._numbers = itertools.count()
        self._of_kinds: OrderedDict[object, list[tuple[int, slice, PartShape]]] = OrderedDict()
        self._kind_values = 0
        self._vocabularies: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        self._lock = Lock()

    def prepare(self, block: PointBlock) -> None:
        """Computes the shapes of large frames in advance, because that takes long."""
        vocabulary = self._vocabulary(block)
        for some in _frames(block.times):
            if some.stop - some.start >= _LARGE:
                self._part(block, vocabulary, some)

    def parts(self, block: PointBlock) -> Iterator[tuple[int, MergedParts]]:
        """Yields the times in a block, each with its part."""
        kind = block.kind
        if kind is not None and kind in self._of_kinds:
            self._of_kinds.move_to_end(kind)
            for start, some, shape in self._of_kinds[kind]:
                yield block.times.item(start), MergedParts(Part(shape, block.values[some].copy()), 0)
            return
        vocabulary = self._vocabulary(block)
        known: list[tuple[int, slice, PartShape]] = []
        for some in _frames(block.times):
            part = self._part(block, vocabulary, some)
            known.append((some.start, some, part.part.shape))
            yield block.times.item(some.start), part
        if kind is not None and not any(len(shape.streams) < some.stop - some.start for _, some, shape in known):
            self._of_kinds[kind] = known
            self._kind_values += len(block.times)
            while self._kind_values > self._most_values or len(self._of_kinds) > _MOST_KINDS:
                self._kind_values -= self._of_kinds.popitem(last=False)[1][-1][1].stop

    def _part(self, block: PointBlock, vocabulary: int, some: slice) -> MergedParts:
        streams, values = block.streams[some], block.values[some]
        shape = self._shape(block, vocabulary, streams)
        if not shape.has_repeats:
            return MergedParts(Part(shape, values.copy()), 0)  # a waiting frame must not keep the whole request
        _, first, of_stream = np.unique(streams, return_index=True, return_inverse=True)
        known = values[first[of_stream]]
        differs = (values != known) & ~(np.isnan(values) & np.isnan(known))
        keep = np.sort(first)
        names = dict(zip(block.names, itertools.count()))
        if (differs & (streams == names.get(_SEQUENCE[0], -1))).any():
            keep = keep[streams[keep] != names.get(_POINTS[0], -1)]
        return MergedParts(Part(self._shape(block, vocabulary, streams[keep]), values[keep]), int(differs.sum()))

    def _vocabulary(self, block: PointBlock) -> int:
        """Returns a number for the block's names and seeds, so that these long tuples are hashed once per block."""
        words = (block.names, block.seeds)
        with self._lock:
            number = self._vocabularies.pop(words, None)
            if number is None:
                number = next(self._numbers)
                self._words += len(block.names) + len(block.seeds)
                while self._words > self._most_values and self._vocabularies:
                    names, seeds = next(iter(self._vocabularies))
                    del self._vocabularies[names, seeds]
                    self._words -= len(names) + len(seeds)
            self._vocabularies[words] = number
        return number

    def _shape(self, block: PointBlock, vocabulary: int, streams: npt.NDArray[np.int64]) -> PartShape:
        key = (vocabulary, streams.tobytes())
        with self._lock:
            shape = self._known.pop(key, None)
            if shape is not None:
                self._known[key] = shape  # keep the most recently used last
                return shape
        shape = PartShape.of(_streams(block, streams))
        with self._lock:
            if key not in self._known:
                self._values += len(streams) + _EMPTY_SHAPE
            self._known[key] = shape
            while self._values > self._most_values and len(self._known) > 1:
                self._values -= len(self._known.pop(next(iter(self._known))).streams) + _EMPTY_SHAPE
        return shape


def _frames(times: npt.NDArray[np.uint64]) -> Iterator[slice]:
    """Yields the range of points for each time."""
    bounds = [0, *(np.flatnonzero(times[1:] != times[:-1]) + 1).tolist(), len(times)]
    return itertools.starmap(slice, itertools.pairwise(bounds))


def _streams(block: PointBlock, streams: npt.NDArray[np.int64]) -> list[Stream]:
    seed, name = np.divmod(streams, len(block.names))
    names, seeds = block.names, block.seeds
    return [(names[n], seeds[s - 1] if s else "") for s, n in zip(seed.tolist(), name.tolist(), strict=True)]
