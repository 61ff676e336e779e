"""Live seeds: last known cells, new violations, lives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import itemgetter
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import plain, rows, table, tables

from esper_otel.frames.frame import NARROW
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.schema import SEED_CELLS, SEED_FIELDS, Stage


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


_Rows = dict[str, dict[str, float]]

_MOVED = st.one_of(  # None: not said any more
    st.floats(0, 1), st.sampled_from([None, 0.0, -0.0, 1.5, -1.0, 2.0, 4.0, 5.0, math.nan, math.inf, -math.inf])
)
_BOUNDS = {
    metric.field: (
        -math.inf if metric.unit in ("dot", "1") else 0.0,
        1.0 if metric.unit in ("ratio", "flag") else math.inf,
    )
    for metric in SEED_CELLS
}


class Closely:
    """What steps mean, cell by cell."""

    def __init__(self, resumed: dict[str, float]) -> None:
        self.live: _Rows = {}
        self.resumed = resumed

    def commit(self, seeds: _Rows) -> tuple[_Rows, float | None, int, set[str]]:
        """Returns recorded cells, new violations, how many cells are not finite, and fields with one out of range."""
        recorded: _Rows = {}
        violations, nonfinite, outside = None, 0, set()
        for seed_id, row in seeds.items():
            cells, before = row, self.live.get(seed_id, {})
            if seed_id not in self.live and seed_id in self.resumed:
                before = {"isolation_violations": self.resumed[seed_id]}
            merged = before | cells
            if merged.get("stage") != Stage.BLENDING:
                merged, cells = ({f: c for f, c in each.items() if f != "alpha_steps"} for each in (merged, cells))
            if not cells:
                continue
            recorded[seed_id], self.live[seed_id] = cells, merged
            nonfinite += sum(not math.isfinite(cell) for cell in cells.values())
            outside |= {field for field, cell in cells.items() if cell < _BOUNDS[field][0] or cell > _BOUNDS[field][1]}
            if "isolation_violations" in cells:
                now, then = cells["isolation_violations"], before.get("isolation_violations", 0.0)
                then = then if math.isfinite(then) else 0.0
                violations = (violations or 0.0) + (
                    0.0 if not math.isfinite(now) else now - then if now >= then else now
                )
        return recorded, violations, nonfinite, outside

    def retire(self, seed_ids: Iterable[str]) -> None:
        for seed_id in seed_ids:
            if self.live.pop(seed_id, None) is not None:
                self.resumed.pop(seed_id, None)


def check(
    live: LiveSeeds, closely: Closely, seeds: _Rows, order: Literal["C", "F"], *, is_looked_at: bool = False
) -> None:
    """Both say the same of a step; ``is_looked_at``: the table was looked at before the step ended."""
    given_table = table(seeds)._replace(cells=np.array(table(seeds).cells, order=order))
    if is_looked_at:
        live.is_good(given_table)
    step = live.step(given_table)
    live.commit(step)
    recorded, violations, nonfinite, outside = closely.commit(seeds)
    assert plain(step.recorded) == plain(table(recorded))
    assert plain(live.table) == plain(table(closely.live))
    assert [*live.table.ids] == [*closely.live] == [*live.ids]
    assert (step.violations, step.nonfinite, {*step.out_of_range}) == (violations, nonfinite, outside)
    assert (step.recorded.cells is step.live.cells) <= (plain(step.recorded) == plain(step.live))


@given(
    rows,
    st.lists(st.tuples(st.sampled_from(SEED_FIELDS), _MOVED), max_size=6),
    st.sampled_from([*Stage]),
    st.sampled_from("CF"),
    st.lists(st.sampled_from(["", "b", "c", "bc"]), min_size=1, max_size=3),
    st.booleans(),
)
def test_steps_that_only_move_numbers_mean_what_they_mean_when_looked_at_closely(
    row: dict[str, float],
    changes: list[tuple[str, float | None]],
    stage: Stage,
    order: Literal["C", "F"],
    silent: list[str],
    is_looked_at: bool,
) -> None:
    """The short cut for such steps must be one only in time, also if other seeds are silent in every step."""
    live, closely = LiveSeeds(), Closely({})
    row = {**row, "stage": float(stage)}
    before, after = [("alpha", number / 8) for number in range(7)], [("alpha", number / 8) for number in range(5)]
    for number, (field, value) in enumerate([*before, *changes, *after]):
        if value is None:
            row = {name: cell for name, cell in row.items() if name != field}
        elif field != "stage":
            row = {**row, field: value}
        seeds: _Rows = {"b": {"alpha": 0.5, "isolation_dot": -1.0}, "a": row, "c": {"stage": 2.0}}
        if live.table.ids:
            seeds = {seed_id: cells for seed_id, cells in seeds.items() if seed_id not in silent[number % len(silent)]}
        check(live, closely, seeds, order, is_looked_at=is_looked_at)


_FULL = dict.fromkeys(SEED_FIELDS[:NARROW], 0.5) | {"stage": 4.0}
_CHANGED_ROWS = st.one_of(
    st.just(_FULL), st.fixed_dictionaries({"stage": st.sampled_from([2.0, 4.0]), "isolation_violations": _MOVED}), rows
)


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from("abcdefg"), _CHANGED_ROWS), max_size=5, unique_by=itemgetter(0)),
            st.lists(st.sampled_from("abcdefg"), max_size=3, unique=True),
            st.sampled_from("CF"),
            st.booleans(),
        ),
        max_size=8,
    ),
    st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from([0.0, 1.0, 4.0]), max_size=3),
)
def test_seeds_that_come_and_go_in_every_step_mean_what_they_mean_when_looked_at_closely(
    steps: list[tuple[list[tuple[str, dict[str, float | None]]], list[str], Literal["C", "F"], bool]],
    resumed: dict[str, float],
) -> None:
    """Births at the end and elsewhere, deaths, silence and ids that live again: each has a way of its own."""
    live, closely = LiveSeeds(), Closely(resumed.copy())
    live.resume_violations(resumed)
    for said, retired, order, is_looked_at in steps:
        ended = live.retire(retired)
        assert {*ended} == {*retired} & {*closely.live}
        closely.retire(retired)
        seeds = {seed_id: {f: c for f, c in row.items() if c is not None} for seed_id, row in said}
        check(live, closely, seeds, order, is_looked_at=is_looked_at)


def test_steps_that_are_undone_leave_nothing_behind() -> None:
    """Ctrl-C undoes a step, and ``now.state()`` commits none."""
    live = LiveSeeds()
    live.commit(live.step(table({"a": _FULL, "b": _FULL})))
    state, before = live.state, plain(live.table)
    live.retire(["a"])
    live.commit(live.step(table({"b": _FULL | {"stage": 2.0}, "c": _FULL})))
    live.state = state
    assert plain(live.table) == before
    step = live.step(table({"a": _FULL, "b": _FULL | {"isolation_violations": 2.0}}))
    assert (step.violations, step.live.ids) == (1.5, ("a", "b"))


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
