"""Alerts fire in a real Prometheus, by a real run; and the collector's page can be scraped."""

from __future__ import annotations

import math
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import grpc
import pytest
from gateways import RunningGateway
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from programs import ROOT, Collector, Prometheus, until

import esper_otel
from esper_otel import EsperSettings, Stage, Telemetry

pytestmark = pytest.mark.collector

PROMETHEUS = ROOT / "deploy" / "prometheus"


# The times of the rules, for a test that has no hour.
SOONER = {
    "[5m]": "[5s]",
    "[1m]": "[8s]",
    "5m": "2s",
    "2m": "1s",
    "1m": "1s",
    "[1h] offset 10m": "[10s] offset 5s",
    "[1h] offset 2m": "[10s] offset 8s",
    "[10m]": "[10s]",
    "offset 10m": "offset 10s",
    "> 300": "> 5",
    "- 1800": "- 20",
}


def lively(folder: Path, name: str, sooner: Mapping[str, str] = MappingProxyType({})) -> Path:
    """A shipped configuration that looks each second, beside the shipped rules, or the same with other times."""
    folder.mkdir()
    text = (PROMETHEUS / name).read_text(encoding="utf-8")
    for interval in ("15s", "5s"):
        text = text.replace(f"interval: {interval}", "interval: 1s")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    if not sooner:
        (folder / "rules").symlink_to(PROMETHEUS / "rules")
        return path
    rules = (PROMETHEUS / "rules" / "esper.yml").read_text(encoding="utf-8")
    for shipped, other in sooner.items():
        marked = [f"for: {shipped}"] if shipped[0].isdigit() else [shipped]
        for text in marked:
            assert text in rules, text
            rules = rules.replace(text, f"for: {other}" if text.startswith("for") else other)
    (folder / "rules").mkdir()
    (folder / "rules" / "esper.yml").write_text(rules, encoding="utf-8")
    return path


def step(telemetry: Telemetry, **values: float) -> None:
    with telemetry.step(epoch=0) as now:
        now.put(values)
        now.seed("seed-1", stage=Stage.TRAINING, alpha=0.25)


def test_alerts_fire_when_a_run_goes_wrong_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, a hook beyond its budget; each with the run's name and what to do."""
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
                # What is usual for a run is not known in its first two minutes.
                expected = {"EsperHookBudget", "EsperLossNotFinite"}
                until("the alerts fire", lambda: firing() >= expected)
                assert firing() == expected


HEALTHY = {
    "loss": 1.0,
    "loss_delta": -0.01,
    "loss_volatility": 0.01,
    "grad_var": 0.1,
    "hook_latency_ms": 2.0,
    "step_latency_ms": 20.0,
    "input_wait_ms": 1.0,
    "samples_per_s": 1000.0,
    "cpu_util_percent": 50.0,
}
# What each run has that is not healthy, and what fires for it.
RUNS: dict[str, tuple[dict[str, float], set[str]]] = {
    "healthy": ({}, set()),
    "spike": ({"loss_delta": 0.2}, {"EsperLossSpike"}),
    "warning": ({"loss_delta": 0.1}, {"EsperLossWarning"}),
    "hook": ({"hook_latency_ms": 75.0}, {"EsperHookBudget"}),
    "slow": ({"step_latency_ms": 150.0}, {"EsperStepLatencyHigh"}),
    "apply": ({"kasmina.apply_ms": 40.0}, {"EsperKasminaApplySlow"}),
    "finalize": ({"kasmina.finalize_ms": 40.0}, {"EsperKasminaFinalizeSlow"}),
    "volatile": ({"loss_volatility": 0.2}, {"EsperLossVolatilityHigh"}),
    "variance": ({"grad_var": 2.0}, {"EsperGradVarianceHigh"}),
    "conflict": ({"grad_conflict_rate": 0.6}, {"EsperGradConflictHigh"}),
    "device": (
        {"gpu_util_percent": 97.0, "gpu_mem_free_gb": 0.1, "gpu_mem_used_gb": 79.0},
        {"EsperDevicePressureHigh", "EsperGpuMemoryNearlyFull"},
    ),
    "cpu": ({"cpu_util_percent": 97.0, "gpu_mem_used_gb": 10.0}, {"EsperCpuPressureHigh"}),
    "nan": ({"loss": math.nan}, {"EsperLossNotFinite"}),
    "input": ({"input_wait_ms": 80.0}, {"EsperInputBound"}),
    "isolation": ({}, {"EsperIsolationViolations"}),
    "slower": ({}, {"EsperThroughputDrop"}),
    "stuck": ({}, {"EsperRunWithoutSteps", "EsperRunStuck"}),  # one after the other: its process lives
    "dropping": ({}, {"EsperTelemetryDropping"}),
}
# Runs that are compared with their own past: they go wrong after 15 seconds.
LATER = {"spike", "warning", "slow", "volatile", "variance"}
PIPELINE = {
    "EsperCollectorDropping",
    "EsperCollectorQueueFilling",
    "EsperCollectorRefusing",
    "EsperGatewayNotStoring",
    "EsperGatewayRejecting",
    "EsperGatewayOverLimit",
    "EsperGatewayRefusing",
    "EsperGatewayDeferring",
}
SMALL_QUEUE = """
exporters:
  otlp_http/prometheus: &small
    sending_queue: {queue_size: 20000, batch: {min_size: 1, max_size: 100}}
  otlp_grpc/esper: *small
"""


