"""esper-otel check: what is wrong on the way, in plain words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import warm
from certificates import Authority
from endpoints import expired_pair
from frame_examples import make_frame, seed_table
from gateways import RunningGateway
from grpc import StatusCode
from log_receiver import receiver
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)
from patience import patience
from programs import until

from esper_otel import EsperSettings, TamiyoClient
from esper_otel.check.one_frame import CheckResult, report_json, report_text, run_check
from esper_otel.check.through import ReadBack, run_through
from esper_otel.cli import main
from esper_otel.export.encode import Encoder
from esper_otel.export.resource import resource_for
from esper_otel.frames.ring import blocks_of
from esper_otel.schema import METRICS, SEED_CELLS, SEED_FIELDS, is_check
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

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
        points = collector.points()
        assert is_check(str(points[0].resource["esper.run.id"]))
        series = {point.name for point in points if not point.flags} - {"esper.run.ended"}
        assert {point.name for point in points if point.flags} == series  # nothing that it has sent goes on
        assert [point.attributes["outcome"] for point in points if point.name == "esper.run.ended"] == ["completed"]
    assert result.ok
    assert [(stage.name, stage.ok) for stage in result.stages] == [
        ("settings", True),
        ("name resolution", True),
        ("connection", True),
        ("frame", True),
    ]
    assert result.latency_ms is not None
    assert "ok    frame" in report_text(result)


def test_a_threshold_of_no_signal_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """``start()`` refuses it."""
    monkeypatch.setenv("ESPER_RISK_THRESHOLDS", '{"hook_bugdet": 80}')
    with MemoryCollector() as collector:
        name, words = fault(run_check(environ=at(collector, "grpc")))
        assert collector.frames_received == 0
    assert name == "settings"
    assert "hook_bugdet" in words


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
        ({f"{E}PROTOCOL": "thrift"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"OTEL_METRICS_EXPORTER": "none"}, "steps are not sent: OTEL_METRICS_EXPORTER=none"),
        ({"OTEL_SDK_DISABLED": "true"}, "steps are not sent: OTEL_SDK_DISABLED=true"),
        ({"OTEL_METRICS_EXPORTER": "nonsense"}, "OTEL_METRICS_EXPORTER"),
        ({"OTEL_LOGS_EXPORTER": "nonsense"}, "OTEL_LOGS_EXPORTER"),
    ],
    ids=str,
)
def test_settings_that_keep_steps_at_home_are_named(environ: dict[str, str], words: str) -> None:
    """The first thing to look at."""
    stage, said = fault(run_check(environ=environ))
    assert stage == "settings"
    assert words in said


def test_a_setting_of_ours_that_cannot_be_used_is_told_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In JSON too, which a launcher reads."""
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "-1")
    result = run_check(environ={})
    assert fault(result)[0] == "settings"
    assert "ESPER_EXPORT_EVERY_S) = '-1'" in json.loads(report_json(result))["stages"][0]["message"]


def test_credentials_that_cannot_be_had_are_a_matter_of_settings() -> None:
    """Not of the endpoint, whose log knows nothing about it."""
    environ = {"OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": "nobody", f"{E}ENDPOINT": "https://127.0.0.1:1"}
    stage, said = fault(run_check(environ=environ))
    assert stage == "settings"
    assert "'nobody' is not among the entry points" in said


def test_a_time_out_in_milliseconds_is_pointed_out() -> None:
    """The specification's unit is not that of the Python exporters."""
    with MemoryCollector() as collector:
        result = run_check(environ=at(collector, "grpc", TIMEOUT="10000"))
    assert result.ok
    assert "time-out 10000 s (OTEL_EXPORTER_OTLP_TIMEOUT is in seconds here" in result.stages[0].message


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
    """Not trusted, another name, too old, and no TLS at all."""
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
            assert said.endswith("use a host name or address that the certificate has")
        old = expired_pair(authority)
        with MemoryCollector(certificate_file=old.certificate, key_file=old.key) as collector:
            stage, said = fault(run_check(environ=at(collector, protocol, **trusted)))
            assert stage == "TLS"
            assert said.endswith("is not trusted: certificate has expired; it must be renewed there")
        with MemoryCollector() as collector:
            stage, said = fault(run_check(environ=at(collector, protocol, scheme="https")))
            assert stage == "TLS"
            assert "does not speak TLS" in said
            assert "http://" in said


