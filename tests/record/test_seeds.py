"""Seed rows: presence, merging, lives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric
from esper_otel.frame import ABSENT, SeedTable
from esper_otel.record.seeds import (
    ROW,
    LiveSeeds,
    checked_seed_id,
    merged_row,
    merged_tables,
    table_of_columns,
    table_of_rows,
)
from esper_otel.schema import SEED_FIELDS, Stage

cell_values = st.one_of(st.floats(allow_nan=True), st.integers(0, 11).map(float))
rows = st.dictionaries(st.sampled_from([f for f in SEED_FIELDS if f != "stage"]), cell_values)
tables = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), rows)


def packed(cells: dict[str, float]) -> bytes:
    return ROW.pack(*(cells.get(field, ABSENT) for field in SEED_FIELDS))


def table(seeds: dict[str, dict[str, float]]) -> SeedTable:
    return table_of_rows({seed_id: packed(cells) for seed_id, cells in seeds.items()})


def plain(seeds: SeedTable) -> dict[str, dict[str, float | str]]:
    """Comparable: NaN as text, since NaN is no equal of itself."""
    return {
        seed_id: {field: "NaN" if math.isnan(cell) else cell for field, cell in cells.items()}
        for seed_id, cells in seeds.rows()
    }


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


@given(st.lists(tables, max_size=8))
def test_live_seeds_keep_the_last_known_cell_of_each(steps: list[dict[str, dict[str, float]]]) -> None:
    """The state packet lists every live seed, also those that this step is silent about."""
    live = LiveSeeds()
    expected: dict[str, dict[str, float]] = {}
    for seeds in steps:
        step = live.step(table(seeds))
        live.commit(step)
        for seed_id, cells in seeds.items():
            known = expected.setdefault(seed_id, {})
            known.update(cells)
            known.pop("alpha_steps", None)  # no stage is known, so nobody is BLENDING
        assert plain(live.table) == plain(table(expected))
        assert set(step.recorded.ids) == set(seeds)


@given(tables, tables)
def test_tables_of_one_step_merge_like_rows(
    earlier: dict[str, dict[str, float]], later: dict[str, dict[str, float]]
) -> None:
    """Columns and single rows may be mixed in one step."""
    expected = {seed_id: {**earlier.get(seed_id, {}), **later.get(seed_id, {})} for seed_id in {**earlier, **later}}
    assert plain(merged_tables(table(earlier), table(later))) == plain(table(expected))


_MOVED = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, -0.0, 1.5, -1.0, 2.0, 4.0, 5.0, math.nan, math.inf, -math.inf])
)


@given(rows, st.lists(st.tuples(st.sampled_from(SEED_FIELDS), _MOVED), max_size=6), st.sampled_from([*Stage]))
def test_steps_that_only_move_numbers_mean_what_they_mean_when_looked_at_closely(
    row: dict[str, float], changes: list[tuple[str, float]], stage: Stage
) -> None:
    """The short cut for such steps must be one only in time."""
    live, closely = LiveSeeds(), LiveSeeds()
    row = {**row, "stage": float(stage)}
    for field, value in [("alpha", 0.5), ("alpha", 0.25), *changes, ("alpha", 0.75)]:
        if field != "stage":
            row = {**row, field: value}
        seeds = {"a": row, "b": {"alpha": 0.5, "isolation_dot": -1.0}}
        quick, slow = live.step(table(seeds)), closely._step(table(seeds))
        live.commit(quick)
        closely.commit(slow)
        assert plain(quick.recorded) == plain(slow.recorded)
        assert plain(live.table) == plain(closely.table)
        assert (quick.violations, quick.nonfinite, quick.out_of_range) == (
            slow.violations,
            slow.nonfinite,
            slow.out_of_range,
        )


def test_looking_at_a_step_changes_nothing() -> None:
    """now.state() must not commit."""
    live = LiveSeeds()
    live.step(table({"a": {"alpha": 0.5}}))
    assert live.table.ids == ()


def test_alpha_steps_exist_only_in_blending() -> None:
    """The request says so; a seed that leaves BLENDING has no blending steps."""
    live = LiveSeeds()
    blending = live.step(table({"a": {"stage": Stage.BLENDING, "alpha_steps": 3.0}}))
    assert plain(blending.recorded) == {"a": {"stage": 4.0, "alpha_steps": 3.0}}
    live.commit(blending)
    silent = live.step(table({"a": {"alpha_steps": 4.0}}))
    assert plain(silent.recorded) == {"a": {"alpha_steps": 4.0}}
    live.commit(silent)
    done = live.step(table({"a": {"stage": Stage.FOSSILIZED, "alpha_steps": 5.0}}))
    assert plain(done.recorded) == {"a": {"stage": 7.0}}
    assert plain(done.live) == {"a": {"stage": 7.0}}


def test_violations_of_a_step_are_those_that_are_new() -> None:
    """A sum that never falls would pause the controller for ever; a count that fell was reset by Kasmina."""
    live = LiveSeeds()
    seen = []
    for count in (2.0, 2.0, 5.0, 1.0, math.nan, 1.0):
        step = live.step(table({"a": {"isolation_violations": count}, "b": {"alpha": 0.1}}))
        live.commit(step)
        seen.append(step.violations)
    assert seen == [2.0, 0.0, 3.0, 1.0, 0.0, 1.0]
    assert live.step(table({"b": {"alpha": 0.2}})).violations is None


def test_a_resumed_run_does_not_count_old_violations_again() -> None:
    """The first step after a resume would otherwise pause the controller."""
    first = LiveSeeds()
    first.commit(first.step(table({"a": {"isolation_violations": 3.0}})))
    second = LiveSeeds()
    second.resume_violations(first.violations())
    step = second.step(table({"a": {"isolation_violations": 4.0}}))
    assert step.violations == 1.0
    assert plain(step.live) == {"a": {"isolation_violations": 4.0}}


def test_a_retired_seed_is_gone_and_its_id_may_live_again() -> None:
    """Ids are recycled; the new life must know nothing of the old one."""
    live = LiveSeeds()
    live.commit(live.step(table({"a": {"alpha": 0.5}, "b": {"alpha": 0.6}})))
    assert live.retire(["a", "never seen"]) == ("a",)
    assert live.table.ids == ("b",)
    live.commit(live.step(table({"a": {"risk_score": 0.1}})))
    assert plain(live.table) == {"b": {"alpha": 0.6}, "a": {"risk_score": 0.1}}


def test_values_that_are_not_finite_or_out_of_range_are_counted_and_kept() -> None:
    """Data never raises; it is counted."""
    step = LiveSeeds().step(
        table({"a": {"alpha": 1.5, "isolation_dot": -3.0, "last_kernel_latency_ms": -1.0, "risk_score": math.inf}})
    )
    assert step.nonfinite == 1
    assert set(step.out_of_range) == {"alpha", "last_kernel_latency_ms"}
    assert plain(step.recorded)["a"]["alpha"] == 1.5


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


@given(st.lists(st.one_of(st.none(), st.floats(0, 1), st.just(math.nan)), min_size=1, max_size=20))
def test_columns_and_rows_say_the_same(alphas: list[float | None]) -> None:
    """telemetry.seeds() is only the cheaper way; NaN in a column means absent."""
    ids = [f"seed-{number}" for number in range(len(alphas))]
    columns = table_of_columns(ids, {"alpha": alphas, "fallback_used": np.zeros(len(ids), bool), "stage": None}, ())
    expected = {
        seed_id: {"alpha": alpha, "fallback_used": 0.0}
        if alpha is not None and alpha == alpha
        else {"fallback_used": 0.0}
        for seed_id, alpha in zip(ids, alphas, strict=True)
    }
    assert plain(columns) == plain(table(expected))


@pytest.mark.parametrize(
    ("ids", "columns", "error", "message"),
    [
        (["a"], {"alfa": [1.0]}, UnknownMetric, "alpha"),
        (["a", "a"], {}, InvalidName, "more than once"),
        ("ab", {}, InvalidValue, "one string"),
        ([1], {}, InvalidValue, "is a int"),
        (["a"], {"alpha": [1.0, 2.0]}, InvalidValue, r"shape \(2,\)"),
        (["a"], {"alpha": 1.0}, InvalidValue, r"shape \(\)"),
        (["a"], {"alpha": ["x"]}, InvalidValue, "not an array of numbers"),
        (["a"], {"stage": [12]}, InvalidValue, "none of Leyline's stages"),
        (["a"], {"stage": [3.5]}, InvalidValue, "none of Leyline's stages"),
    ],
)
def test_wrong_columns_are_mistakes(
    ids: list[str], columns: dict[str, object], error: type[Exception], message: str
) -> None:
    """Each names the culprit."""
    with pytest.raises(error, match=message):
        table_of_columns(ids, columns, ())


def test_ids_of_the_last_call_are_not_checked_again() -> None:
    """With a thousand seeds a step, checking costs more than recording."""
    ids = ("a", "b")
    assert table_of_columns(ids, {}, ids).ids is ids
