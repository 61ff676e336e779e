"""Seeds: ids, stages, and rows as they are recorded."""

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

# Packed rows; most calls give the request's fields only.
ROW = struct.Struct(f"={WIDTH}d")
REQUESTED = struct.Struct(f"={NARROW}d")
MORE_FIELDS = SEED_FIELDS[NARROW:]
_NO_MORE = struct.pack(f"={len(MORE_FIELDS)}d", *(ABSENT for _ in MORE_FIELDS))

_FLOAT64 = np.dtype(np.float64)
_STAGE = COLUMN["stage"]

_MAX_ID_BYTES = 256
STAGES = frozenset(float(stage) for stage in Stage)
# What needs no checking as a stage.
STAGES_OR_ABSENT = STAGES | {ABSENT}
NO_IDS: Mapping[str, int] = {}


class MoreOfASeed(TypedDict, total=False):
    """Fields of a seed that a packet has and the request lacks."""

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


def table_of_rows(rows: Mapping[str, bytes]) -> SeedTable:
    """A table from packed rows (``REQUESTED`` or ``ROW``), one per seed id."""
    if not rows:
        return NO_SEEDS
    content, width = b"".join(rows.values()), NARROW
    if len(content) != len(rows) * REQUESTED.size:  # some are wide: all are to be
        content, width = b"".join(map(_wide, rows.values())), WIDTH
    cells: Cells = np.ndarray((len(rows), width), _FLOAT64, content)
    table: SeedTable = tuple.__new__(SeedTable, (tuple(rows), cells))  # in half the time
    return table


def one_cell(seed_id: str, field: str, value: float) -> SeedTable:
    """A table of one row with one cell."""
    column = COLUMN[field]
    cells = np.full((1, NARROW if column < NARROW else WIDTH), ABSENT)
    cells[0, column] = value
    return SeedTable((seed_id,), cells)


def _wide(row: bytes) -> bytes:
    return row if len(row) == ROW.size else row + _NO_MORE


def merged_row(earlier: bytes, later: bytes) -> bytes:
    """Two packed rows of one seed: the later one's cells, else the earlier one's."""
    if len(earlier) != len(later):
        earlier, later = _wide(earlier), _wide(later)
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
