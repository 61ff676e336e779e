"""Seed rows for tests: tables made of plain dicts, and plain dicts made of tables."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from esper_otel.frames.frame import ABSENT, SeedTable
from esper_otel.record.seeds import MORE_FIELDS, REQUESTED, ROW, table_of_rows
from esper_otel.schema import SEED_FIELDS

cell_values = st.one_of(st.floats(allow_nan=True), st.integers(0, 11).map(float))
rows = st.dictionaries(st.sampled_from([f for f in SEED_FIELDS if f != "stage"]), cell_values)
tables = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), rows)


def packed(cells: dict[str, float]) -> bytes:
    """A row as a step packs it: the request's fields, and the others only if one of them is there."""
    row = [cells.get(field, ABSENT) for field in SEED_FIELDS]
    if not cells.keys() & set(MORE_FIELDS):
        return REQUESTED.pack(*row[: -len(MORE_FIELDS)])
    return ROW.pack(*row)


def table(seeds: dict[str, dict[str, float]]) -> SeedTable:
    return table_of_rows({seed_id: packed(cells) for seed_id, cells in seeds.items()})


def plain(seeds: SeedTable) -> dict[str, dict[str, float | str]]:
    """Comparable: NaN as text, since NaN is no equal of itself."""
    return {
        seed_id: {field: "NaN" if math.isnan(cell) else cell for field, cell in cells.items()}
        for seed_id, cells in seeds.rows()
    }
