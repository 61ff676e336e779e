"""A step whose device values come late is published when they come, whatever the training thread does then."""

from __future__ import annotations

import time

import pytest
from patience import patience
from programs import until

import esper_otel
from esper_otel.record.frame_publisher import Draft
from esper_otel.record.values import DeviceValues


class Late(DeviceValues):
    """What a device delivers after some time. There is no device here to do it."""

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self._at_s = time.monotonic() + after_s

    def done(self) -> bool:
        return time.monotonic() >= self._at_s


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody exports: nobody else would look."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


def draft(step: int) -> Draft:
    return Draft(step, 0, time.time_ns() + step * 10**6, {"loss": 1.0})


def test_the_last_step_before_a_pause_is_published_when_its_values_are_there() -> None:
    with esper_otel.start(run_id="run") as telemetry:
        publisher = telemetry._recorder.publisher
        for step in range(1, 4):
            publisher.publish_later(draft(step), Late(0.1 * step))
            assert publisher.ring.last == step - 1
            assert until("published", lambda step=step: publisher.ring.last == step)
            time.sleep(0.05)  # the thread sleeps meanwhile
        assert telemetry.health()["faults"] == 0


def test_what_never_comes_holds_up_neither_the_end_nor_the_process() -> None:
    telemetry = esper_otel.start(run_id="run")
    publisher = telemetry._recorder.publisher
    publisher.publish_later(draft(1), Late(3600.0))
    started_s = time.monotonic()
    telemetry.close(timeout_s=0.3)
    assert time.monotonic() - started_s < patience(3.0)
    assert publisher.ring.last == 1
    assert until("ended", lambda: not publisher._arrivals._thread.is_alive())
