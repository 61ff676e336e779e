"""Thinning: few buckets, and nothing that matters is hidden."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from esper_otel.charts.groups import described
from esper_otel.charts.thinned import ChartStep, ThinnedSteps

VALUES = st.one_of(st.none(), st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(VALUES, min_size=1, max_size=300), st.integers(2, 40), st.integers(1, 50))
def test_no_spike_and_no_value_that_is_not_finite_is_hidden(values: list[float | None], most: int, apart: int) -> None:
    """Whatever is recorded, in at most so many buckets."""
    thinned = ThinnedSteps(most)
    thinned.add(
        ChartStep(1 + place * apart, 0, float(place), {} if value is None else {"loss": value})
        for place, value in enumerate(values)
    )
    series = thinned.series()
    assert len(series["columns"]["step"]) <= most
    assert sum(series["columns"]["steps"]) == len(values)
    assert series["columns"]["step"][-1] == 1 + (len(values) - 1) * apart
    there = [value for value in values if value is not None]
    metric = series["metrics"].get("loss", {"last": [], "odd": []})
    assert bool(there) == ("loss" in series["metrics"])
    counts = [sum(row[kind] for row in metric["odd"]) for kind in (1, 2, 3)]
    assert counts == [sum(map(math.isnan, there)), there.count(math.inf), there.count(-math.inf)]
    finite = [value for value in there if math.isfinite(value)]
    low = [value for value in metric.get("min", metric["last"]) if value is not None]
    high = [value for value in metric.get("max", metric["last"]) if value is not None]
    if finite:
        assert math.isclose(min(low), min(finite), rel_tol=1e-6)
        assert math.isclose(max(high), max(finite), rel_tol=1e-6)
    for row, *_, step in metric["odd"]:
        assert series["columns"]["first_step"][row] <= step <= series["columns"]["step"][row]


def test_steps_that_go_back_begin_a_segment_and_what_was_done_again_is_known() -> None:
    thinned = ThinnedSteps(100)
    thinned.add(ChartStep(step, 0, float(place), {"loss": 1.0}) for place, step in enumerate([1, 2, 3, 4, 3, 4, 5]))
    series = thinned.series()
    assert series["columns"]["segment"] == [0, 0, 0, 0, 1, 1, 1]
    assert series["columns"]["is_again"] == [0, 0, 1, 1, 0, 0, 0]
    assert [segment["why"] for segment in series["segments"]] == ["start", "back"]


def test_a_metric_that_comes_late_is_missing_before() -> None:
    thinned = ThinnedSteps(100)
    thinned.add([ChartStep(1, 0, 1.0, {"a": 1.0})])
    thinned.add([ChartStep(2, 0, 2.0, {"b": 2.0})])
    metrics = thinned.series()["metrics"]
    assert (metrics["a"]["last"], metrics["b"]["last"]) == ([1.0, None], [None, 2.0])


def test_a_metric_of_the_users_own_has_the_unit_that_its_name_ends_with() -> None:
    names = ("tokens_per_s", "wait_ms", "sync_s", "cache_bytes", "hit_percent", "bonus")
    units = {each.name: each.unit for each in described(names)}
    assert units == dict(zip(names, ("rate", "ms", "s", "bytes", "%", ""), strict=True))
