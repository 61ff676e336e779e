"""esper-otel check: what is wrong on the way, in plain words."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from certificates import Authority
from grpc import StatusCode
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel import EsperSettings
from esper_otel.check import CheckResult, report_json, report_text, run_check
from esper_otel.schema import METRICS, SEED_METRICS
from esper_otel.testing import MemoryCollector

E = "OTEL_EXPORTER_OTLP_"
PROTOCOLS = ["grpc", "http/protobuf"]


def at(collector: MemoryCollector, protocol: str, scheme: str | None = None, **settings: str) -> dict[str, str]:
    endpoint = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
    if scheme is not None:
        endpoint = f"{scheme}://{endpoint.partition('://')[2]}"
    settings = {"PROTOCOL": protocol, "ENDPOINT": endpoint, "TIMEOUT": "2", **settings}
    return {f"{E}{name}": text for name, text in settings.items()}


def fault(result: CheckResult) -> tuple[str, str]:
    """Name and words of the stage that failed: the last one."""
    assert not result.ok
    assert [stage.ok for stage in result.stages[:-1]].count(False) == 0
    assert result.stages[-1].ok is False
    return result.stages[-1].name, f"{result.stages[-1].message}; {result.stages[-1].fix}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_frame_that_arrives_is_ok_and_timed(protocol: str) -> None:
    """One whole frame, of a run that says what it is."""
    with MemoryCollector() as collector:
        result = run_check(environ=at(collector, protocol))
        assert collector.frames_received == 1
        assert collector.points()[0].resource["esper.run.id"].startswith("esper-otel-check-")
    assert result.ok
    assert [(stage.name, stage.ok) for stage in result.stages] == [
        ("settings", True),
        ("name resolution", True),
        ("connection", True),
        ("frame", True),
    ]
    assert result.latency_ms is not None
    assert "ok    frame" in report_text(result)


def test_the_report_is_json_that_a_program_reads() -> None:
    """For a launcher that checks before it starts a thousand ranks."""
    with MemoryCollector() as collector:
        found = json.loads(report_json(run_check(environ=at(collector, "grpc"))))
    assert found["ok"] is True
    assert found["protocol"] == "grpc"
    assert [stage["name"] for stage in found["stages"]] == ["settings", "name resolution", "connection", "frame"]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({f"{E}PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"OTEL_METRICS_EXPORTER": "none"}, "steps are not sent: OTEL_METRICS_EXPORTER=none"),
        ({"OTEL_SDK_DISABLED": "true"}, "steps are not sent: OTEL_SDK_DISABLED=true"),
        ({"OTEL_METRICS_EXPORTER": "nonsense"}, "OTEL_METRICS_EXPORTER"),
    ],
    ids=str,
)
def test_settings_that_keep_steps_at_home_are_named(environ: dict[str, str], words: str) -> None:
    """The first thing to look at."""
    stage, said = fault(run_check(environ=environ))
    assert stage == "settings"
    assert words in said


def test_a_name_that_is_not_known_is_told() -> None:
    """Names under .invalid never are (RFC 2606)."""
    stage, said = fault(run_check(environ={f"{E}ENDPOINT": "http://no-such-host.invalid:4317"}))
    assert stage == "name resolution"
    assert "no-such-host.invalid" in said


def test_a_port_where_nothing_listens_is_told_with_the_usual_ones() -> None:
    """4317 and 4318 are easily mixed up."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        stage, said = fault(run_check(environ={f"{E}ENDPOINT": f"http://127.0.0.1:{port}"}))
    assert stage == "connection"
    assert "connection refused" in said
    assert "4318 for http/protobuf" in said


def test_tls_is_explained(tmp_path: Path) -> None:
    """Not trusted, another name, and no TLS at all."""
    authority = Authority(tmp_path)
    good, elsewhere = authority.pair("good"), authority.pair("elsewhere", "elsewhere.example")
    trusted = {"CERTIFICATE": str(authority.certificate)}
    for protocol in PROTOCOLS:
        with MemoryCollector(certificate_file=good.certificate, key_file=good.key) as collector:
            assert run_check(environ=at(collector, protocol, **trusted)).ok
            stage, said = fault(run_check(environ=at(collector, protocol)))
            assert stage == "TLS"
            assert "not trusted" in said
            assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in said
        with MemoryCollector(certificate_file=elsewhere.certificate, key_file=elsewhere.key) as collector:
            stage, said = fault(run_check(environ=at(collector, protocol, **trusted)))
            assert stage == "TLS"
            assert "IP address mismatch" in said
        with MemoryCollector() as collector:
            stage, said = fault(run_check(environ=at(collector, protocol, scheme="https")))
            assert stage == "TLS"
            assert "does not speak TLS" in said
            assert "http://" in said


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_other_protocols_port_is_told(protocol: str) -> None:
    """gRPC sent to the HTTP port, and the other way round."""
    other = PROTOCOLS[1 - PROTOCOLS.index(protocol)]
    with MemoryCollector() as collector:
        stage, said = fault(run_check(environ={**at(collector, other), f"{E}PROTOCOL": protocol}))
    assert stage == "frame"
    assert f"OTEL_EXPORTER_OTLP_PROTOCOL={other}" in said


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_refused_credentials_are_told_with_the_variable(protocol: str) -> None:
    """The data is kept; somebody has to set a header."""
    with MemoryCollector(headers={"authorization": "Bearer right"}) as collector:
        stage, said = fault(run_check(environ=at(collector, protocol, HEADERS="authorization=Bearer%20wrong")))
        assert stage == "frame"
        assert "OTEL_EXPORTER_OTLP_HEADERS" in said
        assert "wrong" not in said.replace("missing or wrong", "")
        assert run_check(environ=at(collector, protocol, HEADERS="authorization=Bearer%20right")).ok


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_endpoint_that_never_answers_costs_the_timeout(protocol: str) -> None:
    """A black hole behind an open port."""
    with MemoryCollector(hang=True) as collector:
        started_s = time.monotonic()
        stage, said = fault(run_check(environ=at(collector, protocol, TIMEOUT="0.5")))
        assert time.monotonic() - started_s < 5.0
    assert stage == "frame"
    assert "within 0.5 s" in said


def test_answers_that_are_errors_are_told() -> None:
    """Refused for good, and taken in part."""
    with MemoryCollector(answer=lambda _: StatusCode.INVALID_ARGUMENT) as collector:
        stage, said = fault(run_check(environ=at(collector, "grpc")))
        assert (stage, "INVALID_ARGUMENT" in said) == ("frame", True)
    partial = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(rejected_data_points=2, error_message="too old")
    )
    with MemoryCollector(answer=lambda _: partial) as collector:
        stage, said = fault(run_check(environ=at(collector, "grpc")))
        assert "refused 2 points: too old" in said


def test_the_size_of_a_run_follows_from_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever pays by series or by sample."""
    result = run_check(seeds=100, steps_per_second=5.0, environ={"OTEL_METRICS_EXPORTER": "none"})
    steps = [metric for metric in METRICS if metric.level == "step"]
    session = [metric for metric in METRICS if metric.level == "session"]
    assert result.series == len(steps) + 100 * len(SEED_METRICS) + len(session)
    assert result.samples_per_s == pytest.approx(5.0 * (len(steps) + 1000) + len(session) / 10)
    monkeypatch.setattr(EsperSettings, "tolaria_step_enrichment_enabled", False)
    core = run_check(environ={"OTEL_METRICS_EXPORTER": "none"})
    assert core.series == len([m for m in steps if not m.gated]) + len(session)
