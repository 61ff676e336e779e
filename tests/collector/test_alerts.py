"""Alerts fire in a real Prometheus, by a real run; and the collector's page can be scraped."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from gateways import RunningGateway
from programs import ROOT, Collector, Prometheus, until

import esper_otel
from esper_otel import EsperSettings, Stage, Telemetry

pytestmark = pytest.mark.collector

PROMETHEUS = ROOT / "deploy" / "prometheus"


def lively(folder: Path, name: str) -> Path:
    """A shipped configuration that looks each second, beside the shipped rules."""
    folder.mkdir()
    text = (PROMETHEUS / name).read_text(encoding="utf-8")
    for interval in ("15s", "5s"):
        text = text.replace(f"interval: {interval}", "interval: 1s")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    (folder / "rules").symlink_to(PROMETHEUS / "rules")
    return path


def step(telemetry: Telemetry, **values: float) -> None:
    with telemetry.step(epoch=0) as now:
        now.put(values)
        now.seed("seed-1", stage=Stage.TRAINING, alpha=0.25)


def test_alerts_fire_when_a_run_goes_wrong_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, a hook beyond its budget, a loss that jumps; each with the run's name and what to do."""
    with RunningGateway() as gateway:
        agent = Collector(tmp_path / "agent", ESPER_GATEWAY=gateway.grpc)
        targets = {8888: f"127.0.0.1:{agent.metrics_port}", 4328: gateway.http}
        prometheus = Prometheus(tmp_path / "prometheus", lively(tmp_path / "config", "prometheus.yml"), targets)
        agent.variables["ESPER_PROMETHEUS_OTLP"] = prometheus.otlp

        def firing() -> set[str]:
            alerts = prometheus.get("alerts")["alerts"]
            found = {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}
            for alert in found.values():
                assert alert["annotations"]["action"]
                if "run_id" in alert["labels"]:
                    assert "wrong" in alert["annotations"]["summary"]
            return set(found) - {"EsperCpuPressureHigh", "EsperStepLatencyHigh"}  # this machine may be busy

        with prometheus, agent:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
            with esper_otel.start(run_id="wrong", settings=EsperSettings(export_every_s=0.1)) as telemetry:
                for number in range(20):
                    step(telemetry, loss=1.0 - number / 100, hook_latency_ms=2.0)
                until("it is seen", lambda: prometheus.query('esper_global_step{run_id="wrong"}'))
                time.sleep(3)
                assert firing() == set()
                step(telemetry, loss=2.0, hook_latency_ms=75.0)
                step(telemetry, loss=math.nan, hook_latency_ms=2.0)
                expected = {"EsperLossSpike", "EsperHookBudget", "EsperLossNotFinite", "EsperLossVolatilityHigh"}
                until("the alerts fire", lambda: firing() >= expected)
                assert firing() == expected


def test_a_prometheus_that_only_scrapes_sees_the_newest_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names and labels, each once; seeds that are retired and a run that has ended are gone at once."""
    variables = {"ESPER_GATEWAY": "127.0.0.1:1", "ESPER_PROMETHEUS_OTLP": "http://127.0.0.1:1"}
    agent = Collector(tmp_path / "agent", **variables)
    targets = {8889: agent.scrape, 8888: f"127.0.0.1:{agent.metrics_port}"}
    prometheus = Prometheus(tmp_path / "prometheus", lively(tmp_path / "config", "scrape.yml"), targets)
    with agent, prometheus:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
        sessions = [
            esper_otel.start(run_id="scraped", rank=rank, world_size=2, settings=EsperSettings(export_every_s=0.1))
            for rank in (0, 1)
        ]
        for number in range(10):
            for telemetry in sessions:
                step(telemetry, loss=math.nan if number == 9 else 1.0, gradient_norm=float(number))

        def newest(name: str) -> dict[str, float]:
            found = prometheus.query(f'{name}{{run_id="scraped"}}')
            for series in found:
                assert series["metric"]["instance"] == f"scraped/{series['metric']['rank']}"
                assert series["metric"]["job"] == "esper-tolaria"
                assert not {"exported_job", "exported_instance"} & series["metric"].keys()
            return {series["metric"]["rank"]: float(series["value"][1]) for series in found}

        until("both ranks are there", lambda: newest("gradient_norm") == {"0": 9.0, "1": 9.0})
        assert all(math.isnan(value) for value in newest("loss").values())
        assert newest("kasmina_seed_alpha") == {"0": 0.25, "1": 0.25}
        assert newest("esper_global_step") == {"0": 10.0, "1": 10.0}
        first, _ = sessions
        first.seeds(["one", "two"], alpha=[0.5, 0.75])
        step(first, loss=1.0, gradient_norm=10.0)

        def alphas() -> list[float]:
            found = prometheus.query('kasmina_seed_alpha{run_id="scraped", rank="0"}')
            return sorted(float(series["value"][1]) for series in found)

        until("three seeds are there", lambda: alphas() == [0.25, 0.5, 0.75])
        for seed_id in ("one", "two"):
            first.retire_seed(seed_id)
        step(first, loss=1.0, gradient_norm=11.0)
        until("two seeds are retired", lambda: alphas() == [0.25])
        for telemetry in sessions:
            telemetry.close()
        until("the run is gone", lambda: newest("gradient_norm") == {})
