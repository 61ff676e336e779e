"""Parts: what one request holds of a frame. Parts of equal streams share a shape: what becomes of each value."""

from __future__ import annotations

import itertools
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

# A metric's name, and the seed's id or nothing.
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
    """Which streams the values of a part belong to.

    Attributes:
        streams: the stream of each value.
        has_repeats: whether a stream has several.
        sequence: the place of the frame's sequence among the values; None when it is not there, as below.
        points: of the frame's number of points.
        step: of its global step.
        epoch: of its epoch.
        live: of its number of live seeds.
        digest: of the digest of these.
        retired: seeds whose lives ended before the frame, sorted.
        names: step metrics that are values of the frame.
        name_places: their places.
        ids: seeds, sorted.
        columns: of the table of their cells.
        cells: places in the flat table of cells.
        cell_places: the places of the values that belong there.
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
        """The shape of values of these streams."""
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
        shape: which streams they belong to.
        numbers: the values.
    """

    shape: PartShape
    numbers: npt.NDArray[np.float64]

    def number(self, place: int | None) -> float | None:
        """The value at a place of the shape's."""
        return None if place is None else float(self.numbers[place])

    def values(self) -> dict[str, float]:
        """The step's values."""
        return dict(zip(self.shape.names, self.numbers[self.shape.name_places].tolist(), strict=True))

    def seeds(self) -> SeedTable:
        """The seeds' rows."""
        shape = self.shape
        if not shape.ids:
            return NO_SEEDS
        cells = np.full(len(shape.ids) * shape.columns, ABSENT)
        cells[shape.cells] = self.numbers[shape.cell_places]
        return SeedTable(shape.ids, cells.reshape(-1, shape.columns))

    def without(self, is_gone: Callable[[str, str], bool]) -> Part:
        """The part without the values of some streams, of which the metric and the seed are given."""
        keep = [place for place, stream in enumerate(self.shape.streams) if not is_gone(*stream)]
        if len(keep) == len(self.numbers):
            return self
        return Part(PartShape.of([self.shape.streams[place] for place in keep]), self.numbers[keep])


def part_of(frame: Frame, *, complete: bool) -> Part:
    """The points that a stored frame was made of.

    One that is not complete has recorded what was said of it; of one that is, all that its sender says is known. What
    the gateway has found out stands in the context.
    """
    values = frame.values() if complete else {**frame.recorded, _STEP[0]: frame.global_step}
    if not frame.sequence and _LIVE[0] not in frame.names:
        values.pop(_LIVE[0], None)  # a plain sender's, of which it was counted
    if frame.epoch:  # of 0 in an incomplete frame it is known only where it was recorded whether somebody said it
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
    """Parts of one frame put together; ``differing`` counts values that came twice and were not the same.

    Of two frames at one time nobody knows which values are whose: the part does not say then how many points it has.
    """

    part: Part
    differing: int


def merged(parts: Iterable[Part], *, last_counts: bool = False) -> MergedParts:
    """The parts as one. Of a stream that comes twice the first value counts, or the last."""
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
    """Whether two values are the same; NaN is the same as NaN."""
    return one == other or (one != one and other != other)  # noqa: PLR0124 - NaN


# As much memory as so many values takes a shape without any.
_EMPTY_SHAPE = 16
# To find out the shape of so many values takes a millisecond or two.
_LARGE = 1_000


class PartShapes:
    """Remembers shapes, since steps are alike; bounded by how many values they are for.

    Threads: ``parts`` belongs to one, ``prepare`` to another; each uses what the other has found out.
    """

    def __init__(self, most_values: int = 500_000) -> None:
        self._most_values = most_values
        self._values = 0
        self._words = 0
        self._known: dict[tuple[int, bytes], PartShape] = {}
        self._numbers = itertools.count()
        self._vocabularies: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        self._lock = Lock()

    def prepare(self, block: PointBlock) -> None:
        """Finds out beforehand what takes long: the shapes of large frames."""
        vocabulary = self._vocabulary(block)
        for some in _frames(block.times):
            if some.stop - some.start >= _LARGE:
                self._part(block, vocabulary, some)

    def parts(self, block: PointBlock) -> Iterator[tuple[int, MergedParts]]:
        """The times in a block, each with its part."""
        vocabulary = self._vocabulary(block)
        for some in _frames(block.times):
            yield int(block.times[some.start]), self._part(block, vocabulary, some)

    def _part(self, block: PointBlock, vocabulary: int, some: slice) -> MergedParts:
        streams, values = block.streams[some], block.values[some]
        shape = self._shape(block, vocabulary, streams)
        if not shape.has_repeats:
            return MergedParts(Part(shape, values.copy()), 0)  # a frame that waits must not keep the whole request
        _, first, of_stream = np.unique(streams, return_index=True, return_inverse=True)
        known = values[first[of_stream]]
        differs = (values != known) & ~(np.isnan(values) & np.isnan(known))
        keep = np.sort(first)
        names = dict(zip(block.names, itertools.count()))
        if (differs & (streams == names.get(_SEQUENCE[0], -1))).any():
            keep = keep[streams[keep] != names.get(_POINTS[0], -1)]
        return MergedParts(Part(self._shape(block, vocabulary, streams[keep]), values[keep]), int(differs.sum()))

    def _vocabulary(self, block: PointBlock) -> int:
        """A number for what streams are counted in; hashed once a block, since it may be long."""
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
                self._known[key] = shape  # the last used comes last
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
    """Where the points of each time stand."""
    bounds = [0, *(np.flatnonzero(times[1:] != times[:-1]) + 1).tolist(), len(times)]
    return itertools.starmap(slice, itertools.pairwise(bounds))


def _streams(block: PointBlock, streams: npt.NDArray[np.int64]) -> list[Stream]:
    seed, name = np.divmod(streams, len(block.names))
    names, seeds = block.names, block.seeds
    return [(names[n], seeds[s - 1] if s else "") for s, n in zip(seed.tolist(), name.tolist(), strict=True)]
