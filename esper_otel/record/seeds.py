"""Seeds: rows as they are recorded, and the last known cells of every live seed."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric
from esper_otel.frame import ABSENT, ABSENT_BITS, NO_SEEDS, WIDTH, Cells, SeedTable, is_absent
from esper_otel.schema import SEED_CELLS, SEED_FIELDS, SEED_METRICS, Stage

ROW = struct.Struct(f"={WIDTH}d")
# Most calls give the request's fields only: a row that begins with them and ends with NO_MORE.
REQUESTED = struct.Struct(f"={len(SEED_METRICS)}d")
MORE_FIELDS = SEED_FIELDS[len(SEED_METRICS) :]
NO_MORE = struct.pack(f"={len(MORE_FIELDS)}d", *(ABSENT for _ in MORE_FIELDS))
COLUMN = {field: column for column, field in enumerate(SEED_FIELDS)}

_STAGE = COLUMN["stage"]
_ALPHA_STEPS = COLUMN["alpha_steps"]
_VIOLATIONS = COLUMN["isolation_violations"]

_MAX_ID_BYTES = 256
STAGES = frozenset(float(stage) for stage in Stage)


def checked_seed_id(seed_id: object) -> str:
    """The id, if it can be one: text of 1 to 256 bytes in UTF-8 without control characters."""
    if not isinstance(seed_id, str):
        raise InvalidValue("seed id", f"{seed_id!r} is a {type(seed_id).__name__}; give a string")
    if 0 < len(seed_id) <= _MAX_ID_BYTES // 4 and seed_id.isprintable():
        return seed_id
    try:
        size = len(seed_id.encode())
    except UnicodeEncodeError as error:
        raise InvalidName(f"seed id {seed_id[:80]!r} is not valid Unicode: {error.reason}") from None
    if not 0 < size <= _MAX_ID_BYTES:
        raise InvalidName(f"seed id {seed_id[:80]!r} has {size} bytes in UTF-8; 1 to {_MAX_ID_BYTES} are allowed")
    if any(character < " " or "\x7f" <= character <= "\x9f" for character in seed_id):
        raise InvalidName(f"seed id {seed_id[:80]!r} has a control character")
    return seed_id


def checked_stage(stage: float) -> float:
    """The stage's number, if there is such a stage (or none is given)."""
    if stage in STAGES or stage != stage:  # noqa: PLR0124 - NaN: absent
        return stage
    raise InvalidValue("stage", f"{stage!r} is none of Leyline's stages 0 to 11 (esper_otel.Stage)")


def more_cells(more: Mapping[str, object]) -> list[object]:
    """The cells beside the request's, in order; ``ABSENT`` where none is given.

    Raises:
        UnknownMetric: a field that seeds do not have.
    """
    for field in more:
        if field not in MORE_FIELDS:
            raise UnknownMetric(field, SEED_FIELDS, what="seed field")
    return [more.get(field, ABSENT) for field in MORE_FIELDS]


def table_of_columns(ids: Sequence[str], columns: Mapping[str, object], last_ids: tuple[str, ...]) -> SeedTable:
    """A table from arrays of shape (len(ids),), NaN meaning absent. ``last_ids`` are ids known to be good.

    Raises:
        UnknownMetric: a field that seeds do not have.
        InvalidName: an id that cannot be one, or that comes twice.
        InvalidValue: a column of another shape or type, or on another device than the CPU.
    """
    names = tuple(ids) if not isinstance(ids, str) else ids
    if isinstance(names, str):
        raise InvalidValue("seed ids", f"{ids!r} is one string; give a sequence of strings")
    if names != last_ids:
        names = tuple(str(name) if isinstance(name, np.str_) else name for name in names)
        for name in names:
            checked_seed_id(name)
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidName(f"seed id {twice[0]!r} comes more than once in one call")
    cells = np.full((len(names), WIDTH), ABSENT)
    places, numbers = [], []
    for field, column in columns.items():
        if field not in COLUMN:
            raise UnknownMetric(field, SEED_FIELDS, what="seed field")
        if column is not None:
            places.append(COLUMN[field])
            numbers.append(_numbers(field, column, len(names)))
    if places:
        given = np.array(numbers, np.float64)
        missing = given != given  # noqa: PLR0124 - NaN
        if missing.any():
            given.view(np.uint64)[missing] = ABSENT_BITS
        cells[:, places] = given.T
        stages = cells[:, _STAGE]
        whole = (stages >= 0) & (stages < len(Stage)) & (stages == np.floor(stages))
        if not whole.all():
            for stage in stages[~whole].tolist():
                checked_stage(stage)
    return SeedTable(last_ids if names == last_ids else names, cells)


