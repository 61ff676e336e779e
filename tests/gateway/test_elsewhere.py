"""Without our collector: through OTLP of another make, and into the Prometheus that Debian has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import rotel
from gateways import RunningGateway
from programs import ROOT, free_port, until

import esper_otel
from esper_otel import EsperSettings, Stage, TamiyoClient, UnknownRun

pytestmark = pytest.mark.lengthy

PROMETHEUS = shutil.which("prometheus")


@contextmanager
def rotel_to(gateway: RunningGateway, folder: Path) -> Iterator[tuple[str, str]]:
    """The agent of rotel (Rust), which takes OTLP and sends it on, packed; its two addresses."""
    addresses = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command: list[str | Path] = [Path(rotel.__file__).parent / "rotel-agent", "start"]
    command += ["--otlp-grpc-endpoint", addresses[0], "--otlp-http-endpoint", addresses[1]]
    command += ["--otlp-exporter-endpoint", f"http://{gateway.grpc}", "--otlp-exporter-protocol", "grpc"]
    command += ["--otlp-exporter-compression", "gzip", "--batch-timeout", "50ms", "--exporter", "otlp"]
    with (folder / "rotel.log").open("wb") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield addresses
    finally:
        agent.terminate()
        agent.wait(20)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_packets_are_the_same_through_another_makers_otlp(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decodes and encodes everything anew, puts requests together and packs them."""
    with RunningGateway() as gateway, rotel_to(gateway, tmp_path) as (grpc_address, http_address):
        address = grpc_address if protocol == "grpc" else http_address
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        with esper_otel.start(run_id="through", settings=EsperSettings(export_every_s=0.02)) as telemetry:
            for step in range(40):
                with telemetry.step(epoch=0) as now:
                    now.put(loss=float("nan") if step == 7 else 1 / (step + 1), accuracy=0.0)
                    now.seed("seed-1", stage=Stage.BLENDING, alpha=step / 40, alpha_steps=step)
            telemetry.close()
            in_process = list(telemetry.pull(max_packets=40))
        with TamiyoClient(gateway.grpc) as client:

            def is_whole() -> bool:
                try:
                    return len(client.pull("through", max_packets=100)) == 40
                except UnknownRun:
                    return False

            until("all steps have come", is_whole)
            assert list(client.pull("through", max_packets=100)) == in_process
            until("its end has come", lambda: [run.ended for run in client.runs()] == ["completed"])


def test_an_old_prometheus_scrapes_the_gateway(tmp_path: Path) -> None:
    """Debian 12 has 2.42, which knows no OTLP: with our file for those, the gateway about itself is there."""
    if PROMETHEUS is None:
        pytest.skip("no Prometheus is installed (Debian: apt-get install prometheus)")
    with RunningGateway() as gateway:
        text = (ROOT / "deploy" / "prometheus" / "scrape.yml").read_text(encoding="utf-8")
        text = text.replace("127.0.0.1:4328", gateway.http).replace("interval: 15s", "interval: 1s")
        (tmp_path / "scrape.yml").write_text(text, encoding="utf-8")
        (tmp_path / "rules").symlink_to(ROOT / "deploy" / "prometheus" / "rules")
        address = f"127.0.0.1:{free_port()}"
        command = [PROMETHEUS, f"--config.file={tmp_path / 'scrape.yml'}", f"--web.listen-address={address}"]
        with (tmp_path / "prometheus.log").open("wb") as log:
            server = subprocess.Popen(
                [*command, f"--storage.tsdb.path={tmp_path / 'data'}"], stdout=log, stderr=subprocess.STDOUT
            )

        def found(query: str) -> list[object]:
            url = f"http://{address}/api/v1/query"
            try:
                result: list[object] = requests.get(url, params={"query": query}, timeout=5).json()["data"]["result"]
            except (requests.ConnectionError, ValueError):  # it has not started yet, or has nothing to say yet
                return []
            return result

        try:
            until("it is scraped", lambda: found('esper_gateway_steps_total{job="esper-gateway"}'))
            assert len(found('up{job="esper-gateway"} == 1')) == 1
            assert len(found("esper_gateway_rejected_points_total")) > 5
        finally:
            server.terminate()
            server.wait(20)
