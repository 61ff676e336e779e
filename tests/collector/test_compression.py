"""Compressions that a collector can be set to: what the gateway takes arrives, what it does not is named in the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
from gateways import RunningGateway
from programs import Collector, until

import esper_otel
from esper_otel import EsperSettings, TamiyoClient

pytestmark = pytest.mark.collector

# gRPC's library takes only the compressions that it knows: a Collector's log then has ``GRPC_SAYS``.
KINDS = {"otlp_grpc": ("gzip", "zstd", "snappy"), "otlp_http": ("gzip", "deflate", "zlib", "zstd", "snappy", "lz4")}
WE_SAY, GRPC_SAYS = "is not supported: set it to zstd", "Error parsing 'grpc-encoding' metadata"
BASE = """
extensions:
  health_check: {endpoint: "${env:ESPER_OTELCOL_HEALTH}"}
receivers:
  otlp:
    protocols:
      grpc: {endpoint: "${env:ESPER_OTELCOL_GRPC}"}
exporters:
%s
service:
  extensions: [health_check]
  telemetry:
    metrics:
      level: detailed
      readers:
        - pull: {exporter: {prometheus: {host: 127.0.0.1, port: "${env:ESPER_OTELCOL_METRICS_PORT}"}}}
  pipelines:
    metrics: {receivers: [otlp], exporters: [%s]}
"""


def test_every_compression_is_taken_or_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, lines = [], []
    with RunningGateway() as gateway:
        for kind, compressions in KINDS.items():
            at = gateway.grpc if kind == "otlp_grpc" else f"http://{gateway.http}"
            for compression in compressions:
                names.append(f"{kind}/{compression}")
                lines.append(
                    f'  {names[-1]}: {{endpoint: "{at}", tls: {{insecure: true}}, compression: {compression}}}'
                )
        (tmp_path / "otel.yaml").write_text(BASE % ("\n".join(lines), ", ".join(names)), encoding="utf-8")
        with Collector(tmp_path, tmp_path / "otel.yaml") as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.grpc}")
            with esper_otel.start(run_id="packed", settings=EsperSettings(export_every_s=0)) as telemetry:
                for _ in range(20):
                    telemetry.record_step({"loss": 1.0}, epoch=0)

            def sent() -> set[str]:
                text = requests.get(f"http://127.0.0.1:{collector.metrics_port}/metrics", timeout=60).text
                lines = [line for line in text.splitlines() if "exporter_sent_metric_points" in line]
                lines = [line for line in lines if not line.startswith("#") and not line.endswith(" 0")]
                return {each for each in names if any(f'exporter="{each}"' in line for line in lines)}

            refused = {each for each in names if each.endswith(("snappy", "lz4")) or each == "otlp_grpc/zstd"}
            until("all are sent", lambda: sent() >= set(names) - refused, timeout_s=60)
            until("others are refused", lambda: all(each in collector.said for each in (WE_SAY, GRPC_SAYS)))
            assert sent() == set(names) - refused
            with TamiyoClient(gateway.grpc) as client:
                assert [run.missing for run in client.runs()] == [0]
