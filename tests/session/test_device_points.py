"""What is sent about the device: a description, apart from frames, and the GPU's metrics under other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv import schemas
from opentelemetry.semconv._incubating.attributes import hw_attributes
from opentelemetry.semconv._incubating.metrics import hw_metrics
from programs import until

import esper_otel
from esper_otel import EsperSettings
from esper_otel.export.scopes import SCHEMA_URL
from esper_otel.probes.description import INFO, DeviceDescription
from esper_otel.schema import TWINS
from esper_otel.testing import MemoryCollector
from esper_otel.testing.received import Point

GPU = {"esper.device.id": "cuda:0", "hw.type": "gpu", "hw.model": "NVIDIA H200", "hw.id": "GPU-aaaa-1111"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.grpc_endpoint)
        yield found


def of_device(collector: MemoryCollector) -> list[Point]:
    return [point for point in collector.points() if point.scope == "esper_otel.device"]


class Described:
    """A device that is whatever ``now`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: Mapping[str, str | int]) -> None:
        self.now = now
        described = self

        def sample(probe: DeviceDescription) -> Mapping[str, float]:
            probe.attributes = described.now
            return {INFO: 1.0}

        monkeypatch.setattr(DeviceDescription, "sample", sample)


def test_the_device_is_described_once_it_is_known_and_the_resource_stays(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With where the rank is, in a scope of its own; a replaced description ends."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = Described(monkeypatch, {})
    settings = EsperSettings(export_every_s=0.0, probe_period_s=0.01)
    with esper_otel.start(run_id="described", device="cpu", settings=settings) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
        until("the step is sent", lambda: telemetry.health()["exported"] == 1)
        assert of_device(collector) == []
        device.now = GPU

        def said(model: str) -> bool:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            return any(point.attributes.get("hw.model") == model for point in of_device(collector))

        until("it is described", lambda: said("NVIDIA H200"))
        device.now = {**GPU, "hw.model": "another"}
        until("it is described anew", lambda: said("another"))
    points = of_device(collector)
    assert {point.name for point in points} == {"esper.device.info"}
    begun = [point.attributes["hw.model"] for point in points if point.value == 1.0]
    over = [point.attributes["hw.model"] for point in points if point.value is None]
    assert (begun[0], begun[-1], over) == ("NVIDIA H200", "another", ["NVIDIA H200"])
    assert points[0].attributes == {**GPU, "esper.local_rank": 1}
    assert len({repr(point.resource) for point in collector.points()}) == 1


def test_the_flag_for_hardware_switches_it_off(collector: MemoryCollector) -> None:
    settings = EsperSettings(export_every_s=0.0, tolaria_step_enrichment_enabled=False)
    with esper_otel.start(run_id="off", device="cpu", settings=settings) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    assert collector.points()
    assert of_device(collector) == []


def test_the_gpus_metrics_have_the_conventions_names_on_request(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the conventions' units, at an endpoint and at a reader of the SDK."""
    Described(monkeypatch, GPU)
    readings = {"gpu_util_percent": 50.0, "gpu_mem_used_gb": 2.0, "esper.device.temperature_celsius": 61.0}
    monkeypatch.setattr("esper_otel.session.start._Session.probed", lambda _session: readings)
    reader = InMemoryMetricReader()
    settings = EsperSettings(export_every_s=0.0, hw_metrics=True)
    provider = MeterProvider([reader])
    with esper_otel.start(
        run_id="twins", device="cpu", settings=settings, meter_provider=provider, export_steps=True
    ) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
        until("the device is known", lambda: len(of_reader(reader)) > 1)
        found = of_reader(reader)
    expected = {"hw.gpu.utilization": 0.5, "hw.gpu.memory.usage": 2.0 * 2**30, "hw.temperature": 61.0}
    assert found == {**expected, "esper.device.info": 1.0}
    sent = {point.name: point for point in of_device(collector)}
    assert {name: sent[name].value for name in expected} == expected
    assert sent["hw.temperature"].attributes == {name: text for name, text in GPU.items() if name.startswith("hw.")}
    provider.shutdown()


def of_reader(reader: InMemoryMetricReader) -> dict[str, float]:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    assert {scope.scope.schema_url for scope in scopes} == {SCHEMA_URL}
    ours = [metric for scope in scopes if scope.scope.name == "esper_otel.device" for metric in scope.metrics]
    return {metric.name: metric.data.data_points[0].value for metric in ours}  # type: ignore[union-attr]


@pytest.mark.own_code
def test_the_names_are_those_of_the_conventions() -> None:
    """Names, units and kinds of the package, in the version that our scopes name."""
    assert SCHEMA_URL in {version.value for version in schemas.Schemas}
    source = Path(hw_metrics.__file__).read_text(encoding="utf-8")
    known = {getattr(hw_attributes, name) for name in dir(hw_attributes) if name.startswith("HW_")}
    assert {name for name in GPU if name.startswith("hw.")} | {"hw.vendor", "hw.parent", "hw.driver_version"} <= known
    for twin in TWINS:
        _, declared = source.split(f'= "{twin.metric.name}"\n"""', 1)
        kind, unit = declared.split('"""', 1)[0].partition("Instrument: ")[2].splitlines()[:2]
        assert (twin.metric.kind, f"Unit: {twin.metric.unit}") == (kind, unit)
