"""A whole run over real sockets: what is recorded is what arrives."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator

import pytest
import warm
from patience import patience

import esper_otel
from esper_otel import EsperSettings, Stage
from esper_otel.schema import METRICS, STEP_METRICS
from esper_otel.testing import MemoryCollector, Point


@pytest.fixture(params=["grpc", "http/protobuf"])
def collector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
        endpoint = collector.grpc_endpoint if request.param == "grpc" else collector.http_endpoint
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0.05")
        yield collector


def series(points: list[Point], name: str) -> list[tuple[int, float]]:
    return [(p.time_unix_ns, p.value) for p in points if p.name == name and p.value is not None]


def test_every_step_arrives_once_in_order_with_its_own_time(collector: MemoryCollector) -> None:
    """The loss of step 412 is in the backend, at the moment of step 412."""
    losses = [math.nan if step % 97 == 0 else math.inf if step % 89 == 0 else 1 / step for step in range(1, 501)]
    with esper_otel.start(run_id="run") as telemetry:
        stamps = []
        for loss in losses:
            with telemetry.step(epoch=0) as now:
                now.put(loss=loss)
                now.seed("seed-1", stage=Stage.TRAINING, alpha=0.5)
                stamps.append(now.time_unix_ns)
    points = collector.points()
    arrived = series(points, "loss")
    assert [t for t, _ in arrived] == stamps
    assert [repr(value) for _, value in arrived] == [repr(loss) for loss in losses]
    assert [t // 1_000_000 for t in stamps] == sorted({t // 1_000_000 for t in stamps})
    assert [value for _, value in series(points, "esper.frame.sequence")] == list(range(1, 501))
    assert len(series(points, "kasmina.seed.alpha")) == 500
    assert collector.frames_received == 500
    health = telemetry.health()
    assert (health["recorded"], health["exported"], health["dropped"]) == (500, 500, 0)


def test_a_frames_points_are_as_many_as_it_says(collector: MemoryCollector) -> None:
    """A gateway knows by the count when a frame is whole, whatever a collector did to the requests."""
    with esper_otel.start(run_id="run") as telemetry:
        for step in range(20):
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
                for seed in range(step % 4):
                    now.seed(f"seed-{seed}", stage=4, alpha=0.1, alpha_steps=step)
    frames: dict[int, list[Point]] = {}
    for point in collector.points():
        if point.scope == "esper_otel" and not point.flags:
            frames.setdefault(point.time_unix_ns, []).append(point)
    assert len(frames) == 20
    for points in frames.values():
        [said] = [p.value for p in points if p.name == "esper.frame.points"]
        assert said == len(points)


def test_names_and_units_are_the_catalogues_and_the_resource_says_who(collector: MemoryCollector) -> None:
    """Whoever reads the stream needs no other document."""
    with esper_otel.start(run_id="run-1", experiment="digits", rank=2, world_size=4) as telemetry:
        telemetry.record_step({metric.name: 0.5 for metric in STEP_METRICS}, epoch=1)
        attempt = telemetry.run.attempt
    units = {metric.name: metric.unit for metric in METRICS}
    points = collector.points()
    assert {metric.name for metric in STEP_METRICS} <= {p.name for p in points}
    for point in points:
        assert point.unit == units[point.name]
    resource = points[0].resource
    assert resource["service.name"] == "esper-tolaria"
    assert resource["service.instance.id"] == "run-1/2"
    assert (resource["esper.run.id"], resource["esper.run.attempt"]) == ("run-1", attempt)
    assert (resource["esper.rank"], resource["esper.world_size"]) == (2, 4)
    assert resource["esper.experiment.name"] == "digits"


def test_with_the_flag_off_no_gated_metric_leaves_the_process(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request's flag, by class assignment and by environment variable."""
    import threading

    monkeypatch.setattr(EsperSettings, "tolaria_step_enrichment_enabled", False)
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({metric.name: 0.5 for metric in STEP_METRICS}, epoch=1)
        assert "esper-otel-probes" not in {thread.name for thread in threading.enumerate()}
    names = {point.name for point in collector.points()}
    assert names.isdisjoint({metric.name for metric in METRICS if metric.gated})
    assert {metric.name for metric in STEP_METRICS if not metric.gated} <= names


def test_a_missing_metric_is_absent_not_zero(collector: MemoryCollector) -> None:
    """0.0 is a value."""
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    recorded = {p.name for p in collector.points() if p.name in {m.name for m in STEP_METRICS}}
    assert {"accuracy", "gradient_norm", "h2d_copy_ms", "loss_delta"}.isdisjoint(recorded)
    assert {"loss", "loss_ewma"} <= recorded


