"""Checks of seed ids and stages, and the packed rows in which seeds are recorded."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric
from esper_otel.frames.frame import ABSENT, COLUMN, NARROW, NO_SEEDS, WIDTH, Cells, SeedTable, is_absent
from esper_otel.schema import SEED_FIELDS, Stage

if TYPE_CHECKING:
    from esper_otel.record.values import Scalar

# Packed rows: all fields, or only the ten of the original request, which are all that most calls give.
ROW = struct.Struct(f"={WIDTH}d")
REQUESTED = struct.Struct(f"={NARROW}d")
MORE_FIELDS = SEED_FIELDS[NARROW:]
_NO_MORE = struct.pack(f"={len(MORE_FIELDS)}d", *(ABSENT for _ in MORE_FIELDS))

_FLOAT64 = np.dtype(np.float64)
_STAGE = COLUMN["stage"]

_MAX_ID_BYTES = 256
STAGES = frozenset(float(stage) for stage in Stage)
# Stage values that need no check.
STAGES_OR_ABSENT = STAGES | {ABSENT}
NO_IDS: Mapping[str, int] = {}


class FurtherSeedFields(TypedDict, total=False):
    """Further fields of a seed in a Leyline packet, in addition to the ten of the original request."""

    learning_rate: Scalar | None
    layer_depth: Scalar | None
    age_epochs: Scalar | None
    risk_score: Scalar | None
    gradient_norm: Scalar | None
    alpha_total_steps: Scalar | None
    alpha_temperature: Scalar | None
    risk_tolerance: Scalar | None
    blend_allowed: Scalar | None


def checked_seed_id(seed_id: object) -> str:
    """Returns the id if it is valid: text of 1 to 256 bytes in UTF-8 without control characters."""
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
    """Returns the stage's number if such a stage exists or the number is NaN, which means absent."""
    if stage in STAGES or stage != stage:  # noqa: PLR0124 - NaN: absent
        return stage
    raise InvalidValue("stage", f"{stage!r} is not one of Leyline's stages 0 to 11 (esper_otel.Stage)")


def more_cells(more: Mapping[str, object]) -> list[object]:
    """Returns the cells of ``MORE_FIELDS`` in order, with ``ABSENT`` for those not given.

    Raises:
        UnknownMetric: seeds do not have such a field.
    """
    for field in more:
        if field not in MORE_FIELDS:
            raise UnknownMetric(field, SEED_FIELDS, what="seed field")
    return [more.get(field, ABSENT) for field in MORE_FIELDS]


def table_of_rows(rows: Mapping[str, bytes]) -> SeedTable:
    """Builds a table from packed rows (``REQUESTED`` or ``ROW``), one per seed id."""
    if not rows:
        return NO_SEEDS
    content, width = b"".join(rows.values()), NARROW
    if len(content) != len(rows) * REQUESTED.size:  # some rows are wide, so all must be
        content, width = b"".join(map(_wide, rows.values())), WIDTH
    cells: Cells = np.ndarray((len(rows), width), _FLOAT64, content)
    table: SeedTable = tuple.__new__(SeedTable, (tuple(rows), cells))  # skips SeedTable's Python-level constructor
    return table


def one_cell(seed_id: str, field: str, value: float) -> SeedTable:
    """Builds a table of one row with one cell."""
    column = COLUMN[field]
    cells = np.full((1, NARROW if column < NARROW else WIDTH), ABSENT)
    cells[0, column] = value
    return SeedTable((seed_id,), cells)


def _wide(row: bytes) -> bytes:
    return row if len(row) == ROW.size else row + _NO_MORE


def merged_row(earlier: bytes, later: bytes) -> bytes:
    """Merges two packed rows of one seed. Cells of the later row replace those of the earlier one."""
    if len(earlier) != len(later):
        earlier, later = _wide(earlier), _wide(later)
    above = np.frombuffer(later)
    merged: bytes = np.where(is_absent(above), np.frombuffer(earlier), above).tobytes()
    return merged


def merged_tables(earlier: SeedTable, later: SeedTable) -> SeedTable:
    """Merges two tables of one step. Cells of the later table replace the earlier ones; the earlier order is kept."""
    rows = {seed_id: cells.tobytes() for seed_id, cells in zip(earlier.ids, earlier.cells, strict=True)}
    for seed_id, cells in zip(later.ids, later.cells, strict=True):
        row = cells.tobytes()
        rows[seed_id] = merged_row(rows[seed_id], row) if seed_id in rows else row
    return table_of_rows(rows)
