"""Live seeds: the last known cells of each seed, and what the rows of a step change in them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import ABSENT, ABSENT_BITS, COLUMN, NO_SEEDS, WIDTH, Cells, SeedTable, is_absent
from esper_otel.schema import SEED_CELLS, SEED_FIELDS, Stage

_STAGE = COLUMN["stage"]
_ALPHA_STEPS = COLUMN["alpha_steps"]
_VIOLATIONS = COLUMN["isolation_violations"]
_EXACT = slice(_STAGE, _VIOLATIONS + 1, _VIOLATIONS - _STAGE)  # the stage and the count of violations
_BLENDING = float(Stage.BLENDING)
_BLENDING_BYTES = struct.pack("=d", _BLENDING)
_INFINITY = float("inf")


def _bounds() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    low = [-np.inf if metric.unit in ("dot", "1") else 0.0 for metric in SEED_CELLS]
    high = [1.0 if metric.unit in ("ratio", "flag") else np.inf for metric in SEED_CELLS]
    return np.array(low), np.array(high)


_LOW, _HIGH = _bounds()

# The bits of non-negative doubles are in the order of their values, with infinity and NaN above and the negative
# ones above those: one comparison of integers finds what is finite and in range. Where negative values are
# allowed the sign is masked out first.
_UINT64 = np.dtype(np.uint64)
_and, _is_at_most, _is_equal = np.bitwise_and, np.less_equal, np.equal
_MASK = np.where(_LOW < 0.0, np.uint64(0x7FFF_FFFF_FFFF_FFFF), np.uint64(0xFFFF_FFFF_FFFF_FFFF))
_HIGHEST_BITS = np.minimum(_HIGH, np.finfo(np.float64).max).view(np.uint64)
_ABSENT = np.uint64(ABSENT_BITS)

_BLANK = np.full((64, WIDTH), ABSENT)  # cells of seeds that have none yet

_MOST_SHAPES = 8

_Rows: TypeAlias = npt.NDArray[np.intp]


class _Marks:
    """Marks cells of tables of one shape: a byte for each, in the order in which they lie in memory.

    Args:
        cells: a table of this shape.

    Attributes:
        shape: the shape.
        strides: how the cells lie in memory.
        all: the bytes if each cell is marked.
        flags: the last marks, as an array.
    """

    __slots__ = ("_flat", "_limit", "_mask", "_scratch", "all", "flags", "shape", "strides")

    def __init__(self, cells: Cells) -> None:
        columns = cells.shape[1]
        self.shape: tuple[int, ...] = cells.shape
        self.strides: tuple[int, ...] = cells.strides
        self._mask = np.empty_like(cells, _UINT64)
        self._mask[...] = _MASK[:columns]
        self._limit = np.empty_like(cells, _UINT64)
        self._limit[...] = _HIGHEST_BITS[:columns]
        self._scratch = np.empty_like(cells, _UINT64)
        self.flags: npt.NDArray[np.bool_] = np.empty_like(cells, np.bool_)
        self._flat = self.flags.reshape(-1, order="A")  # as it lies in memory: a view
        self.all: bytes = b"\1" * cells.size

    def fits(self, cells: Cells) -> bool:
        """Whether a table is of this shape, and lies in memory in the same way."""
        return cells.shape == self.shape and cells.strides == self.strides

    def good(self, cells: Cells) -> bytes:
        """Marks cells that are present, finite and in their range."""
        _and(cells.view(_UINT64), self._mask, self._scratch)
        _is_at_most(self._scratch, self._limit, self.flags)
        return self._flat.tobytes()

    def absent(self, cells: Cells) -> bytes:
        """Marks cells that are absent."""
        _is_equal(cells.view(_UINT64), _ABSENT, self.flags)
        return self._flat.tobytes()


class _Likeness(NamedTuple):
    """What a step that recorded every live seed shares with those like it, which need no further checks.

    A step is like it if it has the same seeds, stages, counts of violations and absent cells, and all other cells are
    finite and in range.

    Attributes:
        ids: the seeds.
        marks: for tables of its shape.
        good: the marks of the cells that are good.
        absent: those of the cells that are absent; empty if none is.
        exact: the stages and counts of violations.
        erased: rows whose ``alpha_steps`` do not count, because the seed is not BLENDING.
        is_whole: whether its rows are all that is known of the seeds.
        violations: new in a step like it; None if no row has any.
    """

    ids: tuple[str, ...]
    marks: _Marks
    good: bytes
    absent: bytes
    exact: bytes
    erased: Sequence[int]
    is_whole: bool
    violations: float | None


class SeedStep(NamedTuple):
    """What one step's rows mean, given the seeds that were live before it.

    Attributes:
        recorded: the step's rows; ``alpha_steps`` only where the seed is BLENDING.
        live: every live seed with its last known cells.
        violations: isolation violations new in this step; None if no row has any.
        nonfinite: recorded cells that are NaN or infinite.
        out_of_range: recorded cells outside their range, by field.
        likeness: what it shares with steps like it; None if such steps need all checks.
    """

    recorded: SeedTable
    live: SeedTable
    violations: float | None = None
    nonfinite: int = 0
    out_of_range: tuple[str, ...] = ()
    likeness: _Likeness | None = None


class LiveSeeds:
    """The live seeds. ``step`` is pure; ``commit`` and ``retire`` change what the next step sees.

    Threads: the publisher's only.

    Attributes:
        table: every live seed with its last known cells.
    """

    def __init__(self) -> None:
        self.table: SeedTable = NO_SEEDS
        self._ids: Mapping[str, int] | None = {}  # None until they are asked for
        self._resumed_violations: dict[str, float] = {}
        self._likeness: _Likeness | None = None  # of the last step
        # These two do not change what a step means: marks by shape and strides, and the table that was found good last.
        self._marks: dict[tuple[tuple[int, ...], tuple[int, ...]], _Marks] = {}
        self._good: SeedTable | None = None

    @property
    def state(self) -> Any:
        """All that changes with a step; never changed in place. Assigning an earlier one undoes the steps since."""
        return self.table, self._ids, self._resumed_violations, self._likeness

    @state.setter
    def state(self, state: Any) -> None:
        self.table, self._ids, self._resumed_violations, self._likeness = state

    @property
    def ids(self) -> Mapping[str, int]:
        """The seeds, each with its row in the table; never changed in place."""
        ids = self._ids
        if ids is None:
            self._ids = ids = dict(zip(self.table.ids, range(len(self.table.ids)), strict=True))
        return ids

    def begin(self, table: SeedTable) -> None:
        """Makes these the live seeds, whatever was live before."""
        if table.ids is not self.table.ids:
            self._ids = None
        self.table = table
        self._likeness = None

    def is_good(self, recorded: SeedTable) -> bool:
        """Whether all cells of a table are present, finite and in range. Found out once for each table."""
        marks = self._marks_of(recorded.cells)
        if marks.good(recorded.cells) != marks.all:
            return False
        self._good = recorded
        return True

    def _marks_of(self, cells: Cells) -> _Marks:
        """Returns the marks for tables like this one."""
        if self._likeness is not None and self._likeness.marks.fits(cells):
            return self._likeness.marks
        key = cells.shape, cells.strides
        marks = self._marks.get(key)
        if marks is None:
            if len(self._marks) == _MOST_SHAPES:
                self._marks = {}
            self._marks[key] = marks = _Marks(cells)
        return marks

    def step(self, recorded: SeedTable) -> SeedStep:
        """What this step's rows mean; nothing is changed."""
        if not recorded.ids:
            return SeedStep(NO_SEEDS, self.table, likeness=self._likeness)
        likeness = self._likeness
        if likeness is not None and self._is_like(recorded, likeness):
            return self._alike(recorded.cells, likeness)
        return self._step(recorded)

    def _is_like(self, recorded: SeedTable, likeness: _Likeness) -> bool:
        """Whether the step is like the last one."""
        ids, cells = recorded
        marks = likeness.marks
        if ids is not likeness.ids and ids != likeness.ids:
            return False
        if not marks.fits(cells):
            return False
        if recorded is self._good:
            if likeness.absent:
                return False
        elif marks.good(cells) != likeness.good or (likeness.absent and marks.absent(cells) != likeness.absent):
            return False
        return cells.T[_EXACT].tobytes() == likeness.exact

    def _alike(self, cells: Cells, likeness: _Likeness) -> SeedStep:
        """What the rows of a step mean that is like the last one. Its absent cells have just been marked."""
        if likeness.erased:
            cells = cells.copy("K")
            cells[likeness.erased, _ALPHA_STEPS] = ABSENT
        table: SeedTable = tuple.__new__(SeedTable, (likeness.ids, cells))  # skips SeedTable's Python-level constructor
        if likeness.is_whole:
            return SeedStep(table, table, likeness.violations, 0, (), likeness)
        after = self.table.cells.copy("K")
        np.copyto(after[:, : cells.shape[1]], cells, where=~likeness.marks.flags if likeness.absent else True)
        return SeedStep(table, SeedTable(likeness.ids, after), likeness.violations, 0, (), likeness)

    def _step(self, recorded: SeedTable) -> SeedStep:
        ids, new = recorded
        marks = self._marks_of(new)
        good = marks.good(new)
        absent = b"" if good == marks.all else marks.absent(new)
        flags = marks.flags if b"\1" in absent else None
        is_fine = not absent or good.count(1) + absent.count(1) == len(good)
        rows = self._rows(ids)
        merged = before = new if flags is None else self._before(recorded, rows)
        if flags is not None:
            merged = np.where(flags, before, new)
        new, merged, erased = _without_steps_at_rest(new, merged, flags)
        if flags is not None and absent.count(1) + len(erased) >= new.shape[1]:
            # Some rows may have no values: no point could carry them.
            kept = np.flatnonzero(~is_absent(new).all(axis=1))
            if len(kept) < len(ids):
                return self.step(SeedTable(tuple(ids[row] for row in kept), recorded.cells[kept]))
        if flags is not None and merged.tobytes() == new.tobytes():
            merged = new
        nonfinite, out_of_range = (0, ()) if is_fine else _odd_cells(new)
        has_violations = flags is None or not flags[:, _VIOLATIONS].all()
        violations = self._new_violations(ids, rows, new) if has_violations else None
        live = self._live_after(ids, rows, merged)
        table = SeedTable(live.ids if rows is None else ids, new)
        likeness = None
        if is_fine and live.ids is self.table.ids and rows is None:
            exact, is_whole = recorded.cells.T[_EXACT].tobytes(), live.cells is new
            violations_of = 0.0 if has_violations else None
            likeness = _Likeness(live.ids, marks, good, absent, exact, erased, is_whole, violations_of)
        return SeedStep(table, live, violations, nonfinite, out_of_range, likeness)

    def _rows(self, ids: tuple[str, ...]) -> _Rows | None:
        """Returns where each recorded seed is among the live ones, -1 for a new one.

        Returns None if they are all live seeds, in their order, before any new ones.
        """
        live = self.table.ids
        if ids is live or ids[: len(live)] == live:
            return None
        return np.fromiter(map(self.ids.get, ids, itertools.repeat(-1)), np.intp, len(ids))

    def _before(self, recorded: SeedTable, rows: _Rows | None) -> Cells:
        """Returns the cells known before the step, a row for each of its seeds."""
        ids, width = recorded.ids, recorded.cells.shape[1]
        table = self.table
        known = table.cells if table.cells.shape[1] >= width else table.wide().cells
        known, count = known[:, :width], len(table.ids)
        if rows is not None:
            before = np.concatenate((known, _blank(1, width)))[rows]  # the last one for a new seed
            born: Iterable[int] = np.flatnonzero(rows < 0).tolist()
        elif len(ids) == count:
            return known
        else:
            before, born = np.concatenate((known, _blank(len(ids) - count, width))), range(count, len(ids))
        if self._resumed_violations:
            for place in born:
                before[place, _VIOLATIONS] = self._resumed_violations.get(ids[place], ABSENT)
        return before

    def _new_violations(self, ids: tuple[str, ...], rows: _Rows | None, new: Cells) -> float:
        """Violations counted since: a count that fell was reset, and counts from 0."""
        now, then = new[:, _VIOLATIONS], self.table.cells[:, _VIOLATIONS]
        if rows is None and len(now) == len(then) and now.tobytes() == then.tobytes():
            return 0.0
        counts: list[float] = then.tolist()
        if rows is not None:
            counts = [counts[row] if row >= 0 else ABSENT for row in rows.tolist()]
        else:
            counts += [ABSENT] * (len(now) - len(counts))
        if self._resumed_violations:
            for place, seed_id in enumerate(ids):
                if seed_id not in self.ids:
                    counts[place] = self._resumed_violations.get(seed_id, ABSENT)
        found = 0.0
        for after, before in zip(now.tolist(), counts, strict=True):
            if after != before and after - after == 0.0:  # neither NaN nor an infinity
                found += after - before if after >= before > -_INFINITY else after
        return found

    def _live_after(self, ids: tuple[str, ...], rows: _Rows | None, merged: Cells) -> SeedTable:
        """Returns the live seeds after a step that has these rows, merged with what was known before."""
        live, width = self.table, merged.shape[1]
        count = len(live.ids)
        whole = max(width, live.cells.shape[1]) if count else width
        if rows is None:
            ids = ids if len(ids) > count else live.ids
            if whole == width:
                return SeedTable(ids, merged)
            places: Any = slice(None)
        else:
            born = np.flatnonzero(rows < 0)
            places = rows.copy()
            places[born] = range(count, count + len(born))
            ids = live.ids + tuple([ids[place] for place in born.tolist()])
        cells = np.full((len(ids), whole), ABSENT)
        cells[:count, : live.cells.shape[1]] = live.cells
        cells[places, :width] = merged
        return SeedTable(ids, cells)

    def commit(self, step: SeedStep) -> None:
        """Makes the step's live seeds those that the next step starts from."""
        before, self.table = self.table, step.live
        if step.live.ids is not before.ids:
            self._ids = None
        self._likeness = step.likeness

    def retire(self, seed_ids: Iterable[str]) -> tuple[str, ...]:
        """Ends the lives of seeds; returns those that were alive."""
        ended = tuple([seed_id for seed_id in seed_ids if seed_id in self.ids])
        if ended:
            ids, cells = self.table
            if len(ended) == 1:
                row = self.ids[ended[0]]
                ids, cells = ids[:row] + ids[row + 1 :], np.concatenate((cells[:row], cells[row + 1 :]))
            else:
                gone = set(ended)
                keep = [row for row, seed_id in enumerate(ids) if seed_id not in gone]
                ids, cells = tuple([ids[row] for row in keep]), cells[keep]
            self.table, self._ids = SeedTable(ids, cells), None
            self._likeness = None
            resumed = self._resumed_violations
            if resumed:
                self._resumed_violations = {seed_id: resumed[seed_id] for seed_id in resumed if seed_id not in ended}
        return ended

    def violations(self) -> dict[str, float]:
        """The last known isolation violations by seed id, for a checkpoint."""
        column = self.table.cells[:, _VIOLATIONS]
        counts = zip(self.table.ids, column.tolist(), np.isfinite(column).tolist(), strict=True)
        return {**self._resumed_violations, **{seed_id: count for seed_id, count, known in counts if known}}

    def resume_violations(self, counts: Mapping[str, float]) -> None:
        """Takes the counts of a checkpoint, so that old violations are not new again."""
        self._resumed_violations = dict(counts)


