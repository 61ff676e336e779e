"""Statistics against NumPy's, and what intervals are worth on runs whose steps resemble their neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.compare.condition import Condition, Verdict
from esper_otel.compare.statistic import Statistic, Values, change
from esper_otel.errors import ConfigurationError

pytestmark = pytest.mark.own_code

PAIRS = 100
STEPS = 600


def latencies(random: np.random.Generator, factor: float = 1.0) -> Values:
    """Step latencies as machines have them: skewed, correlated over tens of steps, with single slow steps."""
    drift = np.zeros(STEPS)
    for step in range(1, STEPS):
        drift[step] = 0.95 * drift[step - 1] + random.normal(0, 0.004)
    slow = random.random(STEPS) < 0.01
    return np.asarray(factor * 20.0 * np.exp(drift + random.normal(0, 0.03, STEPS)) * np.where(slow, 5, 1))


def failures(factor: float, text: str) -> int:
    """How many of 100 pairs fail a condition."""
    condition = Condition.of(text)
    failed = 0
    for seed in range(PAIRS):
        random = np.random.default_rng(seed)
        found = change(condition.statistic, latencies(random, factor), latencies(random))
        failed += condition.judge(found)[0] is Verdict.FAILED
    return failed


@pytest.mark.parametrize("text", ["latency.p50 > 1.02x", "latency.p50 > 1.0x", "latency.mean > 1.02x"])
def test_equal_runs_raise_few_false_alarms(text: str) -> None:
    assert failures(1.0, text) <= 5


def test_five_percent_more_is_found() -> None:
    assert failures(1.05, "latency.p50 > 1.02x") >= 90
    assert failures(1 / 1.05, "latency.p50 < 0.98x") >= 90


def test_an_improvement_can_be_demanded() -> None:
    """A limit on the other side of no change: equal runs fail, and one that is 20 % quicker passes."""
    assert failures(1.0, "latency.p50 > 0.9x") >= 95
    assert failures(0.8, "latency.p50 > 0.9x") == 0


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=300),
    st.sampled_from([("p50", 50), ("p90", 90), ("p99.9", 99.9), ("min", 0), ("max", 100)]),
)
def test_percentiles_are_numpys(numbers: list[float], named: tuple[str, float]) -> None:
    values = np.array(numbers)
    name, percent = named
    assert Statistic.of(name)(values) == np.percentile(values, percent, method="inverted_cdf")


@given(st.lists(st.floats(-1e6, 1e6), min_size=16, max_size=300))
def test_a_resample_that_draws_each_block_once_is_the_statistic(numbers: list[float]) -> None:
    values = np.array(numbers)

    class Once(np.random.Generator):
        def multinomial(self, n: object, pvals: object, size: object = None) -> Values:  # type: ignore[override]
            return np.ones((1, len(pvals)))  # type: ignore[arg-type]

    for name in ("p50", "p90", "mean"):
        statistic = Statistic.of(name)
        assert statistic.resampled(values, Once(np.random.PCG64(0)))[0] == pytest.approx(statistic(values), abs=1e-6)


def test_nan_is_a_value_and_not_missing() -> None:
    values = np.arange(1000.0)
    values[-3] = math.nan
    assert math.isnan(Statistic.of("last")(values))
    assert math.isnan(Statistic.of("mean")(values))
    assert Statistic.of("p50")(values) == 499  # an order exists for the others only
    for text in ("loss.last > 1.02x", "loss.last < 0.5x", "loss.mean > 1e9", "loss.p50 > 9x", "loss.max > 1e9"):
        condition = Condition.of(text)
        assert condition.judge(change(condition.statistic, values, np.arange(1000.0)))[0] is Verdict.FAILED
    condition = Condition.of("loss.last > 1.02x")
    assert condition.judge(change(condition.statistic, np.arange(1000.0), values))[0] is Verdict.NONE
    infinite = np.where(np.arange(1000) == 990, math.inf, 1.0)
    assert condition.judge(change(condition.statistic, infinite, np.ones(1000)))[0] is Verdict.FAILED


@pytest.mark.parametrize(
    ("name", "fewest"), [("p50", 100), ("p90", 100), ("p99", 1000), ("p99.9", 10_000), ("last", 100)]
)
def test_a_verdict_needs_steps(name: str, fewest: int) -> None:
    condition = Condition.of(f"x.{name} > 1.05x")
    enough, too_few = np.full(fewest, 2.0), np.full(fewest - 1, 2.0)
    assert condition.judge(change(condition.statistic, enough, enough / 2))[0] is Verdict.FAILED
    verdict, reason = condition.judge(change(condition.statistic, too_few, too_few / 2))
    assert verdict is Verdict.NONE
    assert reason == f"{fewest - 1} steps, needs {fewest}"


def test_a_baseline_that_is_not_above_zero_has_no_multiple() -> None:
    for baseline in (0.0, -1.0):
        condition = Condition.of("x.p50 > 1.05x")
        verdict, reason = condition.judge(change(condition.statistic, np.ones(200), np.full(200, baseline)))
        assert verdict is Verdict.NONE
        assert "baseline" in reason
    condition = Condition.of("x.p50 > -2")
    assert condition.judge(change(condition.statistic, np.full(200, -1.0), np.zeros(0)))[0] is Verdict.FAILED


@pytest.mark.parametrize(
    "text",
    [
        "loss",
        "loss > 1x",
        "loss.p50 1.05x",
        "loss.p50 > ",
        "loss.p50 > x",
        "loss.p50 > nan",
        "loss.p50 > 0x",
        "loss.p50 = 1",
    ],
)
def test_what_is_not_a_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"step_latency_ms.p50 > 1.05x"):
        Condition.of(text)


def test_an_unknown_statistic_is_refused_with_the_known() -> None:
    with pytest.raises(ConfigurationError, match="'median': known are mean, last"):
        Condition.of("loss.median > 1.05x")
    assert Condition.of("esper.phase_ms.p99.9<=0.5").metric == "esper.phase_ms"
