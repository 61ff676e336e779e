"""Live seeds: the last known cells of each seed, and what the rows of a step change in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import ABSENT, ABSENT_BITS, COLUMN, NO_SEEDS, Cells, SeedTable, alike, is_absent
from esper_otel.schema import SEED_CELLS, SEED_FIELDS, Stage

_STAGE = COLUMN["stage"]
_ALPHA_STEPS = COLUMN["alpha_steps"]
_VIOLATIONS = COLUMN["isolation_violations"]


class SeedStep(NamedTuple):
    """What one step's rows mean, given the seeds that were live before it.

    Attributes:
        recorded: the step's rows; ``alpha_steps`` only where the seed is BLENDING.
        live: every live seed with its last known cells.
        violations: isolation violations new in this step; None if no row has any.
        nonfinite: recorded cells that are NaN or infinite.
        out_of_range: recorded cells outside their range, by field.
        erased: rows whose ``alpha_steps`` were recorded but are ignored, because the seed is not BLENDING.
        is_settled: whether the checks were skipped, because the step is like the one before.
    """

    recorded: SeedTable
    live: SeedTable
    violations: float | None
    nonfinite: int
    out_of_range: tuple[str, ...]
    erased: tuple[int, ...] = ()
    is_settled: bool = False


def _bounds() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    low = [-np.inf if metric.unit in ("dot", "1") else 0.0 for metric in SEED_CELLS]
    high = [1.0 if metric.unit in ("ratio", "flag") else np.inf for metric in SEED_CELLS]
    return np.array(low), np.array(high)


_LOW, _HIGH = _bounds()

# The bits of non-negative doubles are in the order of their values, with infinity and NaN above and the negative
# ones above those: one comparison of integers finds what is finite and in range. Where negative values are
# allowed the sign is masked out first.
_UINT64 = np.dtype(np.uint64)
_xor, _and, _is_at_most = np.bitwise_xor, np.bitwise_and, np.less_equal
_EVERY_BIT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_MASK = np.where(_LOW < 0.0, np.uint64(0x7FFF_FFFF_FFFF_FFFF), _EVERY_BIT)
_HIGHEST_BITS = np.minimum(_HIGH, np.finfo(np.float64).max).view(np.uint64)

_MOST_KNOWN = 16  # sets of seeds that are recorded in turns


class _SettledRows:
    """What a run of similar steps has in common; a step that matches needs no further checks.

    A step matches if it has the same seeds, cells, stages and violations, and if all cells are finite and in their
    ranges. It does if ``(bits ^ expected) & mask <= limit`` holds for each cell.

    Args:
        step: the step that later ones are compared with.
        rows: the rows of its seeds among the live ones; None if it has all live seeds, in their order.

    Attributes:
        ids: the seeds.
        violations: new in a step that matches; None if no row has any.
    """

    __slots__ = (
        "_all",
        "_erased",
        "_expected",
        "_fits",
        "_fitting",
        "_flat",
        "_limit",
        "_mask",
        "_present",
        "_rows",
        "_scratch",
        "ids",
        "violations",
    )

    def __init__(self, step: SeedStep, rows: Sequence[int] | None) -> None:
        bits = step.recorded.cells.view(np.uint64)
        exact = bits == ABSENT_BITS
        self._rows = None if rows is None else np.array(rows)
        # Cells that are not recorded again keep their last known values; there are none if the two tables are equal.
        is_all = rows is None and bits.tobytes() == step.live.cells.tobytes()
        self._present = None if is_all else ~exact
        exact[:, [_STAGE, _VIOLATIONS]] = True
        # While a seed is not blending its alpha_steps do not count, whichever are given.
        self._erased = list(step.erased)
        exact[self._erased, _ALPHA_STEPS] = False
        self._expected = np.where(exact, bits, np.uint64(0))
        width = bits.shape[1]
        self._mask = np.where(exact, _EVERY_BIT, _MASK[:width])
        self._limit = np.where(exact, np.uint64(0), _HIGHEST_BITS[:width])
        self._scratch = np.empty_like(bits)
        self._fits = np.empty_like(bits, np.bool_)
        self._flat = self._fits.reshape(-1, order="A")  # as it lies in memory: a view
        self._all = b"\1" * bits.size
        self._fitting: SeedTable | None = None  # the table that was found to be one last
        self.ids = step.recorded.ids
        self.violations = 0.0 if (bits[:, _VIOLATIONS] != ABSENT_BITS).any() else None

    def fits(self, recorded: SeedTable) -> bool:
        """Whether the rows are those of a like step; of the same table again it is known."""
        if recorded is self._fitting:
            return True
        cells = recorded.cells
        if recorded.ids != self.ids or cells.size != len(self._all):
            return False
        scratch = self._scratch
        _xor(cells.view(_UINT64), self._expected, scratch)
        _and(scratch, self._mask, scratch)
        _is_at_most(scratch, self._limit, self._fits)
        if self._flat.tobytes() != self._all:
            return False
        self._fitting = recorded
        return True

    def tables(self, recorded: SeedTable, live: SeedTable) -> tuple[SeedTable, SeedTable] | None:
        """Returns the rows of a step that fits, and the live seeds after it; None for a step that does not fit."""
        if not self.fits(recorded):
            return None
        cells = recorded.cells
        if self._erased:
            cells = cells.copy("K")
            cells[self._erased, _ALPHA_STEPS] = ABSENT
        table: SeedTable = tuple.__new__(SeedTable, (self.ids, cells))
        if self._present is None:
            return table, table
        after = live.cells.copy("K")
        if self._rows is None:
            np.copyto(after[:, : cells.shape[1]], cells, where=self._present)
        else:
            rows, columns = self._rows, slice(cells.shape[1])
            after[rows, columns] = np.where(self._present, cells, after[rows, columns])
        return table, SeedTable(live.ids, after)


class LiveSeeds:
    """The live seeds. ``step`` is pure; ``settled``, ``commit`` and ``retire`` change what the next step sees.

    Threads: the publisher's only.

    Attributes:
        table: every live seed with its last known cells.
        ids: the seeds, each with its row in the table.
    """

    def __init__(self) -> None:
        self.table: SeedTable = NO_SEEDS
        self.ids: dict[str, int] = {}
        self._resumed_violations: dict[str, float] = {}
        # By the seeds recorded: what steps have in common, or the first of them, from which that is found out for the
        # next one. Steps with other seeds may come in between, unless they change a stage, a count of violations or
        # which cells are known.
        self._known: Mapping[tuple[str, ...], _SettledRows | SeedStep | None] = {}
        self._settled: _SettledRows | None = None  # of the last step

    @property
    def state(self) -> Any:
        """All that changes with a step; never changed in place. Assigning an earlier one undoes the steps since."""
        return self.table, self.ids, self._resumed_violations, self._known, self._settled

    @state.setter
    def state(self, state: Any) -> None:
        self.table, self.ids, self._resumed_violations, self._known, self._settled = state

    def begin(self, table: SeedTable) -> None:
        """Makes these the live seeds, whatever was live before."""
        if table.ids is not self.table.ids:
            self.ids = {seed_id: row for row, seed_id in enumerate(table.ids)}
            self._known, self._settled = {}, None
        self.table = table

    def step(self, recorded: SeedTable) -> SeedStep:
        """What this step's rows mean; nothing is changed."""
        if not recorded.ids:
            return SeedStep(NO_SEEDS, self.table, None, 0, ())
        settled = self._settled_for(recorded)
        tables = None if settled is None else settled.tables(recorded, self.table)
        if tables is not None:
            return SeedStep(*tables, self.settled_violations, 0, (), is_settled=True)
        return self._step(recorded)

    def _step(self, recorded: SeedTable) -> SeedStep:
        new, width = recorded.cells, recorded.cells.shape[1]
        live = self.table if self.table.ids else SeedTable((), new[:0])
        if width > live.cells.shape[1]:
            live = live.wide()
        same = recorded.ids == live.ids
        rows = () if same else [self.ids.get(seed_id, -1) for seed_id in recorded.ids]
        before = live.cells[:, :width]
        if not same:
            before = self._cells_before(before, recorded.ids, rows)
        absent = is_absent(new)
        merged = np.where(absent, before, new)
        erased = np.array((), np.intp)
        resting = merged[:, _STAGE] != Stage.BLENDING
        if resting.any():
            merged.view(np.uint64)[resting, _ALPHA_STEPS] = ABSENT_BITS
            erased = np.flatnonzero(resting & ~absent[:, _ALPHA_STEPS])
            if erased.size:
                new = new.copy("K")
                new.view(np.uint64)[erased, _ALPHA_STEPS] = ABSENT_BITS
                absent = is_absent(new)
        empty = absent.all(axis=1)
        if empty.any():  # such a row has no values, and no point could carry it
            kept = np.flatnonzero(~empty)
            return self.step(SeedTable(tuple(recorded.ids[row] for row in kept), recorded.cells[kept]))
        finite = np.isfinite(new)
        outside = (new < _LOW[:width]) | (new > _HIGH[:width])
        step = SeedStep(
            SeedTable(live.ids if same else recorded.ids, new),
            _live_after(live, recorded.ids, rows, merged),
            None if absent[:, _VIOLATIONS].all() else _new_violations(before, new),
            int(new.size - np.count_nonzero(finite) - np.count_nonzero(absent)),
            tuple(SEED_FIELDS[column] for column in np.flatnonzero(outside.any(axis=0))) if outside.any() else (),
            tuple(erased.tolist()),
        )
        step.recorded.cells.flags.writeable = False
        step.live.cells.flags.writeable = False
        return step

    def _cells_before(self, live: Cells, ids: tuple[str, ...], rows: Sequence[int]) -> Cells:
        before = np.full((len(ids), live.shape[1]), ABSENT)
        known = np.array(rows) >= 0
        before[known] = live[[row for row in rows if row >= 0]]
        for position, seed_id in enumerate(ids):
            if rows[position] < 0 and seed_id in self._resumed_violations:
                before[position, _VIOLATIONS] = self._resumed_violations[seed_id]
        return before

    def is_settled(self, recorded: SeedTable) -> bool:
        """Whether the rows recorded so far match the steps before, so that they need no further checks."""
        settled = self._settled_for(recorded)
        return settled is not None and settled.fits(recorded)

    def settled(self, recorded: SeedTable) -> SeedTable | None:
        """The rows of a step that matches those before; they become the live rows. None, and no change, otherwise."""
        settled = self._settled_for(recorded)
        tables = None if settled is None else settled.tables(recorded, self.table)
        if tables is None:
            return None
        self.table = tables[1]
        return tables[0]

    @property
    def settled_violations(self) -> float | None:
        """New violations of a step that matches; None if no row has any."""
        return None if self._settled is None else self._settled.violations

    def commit(self, step: SeedStep) -> None:
        """Makes the step's live seeds those that the next step starts from."""
        before, self.table = self.table, step.live
        if step.live.ids is not before.ids:
            self.ids = {seed_id: row for row, seed_id in enumerate(step.live.ids)}
        if not step.is_settled:
            is_full = len(self._known) == _MOST_KNOWN
            known = self._known if _is_alike(before, step.live) and not is_full else {}
            self._known = {**known, step.recorded.ids: step} if step.recorded.ids else known
            self._settled = None

    def _settled_for(self, recorded: SeedTable) -> _SettledRows | None:
        """What the step may have in common with those before; determined when the same seeds are recorded again."""
        settled = self._settled
        if settled is None or settled.ids != recorded.ids:
            known = self._known.get(recorded.ids)
            settled = self._settled_after(known) if isinstance(known, SeedStep) else known
            if settled is not known:
                self._known = {**self._known, recorded.ids: settled}
            self._settled = settled
        return settled

    def _settled_after(self, step: SeedStep) -> _SettledRows | None:
        recorded = step.recorded
        exact = recorded.cells[:, [_STAGE, _VIOLATIONS]]
        if not (np.isfinite(exact) & (exact >= 0.0) | is_absent(exact)).all():
            return None  # each such cell is to be counted, in every step
        is_same = recorded.ids == step.live.ids
        return _SettledRows(step, None if is_same else [self.ids[seed_id] for seed_id in recorded.ids])

    def retire(self, seed_ids: Iterable[str]) -> tuple[str, ...]:
        """Ends the lives of seeds; returns those that were alive."""
        ended = tuple(seed_id for seed_id in seed_ids if seed_id in self.ids)
        if ended:
            gone = set(ended)
            keep = [row for row, seed_id in enumerate(self.table.ids) if seed_id not in gone]
            self.table = SeedTable(tuple(self.table.ids[row] for row in keep), self.table.cells[keep])
            self.ids = {seed_id: row for row, seed_id in enumerate(self.table.ids)}
            self._known, self._settled = {}, None
            resumed = self._resumed_violations
            self._resumed_violations = {seed_id: resumed[seed_id] for seed_id in resumed if seed_id not in gone}
        return ended

    def violations(self) -> dict[str, float]:
        """The last known isolation violations by seed id, for a checkpoint."""
        column = self.table.cells[:, _VIOLATIONS]
        counts = zip(self.table.ids, column.tolist(), np.isfinite(column).tolist(), strict=True)
        return {**self._resumed_violations, **{seed_id: count for seed_id, count, known in counts if known}}

    def resume_violations(self, counts: Mapping[str, float]) -> None:
        """Takes the counts of a checkpoint, so that old violations are not new again."""
        self._resumed_violations = dict(counts)


