"""Columns: the same as rows, only cheaper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import plain, table

import esper_otel
from esper_otel import EsperSettings, Telemetry
from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric
from esper_otel.frames.frame import NARROW, Frame
from esper_otel.record.seed_columns import SeedColumns
from esper_otel.record.values import VIOLATIONS
from esper_otel.schema import SEED_FIELDS, Stage


@given(st.lists(st.one_of(st.none(), st.floats(0, 1), st.just(math.nan)), min_size=1, max_size=20))
def test_columns_and_rows_say_the_same(alphas: list[float | None]) -> None:
    """telemetry.seeds() is only the cheaper way; NaN in a column means absent."""
    ids = [f"seed-{number}" for number in range(len(alphas))]
    given_columns = {"alpha": alphas, "fallback_used": np.zeros(len(ids), bool), "stage": None}
    columns = SeedColumns(lambda table: False).table(ids, given_columns)
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
        (["a"], {"stage": [12]}, InvalidValue, "not one of Leyline's stages"),
        (["a"], {"stage": [3.5]}, InvalidValue, "not one of Leyline's stages"),
    ],
)
def test_wrong_columns_are_mistakes(
    ids: list[str], columns: dict[str, object], error: type[Exception], message: str
) -> None:
    """Each names the culprit."""
    with pytest.raises(error, match=message):
        SeedColumns(lambda table: False).table(ids, columns)


@pytest.mark.parametrize("mask", [[False, True], True, False])
def test_what_is_masked_is_absent(mask: Any) -> None:
    """Under the mask, there may be anything."""
    ids, columns = ["a", "b"], {"alpha": np.ma.array([0.25, 7.0], mask=mask), "layer_depth": np.ma.array([1, 2])}
    absent = np.broadcast_to(mask, 2)
    expected = {
        seed_id: {"layer_depth": depth} if is_absent else {"alpha": alpha, "layer_depth": depth}
        for seed_id, alpha, depth, is_absent in zip(ids, (0.25, 7.0), (1.0, 2.0), absent, strict=True)
    }
    assert plain(SeedColumns(lambda table: False).table(ids, columns)) == plain(table(expected))


def test_a_column_may_be_part_of_a_graph() -> None:
    """A seed's alpha is often a parameter: its values are taken, and the graph is left alone."""
    torch = pytest.importorskip("torch")
    alphas = torch.tensor([0.25, 0.5], requires_grad=True)
    with silent() as telemetry:
        with telemetry.step(epoch=0) as now:
            telemetry.seeds(["a", "b"], alpha=alphas, layer_depth=(2 * alphas))
            now.put(loss=0.5)
        assert plain(newest(telemetry).seeds) == {
            "a": {"alpha": 0.25, "layer_depth": 0.5},
            "b": {"alpha": 0.5, "layer_depth": 1.0},
        }
    alphas.sum().backward()
    assert alphas.grad.tolist() == [1.0, 1.0]


def test_ids_of_the_last_call_are_not_checked_again() -> None:
    """With a thousand seeds a step, checking costs more than recording."""
    columns = SeedColumns(lambda table: False)
    first = columns.table(["a", "b"], {})
    assert columns.table(["a", "b"], {}).ids is first.ids


def test_ids_that_come_and_go_are_checked_and_forgotten() -> None:
    """A new id is checked next to known ones; a number is no name, even if a name was equal to it."""
    columns = SeedColumns(lambda table: False)
    for number in range(3_000):
        ids = ["a", np.str_("b"), f"new-{number}"]
        assert columns.table(ids, {}).ids == ("a", "b", f"new-{number}")
    assert len(columns._names) < 1_100
    assert {type(name) for name in columns.table(["a", np.str_("b")], {}).ids} == {str}
    wrongs: list[Any] = [["a", "\n"], ["a", 1], ["a", ["b"]], ["a", "b", "a"]]
    for wrong in wrongs:
        with pytest.raises((InvalidName, InvalidValue)):
            columns.table(wrong, {})


def test_a_call_that_failed_leaves_nothing_that_counts_as_good() -> None:
    """The second try must be told the same."""
    columns = SeedColumns(lambda table: False)
    for _ in range(2):
        with pytest.raises(InvalidValue, match="not one of Leyline's stages"):
            columns.table(["a"], {"stage": [12]})
        with pytest.raises(InvalidName, match="more than once"):
            columns.table(["a", "a"], {})


