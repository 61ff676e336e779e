"""``now.part()``: the host's clock on the CPU, events on CUDA that nobody waits for, and neither without enrichment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import esper_otel
from esper_otel import EsperSettings, InvalidValue
from esper_otel.record import step_parts
from esper_otel.record.step_parts import HOST, NOTHING, CudaTimer, timer_for


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


class Gpu:
    """A device whose events are over only when it is told so."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.is_over = False
        self.waits = 0

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at_ms=0.0, query=lambda: self.is_over)
        event.record = lambda _stream: setattr(event, "at_ms", self.now_ms)
        event.elapsed_time = lambda end: end.at_ms - event.at_ms

        def synchronize() -> None:
            self.waits += 1

        event.synchronize = synchronize
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    cuda = SimpleNamespace(is_initialized=lambda: True, Event=gpu.event, current_stream=lambda _device: None)
    monkeypatch.setitem(step_parts.sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[attr-defined]
    monkeypatch.setattr(step_parts, "check_no_capture", lambda _what: None)
    return gpu


def test_parts_on_the_cpu_add_up_and_are_metrics() -> None:
    with esper_otel.start(run_id="parts", device="cpu") as telemetry:
        with telemetry.step(epoch=0) as now:
            for _ in range(2):
                with now.part("forward"):
                    pass
            with now.part("optimizer"):
                pass
        [packets] = telemetry.pull()
        recorded = telemetry._recorder.publisher.ring.newest().recorded  # type: ignore[union-attr]
    assert recorded["esper.forward_ms"] > 0.0
    assert "esper.backward_ms" not in recorded
    assert recorded["esper.forward_ms"] + recorded["esper.optimizer_ms"] <= recorded["step_latency_ms"]
    assert not [name for name in packets.state.training_metrics if "forward" in name]  # in packets no change


def test_what_a_trainer_has_measured_itself_is_taken() -> None:
    with esper_otel.start(run_id="parts") as telemetry:
        telemetry.record_step({"esper.forward_ms": 3.0, "esper.backward_ms": 6.0}, epoch=0)
        recorded = telemetry._recorder.publisher.ring.newest().recorded  # type: ignore[union-attr]
    assert recorded == {"esper.forward_ms": 3.0, "esper.backward_ms": 6.0}


def test_another_name_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "'loss' is not one of forward, backward, optimizer"
    with (
        esper_otel.start(run_id="parts") as telemetry,
        telemetry.step(epoch=0) as now,
        pytest.raises(InvalidValue, match=names),
    ):
        now.part("loss")
    monkeypatch.setenv("ESPER_ON_MISTAKE", "warn")
    with esper_otel.start(run_id="parts") as telemetry:
        with telemetry.step(epoch=0) as now, now.part("loss"):
            pass
        assert telemetry.health()["mistakes"] == 1


def test_parts_on_cuda_are_resolved_later(gpu: Gpu) -> None:
    """The step waits for the device's events, the training thread does not."""
    with esper_otel.start(run_id="parts", device="cuda:0") as telemetry:
        with telemetry.step(epoch=0) as now:
            for part, spent_ms in (("forward", 4.0), ("backward", 9.0), ("forward", 2.0)):
                with now.part(part):
                    gpu.now_ms += spent_ms
        assert telemetry.pull().cursor.endswith(":0")
        gpu.is_over = True
        [_] = telemetry.pull()
        recorded = telemetry._recorder.publisher.ring.newest().recorded  # type: ignore[union-attr]
        assert gpu.waits == 0
    assert (recorded["esper.forward_ms"], recorded["esper.backward_ms"]) == (6.0, 9.0)


def test_without_enrichment_no_event_is_made(gpu: Gpu) -> None:
    """The core loop's and the hooks' timings stay; so do parts by the host's clock."""
    settings = EsperSettings(tolaria_step_enrichment_enabled=False)
    with esper_otel.start(run_id="parts", device="cuda:0", settings=settings) as telemetry:
        with telemetry.step(epoch=0) as now, now.hook(), now.part("forward"):
            gpu.now_ms += 5.0
        recorded = telemetry._recorder.publisher.ring.newest().recorded  # type: ignore[union-attr]
    assert set(recorded) == {"hook_latency_ms"}
    assert timer_for("cpu", enriched=False) is HOST


def test_the_timer_is_that_of_the_device(gpu: Gpu) -> None:
    assert isinstance(timer_for("cuda:0", enriched=True), CudaTimer)
    assert timer_for("mps", enriched=True) is NOTHING  # its work is queued, too
    assert timer_for("", enriched=True) is NOTHING  # CUDA is in use, and it is not known yet for what
    gpu.is_over = True
