"""Rates of a step's work, as a user computes them, and the highest rate that MFU is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import esper_otel
from esper_otel import EsperSettings, Telemetry
from esper_otel.errors import ConfigurationError, InvalidValue
from esper_otel.record.peak import PEAKS, Peak, peak_of
from esper_otel.settings import COMPUTE_DTYPES
from esper_otel.testing import MemoryCollector

RATES = ("samples_per_s", "esper.tokens_per_s", "esper.tflops_per_s", "esper.mfu")


@pytest.fixture(autouse=True)
def _not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


def newest(telemetry: Telemetry) -> Mapping[str, float]:
    frame = telemetry._recorder.publisher.ring.newest()
    assert frame is not None
    return frame.values()


def test_rates_follow_from_the_cycle() -> None:
    """10 tokens and 3 TFLOP in half a second, on a device of at most 24 TFLOP/s: a quarter."""
    with esper_otel.start(settings=EsperSettings(peak_tflops=24)) as telemetry:
        times = {"step_latency_ms": 400.0, "input_wait_ms": 100.0}
        telemetry.record_step(times, epoch=0, samples=5, tokens=10, flops=3e12)
        found = newest(telemetry)
        assert [found[name] for name in RATES] == pytest.approx([10.0, 20.0, 6.0, 0.25])
        with telemetry.step(epoch=0, tokens=10, flops=3 * 10**12):
            pass
        found = newest(telemetry)
        assert "samples_per_s" not in found
        assert found["esper.tokens_per_s"] / found["esper.tflops_per_s"] == pytest.approx(10 / 3)
        assert found["esper.mfu"] == pytest.approx(found["esper.tflops_per_s"] / 24)
        assert not {*RATES} & {*telemetry.absent()} - {"samples_per_s"}


def test_without_a_known_highest_rate_mfu_is_absent_with_the_reason() -> None:
    """Never guessed."""
    with esper_otel.start(device="cpu") as telemetry:
        with telemetry.step(epoch=0):
            pass
        assert "flops=" in telemetry.absent()["esper.mfu"]
        assert "tokens=" in telemetry.absent()["esper.tokens_per_s"]
        with telemetry.step(epoch=0, flops=1e9):
            pass
        assert "esper.tflops_per_s" in newest(telemetry)
        assert "esper.mfu" not in newest(telemetry)
        assert telemetry.absent()["esper.mfu"] == (
            "training runs on cpu, whose peak rate is not in the table: set ESPER_PEAK_TFLOPS"
        )


def test_rates_arrive_over_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(settings=EsperSettings(peak_tflops=2)) as telemetry:
            telemetry.record_step({"step_latency_ms": 1e3}, epoch=0, tokens=4, flops=1e12)
        found = {point.name: point.value for point in collector.points() if point.value is not None}
    assert [found[name] for name in RATES[1:]] == [4.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "wrong", [{"tokens": -1}, {"tokens": 0.5}, {"flops": "1"}, {"flops": float("nan")}, {"flops": -1}]
)
def test_wrong_work_is_a_mistake(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    with esper_otel.start() as telemetry:
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            telemetry.step(epoch=0, **wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            telemetry.record_step({}, epoch=0, **wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("ESPER_ON_MISTAKE", "warn")
    with esper_otel.start() as telemetry:
        with telemetry.step(epoch=0, samples=3, **wrong):  # type: ignore[arg-type]
            pass
        assert "samples_per_s" in newest(telemetry)
        telemetry.record_step({"loss": 1.0}, epoch=0, samples=3, **wrong)  # type: ignore[arg-type]
        assert newest(telemetry)["loss"] == 1.0
        assert telemetry.health()["mistakes"] == 2


def test_the_highest_rate_needs_the_exact_name_and_a_dtype() -> None:
    """A MIG instance or another variant of a device is another device."""
    assert peak_of("NVIDIA H100 80GB HBM3", "bfloat16") == 989.5
    assert peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None
    assert peak_of("Tesla T4", "bfloat16") is None
    names = [name for row in PEAKS for name in row.names]
    assert len(names) == len({*names})
    assert all({*row.tflops} <= {*COMPUTE_DTYPES} for row in PEAKS)


def test_the_device_is_looked_up_once_and_again_when_it_changes() -> None:
    device, asked = "", []

    def name_of(asked_for: str) -> str | None:
        asked.append(asked_for)
        return {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA X1"}.get(asked_for) if len(asked) > 1 else None

    peak = Peak(None, "bfloat16", lambda: device, name_of)
    assert (peak.tflops(), peak.reason[:28]) == (None, "the training device is not k")
    device = "cuda:0"
    assert (peak.tflops(), peak.reason) == (None, "CUDA is not in use in this process")
    assert (peak.tflops(), peak.tflops(), peak.reason) == (989.5, 989.5, "")
    device = "cuda:1"
    assert peak.tflops() is None
    assert peak.reason == "the table has no bfloat16 rate of 'NVIDIA X1': set ESPER_PEAK_TFLOPS"
    assert asked == ["cuda:0", "cuda:0", "cuda:1"]
    without = Peak(None, "", lambda: device, name_of)
    assert without.tflops() is None
    assert "ESPER_COMPUTE_DTYPE" in without.reason


@pytest.mark.parametrize("wrong", [{"peak_tflops": 0}, {"peak_tflops": "fast"}, {"compute_dtype": "bf16"}])
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        EsperSettings(**wrong)  # type: ignore[arg-type]