def _blank(rows: int, columns: int) -> Cells:
    """Cells of which none is there; not to be changed."""
    return _BLANK[:rows, :columns] if rows <= len(_BLANK) else np.full((rows, columns), ABSENT)


def _without_steps_at_rest(
    new: Cells, merged: Cells, absent: npt.NDArray[np.bool_] | None
) -> tuple[Cells, Cells, list[int]]:
    """Erases ``alpha_steps`` of seeds that are not BLENDING; returns the rows in which they were recorded, too.

    Args:
        new: the cells of a step.
        merged: these, and what was known before where they are absent; may be changed unless it is ``new``.
        absent: which of the new cells are absent; None if none is.
    """
    stages = merged[:, _STAGE]
    if stages.tobytes() == len(stages) * _BLENDING_BYTES:
        return new, merged, []
    is_at_rest = stages != _BLENDING
    if absent is None:
        erased = np.flatnonzero(is_at_rest).tolist()
        new = new.copy("K")
        new[erased, _ALPHA_STEPS] = ABSENT
        return new, new, erased
    merged[is_at_rest, _ALPHA_STEPS] = ABSENT
    erased = np.flatnonzero(is_at_rest & ~absent[:, _ALPHA_STEPS]).tolist()
    if erased:
        new = new.copy("K")
        new[erased, _ALPHA_STEPS] = ABSENT
    return new, merged, erased


def _odd_cells(cells: Cells) -> tuple[int, tuple[str, ...]]:
    """Returns how many cells are NaN or infinite, and the fields in which cells are out of range."""
    columns = cells.shape[1]
    outside = ((cells < _LOW[:columns]) | (cells > _HIGH[:columns])).any(axis=0)
    nonfinite = cells.size - np.count_nonzero(np.isfinite(cells)) - np.count_nonzero(is_absent(cells))
    return int(nonfinite), tuple([SEED_FIELDS[column] for column in np.flatnonzero(outside).tolist()])
