"""What SDK readers see: one whole step per collect, from any number of readers, providers and sessions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

import esper_otel
from esper_otel.schema import METRICS, SEED_METRICS, STEP_METRICS, Stage


def collected(reader: InMemoryMetricReader) -> dict[str, tuple[str, list[tuple[dict[str, Any], float]]]]:
    """Unit and points by metric name."""
    data = reader.get_metrics_data()
    if data is None:
        return {}
    metrics: list[Any] = [
        metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
    ]
    return {
        metric.name: (metric.unit, [(dict(p.attributes or {}), p.value) for p in metric.data.data_points])
        for metric in metrics
    }


def provider() -> tuple[MeterProvider, InMemoryMetricReader, InMemoryMetricReader]:
    readers = InMemoryMetricReader(), InMemoryMetricReader()
    return MeterProvider(metric_readers=readers, resource=Resource({}), shutdown_on_exit=False), *readers


def test_every_metric_of_the_request_is_an_instrument_with_its_name_unit_and_seed() -> None:
    """Registered through the Meter API, seen by a reader that nobody here wrote."""
    meter_provider, reader, _ = provider()
    with esper_otel.start(run_id="run", rank=0, meter_provider=meter_provider) as telemetry:
        telemetry.seeds(["seed-1"], **{m.field: [4.0] for m in SEED_METRICS})
        telemetry.record_step({m.name: 0.5 for m in STEP_METRICS}, epoch=0)
        found = collected(reader)
    ours: dict[str, Any] = {"esper.run.id": "run", "esper.rank": 0}
    of_seed = {**ours, "seed_id": "seed-1"}
    expected = {metric.name: (metric.unit, [(ours, 0.5)]) for metric in STEP_METRICS}
    expected |= {metric.name: (metric.unit, [(of_seed, 4.0)]) for metric in SEED_METRICS}
    expected["esper.steps"] = ("count", [(ours, 1)])
    assert {name: found[name] for name in expected} == expected
    assert found.keys() <= {m.name for m in METRICS} - {"esper.frame.points", "esper.frame.sequence"}
    meter_provider.shutdown()


def test_a_collect_never_mixes_two_steps_under_load() -> None:
    """A timer collect of plain gauges mixes two steps in 4 to 5 % of cases."""
    providers = [provider(), provider()]
    sessions = [esper_otel.start(run_id=f"run-{i}", meter_provider=p[0]) for i, p in enumerate(providers)]
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            for session in sessions:
                session.seeds(["a", "b"], alpha=[step, step])
                session.record_step({"loss": step, "kasmina.apply_ms": step, "cpu_util_percent": step}, epoch=0)

    trainer = threading.Thread(target=train)
    trainer.start()
    collects = 0
    try:
        while collects < 200:
            for _, *readers in providers:
                for reader in readers:
                    found = collected(reader)
                    if "loss" not in found:
                        continue
                    names = ("loss", "kasmina.apply_ms", "cpu_util_percent", "esper.global_step", "kasmina.seed.alpha")
                    values = {value for name in names for _, value in found[name][1]}
                    assert len(values) == 1
                    collects += 1
    finally:
        stop.set()
        trainer.join()
        for session in sessions:
            session.close()
        for meter_provider, *_ in providers:
            meter_provider.shutdown()


def test_what_is_missing_or_not_finite_or_over_is_in_no_collect() -> None:
    """A synchronous gauge would repeat the last healthy loss for ever."""
    meter_provider, reader, _ = provider()
    telemetry = esper_otel.start(run_id="run", meter_provider=meter_provider)
    assert "loss" not in collected(reader)
    telemetry.record_step({"loss": 1.0, "accuracy": 0.5}, epoch=0)
    assert "loss" in collected(reader)
    telemetry.record_step({"loss": float("nan")}, epoch=0)
    assert {"loss", "accuracy"}.isdisjoint(collected(reader))
    telemetry.close()
    assert collected(reader) == {}
    meter_provider.shutdown()


def test_two_sessions_at_one_provider_and_one_after_another() -> None:
    """The SDK registers an observable once and for ever."""
    meter_provider, reader, _ = provider()
    with esper_otel.start(run_id="a", meter_provider=meter_provider) as first:
        with esper_otel.start(run_id="b", meter_provider=meter_provider) as second:
            first.record_step({"loss": 1.0}, epoch=0)
            second.record_step({"loss": 2.0}, epoch=0)
            both = {a["esper.run.id"]: value for a, value in collected(reader)["loss"][1]}
        assert both == {"a": 1.0, "b": 2.0}
    with esper_otel.start(run_id="c", meter_provider=meter_provider) as third:
        third.record_step({"loss": 3.0}, epoch=0)
        assert [value for _, value in collected(reader)["loss"][1]] == [3.0]
    meter_provider.shutdown()


def test_a_second_session_that_declares_a_name_differently_is_told() -> None:
    """The SDK would only log a conflict and export one of the two."""
    meter_provider, _, _ = provider()
    meters = esper_otel.Metric("length", unit="m", description="A length.")
    feet = esper_otel.Metric("length", unit="ft", description="A length.")
    with (
        esper_otel.start(run_id="a", meter_provider=meter_provider, metrics=[meters]),
        pytest.raises(esper_otel.InvalidCatalogue, match="length"),
    ):
        esper_otel.start(run_id="b", meter_provider=meter_provider, metrics=[feet])
    meter_provider.shutdown()


def test_a_leyline_reader_at_the_sessions_provider_gives_the_sessions_packet() -> None:
    """OTel readings in, packets out: the same conversion as in process."""
    reader = esper_otel.LeylineMetricReader()
    meter_provider = MeterProvider(metric_readers=[reader], resource=Resource({}), shutdown_on_exit=False)
    with esper_otel.start(run_id="run", meter_provider=meter_provider) as telemetry:
        with telemetry.step(epoch=2, global_step=7) as now:
            now.put(loss=0.5, accuracy=0.25)
            now.seed("a", stage=Stage.BLENDING, alpha=0.5, alpha_steps=3)
        packets = reader.pull()
        [direct] = telemetry.pull()
    assert packets is not None
    assert (packets.run_id, packets.step) == ("run", 7)
    for name in ("loss", "accuracy", "step_latency_ms", "loss_ewma"):
        assert packets.state.training_metrics[name] == direct.state.training_metrics[name]
    assert [(s.seed_id, s.stage) for s in packets.state.seed_states] == [("a", 4)]
    assert [m.name for m in packets.telemetry[0].metrics] == [m.name for m in direct.telemetry[0].metrics]
    meter_provider.shutdown()


def test_the_global_provider_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that sets it takes it from the application."""
    from opentelemetry import metrics

    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    before = metrics.get_meter_provider()
    with esper_otel.start():
        assert metrics.get_meter_provider() is before
