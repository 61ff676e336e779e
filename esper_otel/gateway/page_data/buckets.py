"""Buckets: the steps of one segment, thinned without hiding a spike or a value that is not finite.

A bucket covers ``width`` step numbers, from a multiple of the width on. Each metric has in it the smallest, the largest
and the last value, the sum, and how many values were finite, NaN, +Inf and -Inf. A bucket of width 1 is a single step.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint32]

# The step of the first value that is not finite, where there is none.
NO_STEP = 2**62
_FEWEST_ROWS, _FEWEST_COLUMNS = 16, 8
# Room for all rows that a table may have, and for those added before it is made coarser. Zeros take memory only where
# something is written.
_MOST_ROWS = 2**14 + 2**9
_COPIED_ROWS = 2**10
_EVERY = slice(None)


class StepArrays(NamedTuple):
    """Steps that have the same metrics, in order of time.

    Attributes:
        steps: their numbers, shape (steps,).
        epochs: their epochs, shape (steps,).
        times: Unix nanoseconds, shape (steps,).
        numbers: their positions in the store, shape (steps,).
        columns: the column of each metric, shape (metrics,), all different.
        last: the values, or for metrics of seeds their mean over the seeds, shape (metrics, steps).
        low: the smallest finite value; infinity where there is none: it is missing or not finite. As ``last``.
        high: the largest finite value, likewise; minus infinity where there is none.
        odd: how many values are NaN, +Inf and -Inf, shape (3, metrics, steps); None if there are none.
    """

    steps: Ints
    epochs: Ints
    times: Ints
    numbers: Ints
    columns: npt.NDArray[np.intp]
    last: Floats
    low: Floats
    high: Floats
    odd: Counts | None

    def some(self, which: slice | npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> StepArrays:
        """Returns some of the steps."""
        return StepArrays(
            *(self.steps[which], self.epochs[which], self.times[which], self.numbers[which], self.columns),
            *(self.last[:, which], self.low[:, which], self.high[:, which]),
            None if self.odd is None else self.odd[:, :, which],
        )


class Heads(NamedTuple):
    """What buckets have besides the values of metrics; each an array with one number for each bucket.

    Attributes:
        keys: the smallest step number that belongs in it, divided by the width.
        first_step: the smallest step in it.
        last_step: the largest step in it.
        size: how many steps are in it.
        lowest: the smallest position in the store of its steps.
        highest: the largest position in the store of its steps.
        time: Unix nanoseconds of its last step.
        epoch: epoch of its last step.
        changed: the version in which it last changed.
    """

    keys: Ints
    first_step: Ints
    last_step: Ints
    size: Ints
    lowest: Ints
    highest: Ints
    time: Ints
    epoch: Ints
    changed: Ints


class Values(NamedTuple):
    """What buckets have of one metric, or of several in a first dimension.

    Attributes:
        last: the last value, also if it is not finite; NaN if there is none.
        low: the smallest finite value; infinity if there is none.
        high: the largest finite value; minus infinity if there is none.
        total: the sum of the finite values.
        finite: how many values are finite.
        odd: how many values are NaN, +Inf and -Inf, in a first dimension; None if all are finite.
        odd_step: the first step whose value is not finite, or ``NO_STEP``; None if all are finite.
    """

    last: Floats
    low: Floats
    high: Floats
    total: Floats
    finite: Counts
    odd: Counts | None
    odd_step: Ints | None

    def column(self, column: int, rows: slice | npt.NDArray[np.intp] = _EVERY) -> Values:
        """Returns what these rows have of one metric."""
        return Values(
            self.last[column][rows],
            self.low[column][rows],
            self.high[column][rows],
            self.total[column][rows],
            self.finite[column][rows],
            None if self.odd is None else self.odd[:, column][:, rows],
            None if self.odd_step is None else self.odd_step[column][rows],
        )

    def reduced(self, starts: npt.NDArray[np.intp]) -> Values:
        """Returns one bucket for the buckets from each start to before the next one; they are of one metric."""
        is_there = self.finite > 0
        if self.odd is not None:
            is_there |= self.odd.any(axis=0)
        newest = np.append(starts[1:], len(self.last)) - 1
        last = self.last[newest]
        if not is_there[newest].all():
            newest = np.maximum.reduceat(np.where(is_there, np.arange(len(self.last)), -1), starts)
            last = np.where(newest < 0, np.nan, self.last[newest])
        return Values(
            last,
            np.minimum.reduceat(self.low, starts),
            np.maximum.reduceat(self.high, starts),
            np.add.reduceat(self.total, starts),
            np.add.reduceat(self.finite, starts, dtype=np.uint32),
            None if self.odd is None else np.add.reduceat(self.odd, starts, axis=1, dtype=np.uint32),
            None if self.odd_step is None else np.minimum.reduceat(self.odd_step, starts),
        )


def reduced_heads(heads: Heads, starts: npt.NDArray[np.intp], keys: Ints) -> Heads:
    """Returns one head for the buckets from each start up to the next one.

    Args:
        heads: in order of their keys.
        starts: where each new bucket begins.
        keys: the keys of the new buckets.
    """
    newest = np.append(starts[1:], len(heads.keys)) - 1
    return Heads(
        keys,
        np.minimum.reduceat(heads.first_step, starts),
        np.maximum.reduceat(heads.last_step, starts),
        np.add.reduceat(heads.size, starts),
        np.minimum.reduceat(heads.lowest, starts),
        np.maximum.reduceat(heads.highest, starts),
        np.maximum.reduceat(heads.time, starts),
        heads.epoch[newest],
        np.maximum.reduceat(heads.changed, starts),
    )


class Buckets:
    """The buckets of one segment, in order of creation; they may be created in any order of their keys.

    Attributes:
        count: how many there are, including ones that have been emptied.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self._heads = Heads(*(np.zeros(_FEWEST_ROWS, np.int64) for _ in Heads._fields))
        self._values = _room(_FEWEST_COLUMNS, _FEWEST_ROWS)
        self._order: npt.NDArray[np.intp] | None = None  # None: by key as they are

    @property
    def cells(self) -> int:
        """How many values of metrics there are, present or not."""
        return len(self._values.last) * self.count

    @property
    def heads(self) -> Heads:
        """The heads in order of creation; views."""
        return Heads(*(each[: self.count] for each in self._heads))

    def column(self, column: int, rows: npt.NDArray[np.intp]) -> Values:
        """Returns what some buckets have of a metric, which may have no value in any of them."""
        if column < len(self._values.last):
            return self._values.column(column, rows)
        none = np.full(len(rows), np.nan)
        nothing = np.zeros(len(rows), np.uint32)
        return Values(
            none, np.full(len(rows), np.inf), np.full(len(rows), -np.inf), np.zeros(len(rows)), nothing, None, None
        )

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """The buckets in order of their keys."""
        return np.arange(self.count) if self._order is None else self._order

    def find(self, keys: Ints) -> npt.NDArray[np.intp]:
        """Returns the bucket of each key; -1 where there is none."""
        if not self.count:
            return np.full(len(keys), -1)
        known = self.heads.keys if self._order is None else self.heads.keys[self._order]
        places = np.minimum(np.searchsorted(known, keys), self.count - 1)
        rows = places if self._order is None else self._order[places]
        return np.where(self.heads.keys[rows] == keys, rows, -1)

    def add(self, new: StepArrays, width: int, version: int) -> None:
        """Adds steps, which may belong in buckets that are there.

        Args:
            new: the steps; at least one.
            width: the width of all buckets.
            version: the version in which the buckets change.
        """
        keys = new.steps // width
        if len(keys) > 1 and (np.diff(keys) < 0).any():
            by_key = np.argsort(keys, kind="stable")
            new, keys = new.some(by_key), keys[by_key]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        finite = new.low <= new.high
        heads = Heads(
            *(keys, new.steps, new.steps, np.ones(len(keys), np.int64), new.numbers, new.numbers, new.times),
            *(new.epochs, np.full(len(keys), version)),
        )
        odd_step = None
        if new.odd is not None:
            odd_step = np.where(new.odd.any(axis=0), new.steps, NO_STEP)
        every = Values(
            *(new.last, new.low, new.high, np.where(finite, new.last, 0.0), finite.astype(np.uint32)),
            *(new.odd, odd_step),
        )
        if len(starts) < len(keys):
            heads = reduced_heads(heads, starts, keys[starts])
            every = _joined([every.column(place).reduced(starts) for place in range(len(new.columns))], len(starts))
        self._merge(heads, every, new.columns)

    def empty(self, rows: npt.NDArray[np.intp]) -> None:
        """Empties buckets, which are about to be filled again; their positions in the store are kept."""
        self._blank(rows)

    def _blank(self, rows: slice | npt.NDArray[np.intp], columns: slice = _EVERY) -> None:
        """Makes the content of buckets that of empty ones."""
        if columns == _EVERY:
            self._heads.size[rows] = self._heads.time[rows] = 0
            self._heads.first_step[rows], self._heads.last_step[rows] = NO_STEP, -1
        values = self._values
        values.last[columns, rows], values.low[columns, rows], values.high[columns, rows] = np.nan, np.inf, -np.inf
        values.total[columns, rows] = values.finite[columns, rows] = 0
        if values.odd is not None and values.odd_step is not None:
            values.odd[:, columns, rows], values.odd_step[columns, rows] = 0, NO_STEP

    def coarsened(self) -> Generator[None, None, Buckets]:
        """Returns buckets of twice the width, made in parts; nothing changes here."""
        wider = Buckets()
        if not self.count:
            return wider
        order = self.order
        heads = Heads(*(each[order] for each in self.heads))
        keys = heads.keys >> 1
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        wider.count = len(starts)
        room = max(_MOST_ROWS, wider.count)
        wider._heads = Heads(*(_lengthened(each, room) for each in reduced_heads(heads, starts, keys[starts])))
        wider._values = _room(len(self._values.last), room, has_odd=self._values.odd is not None)
        for column in range(len(self._values.last)):
            for into, made in zip(wider._values, self._values.column(column, order).reduced(starts), strict=True):
                if into is not None and made is not None:
                    into[..., column, : wider.count] = made
            yield
        return wider

    def _merge(self, heads: Heads, every: Values, columns: npt.NDArray[np.intp]) -> None:
        """Adds buckets with different keys to those that are there."""
        rows = self.find(heads.keys)
        is_new = rows < 0
        if is_new.any():
            rows = self._appended(heads, rows, is_new)
        self._widen(int(columns.max(initial=-1)) + 1, has_odd=every.odd is not None)
        mine, at = self._values, np.ix_(columns, rows)
        is_later = heads.time >= self._heads.time[rows]
        is_there = every.finite > 0
        is_here = mine.finite[at] > 0
        if every.odd is not None:
            is_there = is_there | every.odd.any(axis=0)
        if mine.odd is not None:
            is_here = is_here | mine.odd[:, columns[:, None], rows].any(axis=0)
        mine.last[at] = np.where(is_there & (is_later | ~is_here), every.last, mine.last[at])
        mine.low[at] = np.minimum(mine.low[at], every.low)
        mine.high[at] = np.maximum(mine.high[at], every.high)
        mine.total[at] += every.total
        mine.finite[at] += every.finite
        if every.odd is not None and every.odd_step is not None:
            assert mine.odd is not None
            assert mine.odd_step is not None
            mine.odd[:, columns[:, None], rows] += every.odd
            mine.odd_step[at] = np.minimum(mine.odd_step[at], every.odd_step)
        own = self._heads
        own.first_step[rows] = np.minimum(own.first_step[rows], heads.first_step)
        own.last_step[rows] = np.maximum(own.last_step[rows], heads.last_step)
        own.size[rows] += heads.size
        own.lowest[rows] = np.minimum(own.lowest[rows], heads.lowest)
        own.highest[rows] = np.maximum(own.highest[rows], heads.highest)
        own.epoch[rows] = np.where(is_later, heads.epoch, own.epoch[rows])
        own.time[rows] = np.maximum(own.time[rows], heads.time)
        own.changed[rows] = heads.changed

    def _appended(
        self, heads: Heads, rows: npt.NDArray[np.intp], is_new: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.intp]:
        """Appends empty buckets for the new keys; returns the bucket of each key."""
        count, first = int(is_new.sum()), self.count
        self.count += count
        if self.count > self._values.last.shape[1]:
            self._grow(self._more_rows())
        new = slice(first, self.count)
        keys = heads.keys[is_new]
        is_in_order = self._order is None and (not first or keys[0] > self._heads.keys[first - 1])
        self._heads.keys[new] = keys
        self._blank(new)
        self._heads.lowest[new], self._heads.highest[new] = NO_STEP, -1
        self._order = None if is_in_order else np.argsort(self.heads.keys, kind="stable")
        rows = rows.copy()
        rows[is_new] = np.arange(first, self.count)
        return rows

    def _more_rows(self) -> int:
        """Returns for how many buckets to make room. From some on it is for all, since copying them takes longer."""
        rows = 4 * self._values.last.shape[1]
        return max(rows if rows <= _COPIED_ROWS else _MOST_ROWS, self.count)

    def _grow(self, rows: int) -> None:
        self._heads = Heads(*(_lengthened(each, rows) for each in self._heads))
        before = self._values
        self._values = _room(len(before.last), rows, has_odd=before.odd is not None)
        for into, each in zip(self._values, before, strict=True):
            if into is not None and each is not None:
                into[..., : each.shape[-1]] = each

    def _widen(self, columns: int, *, has_odd: bool) -> None:
        """Makes room for so many metrics, and for counts of values that are not finite."""
        before = self._values
        there, rows = before.last.shape
        if has_odd and before.odd is None:
            room = _room(there, rows, has_odd=True)
            assert room.odd_step is not None
            room.odd_step[:, : self.count] = NO_STEP
            before = self._values = before._replace(odd=room.odd, odd_step=room.odd_step)
        if columns > there:
            self._values = _room(max(2 * there, columns), rows, has_odd=before.odd is not None)
            for into, each in zip(self._values, before, strict=True):
                if into is not None and each is not None:
                    into[..., :there, : self.count] = each[..., : self.count]
            self._blank(slice(self.count), slice(there, None))


def _room(columns: int, rows: int, *, has_odd: bool = False) -> Values:
    shape = (columns, rows)
    return Values(
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape, np.uint32),
        np.zeros((3, *shape), np.uint32) if has_odd else None,
        np.zeros(shape, np.int64) if has_odd else None,
    )


def _lengthened(array: Ints, rows: int) -> Ints:
    longer: Ints = np.zeros(rows, np.int64)
    longer[: len(array)] = array
    return longer


def _joined(columns: list[Values], rows: int) -> Values:
    """Returns the values of several metrics, given those of each."""
    if not columns:
        return _room(0, rows)
    odd = [each.odd for each in columns if each.odd is not None]
    odd_step = [each.odd_step for each in columns if each.odd_step is not None]
    return Values(
        np.stack([each.last for each in columns]),
        np.stack([each.low for each in columns]),
        np.stack([each.high for each in columns]),
        np.stack([each.total for each in columns]),
        np.stack([each.finite for each in columns]),
        np.stack(odd, axis=1) if odd else None,
        np.stack(odd_step) if odd_step else None,
    )
