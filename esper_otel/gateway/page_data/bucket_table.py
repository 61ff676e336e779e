"""The steps of one rank, or of a range of them, in buckets that become wider as steps are added."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.gateway.page_data.buckets import Buckets, Heads, StepArrays, Values, reduced_heads

MOST_ROWS = 16_384
# Rows of a table times its metrics: 36 bytes each, 56 if some values are not finite.
MOST_CELLS = 2**20
_FIRST, _LAST = 0, 2**63 - 1


class Range(NamedTuple):
    """Step numbers, both ends included."""

    first: int = _FIRST
    last: int = _LAST


class DirtyBucket(NamedTuple):
    """A bucket that has to be filled again, because one of its steps was corrected."""

    segment: int
    key: int


class Rows(NamedTuple):
    """Rows of an answer: consecutive buckets of one segment together.

    Attributes:
        segment: the segment.
        starts: where in ``rows`` each row begins.
        rows: the buckets, in order of their keys.
        heads: the heads of the rows.
    """

    segment: int
    starts: npt.NDArray[np.intp]
    rows: npt.NDArray[np.intp]
    heads: Heads


class Table:
    """Buckets of steps by segment.

    Args:
        covers: the steps that it takes; others are ignored.

    Attributes:
        covers: the same.
        life: an id that no other table has.
        width: how many step numbers a bucket covers, a power of two.
        segments: the buckets of each segment.
        dirty: buckets to be filled again.
        used_s: when it was last shown.
    """

    def __init__(self, covers: Range) -> None:
        self.covers = covers
        self.life: str = secrets.token_hex(4)
        self.width: int = 1
        self.segments: list[Buckets] = []
        self.dirty: set[DirtyBucket] = set()
        self.used_s: float = 0.0

    @property
    def rows(self) -> int:
        """How many buckets there are."""
        return sum(buckets.count for buckets in self.segments)

    @property
    def cells(self) -> int:
        """For how many values there is memory."""
        return sum(buckets.cells for buckets in self.segments)

    def add(self, segment: int, new: StepArrays, version: int, *, is_correction: bool = False) -> None:
        """Adds steps to a segment.

        Args:
            segment: its number.
            new: the steps.
            version: the version in which the buckets change.
            is_correction: whether they replace steps that were added before. A bucket with several steps cannot
                forget one of them; it becomes dirty.
        """
        if self.covers != (_FIRST, _LAST):
            inside = (new.steps >= self.covers.first) & (new.steps <= self.covers.last)
            if not inside.all():
                new = new.some(inside)
        if not len(new.steps):
            return
        while len(self.segments) <= segment:
            self.segments.append(Buckets())
        buckets = self.segments[segment]
        if is_correction:
            new = self._without_replaced(segment, new, version)
        if len(new.steps):
            buckets.add(new, self.width, version)

    def _without_replaced(self, segment: int, new: StepArrays, version: int) -> StepArrays:
        """Empties buckets whose only step is replaced, and notes the others; returns the steps to add."""
        buckets = self.segments[segment]
        keys = new.steps // self.width
        rows = buckets.find(keys)
        known = rows >= 0
        single = known & (buckets.heads.size[rows] <= 1) & (buckets.heads.time[rows] == new.times)
        if single.any():
            buckets.empty(rows[single])
        many = known & ~single
        self.dirty.update(DirtyBucket(segment, key) for key in keys[many].tolist())
        heads = buckets.heads
        np.minimum.at(heads.lowest, rows[many], new.numbers[many])
        np.maximum.at(heads.highest, rows[many], new.numbers[many])
        heads.changed[rows[many]] = version
        return new.some(~many)

    def is_too_large(self, columns: int) -> bool:
        """Whether the buckets should be made wider, if there are so many metrics."""
        most = min(MOST_ROWS, MOST_CELLS // max(columns, 1))
        return self.rows > max(most, 2 * len(self.segments))

    def coarsening(self) -> Generator[None, None, None]:
        """Doubles the width of all buckets, in parts; nothing changes before the last one."""
        wider: list[Buckets] = []
        for buckets in self.segments:
            coarse = yield from buckets.coarsened()
            wider.append(coarse)
        self.segments = wider
        self.width *= 2
        self.dirty = {DirtyBucket(segment, key >> 1) for segment, key in self.dirty}

    def dirty_ranges(self) -> list[tuple[DirtyBucket, Range]]:
        """Returns the dirty buckets, each with the positions in the store where its steps are."""
        found = []
        for dirty in self.dirty:
            buckets = self.segments[dirty.segment]
            (row,) = buckets.find(np.array([dirty.key])).tolist()
            found.append((dirty, Range(int(buckets.heads.lowest[row]), int(buckets.heads.highest[row]))))
        return found

    def refill(self, dirty: DirtyBucket, steps: list[StepArrays], version: int) -> None:
        """Replaces what is in a dirty bucket by those of these steps that belong in it."""
        buckets = self.segments[dirty.segment]
        buckets.empty(buckets.find(np.array([dirty.key])))
        is_filled = False
        for some in steps:
            inside = some.steps // self.width == dirty.key
            if inside.any():
                self.add(dirty.segment, some.some(inside), version)
                is_filled = True
        self.dirty.discard(dirty)
        if not is_filled:  # a row that goes is in no answer, so everything is sent again
            self.life = secrets.token_hex(4)

    def positions(self, wanted: Range) -> Range | None:
        """Returns the positions in the store of the steps in a range; None if there is none."""
        lowest, highest = [], []
        for buckets in self.segments:
            heads = buckets.heads
            inside = (heads.size > 0) & (heads.last_step >= wanted.first) & (heads.first_step <= wanted.last)
            if inside.any():
                lowest.append(int(heads.lowest[inside].min()))
                highest.append(int(heads.highest[inside].max()))
        return Range(min(lowest), max(highest)) if lowest else None

    def counted(self, wanted: Range) -> int:
        """Returns how many steps there are in the buckets of a range."""
        steps = 0
        for buckets in self.segments:
            heads = buckets.heads
            inside = (heads.size > 0) & (heads.last_step >= wanted.first) & (heads.first_step <= wanted.last)
            steps += int(heads.size[inside].sum())
        return steps

    def shown(self, wanted: Range, most: int) -> tuple[int, list[Rows]]:
        """Returns rows for a range of steps.

        Args:
            wanted: the range.
            most: how many rows there may be, unless there are more segments.

        Returns:
            How many step numbers a row covers, and the rows of each segment that has any.
        """
        ordered = []
        for segment, buckets in enumerate(self.segments):
            heads, order = buckets.heads, buckets.order
            inside = (heads.size > 0) & (heads.last_step >= wanted.first) & (heads.first_step <= wanted.last)
            rows = order[inside[order]]
            if len(rows):
                ordered.append((segment, rows, heads.keys[rows]))
        wide = 0
        starts = [_starts(keys) for _, _, keys in ordered]
        while sum(map(len, starts)) > max(most, len(ordered)):
            wide += 1
            starts = [_starts(keys >> wide) for _, _, keys in ordered]
        found = []
        for (segment, rows, keys), begins in zip(ordered, starts, strict=True):
            heads = Heads(*(each[rows] for each in self.segments[segment].heads))
            if wide:
                heads = reduced_heads(heads, begins, keys[begins] >> wide)
            found.append(Rows(segment, begins, rows, heads))
        return self.width << wide, found

    def values(self, row: Rows, column: int, first: int) -> Values:
        """Returns a metric's values in the rows of a segment, from the ``first`` one on; at least one is left.

        Args:
            row: the rows.
            column: the metric.
            first: how many rows to leave out.
        """
        begin = row.starts[first]
        of_rows = self.segments[row.segment].column(column, row.rows[begin:])
        if len(row.starts) == len(row.rows):
            return of_rows
        return of_rows.reduced(row.starts[first:] - begin)


def _starts(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    return np.flatnonzero(np.diff(keys, prepend=-1))
