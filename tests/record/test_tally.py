"""Values that are not finite or out of range are counted by a thread, and a fault in it harms nobody."""

from __future__ import annotations

import logging
import math

import pytest
from programs import until

import esper_otel
from esper_otel import EsperSettings
from esper_otel.record.tally import Tally
from esper_otel.schema import STEP_METRICS

pytestmark = pytest.mark.own_code


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody exports: nobody else would count."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


def test_values_are_counted_and_said_without_being_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "esper_otel"), esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({"loss": math.nan, "accuracy": 97.0, "gradient_norm": -1.0}, epoch=0)
        telemetry.record_step({"loss": -1.0, "accuracy": math.inf}, epoch=0)
        tally = telemetry._recorder.publisher.tally
        assert until("counted", lambda: (tally.nonfinite, tally.out_of_range) == (2, 3))
    assert "give a share of 1, not a percentage" in caplog.text
    assert (telemetry.health()["nonfinite"], telemetry.health()["out_of_range"]) == (2, 3)


def test_below_zero_is_out_of_range_but_for_losses() -> None:
    """Each metric of a step by itself: of durations, norms and shares there is no negative one."""
    losses = {"loss", "loss_delta", "loss_ewma", "loss_volatility"}
    others = {metric.name for metric in STEP_METRICS} - losses
    assert len(others) > 10
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step(dict.fromkeys(losses, -1.0), epoch=0)
        telemetry.record_step(dict.fromkeys(losses | others, 0.0), epoch=0)
        assert telemetry.health()["out_of_range"] == 0
        for counted, name in enumerate(sorted(others), 1):
            telemetry.record_step({name: -1.0}, epoch=0)
            assert telemetry.health()["out_of_range"] == counted, name


def test_rows_are_counted_before_they_are_dropped() -> None:
    with esper_otel.start(run_id="run", settings=EsperSettings(buffer_bytes=2**20)) as telemetry:
        for number in range(20_000):
            telemetry.record_step({"loss": math.nan if number % 2 else 1.0, "accuracy": 0.5}, epoch=0)
        assert telemetry._recorder.publisher.ring.first > 8_000
        assert telemetry.health()["nonfinite"] == 10_000


def test_a_fault_while_counting_is_counted_and_raises_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault of ours")

    with esper_otel.start(run_id="run") as telemetry:
        monkeypatch.setattr(Tally, "_count", fail)
        telemetry.record_step({"loss": 1.0}, epoch=0)
        assert telemetry.health()["faults"] == 1
        monkeypatch.undo()
        telemetry.record_step({"loss": math.nan}, epoch=0)
        assert telemetry.health()["nonfinite"] == 1
