"""Loss and gradient dynamics against pandas."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.derive.deriver import Deriver
from esper_otel.derive.dynamics import Dynamics
from esper_otel.errors import InvalidValue

Series = Sequence[float | None]


def _square_is_a_number(value: float) -> bool:
    """Below, the oracles' squares are 0 where ours, which are scaled, are not."""
    return value == 0.0 or abs(value) > 1e-140


readings_with_gaps = st.lists(
    st.one_of(
        st.none(),
        st.floats(-1e9, 1e9).filter(_square_is_a_number),
        st.floats(-1e-9, 1e-9).filter(_square_is_a_number),
        st.sampled_from([math.nan, math.inf, -math.inf]),
    ),
    max_size=200,
)


def fail(where: str, error: Exception) -> None:
    raise AssertionError(where) from error


def derived(series: Series, name: str) -> list[dict[str, float]]:
    """The readings of each step of a series of one metric."""
    deriver = Deriver([Dynamics()], fail)
    steps = []
    for value in series:
        steps.append(dict(zip(*deriver.commit({} if value is None else {name: value}), strict=True)))
    return steps


def finite(series: Series) -> pd.Series[float]:
    return pd.Series([value for value in series if value is not None and math.isfinite(value)], dtype=float)


def of_finite_steps(series: Series, steps: list[dict[str, float]]) -> pd.DataFrame:
    rows = [row for value, row in zip(series, steps, strict=True) if value is not None and math.isfinite(value)]
    names = ["loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma", "grad_var"]
    return pd.DataFrame(rows, columns=names, dtype=float)


def assert_equal(ours: pd.Series[float], theirs: pd.Series[float], scale: float) -> None:
    np.testing.assert_array_equal(np.isnan(ours.to_numpy()), np.isnan(theirs.to_numpy()))
    np.testing.assert_allclose(ours.to_numpy(), theirs.to_numpy(), rtol=1e-9, atol=1e-10 * scale)


@given(readings_with_gaps)
def test_loss_readings_equal_pandas_on_the_series_without_gaps(series: Series) -> None:
    """A controller must get the textbook numbers, whatever is missing in between."""
    frame = of_finite_steps(series, derived(series, "loss"))
    losses = finite(series)
    scale = float(losses.abs().max()) if len(losses) else 0.0
    assert_equal(frame["loss_delta"], losses.diff(), scale)
    assert_equal(frame["loss_ewma"], losses.ewm(alpha=0.2, adjust=False, ignore_na=True).mean(), scale)
    window = [losses.iloc[max(0, i - 8) : i + 1].to_numpy() for i in range(len(losses))]
    exact = pd.Series([np.std(w) if len(w) > 1 else np.nan for w in window], dtype=float)
    assert_equal(frame["loss_volatility"], exact, scale)


@given(readings_with_gaps)
def test_gradient_readings_equal_pandas_on_the_series_without_gaps(series: Series) -> None:
    """The variance of Finch's recursion is pandas' biased exponentially weighted variance."""
    frame = of_finite_steps(series, derived(series, "gradient_norm"))
    norms = finite(series)
    scale = float(norms.abs().max()) if len(norms) else 0.0
    weighted = norms.ewm(alpha=0.2, adjust=False, ignore_na=True)
    assert_equal(frame["grad_norm_ewma"], weighted.mean(), scale)
    if len(norms):
        assert_equal(frame["grad_var"], weighted.var(bias=True), scale * scale)


@given(readings_with_gaps)
def test_a_step_without_a_finite_input_has_no_reading(series: Series) -> None:
    """Absent is absent: an old average is not this step's."""
    for value, readings in zip(series, derived(series, "loss"), strict=True):
        assert bool(readings) == (value is not None and math.isfinite(value))


def test_volatility_does_not_drift_over_a_million_steps() -> None:
    """A running sum of squares loses its digits; the window is computed anew each time."""
    random = np.random.default_rng(7)
    losses = (1e6 + random.normal(size=1_000_000)).tolist()
    processor = Dynamics()
    state = processor.initial()
    for loss in losses:
        state = processor.advance(state, {"loss": loss})
    assert processor.readings(state)["loss_volatility"] == pytest.approx(np.std(losses[-9:]), rel=1e-9)


@pytest.mark.parametrize("series", [[1e308, -1e308, 5.0], [1.7e308, 0.0, -1.7e308]])
def test_an_overflow_leaves_the_state_as_it_was(series: list[float]) -> None:
    """One absurd value must not poison the averages for ever."""
    for readings in derived(series, "loss"):
        assert all(map(math.isfinite, readings.values()))
    for readings in derived(series, "gradient_norm"):
        assert all(map(math.isfinite, readings.values()))
    assert derived([1e200, 1e-200, 2.0], "gradient_norm")[1:] == [{}, {}]


@given(readings_with_gaps, st.integers(0, 200))
def test_a_checkpoint_through_json_continues_the_series_exactly(series: Series, cut: int) -> None:
    """A resumed run's derived series must equal an uninterrupted one's, bit for bit."""
    before, after = series[:cut], series[cut:]
    first = Deriver([Dynamics()], fail)
    for value in before:
        first.commit({} if value is None else {"loss": value, "gradient_norm": value})
    second = Deriver([Dynamics()], fail)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in after:
        step = {} if value is None else {"loss": value, "gradient_norm": value}
        assert second.commit(step) == first.commit(step)
        assert second.state_dict() == first.state_dict()


def test_peeking_changes_nothing() -> None:
    """now.state() may be asked any number of times in a step."""
    deriver = Deriver([Dynamics()], fail)
    deriver.commit({"loss": 2.0})
    before = deriver.state_dict()
    assert deriver.peek({"loss": 1.0})["loss_delta"] == -1.0
    assert deriver.state_dict() == before


@pytest.mark.parametrize("smoothing", [0.0, -0.1, 1.1, math.nan])
def test_a_smoothing_that_cannot_be_is_a_mistake(smoothing: float) -> None:
    """A wrong constant must be found at the start, not in the curves."""
    with pytest.raises(InvalidValue, match="smoothing"):
        Dynamics(smoothing=smoothing)


def test_a_window_of_one_is_a_mistake() -> None:
    """A deviation needs two values."""
    with pytest.raises(InvalidValue, match="window"):
        Dynamics(window=1)


inputs = st.one_of(
    st.just(math.nan),
    st.floats(-1e3, 1e3),
    st.sampled_from([math.inf, -math.inf, 1e308, -1e308, 1.7e308, -1.7e308, 5e-324, 0.0, -0.0]),
)


@given(st.lists(st.tuples(inputs, inputs), max_size=40), st.integers(2, 4), st.sampled_from([(), ("loss_delta",)]))
def test_one_call_gives_what_the_two_of_a_processor_give(
    series: Sequence[tuple[float, float]], window: int, without: Sequence[str]
) -> None:
    """The training loop's short way, against the one that considers everything: to the bit."""
    processor = Dynamics(window=window, without=without)
    state = processor.initial()
    for loss, norm in series:
        expected = processor.advance(state, {"loss": loss, "gradient_norm": norm})
        readings = {} if expected is state else processor.readings(expected)
        state, names, numbers = processor.step(state, loss, norm)
        assert repr(state) == repr(expected)
        assert list(map(repr, zip(names, numbers, strict=True))) == list(map(repr, readings.items()))
