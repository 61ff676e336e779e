"""Live seeds: last known cells, new violations, lives."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import plain, rows, table, tables

from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.schema import SEED_FIELDS, Stage


@given(st.lists(tables, max_size=8))
def test_live_seeds_keep_the_last_known_cell_of_each(steps: list[dict[str, dict[str, float]]]) -> None:
    """The state packet lists every live seed, also those that this step is silent about."""
    live = LiveSeeds()
    expected: dict[str, dict[str, float]] = {}
    for seeds in steps:
        step = live.step(table(seeds))
        live.commit(step)
        # No stage is known, so nobody is BLENDING; and a row without a cell says nothing of its seed.
        said = {
            seed_id: {field: cells[field] for field in cells if field != "alpha_steps"}
            for seed_id, cells in seeds.items()
        }
        for seed_id, cells in said.items():
            if cells:
                expected.setdefault(seed_id, {}).update(cells)
        assert plain(live.table) == plain(table(expected))
        assert set(step.recorded.ids) == {seed_id for seed_id, cells in said.items() if cells}


_MOVED = st.one_of(  # None: not said any more
    st.floats(0, 1), st.sampled_from([None, 0.0, -0.0, 1.5, -1.0, 2.0, 4.0, 5.0, math.nan, math.inf, -math.inf])
)


@given(
    rows,
    st.lists(st.tuples(st.sampled_from(SEED_FIELDS), _MOVED), max_size=6),
    st.sampled_from([*Stage]),
    st.sampled_from("CF"),
    st.lists(st.sampled_from(["", "b", "c", "bc"]), min_size=1, max_size=3),
)
def test_steps_that_only_move_numbers_mean_what_they_mean_when_looked_at_closely(
    row: dict[str, float],
    changes: list[tuple[str, float | None]],
    stage: Stage,
    order: Literal["C", "F"],
    silent: list[str],
) -> None:
    """The short cut for such steps must be one only in time, also if other seeds are silent in every step."""
    live, closely = LiveSeeds(), LiveSeeds()
    row = {**row, "stage": float(stage)}
    before, after = [("alpha", number / 8) for number in range(7)], [("alpha", number / 8) for number in range(5)]
    for number, (field, value) in enumerate([*before, *changes, *after]):
        if value is None:
            row = {name: cell for name, cell in row.items() if name != field}
        elif field != "stage":
            row = {**row, field: value}
        seeds = {"b": {"alpha": 0.5, "isolation_dot": -1.0}, "a": row, "c": {"stage": 2.0}}
        if live.table.ids:
            seeds = {seed_id: cells for seed_id, cells in seeds.items() if seed_id not in silent[number % len(silent)]}
        given_table = table(seeds)._replace(cells=np.array(table(seeds).cells, order=order))
        quick, slow = live.step(given_table), closely._step(table(seeds))
        settled = live.settled(given_table)
        if settled is None:
            live.commit(quick)
        else:
            assert plain(settled) == plain(quick.recorded)
            assert live.settled_violations == quick.violations
        closely.commit(slow)
        assert plain(quick.recorded) == plain(slow.recorded)
        assert plain(live.table) == plain(closely.table)
        assert (quick.violations, quick.nonfinite, quick.out_of_range) == (
            slow.violations,
            slow.nonfinite,
            slow.out_of_range,
        )


def test_seeds_that_are_silent_in_turns_are_looked_at_once() -> None:
    """And again when a stage changes or a seed is new, since a count may then be new, too."""
    live = LiveSeeds()
    cells = {"stage": 4.0, "alpha": 0.5, "isolation_violations": 1.0}

    def is_settled(seed_ids: str, **others: float) -> bool:
        step = live.step(table(dict.fromkeys(seed_ids, cells | others)))
        live.commit(step)
        return step.is_settled

    turns = ["abc", "ab", "bc"]
    assert [is_settled(seed_ids) for seed_ids in turns * 3] == [False] * 3 + [True] * 6
    assert not is_settled("ab", stage=7.0)
    assert [is_settled(seed_ids) for seed_ids in turns * 2] == [False] * 3 + [True] * 3
    assert not is_settled("abcd")
    assert [is_settled(seed_ids) for seed_ids in turns * 2] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("silent", ["", "b"])
def test_what_is_not_said_again_stays_known_in_every_like_step(silent: str) -> None:
    """Kasmina may say some cells now and then only, and nothing of a seed that has been fossilized."""
    live = LiveSeeds()
    whole = {seed_id: {"stage": 4.0, "alpha": 0.5, "isolation_dot": -1.0, "learning_rate": 0.1} for seed_id in "abc"}
    live.commit(live.step(table(whole)))
    for number in range(4):
        said = {seed_id: {"stage": 4.0, "alpha": number / 8} for seed_id in whole if seed_id not in silent}
        step = live.step(table(said))
        live.commit(step)
        assert step.is_settled == (number > 0)
        assert plain(step.recorded) == plain(table(said))
        assert plain(live.table) == plain(table({seed_id: whole[seed_id] | said.get(seed_id, {}) for seed_id in whole}))


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