def test_grpc_meets_tls_without_http2(tmp_path: Path) -> None:
    """The collector's port for HTTP, with TLS."""
    authority = Authority(tmp_path)
    pair = authority.pair("good")
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        environ = at(collector, "http/protobuf", PROTOCOL="grpc", CERTIFICATE=str(authority.certificate))
        stage, said = fault(run_check(environ=environ))
    assert stage == "TLS"
    assert "but not HTTP/2, which gRPC needs" in said
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in said


def test_tls_is_judged_by_what_the_sender_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``requests`` does not look at the system's store, which a slim container may not have at all."""
    authority = Authority(tmp_path)
    pair = authority.pair("good")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        result = run_check(environ=at(collector, "http/protobuf"))
    assert result.ok
    assert [stage.name for stage in result.stages][-2:] == ["TLS", "frame"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_proxy_or_grpc_itself_finds_is_not_looked_at(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct connection that fails would say nothing about the way that is taken."""
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:1")
    environ = {f"{E}PROTOCOL": protocol, f"{E}ENDPOINT": "http://collector.invalid:4317", f"{E}TIMEOUT": "1"}
    result = run_check(environ=environ)
    assert [(stage.name, stage.ok) for stage in result.stages] == [
        ("settings", True),
        ("connection", None),
        ("frame", False),
    ]
    assert "goes through the proxy 127.0.0.1:1 (http_proxy), which is not looked at" in result.stages[1].message
    assert "hunter2" not in report_text(result)
    monkeypatch.setenv("no_proxy", "collector.invalid")
    assert fault(run_check(environ=environ))[0] == "name resolution"


def test_a_socket_file_is_left_to_grpc(tmp_path: Path) -> None:
    """There is no name to resolve and no port."""
    environ = {f"{E}ENDPOINT": f"unix://{tmp_path}/otel.sock", f"{E}INSECURE": "true"}
    result = run_check(environ=environ)
    assert [stage.name for stage in result.stages] == ["settings", "connection", "frame"]
    assert "nothing listens on unix://" in fault(result)[1]


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
def test_a_token_file_is_named_and_its_content_is_not_shown(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is right, when the endpoint refuses it, and when there is no token in it."""
    path = tmp_path / "token"
    monkeypatch.setenv("ESPER_TOKEN_FILE", str(path))
    with MemoryCollector(headers={"authorization": "Bearer right-token"}) as collector:
        environ = at(collector, protocol, HEADERS="authorization=Bearer%20another,x-scope=here")
        path.write_text("right-token\n")
        result = run_check(environ=environ)
        assert result.ok
        assert result.stages[0].message.endswith(
            f"bearer token from {str(path)!r} in place of the authorization in OTEL_EXPORTER_OTLP_HEADERS, "
            "headers x-scope"
        )
        assert "right-token" not in report_json(result)
        path.write_text("wrong-token\n")
        stage, said = fault(run_check(environ=environ))
        assert stage == "frame"
        assert "(ESPER_TOKEN_FILE); correct the credentials there" in said
        assert "wrong-token" not in said
        path.unlink()
        stage, said = fault(run_check(environ=environ))
        assert stage == "settings"
        assert f"(or ESPER_TOKEN_FILE) = {str(path)!r}: no such file or directory" in said


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_endpoint_that_never_answers_costs_the_timeout(protocol: str) -> None:
    """A black hole behind an open port."""
    with MemoryCollector(hang=True) as collector:
        started_s = time.monotonic()
        stage, said = fault(run_check(environ=at(collector, protocol, TIMEOUT="0.5")))
        assert time.monotonic() - started_s < patience(5.0)
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
    remark = ExportMetricsServiceResponse(partial_success=ExportMetricsPartialSuccess(error_message="use v2"))
    with MemoryCollector(answer=lambda _: remark) as collector:
        result = run_check(environ=at(collector, "grpc"))
        assert result.ok
        assert result.stages[-1].message.endswith("took it, and remarks: use v2")


def test_the_size_of_a_run_follows_from_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever pays by series or by sample."""
    result = run_check(seeds=100, steps_per_second=5.0, environ={"OTEL_METRICS_EXPORTER": "none"})
    steps = [metric for metric in METRICS if metric.level == "step"]
    session = [metric for metric in METRICS if metric.level == "session"]
    assert result.series == len(steps) + 100 * len(SEED_CELLS) + len(session)
    assert result.samples_per_s == pytest.approx(5.0 * (len(steps) + 100 * len(SEED_CELLS)) + len(session) / 10)
    monkeypatch.setattr(EsperSettings, "tolaria_step_enrichment_enabled", False)
    core = run_check(environ={"OTEL_METRICS_EXPORTER": "none"})
    assert core.series == len([m for m in steps if not m.gated]) + len(session)


def test_the_size_of_a_run_is_that_of_the_points_it_sends() -> None:
    """Counted in a request that holds every metric, not taken from the schema a second time."""
    values = {
        metric.name: 1.0 for metric in METRICS if metric.level == "step" and not metric.name.startswith("esper.frame.")
    }
    rows = {seed: dict.fromkeys(SEED_FIELDS, 1.0) for seed in ("seed-1", "seed-2")}

    def fail(where: str, error: Exception) -> None:
        raise AssertionError(where) from error

    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    [request] = encoder.requests(blocks_of([make_frame(recorded=values, seeds=seed_table(rows))]))
    quiet = run_check(seeds=2, steps_per_second=0.0, environ={"OTEL_METRICS_EXPORTER": "none"})
    busy = run_check(seeds=2, steps_per_second=1.0, environ={"OTEL_METRICS_EXPORTER": "none"})
    assert busy.samples_per_s - quiet.samples_per_s == request.points


def test_what_a_check_sends_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever steers by the list of runs must not meet it there, even if it was killed before it could end it."""
    with RunningGateway("--ui") as gateway:
        monkeypatch.setenv(f"{E}ENDPOINT", f"http://{gateway.grpc}")
        assert run_check().ok
        assert [stage.ok for stage in run_through(ReadBack(None, gateway.grpc))] == [True, None]
        with TamiyoClient(gateway.grpc) as client:
            assert client.runs() == []
        assert requests.get(f"http://{gateway.http}/page/runs", timeout=300).json()["runs"] == []
        page = requests.get(f"http://{gateway.http}/metrics", timeout=300).text
        assert "esper_gateway_runs 0" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_interrupted_ends_its_run(number: signal.Signals) -> None:
    """As by ``timeout``: else its series look alive for minutes."""
    with MemoryCollector() as collector:
        command = ("-m", "esper_otel", "check", "--through", "--gateway", "127.0.0.1:1")
        checking = warm.started(*command, env={**os.environ, **at(collector, "grpc")}, imported=warm.PACKAGE)

        def ranks(name: str) -> set[Any]:
            of_two = (each for each in collector.points() if str(each.resource.get("esper.world_size")) == "2")
            return {each.resource["esper.rank"] for each in of_two if each.name == name}

        until("the run of two ranks came", lambda: ranks("loss") == {0, 1})
        checking.send_signal(number)
        checking.communicate()
        assert checking.returncode == 128 + number
        assert ranks("esper.run.ended") == {0, 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_events_are_sent_where_a_run_would_send_them(protocol: str) -> None:
    """An endpoint of logs that takes them, one that has no logs, and one that refuses the credentials."""
    logs_on = {"OTEL_LOGS_EXPORTER": "otlp"}
    with MemoryCollector() as collector, receiver(protocol) as logs:
        to_logs = {**at(collector, protocol), **logs_on, f"{E}LOGS_ENDPOINT": logs.endpoint}
        result = run_check(environ=to_logs)
        assert (result.stages[-1].name, result.ok) == ("events", True)
        [started, ended] = logs.records
        assert (started.event_name, ended.event_name) == ("esper.run.started", "esper.run.ended")
        name, words = fault(run_check(environ={**at(collector, protocol), **logs_on}))
        assert name == "events"
        assert "takes no OTLP logs" in words
        assert "OTEL_LOGS_EXPORTER=none" in words
        logs.answer = lambda _: StatusCode.UNAUTHENTICATED if protocol == "grpc" else 401
        name, words = fault(run_check(environ=to_logs))
        assert (name, "credentials" in words) == ("events", True)
        name, words = fault(run_check(environ={**to_logs, f"{E}LOGS_PROTOCOL": "thrift"}))
        assert (name, f"{E}LOGS_PROTOCOL" in words) == ("settings", True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ESPER_PARALLEL", "dp:3", "is not like dp=3,tp=0"),
        ("ESPER_RUN_ATTEMPT", "first", "is not a whole number"),
        ("ESPER_RUN_ID", " ", "run_id is empty"),
        ("ESPER_SPOOLDIR", "/tmp", "did you mean ESPER_SPOOL_DIR"),
    ],
)
def test_what_a_start_refuses_or_ignores_of_our_variables_is_a_fault(
    name: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with MemoryCollector() as collector:
        stage, said = fault(run_check(environ={**os.environ, **at(collector, "grpc")}))
        assert not collector.requests
    assert stage == "settings"
    assert words in said


def test_the_spool_is_looked_at_and_nothing_is_left_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryCollector() as collector:
        environ = at(collector, "grpc")
        for path in (tmp_path, tmp_path / "new" / "spool"):
            monkeypatch.setenv("ESPER_SPOOL_DIR", str(path))
            assert ("spool", True) in stages_of(run_check(environ=environ))
            assert list(tmp_path.iterdir()) == []
        (tmp_path / "taken").touch()
        monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path / "taken" / "below"))
        name, words = fault(run_check(environ=environ))
        assert (name, "Not a directory" in words, "ESPER_SPOOL_DIR" in words) == ("spool", True, True)
        monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1024))
        name, words = fault(run_check(environ=environ))
        assert (name, "make room" in words) == ("spool", True)