@given(
    st.lists(
        st.dictionaries(st.sampled_from(SEED_FIELDS), st.floats() | st.sampled_from([0.0, 4.0, 7.0]), max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_each_call_means_what_it_would_mean_alone(calls: list[dict[str, float]]) -> None:
    """What is remembered of the last call must never show."""
    columns = SeedColumns(lambda table: False)
    for call in calls:
        given_columns = {field: np.array([cell, math.nan]) for field, cell in call.items()}
        stage = call.get("stage", math.nan)
        if not (math.isnan(stage) or stage in set(map(float, Stage))):
            with pytest.raises(InvalidValue):
                columns.table(["a", "b"], given_columns)
            continue
        present = {field: cell for field, cell in call.items() if not math.isnan(cell)}
        assert plain(columns.table(["a", "b"], given_columns)) == plain(table({"a": present, "b": {}}))


_CELLS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, -1.0, 4.0, -0.0, math.nan, math.inf, -math.inf])


@given(
    st.lists(st.dictionaries(st.sampled_from(SEED_FIELDS[1:]), _CELLS, max_size=2), min_size=1, max_size=6),
    st.sampled_from([*Stage]),
)
def test_a_run_of_columns_means_what_its_rows_mean(changes: list[dict[str, float]], stage: Stage) -> None:
    """Most steps change little, and what they have in common with the last is not looked at again."""
    cells = dict.fromkeys(SEED_FIELDS[:NARROW], 0.5) | {"stage": float(stage)}
    ids = ["a", "b"]
    with silent() as by_row, silent() as by_column:
        for number, change in enumerate([{}, {}, *changes, {}]):
            cells = cells | change
            columns = {field: np.array([cell, 0.5 if field != "stage" else 4.0]) for field, cell in cells.items()}
            with by_row.step(epoch=0) as now:
                now.put(loss=float(number))
                for row, seed_id in enumerate(ids):
                    given_cells = {field: column[row] for field, column in columns.items()}
                    now.seed(seed_id, **{f: float(c) for f, c in given_cells.items() if not math.isnan(c)})
            with by_column.step(epoch=0) as now:
                now.put(loss=float(number))
                by_column.seeds(ids, **columns)
            rows, tables = newest(by_row), newest(by_column)
            assert plain(rows.seeds) == plain(tables.seeds)
            assert plain(rows.live) == plain(tables.live)
            assert rows.recorded.keys() == tables.recorded.keys()
            assert rows.recorded.get(VIOLATIONS) == tables.recorded.get(VIOLATIONS)
        counted = [telemetry._recorder.publisher.counters for telemetry in (by_row, by_column)]
        assert counted[0].nonfinite == counted[1].nonfinite
        assert counted[0].out_of_range == counted[1].out_of_range


def test_blending_steps_that_are_absent_stay_absent_when_the_seed_begins_to_blend_in_the_same_step() -> None:
    """While it rested nobody looked at its steps, whatever was given."""
    resting = dict.fromkeys(SEED_FIELDS[:NARROW], 0.5) | {"stage": float(Stage.TRAINING)}
    with silent() as telemetry:
        for alpha_steps, begins in ((3.0, False), (3.0, False), (3.0, False), (math.nan, True)):
            with telemetry.step(epoch=0) as now:
                cells = resting | {"alpha_steps": alpha_steps}
                telemetry.seeds(["a"], **{field: np.array([cell]) for field, cell in cells.items()})
                now.put(loss=0.5)
                if begins:
                    now.seed("a", stage=Stage.BLENDING)
        assert "alpha_steps" not in plain(newest(telemetry).seeds)["a"]


def test_a_whole_number_beyond_a_double_is_infinite_in_a_row_as_everywhere() -> None:
    """Data never raises."""
    with silent() as telemetry:
        for _ in range(3):
            with telemetry.step(epoch=0) as now:
                now.seed("a", stage=Stage.BLENDING, alpha=True, isolation_violations=10**400)
            assert plain(newest(telemetry).seeds) == {
                "a": {"stage": 4.0, "alpha": 1.0, "isolation_violations": math.inf}
            }


def silent() -> Telemetry:
    settings = EsperSettings(tolaria_step_enrichment_enabled=False)
    return esper_otel.start(run_id="run", settings=settings, export_steps=False)


def newest(telemetry: Telemetry) -> Frame:
    frame = telemetry._recorder.publisher.ring.newest()
    assert frame is not None
    return frame
