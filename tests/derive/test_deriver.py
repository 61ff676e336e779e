"""Users' processors: what they give is in the step, and what goes wrong in them costs their own values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from esper_otel.derive.deriver import Deriver
from esper_otel.derive.dynamics import Dynamics


class Giving:
    """A processor whose readings are whatever it was made with."""

    needs = ("loss",)
    gives = ("loss_ewma",)

    def __init__(self, readings: object) -> None:
        self._readings = readings

    def initial(self) -> int:
        return 0

    def advance(self, state: int, given: Mapping[str, float]) -> int:
        return state + 1

    def readings(self, state: int) -> Any:
        if isinstance(self._readings, Exception):
            raise self._readings
        return self._readings


class Ratio:
    """Stands on what another processor gives."""

    needs = ("loss_ewma",)
    gives = ("loss_volatility",)

    def initial(self) -> float:
        return 0.0

    def advance(self, state: float, given: Mapping[str, float]) -> float:
        return given["loss_ewma"] * 2

    def readings(self, state: float) -> Mapping[str, float]:
        return {"loss_volatility": state}


def committed(deriver: Deriver, given: Mapping[str, float]) -> dict[str, float]:
    """The derived metrics by name."""
    return dict(zip(*deriver.commit(given), strict=True))


@pytest.mark.parametrize("readings", [RuntimeError("broken"), {"loss_ewma": "high"}, 7], ids=repr)
def test_a_broken_processor_costs_a_step_its_own_values_only(readings: object) -> None:
    faults = []
    dynamics = Dynamics(without=["loss_ewma"])
    deriver = Deriver([Giving(readings), dynamics], lambda where, _: faults.append(where))
    for loss, delta in ((2.0, {}), (1.5, {"loss_delta": -0.5})):
        found = committed(deriver, {"loss": loss})
        found.pop("loss_volatility", None)
        assert found == delta
    assert faults == ["readings of Giving"] * 2


def test_a_value_that_it_does_not_give_is_absent_and_no_fault() -> None:
    def fail(where: str, error: Exception) -> None:
        raise AssertionError(where) from error

    given = {"loss_ewma": None, "nobody.declared.this": 1.0}
    assert committed(Deriver([Giving(given)], fail), {"loss": 1.0}) == {}
    assert committed(Deriver([Giving({"loss_ewma": 3})], fail), {"loss": 1.0}) == {"loss_ewma": 3.0}


def test_one_reads_what_another_gives_and_what_the_caller_gave_stands() -> None:
    def fail(where: str, error: Exception) -> None:
        raise AssertionError(where) from error

    deriver = Deriver([Giving({"loss_ewma": 0.25}), Ratio()], fail)
    expected = {"loss_ewma": 0.25, "loss_volatility": 0.5}
    assert deriver.peek({"loss": 1.0}) == committed(deriver, {"loss": 1.0}) == expected
    assert committed(deriver, {"loss": 1.0, "loss_ewma": 4.0})["loss_volatility"] == 8.0
