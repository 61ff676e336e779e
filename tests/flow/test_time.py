"""Where a step's time goes: known delays, put in one by one, must come out one by one, and add up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from patience import patience

import esper_otel

pytestmark = pytest.mark.lengthy

DELAYS = {
    "input_wait_ms": 21.0,
    "tamiyo_latency_ms": 13.0,
    "kasmina.apply_ms": 17.0,
    "hook_rest": 5.0,
    "kasmina.finalize_ms": 9.0,
    "rest": 31.0,
}
STEPS = 8


def pause(name: str) -> None:
    time.sleep(DELAYS[name] / 1e3)


def batches() -> Iterator[int]:
    for number in range(STEPS):
        pause("input_wait_ms")
        yield number


def test_injected_delays_come_out_where_they_were_put_in_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """cycle = input wait + step; step = hook + finalize + rest; tamiyo and apply lie inside the hook."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(run_id="time") as telemetry:
        ends = [time.perf_counter()]
        for _ in telemetry.batches(batches()):
            with telemetry.step(epoch=0, samples=64) as now:
                pause("rest")
                with now.hook():
                    with now.tamiyo():
                        pause("tamiyo_latency_ms")
                    with now.apply():
                        pause("kasmina.apply_ms")
                    pause("hook_rest")
                with now.finalize():
                    pause("kasmina.finalize_ms")
            ends.append(time.perf_counter())
        steps = [dict(packets.state.training_metrics) for packets in telemetry.pull()]
    assert len(steps) == STEPS
    in_hook = DELAYS["tamiyo_latency_ms"] + DELAYS["kasmina.apply_ms"] + DELAYS["hook_rest"]
    expected = {name: DELAYS[name] for name in ("input_wait_ms", "tamiyo_latency_ms", "kasmina.apply_ms")}
    expected |= {"kasmina.finalize_ms": DELAYS["kasmina.finalize_ms"], "hook_latency_ms": in_hook}
    for name, delay_ms in expected.items():
        found = sorted(step[name] for step in steps)
        assert found[0] >= delay_ms - 0.1, name
        assert found[len(found) // 2] < patience(delay_ms + 5.0), name  # a busy machine wakes late now and then
    for step, began, ended in zip(steps, ends, ends[1:], strict=False):
        rest_ms = step["step_latency_ms"] - step["hook_latency_ms"] - step["kasmina.finalize_ms"]
        assert rest_ms >= DELAYS["rest"] - 0.1
        assert (
            step["hook_latency_ms"] >= step["tamiyo_latency_ms"] + step["kasmina.apply_ms"] + DELAYS["hook_rest"] - 0.1
        )
        cycle_ms = step["input_wait_ms"] + step["step_latency_ms"]
        assert cycle_ms == pytest.approx((ended - began) * 1e3, abs=5.0)
        assert step["samples_per_s"] == pytest.approx(64 / cycle_ms * 1e3, rel=1e-3)
