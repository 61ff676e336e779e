"""A step whose device values come late is published when they come, whatever the training thread does then."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from patience import patience
from programs import until

import esper_otel
from esper_otel import EsperSettings
from esper_otel.record import frame_publisher
from esper_otel.record.frame_publisher import Draft
from esper_otel.record.seeds import one_cell
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


def test_steps_that_wait_for_what_never_comes_are_published_without_it_before_they_fill_the_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may hang for hours while the loop goes on: what is dropped is counted and reported."""
    monkeypatch.setattr(frame_publisher, "MOST_WAITING_BYTES", 200_000)
    with esper_otel.start(run_id="run") as telemetry:
        publisher = telemetry._recorder.publisher
        with caplog.at_level(logging.WARNING, "esper_otel"):
            for step in range(1, 201):
                held = Late(3600.0) if step % 2 else Late(0.0)
                publisher.publish_later(draft(step)._replace(table=one_cell("seed", "alpha", 0.5)), held)
                assert len(publisher.waiting) < 50
        assert publisher.ring.last > 150
        waiting = sum(not held.done() for _, held in publisher.waiting if held is not None)
        assert publisher.counters.without_device_values == 100 - waiting
        assert telemetry._wiring.counts()["esper.steps.without_device_values", ""] == 100 - waiting  # type: ignore[attr-defined] # the session
        assert "published without device values" in caplog.text
        frames, _ = publisher.ring.after(0, 1_000)
        assert [frame.global_step for frame in frames] == list(range(1, publisher.ring.last + 1))
        telemetry.close(timeout_s=0.1)
        assert publisher.counters.without_device_values == 100
        assert publisher.ring.last == 200


def test_steps_may_arrive_while_the_memory_of_those_that_wait_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread takes a step from the queue just then."""
    bytes_of = frame_publisher._bytes_of
    with esper_otel.start(run_id="run") as telemetry:
        publisher = telemetry._recorder.publisher
        for step in range(1, 4):
            publisher.publish_later(draft(step), Late(0.2 * step))

        def published_meanwhile(waiting: Draft) -> int:
            if publisher.ring.last == 0:
                assert until("published", lambda: publisher.ring.last > 0)
            return bytes_of(waiting)

        monkeypatch.setattr(frame_publisher, "_bytes_of", published_meanwhile)
        publisher.publish_later(draft(4), None)
        assert until("all published", lambda: publisher.ring.last == 4)


def test_a_step_that_another_thread_publishes_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training thread looks at the live seeds while the row is on its way to the ring."""
    with esper_otel.start(run_id="run") as telemetry:
        publisher = telemetry._recorder.publisher
        append = publisher.ring.append

        def looked_at(*arguments: Any, **named: Any) -> Any:
            assert not publisher.live.ids
            return append(*arguments, **named)

        for step, loss in enumerate((1.0, 100.0, 1.0), start=1):
            monkeypatch.setattr(publisher.ring, "append", looked_at if step == 2 else append)
            publisher.publish_later(draft(step)._replace(values={"loss": loss}), None)
        newest = publisher.ring.newest()
        assert newest is not None
        assert newest.derived["loss_delta"] == -99.0
        assert newest.derived["loss_ewma"] > 2.0


def test_a_preview_takes_no_readings_that_are_handed_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that decides inside each step must not cost the steps their memory readings."""
    settings = EsperSettings(probe_period_s=0.01)
    with esper_otel.start(run_id="run", settings=settings) as telemetry:

        def has_readings() -> bool:
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
                now.state()
            return any("esper.memory.process_gb" in packets.names for packets in telemetry.pull())

        assert until("a step has them", has_readings)
