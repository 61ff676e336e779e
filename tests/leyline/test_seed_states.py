"""The seeds in the state packet."""

from __future__ import annotations

import math
from typing import Any

import pytest
from frame_examples import make_frame, seed_table
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.frames.frame import SeedTable
from esper_otel.frames.numbers import finite, whole
from esper_otel.leyline import SeedState, state
from esper_otel.schema import SEED_FIELDS, Stage

pytestmark = pytest.mark.own_code


def seed_state(**cells: float) -> SeedState:
    """The state of a live seed with these cells, of which the step itself recorded none."""
    (seed,) = state(make_frame(seeds=seed_table({}), live=seed_table({"seed-3": cells}))).seed_states
    return seed


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({}, {}),
        ({"stage": Stage.CULLED}, {"stage": 8, "metrics": {"blend_allowed": 0.0}}),
        ({"gradient_norm": 1.5}, {"gradient_norm": 1.5}),
        ({"learning_rate": 0.25}, {"learning_rate": 0.25}),
        ({"layer_depth": 12.0}, {"layer_depth": 12}),
        ({"age_epochs": 4.0}, {"age_epochs": 4}),
        ({"risk_score": 0.5}, {"risk_score": 0.5}),
        ({"alpha": 0.0}, {"metrics": {"alpha": 0.0}}),
        ({"alpha_total_steps": 20.0}, {"metrics": {"alpha_total_steps": 20.0}}),
        ({"alpha_temperature": 1.5}, {"metrics": {"alpha_temperature": 1.5}}),
        ({"risk_tolerance": 0.25}, {"metrics": {"risk_tolerance": 0.25}}),
        ({"blend_allowed": 0.0, "stage": Stage.BLENDING}, {"stage": 4, "metrics": {"blend_allowed": 0.0}}),
        ({"blend_allowed": 1.0}, {"metrics": {"blend_allowed": 1.0}}),
        ({"alpha_steps": 8.0, "stage": 4.0}, {"stage": 4, "metrics": {"alpha_steps": 8.0, "blend_allowed": 1.0}}),
        ({"alpha_steps": 8.0, "stage": Stage.TRAINING}, {"stage": 3, "metrics": {"blend_allowed": 0.0}}),
        ({"alpha_steps": 8.0}, {}),
        # Cells of the telemetry alone.
        ({"kernel_attached": 1.0, "isolation_dot": 2.0, "isolation_violations": 3.0}, {}),
        # What a field cannot hold is left out.
        ({"stage": 12.0}, {}),
        ({"stage": 4.5}, {}),
        ({"stage": math.nan}, {}),
        ({"layer_depth": -1.0}, {}),
        ({"layer_depth": 2.0**32}, {}),
        ({"age_epochs": 0.5}, {}),
        ({"gradient_norm": math.nan, "learning_rate": math.inf, "risk_score": 1e39}, {}),
        ({"alpha": math.nan, "risk_tolerance": -math.inf, "alpha_temperature": 1e39}, {}),
        ({"blend_allowed": math.nan, "stage": Stage.BLENDING}, {"stage": 4, "metrics": {"blend_allowed": 1.0}}),
    ],
)
def test_each_cell_has_its_place(cells: dict[str, float], expected: dict[str, Any]) -> None:
    """One row for one rule; the message is compared whole."""
    assert seed_state(**cells) == SeedState(seed_id="seed-3", **expected)


@pytest.mark.parametrize("stage", Stage)
def test_blending_is_allowed_in_the_four_stages_from_blending_to_fossilized(stage: Stage) -> None:
    """Where nobody recorded it, the stage says it."""
    assert seed_state(stage=stage).metrics["blend_allowed"] == (1.0 if 4 <= stage <= 7 else 0.0)


def test_every_live_seed_is_listed_with_its_last_known_cells() -> None:
    """A packet without a seed makes Tamiyo pause: a step that records none must still list them."""
    live = seed_table({"a": {"stage": 3.0, "alpha": 0.0}, "b": {"stage": 4.0, "alpha": 0.5}})
    packet = state(make_frame(seeds=seed_table({"b": {"alpha": 0.5}}), live=live))
    assert [(seed.seed_id, seed.stage) for seed in packet.seed_states] == [("a", 3), ("b", 4)]


def test_without_live_seeds_there_is_no_seed_state() -> None:
    """Nothing is made up."""
    assert not state(make_frame(seeds=seed_table({}), live=seed_table({}))).seed_states


def built_by_setters(live: SeedTable) -> list[SeedState]:
    """The same rules, one seed and one field at a time."""
    seeds = []
    for seed_id, cells in live.rows():
        seed = SeedState(seed_id=seed_id)
        stage = whole(cells.get("stage"), 12)
        if stage is not None:
            seed.stage = stage  # type: ignore[assignment] # an enum field takes its number
        for name in ("gradient_norm", "learning_rate", "risk_score"):
            if finite(cells.get(name)) is not None:
                setattr(seed, name, cells[name])
        for name in ("layer_depth", "age_epochs"):
            number = whole(cells.get(name), 2**32)
            if number is not None:
                setattr(seed, name, number)
        for name in (
            "alpha",
            "alpha_steps",
            "alpha_total_steps",
            "alpha_temperature",
            "risk_tolerance",
            "blend_allowed",
        ):
            if finite(cells.get(name)) is not None and (name != "alpha_steps" or stage == 4):
                seed.metrics[name] = cells[name]
        if stage is not None and "blend_allowed" not in seed.metrics:
            seed.metrics["blend_allowed"] = float(4 <= stage <= 7)
        seeds.append(seed)
    return seeds


wild_cells = st.dictionaries(
    st.sampled_from(SEED_FIELDS),
    st.floats() | st.integers(0, 13).map(float) | st.sampled_from([2.0**32, 1e39, math.nan, math.inf]),
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), wild_cells, max_size=5))
def test_the_fast_way_equals_one_field_at_a_time(rows: dict[str, dict[str, float]]) -> None:
    """The bytes with holes are an optimisation and nothing else."""
    by_id = seed_table(dict(sorted(rows.items())))
    assert list(state(make_frame(live=seed_table(rows))).seed_states) == built_by_setters(by_id)