def _numbers(field: str, column: object, count: int) -> npt.NDArray[Any]:
    if getattr(column, "is_cuda", False):
        raise InvalidValue(field, "is on a CUDA device; reading it would stall training: copy it to the CPU first")
    if hasattr(column, "detach"):
        column = column.detach()
    try:
        numbers = np.asarray(column)
        if numbers.dtype.kind not in "fiub":
            numbers = np.array([np.nan if item is None else item for item in column], np.float64)  # type: ignore[attr-defined] # TypeError is the answer
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValue(field, f"is not an array of numbers: {error}") from None
    if numbers.shape != (count,):
        raise InvalidValue(field, f"has shape {numbers.shape}; {count} seeds need ({count},)")
    return numbers


def table_of_rows(rows: Mapping[str, bytes]) -> SeedTable:
    """A table from packed rows (``ROW``), one per seed id."""
    if not rows:
        return NO_SEEDS
    cells = np.frombuffer(b"".join(rows.values())).reshape(len(rows), WIDTH)
    return SeedTable(tuple(rows), cells)


def one_cell(seed_id: str, field: str, value: float) -> SeedTable:
    """A table of one row with one cell."""
    cells = np.full((1, WIDTH), ABSENT)
    cells[0, COLUMN[field]] = value
    return SeedTable((seed_id,), cells)


def merged_row(earlier: bytes, later: bytes) -> bytes:
    """Two packed rows of one seed: the later one's cells, else the earlier one's."""
    above = np.frombuffer(later)
    merged: bytes = np.where(is_absent(above), np.frombuffer(earlier), above).tobytes()
    return merged


def merged_tables(earlier: SeedTable, later: SeedTable) -> SeedTable:
    """Two tables of one step: the later one's cells, else the earlier one's; the earlier one's order."""
    rows = {seed_id: cells.tobytes() for seed_id, cells in zip(earlier.ids, earlier.cells, strict=True)}
    for seed_id, cells in zip(later.ids, later.cells, strict=True):
        row = cells.tobytes()
        rows[seed_id] = merged_row(rows[seed_id], row) if seed_id in rows else row
    return table_of_rows(rows)


class SeedStep(NamedTuple):
    """What one step's rows mean, given the seeds that were live before it.

    Attributes:
        recorded: the step's rows; ``alpha_steps`` only where the seed is BLENDING.
        live: every live seed with its last known cells.
        violations: isolation violations new in this step; None when no row says.
        nonfinite: recorded cells that are NaN or infinite.
        out_of_range: recorded cells outside their range, by field.
    """

    recorded: SeedTable
    live: SeedTable
    violations: float | None
    nonfinite: int
    out_of_range: tuple[str, ...]


def _bounds() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    low = [-np.inf if metric.unit in ("dot", "1") else 0.0 for metric in SEED_CELLS]
    high = [1.0 if metric.unit in ("ratio", "flag") else np.inf for metric in SEED_CELLS]
    return np.array(low), np.array(high)


_LOW, _HIGH = _bounds()

# The bits of non-negative doubles are in the order of their values, with infinity and NaN above and the negative
# ones above those: one comparison of integers finds what is finite and in range. Where negative values are
# allowed the sign is masked out first.
_MASK = np.where(_LOW < 0.0, np.uint64(0x7FFF_FFFF_FFFF_FFFF), np.uint64(0xFFFF_FFFF_FFFF_FFFF))
_HIGHEST_BITS = np.minimum(_HIGH, np.finfo(np.float64).max).view(np.uint64)


class _Shape(NamedTuple):
    """What a step's rows have in common with those before: who, which cells, in which stage, which violations."""

    ids: tuple[str, ...]
    absent: bytes
    stages: bytes
    violations: bytes