def test_a_retired_seeds_series_end(collector: MemoryCollector) -> None:
    """A dead seed must not look alive for five minutes."""
    with esper_otel.start(run_id="run") as telemetry:
        with telemetry.step(epoch=0) as now:
            now.seed("seed-1", alpha=0.5)
            now.seed("seed-2", alpha=0.5)
        telemetry.retire_seed("seed-1")
        telemetry.record_step({"loss": 1.0}, epoch=0)
        assert collector.wait_for(lambda c: any(p.flags for p in c.points()))
        ended = [p for p in collector.points() if p.flags]
        assert [(p.name, p.attributes) for p in ended] == [("kasmina.seed.alpha", {"seed_id": "seed-1"})]
        [began] = [
            p
            for p in collector.points()
            if p.name == "kasmina.seed.alpha" and p.attributes == {"seed_id": "seed-1"} and not p.flags
        ]
        assert (ended[0].scope, ended[0].unit, ended[0].resource) == (began.scope, began.unit, began.resource)
    ended = [p for p in collector.points() if p.flags]
    assert ("kasmina.seed.alpha", {"seed_id": "seed-2"}) in [(p.name, p.attributes) for p in ended]
    assert ("loss", {}) in [(p.name, p.attributes) for p in ended]


def test_two_sessions_at_once_and_one_after_another(collector: MemoryCollector) -> None:
    """A second trainer object in one process must not export nothing."""
    with esper_otel.start(run_id="a") as first, esper_otel.start(run_id="b") as second:
        first.record_step({"loss": 1.0}, epoch=0)
        second.record_step({"loss": 2.0}, epoch=0)
    with esper_otel.start(run_id="c") as third:
        third.record_step({"loss": 3.0}, epoch=0)
    found = {p.resource["esper.run.id"]: p.value for p in collector.points() if p.name == "loss" and not p.flags}
    assert found == {"a": 1.0, "b": 2.0, "c": 3.0}


def _child(telemetry: esper_otel.Telemetry) -> None:
    telemetry.record_step({"loss": 666.0}, epoch=0)
    telemetry.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_exports_nothing_and_the_parent_goes_on(collector: MemoryCollector) -> None:
    """Every DataLoader worker is a fork of the trainer."""
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
        assert collector.wait_for(lambda c: c.frames_received == 1)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(telemetry,))
        process.start()
        process.join(20)
        assert process.exitcode == 0
        telemetry.record_step({"loss": 2.0}, epoch=0)
    assert [value for _, value in series(collector.points(), "loss")] == [1.0, 2.0]


def test_an_endpoint_that_comes_back_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame is kept until it is acknowledged."""
    from grpc import StatusCode

    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0.05")
    with MemoryCollector(answer=lambda _: StatusCode.UNAVAILABLE, retry_after_s=0.1) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="run") as telemetry:
            for _ in range(10):
                telemetry.record_step({"loss": 1.0}, epoch=0)
            assert collector.wait_for(lambda c: c.attempts >= 2)
            assert "UNAVAILABLE" in str(telemetry.health()["last_error"])
            collector.answer = None
        assert collector.frames_received == 10


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_dead_endpoint_does_not_hold_up_training_and_says_why(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connection refused: the loop runs, close() keeps its time-out, the loss is counted."""
    import socket

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
    telemetry = esper_otel.start(run_id="run")
    for _ in range(100):
        telemetry.record_step({"loss": 1.0}, epoch=0)
    started = time.monotonic()
    telemetry.close(timeout_s=1.0)
    assert time.monotonic() - started < patience(3.0)
    health = telemetry.health()
    assert (health["recorded"], health["exported"], health["dropped"]) == (100, 0, 100)
    assert "refused" in str(health["last_error"])
    assert any("refused" in record.getMessage() for record in caplog.records)


def test_a_hanging_endpoint_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK takes 12 to 19 s here."""
    with MemoryCollector(hang=True) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        telemetry = esper_otel.start(run_id="run")
        telemetry.record_step({"loss": 1.0}, epoch=0)
        started = time.monotonic()
        telemetry.close(timeout_s=1.0)
        assert time.monotonic() - started < patience(3.0)
        assert telemetry.health()["dropped"] == 1


@pytest.mark.parametrize("value", ["none", "console", "none,otlp", "nonsense"])
def test_otel_metrics_exporter_means_what_it_means_everywhere(
    value: str, collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exporter recording, deriving and pulling go on; what cannot be used is ignored, with a warning."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", value)
    script = (
        "import esper_otel\n"
        "with esper_otel.start(run_id='run') as telemetry:\n"
        "    telemetry.record_step({'loss': 0.123456}, epoch=0)\n"
        "    assert len(telemetry.pull()) == 1\n"
    )
    done = warm.run("-c", script, imported=warm.PACKAGE)
    assert done.returncode == 0, done.stderr
    is_ignored = value in ("nonsense", "none,otlp")
    assert collector.frames_received == is_ignored
    assert (f"setting ignored: OTEL_METRICS_EXPORTER={value!r}" in done.stderr) == is_ignored
    assert ("0.123456" in done.stdout) == (value == "console")


def test_otel_sdk_disabled_switches_the_export_off(collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard way to run without telemetry."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
        assert len(telemetry.pull()) == 1
    assert collector.frames_received == 0
    assert os.environ["OTEL_SDK_DISABLED"] == "true"