def _is_alike(before: SeedTable, after: SeedTable) -> bool:
    """Whether seeds, stages, counts of violations and which cells are known are the same."""
    if before.ids != after.ids or before.cells.shape != after.cells.shape:
        return False
    exact = [_STAGE, _VIOLATIONS]
    are_equal = before.cells[:, exact].tobytes() == after.cells[:, exact].tobytes()
    return are_equal and is_absent(before.cells).tobytes() == is_absent(after.cells).tobytes()


def _live_after(live: SeedTable, ids: tuple[str, ...], rows: Sequence[int], merged: Cells) -> SeedTable:
    width = merged.shape[1]
    if ids == live.ids and width == live.cells.shape[1]:
        return SeedTable(live.ids, merged)
    cells = live.cells.copy("K")
    if ids == live.ids:
        cells[:, :width] = merged
        return SeedTable(live.ids, cells)
    known = [position for position, row in enumerate(rows) if row >= 0]
    born = [position for position, row in enumerate(rows) if row < 0]
    cells[[rows[position] for position in known], :width] = merged[known]
    if not born:
        return SeedTable(live.ids, cells)
    new = SeedTable(tuple(ids[position] for position in born), merged[born])
    both = alike(SeedTable(live.ids, cells), new)
    return SeedTable(live.ids + new.ids, np.concatenate([table.cells for table in both]))


def _new_violations(before: Cells, after: Cells) -> float:
    """Violations counted since: a count that fell was reset, and counts from 0."""
    now = after[:, _VIOLATIONS]
    then = before[:, _VIOLATIONS]
    now = now[finite := np.isfinite(now)]
    then = np.where(np.isfinite(then[finite]), then[finite], 0.0)
    with np.errstate(over="ignore"):
        return float(np.maximum(np.where(now >= then, now - then, now), 0.0).sum())