@contextmanager
def trained(sessions: dict[str, Telemetry]) -> Iterator[None]:
    """Ten steps a second of each run, while the block runs."""
    over = threading.Event()
    started_s = time.monotonic()

    def train() -> None:
        violations = 0
        while not over.wait(0.1):
            for run_id, telemetry in sessions.items():
                since_s = time.monotonic() - started_s
                values = HEALTHY | ({} if run_id in LATER and since_s < 15 else RUNS[run_id][0])
                if run_id == "slower" and since_s > 15:
                    values["samples_per_s"] = 500.0
                if run_id == "stuck" and since_s > 3:
                    continue
                if run_id == "isolation":
                    violations += 1
                    telemetry.seeds(["seed-1"], isolation_violations=[float(violations)])
                telemetry.record_step(values, epoch=0)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        yield
    finally:
        over.set()
        trainer.join()


def test_every_alert_fires_by_a_run_and_fires_for_that_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them in one Prometheus, by runs and by a pipeline that go wrong in one way each; times are shortened."""
    (tmp_path / "tokens").write_text("nobody-has-it\n", encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL_QUEUE, encoding="utf-8")
    settings = EsperSettings(export_every_s=0.1, buffer_bytes=1024 * 1024, probe_period_s=3600)
    with ExitStack() as stack:
        # Takes no token that a collector has; and one that can neither store nor use what it is sent.
        closed = stack.enter_context(RunningGateway("--send-tokens", str(tmp_path / "tokens")))
        full = stack.enter_context(RunningGateway("--store", str(tmp_path / "store")))
        agent = Collector(tmp_path / "agent", ESPER_GATEWAY=closed.grpc)
        nowhere = {"ESPER_GATEWAY": "127.0.0.1:1", "ESPER_PROMETHEUS_OTLP": "http://127.0.0.1:1"}
        stuck = Collector(tmp_path / "stuck", "agent.yaml", tmp_path / "small.yaml", **nowhere)
        scraped = '", "'.join(f"127.0.0.1:{each.metrics_port}" for each in (agent, stuck))
        config = lively(tmp_path / "config", "prometheus.yml", SOONER)
        prometheus = Prometheus(tmp_path / "prometheus", config, {8888: scraped, 4328: full.http})
        agent.variables["ESPER_PROMETHEUS_OTLP"] = prometheus.otlp
        stack.enter_context(prometheus)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
        sessions = {run_id: esper_otel.start(run_id=run_id, settings=settings) for run_id in RUNS}
        for _ in range(200):  # more than its buffer holds, while nobody listens
            sessions["dropping"].seeds([f"seed-{row}" for row in range(300)], alpha=[0.5] * 300)
            sessions["dropping"].record_step(HEALTHY, epoch=0)
        stack.enter_context(agent)
        stack.enter_context(stuck)
        for telemetry in sessions.values():
            stack.callback(telemetry.close, timeout_s=2)

        def firing() -> dict[str, set[str]]:
            found: dict[str, set[str]] = {}
            for alert in prometheus.get("alerts")["alerts"]:
                if alert["state"] == "firing":
                    assert alert["annotations"]["action"]
                    name = alert["labels"]["alertname"]
                    found.setdefault(alert["labels"].get("run_id", ""), set()).add(name)
                    assert name in PIPELINE or alert["labels"]["run_id"] in alert["annotations"]["summary"]
            return found

        expected = {run_id: names for run_id, (_, names) in RUNS.items() if names} | {"": PIPELINE}
        seen: dict[str, set[str]] = {}

        def have_all_fired() -> bool:
            for run_id, names in firing().items():
                seen.setdefault(run_id, set()).update(names)
            return seen == expected

        with trained(sessions):
            no_metric = ExportMetricsServiceRequest()
            metric = no_metric.resource_metrics.add().scope_metrics.add().metrics.add(name="loss")
            metric.exponential_histogram.data_points.add(time_unix_nano=time.time_ns())
            until("the gateway has been scraped", lambda: prometheus.query("esper_gateway_rejected_points_total"))
            send(full, no_metric.SerializeToString())
            send(full, too_many_seeds())
            with suppress(grpc.RpcError):
                send(full, b"no request")
            until("it rejects", lambda: have_all_fired() or "EsperGatewayRejecting" in seen.get("", ()))
            resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (1, 1))  # what a full disk does to a file
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{full.grpc}")
            with esper_otel.start(run_id="unstored", settings=settings) as unstored:
                unstored.record_step(HEALTHY, epoch=0)
                monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{stuck.grpc}")
                with esper_otel.start(run_id="refused", settings=settings) as refused:
                    # Which ones have not fired is said below.
                    with trained({"healthy": refused}), suppress(AssertionError):
                        until("each alert has fired", have_all_fired, 75)
                    refused.close(timeout_s=0.1)
                unstored.close(timeout_s=0.1)
    assert seen == expected


def too_many_seeds() -> bytes:
    """More than one rank may have alive at once."""
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="kasmina.seed.alpha")
    now_ns = time.time_ns()
    for number in range(20_001):
        point = metric.gauge.data_points.add(time_unix_nano=now_ns, as_double=0.5)
        point.attributes.add(key="seed_id").value.string_value = str(number)
    return request.SerializeToString()


def send(gateway: RunningGateway, body: bytes) -> None:
    """One request, as any sender would."""
    path = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
    with gateway.channel() as channel:
        channel.unary_unary(path, bytes, bytes)(body, timeout=300)


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
