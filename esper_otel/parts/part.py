"""Parts: the points of a frame in one request. Parts with the same streams share a shape, which maps the values."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import ABSENT, GUESSED_STEP, NARROW, NO_SEEDS, WIDTH, Frame, SeedTable
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, SEED_FIELDS, SEED_RETIRED

# A metric's name, and the seed's id or an empty string.
Stream: TypeAlias = tuple[str, str]

SEED_COLUMNS = {metric.name: column for column, metric in enumerate(SEED_CELLS)}
SEQUENCE: Stream = (FRAME_SEQUENCE.name, "")
POINTS: Stream = (FRAME_POINTS.name, "")
_STEP: Stream = ("esper.global_step", "")
_EPOCH: Stream = ("esper.epoch", "")
_LIVE: Stream = ("esper.seeds", "")
_DIGEST: Stream = ("esper.seeds.digest", "")
# Computing the shape of this many values takes one or two milliseconds.
LARGE = 1_000
_NOT_AMONG_THE_VALUES = (SEQUENCE, POINTS, _STEP, _EPOCH, _LIVE, _DIGEST)


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
        of_cells = [(name, seed, number) for (name, seed), number in place.items() if seed and name in SEED_COLUMNS]
        ids = tuple(sorted({seed for _, seed, _ in of_cells}))
        row = {seed: number for number, seed in enumerate(ids)}
        last = max((SEED_COLUMNS[name] for name, _, _ in of_cells), default=0)
        columns = NARROW if last < NARROW else WIDTH
        cells = [(row[seed] * columns + SEED_COLUMNS[name], number) for name, seed, number in of_cells]
        values = [
            (stream[0], number)
            for stream, number in place.items()
            if not stream[1] and stream not in _NOT_AMONG_THE_VALUES
        ]
        return cls(
            tuple(streams),
            len(place) < len(streams),
            place.get(SEQUENCE),
            place.get(POINTS),
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

    def extended(self, more: PartShape) -> PartShape:
        """Returns the shape with other streams after its own, in much less time than ``of`` would take."""
        count = len(self.streams)
        columns = max(self.columns, more.columns)
        new = [seed for seed in more.ids if not _is_in(self.ids, seed)]
        ids = tuple(sorted((*self.ids, *new))) if new else self.ids
        rows = np.arange(len(self.ids))
        rows += np.searchsorted(np.array([bisect_left(self.ids, seed) for seed in new], np.intp), rows, side="right")
        more_rows = np.array([bisect_left(ids, seed) for seed in more.ids], np.intp)
        cells = [rows[self.cells // self.columns] * columns + self.cells % self.columns]
        cells += [more_rows[more.cells // more.columns] * columns + more.cells % more.columns]

        def place(mine: int | None, theirs: int | None) -> int | None:
            return mine if theirs is None else theirs + count

        return PartShape(
            self.streams + more.streams,
            self.has_repeats or more.has_repeats,
            place(self.sequence, more.sequence),
            place(self.points, more.points),
            place(self.step, more.step),
            place(self.epoch, more.epoch),
            place(self.live, more.live),
            place(self.digest, more.digest),
            tuple(sorted((*self.retired, *more.retired))),
            self.names + more.names,
            np.concatenate((self.name_places, more.name_places + count)),
            ids,
            columns,
            np.concatenate(cells),
            np.concatenate((self.cell_places, more.cell_places + count)),
        )

    def selected(self, keep: npt.NDArray[np.bool_]) -> PartShape:
        """Returns the shape of some of the streams, in much less time than ``of`` would take.

        Args:
            keep: for each stream, whether to keep it.
        """
        streams = tuple(itertools.compress(self.streams, keep.tolist()))
        if self.has_repeats:
            return PartShape.of(streams)
        places = np.cumsum(keep) - 1

        def place(number: int | None) -> int | None:
            return None if number is None or not keep[number] else int(places[number])

        retired = self.retired
        if retired:
            retired = tuple(sorted(seed for name, seed in streams if name == SEED_RETIRED.name))
        of_names, of_cells = keep[self.name_places], keep[self.cell_places]
        row, column = np.divmod(self.cells[of_cells], self.columns)
        rows, new_row = np.unique(row, return_inverse=True)
        columns = NARROW if column.max(initial=0) < NARROW else WIDTH
        return PartShape(
            streams,
            has_repeats=False,
            sequence=place(self.sequence),
            points=place(self.points),
            step=place(self.step),
            epoch=place(self.epoch),
            live=place(self.live),
            digest=place(self.digest),
            retired=retired,
            names=tuple(itertools.compress(self.names, of_names.tolist())),
            name_places=places[self.name_places[of_names]],
            ids=tuple(self.ids[number] for number in rows.tolist()),
            columns=columns,
            cells=new_row * columns + column,
            cell_places=places[self.cell_places[of_cells]],
        )


class Part(NamedTuple):
    """Values of one frame.

    Attributes:
        shape: the streams that the values belong to.
        numbers: the values.
    """

    shape: PartShape
    numbers: npt.NDArray[np.float64]

    @classmethod
    def of(cls, numbers: Mapping[Stream, float]) -> Part:
        """Returns the part with these values."""
        return cls(PartShape.of(list(numbers)), np.fromiter(numbers.values(), np.float64, len(numbers)))

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
        keep = np.fromiter((not is_gone(*stream) for stream in self.shape.streams), np.bool_, len(self.numbers))
        return self if keep.all() else Part(self.shape.selected(keep), self.numbers[keep])


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
        numbers[SEQUENCE] = frame.sequence
        if complete:
            numbers[_DIGEST] = digest_of(frame.live.ids)
            numbers[POINTS] = len(numbers) + 1
    return Part.of(numbers)


class MergedParts(NamedTuple):
    """The merged parts of one frame; ``differing`` counts values that arrived twice and differed.

    If two frames share a time, their values cannot be told apart; the merged part then has no number of points.
    """

    part: Part
    differing: int


def merged(parts: Sequence[Part], *, last_counts: bool = False) -> MergedParts:
    """Merges parts. If a stream occurs twice, the first value is used, or the last one if ``last_counts``."""
    if len(parts) > 1 and any(len(part.numbers) >= LARGE for part in parts):
        joined, differing = parts[0], 0
        for is_large, some in itertools.groupby(parts[1:], lambda part: len(part.numbers) >= LARGE):
            for other in some if is_large else [merged(list(some), last_counts=last_counts).part]:
                found = _both(joined, other, last_counts=last_counts)
                joined, differing = found.part, differing + found.differing
        return MergedParts(joined, differing)
    numbers: dict[Stream, float] = {}
    differing = 0
    is_one = True
    for part in parts:
        for stream, number in zip(part.shape.streams, part.numbers.tolist(), strict=True):
            known = numbers.setdefault(stream, number)
            if known is not number and not is_equal(known, number):
                differing += 1
                is_one = is_one and stream != SEQUENCE
                if last_counts:
                    numbers[stream] = number
    if not is_one:
        numbers.pop(POINTS, None)
    return MergedParts(Part.of(numbers), differing)


def _both(first: Part, other: Part, *, last_counts: bool) -> MergedParts:
    """Merges two parts without making the shape of the larger one anew."""
    large, small = (first, other) if len(first.numbers) >= len(other.numbers) else (other, first)
    more = dict(zip(small.shape.streams, small.numbers.tolist(), strict=True))
    known = {stream: place for place, stream in enumerate(large.shape.streams) if stream in more}
    numbers, differing, is_one = large.numbers, 0, True
    if known:
        numbers = numbers.copy()
        for stream, place in known.items():
            number = more.pop(stream)
            if not is_equal(float(numbers[place]), number):
                differing += 1
                is_one = is_one and stream != SEQUENCE
                if last_counts == (small is other):
                    numbers[place] = number
    shape = large.shape
    if more:
        shape = shape.extended(PartShape.of(list(more)) if known else small.shape)
        numbers = np.concatenate((numbers, np.fromiter(more.values(), np.float64, len(more))))
    part = Part(shape, numbers)
    return MergedParts(part if is_one else part.without(lambda name, _: name == POINTS[0]), differing)


def _is_in(ids: tuple[str, ...], seed: str) -> bool:
    place = bisect_left(ids, seed)
    return place < len(ids) and ids[place] == seed


def is_equal(one: float, other: float) -> bool:
    """Returns whether two values are equal; NaN equals NaN."""
    return one == other or (one != one and other != other)  # noqa: PLR0124 - NaN
