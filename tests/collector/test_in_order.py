"""A Prometheus with its defaults takes every sample: nothing of ours goes back in time, whatever way it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from programs import Collector, Prometheus, until

import esper_otel
from esper_otel import EsperSettings, Stage, Telemetry
from esper_otel.export import exporter
from esper_otel.schema import METRICS, SEED_RETIRED

pytestmark = pytest.mark.collector

# A stock collector: what its users write, and defaults for the rest.
STOCK = """
extensions:
  health_check: {endpoint: "${env:ESPER_OTELCOL_HEALTH}"}
receivers:
  otlp:
    protocols:
      grpc: {endpoint: "${env:ESPER_OTELCOL_GRPC}"}
exporters:
  otlp_http:
    endpoint: "${env:ESPER_PROMETHEUS_OTLP}"
  prometheus_remote_write:
    endpoint: "${env:ESPER_PROMETHEUS_WRITE}"
    add_metric_suffixes: false
service:
  extensions: [health_check]
  telemetry:
    metrics:
      level: detailed
      readers:
        - pull: {exporter: {prometheus: {host: 127.0.0.1, port: "${env:ESPER_OTELCOL_METRICS_PORT}"}}}
  pipelines:
    metrics:
      receivers: [otlp]
      exporters: [otlp_http, prometheus_remote_write]
"""
# No out_of_order_time_window.
DEFAULTS = "otlp: {translation_strategy: UnderscoreEscapingWithoutSuffixes}\n"
# The scope is a part of what tells one series from another.
WITH_SCOPES = DEFAULTS.replace("}", ", promote_scope_metadata: true}")

# A retirement is an event: one sample, and no series that could end.
OF_FRAMES = "|".join(
    metric.name.replace(".", "_") for metric in METRICS if metric.level != "session" and metric is not SEED_RETIRED
)
REFUSED = (
    "prometheus_tsdb_out_of_order_samples_total",
    "prometheus_tsdb_out_of_bound_samples_total",
    "prometheus_tsdb_too_old_samples_total",
)


class Way(NamedTuple):
    """How samples come, and where they are stored."""

    environ: dict[str, str]
    stores: tuple[Prometheus, ...]


class Stack(NamedTuple):
    ways: dict[str, Way]
    stores: tuple[Prometheus, ...]
    collector: Collector


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("in-order")
    (folder / "defaults.yml").write_text(DEFAULTS, encoding="utf-8")
    (folder / "with-scopes.yml").write_text(WITH_SCOPES, encoding="utf-8")
    (folder / "stock.yaml").write_text(STOCK, encoding="utf-8")
    with (
        Prometheus(folder / "plain", folder / "defaults.yml") as plain,
        Prometheus(folder / "scopes", folder / "with-scopes.yml") as scopes,
        Prometheus(folder / "written", folder / "defaults.yml", {}, "--web.enable-remote-write-receiver") as written,
        Collector(
            folder / "collector",
            folder / "stock.yaml",
            ESPER_PROMETHEUS_OTLP=plain.otlp,
            ESPER_PROMETHEUS_WRITE=f"{written.url}/api/v1/write",
        ) as collector,
    ):
        directly = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{scopes.otlp}/v1/metrics",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }
        through = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://{collector.grpc}"}
        ways = {"direct": Way(directly, (scopes,)), "through": Way(through, (plain, written))}
        yield Stack(ways, (plain, scopes, written), collector)


def refused(stack: Stack) -> dict[str, float]:
    """What was not taken, by where that is counted; empty when all was."""
    found: dict[str, float] = {}
    for store in stack.stores:
        for line in store.text("metrics").splitlines():
            name, _, value = line.rpartition(" ")
            is_refusal = name.startswith(REFUSED) or (
                name.startswith("prometheus_http_requests_total") and "/api/v1/" in name and 'code="2' not in name
            )
            if is_refusal and float(value):
                found[f"{store.folder.name} {name}"] = float(value)
    for name, count in stack.collector.counts().items():
        if "send_failed" in name and count:
            found[name] = count
    return found


def train(telemetry: Telemetry, steps: int, step_s: float, *, returns: bool) -> list[int]:
    """Steps whose seeds come and go, and come back under the same id or not; the times, in milliseconds."""
    times = []
    for number in range(steps):
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0 / (number + 1))
            now.seed("stays", stage=Stage.TRAINING, alpha=0.5)
            going = "goes" if returns else f"goes-{number // 5}"
            if number % 5 < 3:
                now.seed(going, stage=Stage.TRAINING, alpha=0.25)
            time.sleep(step_s)
        times.append(now.time_unix_ns // 10**6)
        if number % 5 == 2:
            telemetry.retire_seed(going)
    return times


# The collector has ten consumers, by default, in which requests that come together overtake each other. So each period
# has one request: no seed comes back on that way.
SETTINGS = EsperSettings(export_every_s=0.5)
PACES = {"slow": (3, 1.0), "100ms": (40, 0.1), "1ms": (1_500, 0.001)}


def test_no_sample_goes_back_in_time_and_every_series_ends(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """While steps are open for long the counts are due several times; at 1 ms many steps stand in a request."""
    monkeypatch.setattr(exporter, "HEALTH_EVERY_S", 0.15)
    sessions: dict[tuple[str, str], Telemetry] = {}
    for way, (environ, _) in stack.ways.items():
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            for pace in PACES:
                sessions[way, pace] = esper_otel.start(run_id=f"{way}-{pace}", settings=SETTINGS)
    times: dict[tuple[str, str], list[int]] = {}

    def work(key: tuple[str, str]) -> Callable[[], None]:
        def trained() -> None:
            times[key] = train(sessions[key], *PACES[key[1]], returns=key[0] == "direct")
            sessions[key].close()

        return trained

    trainers = [threading.Thread(target=work(key)) for key in sessions]
    for trainer in trainers:
        trainer.start()
    for trainer in trainers:
        trainer.join()
    for (way, pace), telemetry in sessions.items():
        assert telemetry.health()["dropped"] == 0, telemetry.health()
        for store in stack.ways[way].stores:
            mine = f'instance="{telemetry.run_id}/0"'
            where = f"{way} {pace} {store.folder.name}"
            until(f"the end of {where}", lambda: store.query(f"esper_run_ended{{{mine}}}"))  # noqa: B023
            steps = {time_ms: float(value) for _, time_ms, value in store.samples(f"esper_global_step{{{mine}}}")}
            assert steps == {time_ms: number for number, time_ms in enumerate(times[way, pace], 1)}, where
            assert store.query(f'{{__name__=~"{OF_FRAMES}", {mine}}}') == [], where
            counts = {value for *_, value in store.samples(f"esper_frames_exported{{{mine}}}")}
            assert len(counts) > 1, where
            assert max(map(float, counts)) == len(steps), where
            for number in range(3, len(steps), 5):  # the first step without the seed
                living = store.query(f"kasmina_seed_alpha{{{mine}}}", time=times[way, pace][number] / 1e3)
                assert [series["metric"]["seed_id"] for series in living] == ["stays"], where
    assert refused(stack) == {}
