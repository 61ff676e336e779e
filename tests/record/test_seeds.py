"""Seed rows: ids, presence, merging."""

from __future__ import annotations

import pytest
from hypothesis import given
from rows import packed, plain, rows, table, tables

from esper_otel.errors import InvalidName
from esper_otel.record.seeds import checked_seed_id, merged_row, merged_tables, table_of_rows


@given(tables)
def test_a_recorded_nan_is_a_value_and_a_missing_cell_is_not(seeds: dict[str, dict[str, float]]) -> None:
    """NaN is not missing, and missing is not zero."""
    cells = {seed_id: dict(row) for seed_id, row in table(seeds).rows()}
    assert {seed_id: row.keys() for seed_id, row in cells.items()} == {s: r.keys() for s, r in seeds.items()}


@given(rows, rows)
def test_calls_for_one_seed_merge_cell_by_cell(earlier: dict[str, float], later: dict[str, float]) -> None:
    """Two parts of a program may each know something about a seed."""
    merged = table_of_rows({"a": merged_row(packed(earlier), packed(later))})
    assert plain(merged) == plain(table({"a": {**earlier, **later}}))


@given(tables, tables)
def test_tables_of_one_step_merge_like_rows(
    earlier: dict[str, dict[str, float]], later: dict[str, dict[str, float]]
) -> None:
    """Columns and single rows may be mixed in one step."""
    expected = {seed_id: {**earlier.get(seed_id, {}), **later.get(seed_id, {})} for seed_id in {**earlier, **later}}
    assert plain(merged_tables(table(earlier), table(later))) == plain(table(expected))


@pytest.mark.parametrize("seed_id", ["s", "🌱", "a b/c:d", "x" * 256, "é" * 128])
def test_a_seed_id_may_be_any_text_of_256_bytes(seed_id: str) -> None:
    """Names are the user's."""
    assert checked_seed_id(seed_id) == seed_id


@pytest.mark.parametrize(
    ("seed_id", "why"),
    [
        ("", "0 bytes"),
        ("a\nb", "control character"),
        ("a\x7f", "control character"),
        ("\x85", "control character"),
        ("x" * 257, "257 bytes"),
        ("x" * 10_000, "10000 bytes"),
        ("é" * 129, "258 bytes"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_a_seed_id_that_would_break_a_packet_is_a_mistake(seed_id: str, why: str) -> None:
    """The message says what is wrong with it."""
    with pytest.raises(InvalidName, match=why):
        checked_seed_id(seed_id)
