"""Parallel dimensions: places by name, from an argument, a mesh of PyTorch or a variable."""

from __future__ import annotations

from typing import Any

import pytest

from esper_otel import ConfigurationError, InvalidValue
from esper_otel.session.parallel import place_in_mesh


class Mesh:
    """What is used of PyTorch's DeviceMesh."""

    def __init__(self, names: tuple[str, ...] | None, coordinate: list[int] | None) -> None:
        self.mesh_dim_names = names
        self._coordinate = coordinate

    def get_coordinate(self) -> list[int] | None:
        return self._coordinate


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, {}),
        (None, {"ESPER_PARALLEL": "dp=3, tp=0"}, {"dp": 3, "tp": 0}),
        ({"dp": 1}, {"ESPER_PARALLEL": "dp=3"}, {"dp": 1}),
        (Mesh(("dp", "tp"), [1, 2]), {}, {"dp": 1, "tp": 2}),
        (Mesh(("dp", "tp"), None), {}, {}),
    ],
)
def test_parallel_dimensions_come_from_the_argument_a_mesh_or_the_variable(
    given: Any, environ: dict[str, str], expected: dict[str, int]
) -> None:
    """A rank that is not in the mesh has no place in it."""
    assert place_in_mesh(given, environ) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"DP": 1},
        {"a.b": 1},
        {"dp": -1},
        {"dp": True},
        {"dp": 1.0},
        {"dp": "1"},
        {1: 1},
        {f"d{number}": 0 for number in range(9)},
        Mesh(None, [0]),
        [3, 0],
    ],
    ids=lambda given: "a mesh" if isinstance(given, Mesh) else repr(given),
)
def test_what_cannot_be_a_place_raises(given: Any) -> None:
    with pytest.raises(InvalidValue, match="parallel"):
        place_in_mesh(given, {})


@pytest.mark.parametrize("text", ["dp", "dp=", "dp=x", "dp=1,dp=2", "=1", "dp=-1"])
def test_a_variable_that_names_no_places_says_so(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"ESPER_PARALLEL=.* is not like dp=3,tp=0") as raised:
        place_in_mesh(None, {"ESPER_PARALLEL": text})
    assert "literal" not in str(raised.value), "words of Python"
