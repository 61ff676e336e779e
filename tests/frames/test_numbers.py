"""Which numbers may go onto the wire."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.frames.frame import FLOAT32_BOUND
from esper_otel.frames.numbers import finite, finite_cells, whole
from esper_otel.leyline import SeedState

pytestmark = pytest.mark.own_code

NEAR_THE_BOUND = [FLOAT32_BOUND, math.nextafter(FLOAT32_BOUND, 0), math.nextafter(FLOAT32_BOUND, math.inf)]
doubles = st.floats() | st.sampled_from([*NEAR_THE_BOUND, *(-bound for bound in NEAR_THE_BOUND)])


@given(doubles)
def test_finite_is_what_numpy_rounds_to_a_finite_float32(value: float) -> None:
    """A double such as 1e39 is finite here and infinite at the reader."""
    with warnings.catch_warnings(action="ignore"):  # NumPy warns of the overflow that this is about
        stays = bool(np.isfinite(np.float32(value)))
    assert (finite(value) is not None) == stays
    assert bool(finite_cells(np.array([value]))[0]) == stays


@given(doubles.filter(lambda value: finite(value) is not None))
def test_what_is_finite_is_finite_in_a_message(value: float) -> None:
    """The bound is that of protobuf too."""
    assert math.isfinite(SeedState(risk_score=value).risk_score)


def test_missing_is_not_finite() -> None:
    """None stays None, never 0."""
    assert finite(None) is None
    assert whole(None, 10) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0),
        (3.0, 3),
        (2**32 - 1, 2**32 - 1),
        (2**32, None),
        (-1, None),
        (0.5, None),
        (math.nan, None),
        (math.inf, None),
    ],
)
def test_whole_numbers_are_those_an_unsigned_field_holds(value: float, number: int | None) -> None:
    """A field that protobuf would refuse is left out instead of raising into a pull."""
    assert whole(value, 2**32) == number