def test_a_check_that_is_interrupted_amid_its_frame_ends_its_run() -> None:
    """The endpoint may have taken the frame, although it has not answered yet."""
    over = threading.Event()
    with MemoryCollector(answer=lambda _: over.wait(60) and None) as collector:
        environ = {**os.environ, **at(collector, "grpc", TIMEOUT="60")}
        checking = warm.started("-m", "esper_otel", "check", env=environ, imported=warm.PACKAGE)
        assert collector.wait_for(lambda each: each.attempts == 1, 60)
        checking.send_signal(signal.SIGTERM)
        assert collector.wait_for(lambda each: each.attempts > 1, 60)
        over.set()
        checking.communicate()
        assert checking.returncode == 128 + signal.SIGTERM
        assert collector.wait_for(lambda each: any(point.name == "esper.run.ended" for point in each.points()), 60)


# -- files instead of an endpoint --------------------------------------------------------------------------


def stages_of(result: CheckResult) -> list[tuple[str, bool | None]]:
    return [(stage.name, stage.ok) for stage in result.stages]


def test_a_directory_for_files_is_checked_in_place_of_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that the run would make; nothing is left of the check, and no endpoint hears of it."""
    files = tmp_path / "new" / "files"
    monkeypatch.setenv("ESPER_EXPORT_FILE", str(files))
    with MemoryCollector() as collector:
        for _ in range(2):
            result = run_check(environ=at(collector, "grpc"), seeds=10)
            assert stages_of(result) == [("settings", True), ("directory", True), ("room", True), ("format", True)]
            assert (result.ok, result.protocol, result.target) == (True, "file", str(files))
            assert not [*tmp_path.iterdir()] or not [*files.iterdir()]
            files.mkdir(parents=True, exist_ok=True)
        assert not collector.requests
    text = report_text(result)
    assert "nothing is sent" in text
    assert "hours of one rank" in text
    assert f"deliver the files with esper-otel send {files}" in text
    assert main(["check", "--through", "--gateway", "127.0.0.1:1"]) == 1
    assert "nothing is sent from here: neither the way" in capsys.readouterr().out


def test_a_directory_that_files_cannot_be_written_to_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    for name in ("taken", "taken/below"):
        monkeypatch.setenv("ESPER_EXPORT_FILE", str(tmp_path / name))
        result = run_check(environ={})
        assert stages_of(result) == [("settings", True), ("directory", False)]
        assert "Not a directory" in fault(result)[1]
    monkeypatch.setenv("ESPER_EXPORT_FILE", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1024))
    name, words = fault(run_check(environ={}))
    assert name == "room"
    assert "make room" in words
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_a_run_that_sends_nothing_at_all_writes_no_files_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_EXPORT_FILE", str(tmp_path))
    assert "steps are not sent" in fault(run_check(environ={"OTEL_SDK_DISABLED": "true"}))[1]
