"""What the rules for Prometheus must know of a run reaches them: over OTLP, and over a reader of the user's own."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

import esper_otel
from esper_otel.settings import EsperSettings
from esper_otel.testing import MemoryCollector

OWN = {"hook_budget": 80.0, "loss_spike": float("inf")}
EXPECTED = {"hook_budget": 80.0, "loss_spike": 1e308}


def test_own_thresholds_and_muting_reach_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "esper.alerts=off")
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="own", settings=EsperSettings(risk_thresholds=OWN)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        points = [point for point in collector.points() if point.value is not None]
    found = {point.attributes["signal"]: point.value for point in points if point.name == "esper.risk.threshold"}
    assert found == EXPECTED
    assert {point.value for point in points if point.name == "esper.alerts.muted"} == {1.0}


def test_they_reach_a_reader_and_are_absent_by_default() -> None:
    for thresholds, expected in ((OWN, EXPECTED), ({}, {})):
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        settings = EsperSettings(risk_thresholds=thresholds)
        with esper_otel.start(run_id="reader", settings=settings, meter_provider=provider) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            data = reader.get_metrics_data()
        assert data is not None
        found = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            assert metric.name != "esper.alerts.muted" or not metric.data.data_points
            for point in metric.data.data_points if metric.name == "esper.risk.threshold" else ():
                assert isinstance(point, NumberDataPoint)
                found[(point.attributes or {})["signal"]] = point.value
        assert found == expected
        provider.shutdown()