class LiveSeeds:
    """The live seeds. ``step`` is pure; ``commit`` and ``retire`` change what the next step sees.

    Threads: the publisher's only.
    """

    def __init__(self) -> None:
        self.table = NO_SEEDS
        self._rows: dict[str, int] = {}
        self._resumed_violations: dict[str, float] = {}
        self._settled: _Shape | None = None

    @property
    def ids(self) -> Mapping[str, int]:
        """The live seeds' ids."""
        return self._rows

    def step(self, recorded: SeedTable) -> SeedStep:
        """What this step's rows mean; nothing is changed."""
        if not recorded.ids:
            return SeedStep(NO_SEEDS, self.table, None, 0, ())
        return self._step_like_the_last(recorded) or self._step(recorded)

    def _step_like_the_last(self, recorded: SeedTable) -> SeedStep | None:
        """The step's meaning if it only moves finite numbers in cells that the step before had too."""
        settled = self._settled
        if settled is None or recorded.ids != settled.ids:
            return None
        cells = recorded.cells
        bits = cells.view(np.uint64)
        absent = bits == ABSENT_BITS
        if (
            absent.tobytes() != settled.absent
            or cells[:, _STAGE].tobytes() != settled.stages
            or cells[:, _VIOLATIONS].tobytes() != settled.violations
            or not (absent | ((bits & _MASK) <= _HIGHEST_BITS)).all()
        ):
            return None
        cells.flags.writeable = False
        table = SeedTable(settled.ids, cells)
        return SeedStep(table, table, None if absent[0, _VIOLATIONS] else 0.0, 0, ())

    def _step(self, recorded: SeedTable) -> SeedStep:
        live = self.table
        new = recorded.cells
        same = recorded.ids == live.ids
        rows = () if same else [self._rows.get(seed_id, -1) for seed_id in recorded.ids]
        before = live.cells if same else self._cells_before(recorded.ids, rows)
        absent = is_absent(new)
        merged = np.where(absent, before, new)
        resting = merged[:, _STAGE] != Stage.BLENDING
        if resting.any():
            merged.view(np.uint64)[resting, _ALPHA_STEPS] = ABSENT_BITS
            if not absent[resting, _ALPHA_STEPS].all():
                new = new.copy()
                new.view(np.uint64)[resting, _ALPHA_STEPS] = ABSENT_BITS
                absent = is_absent(new)
        finite = np.isfinite(new)
        outside = (new < _LOW) | (new > _HIGH)
        step = SeedStep(
            SeedTable(live.ids if same else recorded.ids, new),
            self._live_after(recorded.ids, rows, merged),
            None if absent[:, _VIOLATIONS].all() else _new_violations(before, new),
            int(new.size - np.count_nonzero(finite) - np.count_nonzero(absent)),
            tuple(SEED_FIELDS[column] for column in np.flatnonzero(outside.any(axis=0))) if outside.any() else (),
        )
        step.recorded.cells.flags.writeable = False
        step.live.cells.flags.writeable = False
        return step

    def _cells_before(self, ids: tuple[str, ...], rows: Sequence[int]) -> Cells:
        before = np.full((len(ids), WIDTH), ABSENT)
        known = np.array(rows) >= 0
        before[known] = self.table.cells[[row for row in rows if row >= 0]]
        for position, seed_id in enumerate(ids):
            if rows[position] < 0 and seed_id in self._resumed_violations:
                before[position, _VIOLATIONS] = self._resumed_violations[seed_id]
        return before

    def _live_after(self, ids: tuple[str, ...], rows: Sequence[int], merged: Cells) -> SeedTable:
        live = self.table
        if ids == live.ids:
            return SeedTable(live.ids, merged)
        cells = live.cells.copy()
        known = [position for position, row in enumerate(rows) if row >= 0]
        born = [position for position, row in enumerate(rows) if row < 0]
        cells[[rows[position] for position in known]] = merged[known]
        if not born:
            return SeedTable(live.ids, cells)
        return SeedTable((*live.ids, *(ids[position] for position in born)), np.concatenate([cells, merged[born]]))

    def commit(self, step: SeedStep) -> None:
        """Makes the step's live seeds those that the next step starts from."""
        if step.live.ids is not self.table.ids:
            self._rows = {seed_id: row for row, seed_id in enumerate(step.live.ids)}
        self.table = step.live
        if step.live is not step.recorded:
            self._settled = _settled(step)

    def retire(self, seed_ids: Iterable[str]) -> tuple[str, ...]:
        """Ends the lives of seeds; returns those that were alive."""
        ended = tuple(seed_id for seed_id in seed_ids if seed_id in self._rows)
        if ended:
            gone = set(ended)
            keep = [row for row, seed_id in enumerate(self.table.ids) if seed_id not in gone]
            self.table = SeedTable(tuple(self.table.ids[row] for row in keep), self.table.cells[keep])
            self._rows = {seed_id: row for row, seed_id in enumerate(self.table.ids)}
            self._settled = None
            for seed_id in ended:
                self._resumed_violations.pop(seed_id, None)
        return ended

    def violations(self) -> dict[str, float]:
        """The last known isolation violations by seed id, for a checkpoint."""
        column = self.table.cells[:, _VIOLATIONS]
        counts = zip(self.table.ids, column.tolist(), np.isfinite(column).tolist(), strict=True)
        return {**self._resumed_violations, **{seed_id: count for seed_id, count, known in counts if known}}

    def resume_violations(self, counts: Mapping[str, float]) -> None:
        """Takes the counts of a checkpoint, so that old violations are not new again."""
        self._resumed_violations = dict(counts)


def _settled(step: SeedStep) -> _Shape | None:
    """The shape of a step after which a like one means exactly what it says; None when it inherits cells."""
    recorded, live = step.recorded, step.live
    if recorded.ids != live.ids:
        return None
    absent = is_absent(recorded.cells)
    violations = recorded.cells[:, _VIOLATIONS]
    known = absent[:, _VIOLATIONS]
    if not np.array_equal(absent, is_absent(live.cells)) or not (known.all() or np.isfinite(violations).all()):
        return None
    return _Shape(live.ids, absent.tobytes(), recorded.cells[:, _STAGE].tobytes(), violations.tobytes())


def _new_violations(before: Cells, after: Cells) -> float:
    """Violations counted since: a count that fell was reset, and counts from 0."""
    now = after[:, _VIOLATIONS]
    then = before[:, _VIOLATIONS]
    now = now[finite := np.isfinite(now)]
    then = np.where(np.isfinite(then[finite]), then[finite], 0.0)
    return float(np.maximum(np.where(now >= then, now - then, now), 0.0).sum())
