"""``OTEL_CONFIG_FILE``: the file decides where steps go, in place of the variables."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.configuration import load_config_file
from opentelemetry.configuration._meter_provider import create_meter_provider
from opentelemetry.sdk.resources import Resource

import esper_otel
from esper_otel import ConfigurationError, EsperSettings
from esper_otel.export.config_file import configured, configured_resource
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.opening import shortest_period_s
from esper_otel.export.provider import events_exporter, exporters_from_environment
from esper_otel.testing import MemoryCollector

HEAD = 'file_format: "1.0"\n'


def file_of(tmp_path: Path, exporter: str, *, reader: str = "", beside: str = "") -> Path:
    """A file with one periodic reader."""
    path = tmp_path / "otel.yaml"
    readers = f"meter_provider:\n  readers:\n    - periodic: {{{reader} exporter: {{{exporter}}}}}\n"
    path.write_text(HEAD + readers + beside, encoding="utf-8")
    return path


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names a file of this content in the environment, beside variables that it replaces."""

    def name(exporter: str, **more: str) -> Path:
        path = file_of(tmp_path, exporter, **more)
        monkeypatch.setenv("OTEL_CONFIG_FILE", str(path))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere:1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "from=variables")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "7")
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
        return path

    return name


EXPORTERS = {
    "otlp_grpc: {}": {"protocol": "grpc", "address": "localhost:4317", "is_insecure": True, "headers": ()},
    "otlp_http: {}": {"protocol": "http/protobuf", "address": "http://localhost:4318/v1/metrics"},
    'otlp_http: {endpoint: "https://host:1/x", encoding: json, compression: gzip, timeout: 2500}': {
        "protocol": "http/json",
        "address": "https://host:1/x",
        "compression": "gzip",
        "timeout_s": 2.5,
    },
    'otlp_grpc: {endpoint: "host:5", tls: {insecure: true}, headers: [{name: X-Key, value: "a b,ü"}]}': {
        "address": "host:5",
        "is_insecure": True,
        "headers": None,
    },
    'otlp_http: {headers_list: "a=1,b=two%20words", headers: [{name: a, value: "2"}]}': {
        "headers": (("a", "2"), ("b", "two words"))
    },
}


@pytest.mark.parametrize(("exporter", "expected"), EXPORTERS.items(), ids=lambda each: str(each)[:40])
def test_the_file_decides_alone(named: Any, exporter: str, expected: dict[str, Any]) -> None:
    """Variables beside it are not looked at, as specified."""
    named(exporter)
    if expected.get("headers", ()) is None:  # a header that gRPC cannot carry is refused, in the file's name too
        with pytest.raises(ConfigurationError, match=r"entry 1 holds, decoded, characters that grpc cannot carry"):
            endpoint_from_environment()
        return
    exporters = exporters_from_environment()
    assert exporters.steps
    endpoint = endpoint_from_environment(protocol=exporters.protocol)
    assert {name: getattr(endpoint, name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["otlp_grpc", "otlp_http"])
def test_it_means_what_it_means_to_the_sdk(named: Any, kind: str) -> None:
    """The exporter that OpenTelemetry makes of the same file, beside ours."""
    exporter = (
        f'{kind}: {{endpoint: "http://host:99/path", timeout: 3000, compression: gzip, '
        "headers: [{name: token, value: abc}]}"
    )
    path = named(exporter, reader="interval: 5000,")
    ours = endpoint_from_environment()
    provider: Any = create_meter_provider(load_config_file(str(path)).meter_provider, Resource({}))
    try:
        [reader] = provider._metric_readers
        official = reader._exporter
        client = official if kind == "otlp_grpc" else official._client
        assert official._endpoint in {ours.address, f"{ours.address}/path"}
        assert ours.timeout_s == client._timeout
        assert dict(ours.headers).items() <= dict(client._headers).items()
        assert shortest_period_s(EsperSettings()) * 1e3 == reader._export_interval_millis
    finally:
        provider.shutdown()


def test_steps_arrive_with_the_files_resource_and_headers(named: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEAM", "vision")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "from=variables")
    with MemoryCollector(headers={"x-key": "two words"}) as collector:
        named(
            f'otlp_http: {{endpoint: "{collector.http_endpoint}/v1/metrics", '
            "headers: [{name: x-key, value: two words}]}",
            beside="""
resource:
  attributes: [{name: service.name, value: trainer}, {name: team, value: "${TEAM}"}, {name: shard, value: 3, type: int}]
  detection/development: {detectors: [{esper_otel: {}}]}
""",
        )
        with esper_otel.start() as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        assert telemetry.health()["exported"] == 1
        resource = collector.points()[0].resource
    found = {name: resource.get(name) for name in ("service.name", "team", "shard", "slurm.job.id", "from")}
    assert found == {"service.name": "trainer", "team": "vision", "shard": 3, "slurm.job.id": "77", "from": None}
    assert resource["esper.run.id"] == "77"


def test_a_file_without_an_otlp_exporter_of_metrics_sends_nothing(named: Any) -> None:
    path = named("console: {}")
    exporters = exporters_from_environment()
    assert (exporters.steps, exporters.readers) == (False, ("console",))
    assert exporters.off == f"OTEL_CONFIG_FILE={str(path)!r} has no OTLP exporter of metrics"
    path.write_text(HEAD, encoding="utf-8")
    assert exporters_from_environment().steps is False
    path.write_text(HEAD + "disabled: true\n", encoding="utf-8")
    assert exporters_from_environment().off == "OTEL_SDK_DISABLED=true"


def test_all_readers_of_a_file_are_run(named: Any) -> None:
    path = named("otlp_grpc: {}")
    path.write_text(
        HEAD
        + """
meter_provider:
  readers:
    - periodic: {exporter: {otlp_grpc: {endpoint: "first:1"}}}
    - periodic: {exporter: {otlp_http: {endpoint: "http://second:1"}}}
    - pull: {exporter: {prometheus/development: {host: 127.0.0.1, port: 9999}}}
""",
        encoding="utf-8",
    )
    found = configured()
    assert found["OTEL_METRICS_EXPORTER"] == "otlp,prometheus"
    assert found["OTEL_EXPORTER_PROMETHEUS_PORT"] == "9999"
    assert endpoint_from_environment().address == "first:1"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEAD + "meter_provider: 3\n", "at meter_provider, it does not match the schema: type object"),
        ("file_format: [", "line 1, column 15: expected the node content, but found '<stream end>'"),
        ("", "Configuration file is empty"),
        (HEAD + "resource: {detection/development: {detectors: [{nonsense: {}}]}}\n", "nonsense"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(named: Any, content: str, said: str) -> None:
    named("console: {}").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=rf"OTEL_CONFIG_FILE=.*({said})"):
        esper_otel.start()


@pytest.mark.parametrize(
    "content",
    [
        HEAD + "meter_provider:\n  readers: {name: t0ken\n",
        HEAD + "meter_provider: t0ken\n",
        HEAD + "meter_provider: ${HELD}\n",
        HEAD + "meter_provider: *t0ken\n",
        HEAD + "meter_provider: !t0ken {}\n",
        "file_format: t0ken\n",
        HEAD + 'resource: {attributes: [{name: a, value: "t0ken", type: int}]}\n',
    ],
)
def test_no_value_of_the_file_is_said_or_logged(
    named: Any, content: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A token in a line with a typing error, or in a variable that the file names."""
    monkeypatch.setenv("HELD", "t0ken")
    named("console: {}").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError) as raised:
        configured_resource()
    assert "t0ken" not in "".join(traceback.format_exception(raised.value)) + caplog.text
    assert raised.value.__context__ is None


def test_a_missing_package_is_named_with_the_line_that_installs_it(named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named("console: {}")
    monkeypatch.setitem(sys.modules, "opentelemetry.configuration", None)
    with pytest.raises(ConfigurationError, match="pip install opentelemetry-configuration"):
        exporters_from_environment()


def test_without_a_file_nothing_is_different() -> None:
    environ = {"OTEL_METRICS_EXPORTER": "console", "OTEL_CONFIG_FILE": " "}
    assert configured(environ) is environ
    assert configured_resource(environ) is None


@pytest.mark.parametrize(
    ("environ", "given", "every_s"),
    [
        ({}, {}, 1.0),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "250"}, {}, 0.25),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "60000"}, {}, 60.0),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "99999999"}, {}, 3600.0),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "soon"}, {}, 1.0),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "60000", "ESPER_EXPORT_EVERY_S": "1"}, {}, 1.0),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "60000"}, {"export_every_s": 0.0}, 0.0),
    ],
)
def test_the_sdks_interval_counts_where_ours_is_not_given(
    environ: dict[str, str], given: dict[str, float], every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    settings: Any = EsperSettings
    assert shortest_period_s(settings(**given)) == every_s


def test_an_exporter_of_logs_that_nobody_has_is_named() -> None:
    """A typing error would leave a run without events, and nobody would know why."""
    ignored: list[str] = []
    for setting in ("", "none", "console", "otlp", "OTLP, console", "otlp_proto_http"):
        assert events_exporter({"OTEL_LOGS_EXPORTER": setting}, ignored=ignored.append).is_on == (
            "otlp" in setting.lower()
        )
    assert ignored == []
    assert not events_exporter({"OTEL_LOGS_EXPORTER": "oltp"}, ignored=ignored.append).is_on
    assert ignored == ["OTEL_LOGS_EXPORTER='oltp': no exporter is called 'oltp'; for events of runs it is otlp"]


@pytest.mark.parametrize("kind", ["batch", "simple"])
def test_the_files_exporter_of_logs_is_that_of_events(named: Any, kind: str) -> None:
    """Without one, events are off, whatever the variables say."""
    logs = (
        f'logger_provider:\n  processors:\n    - {kind}: {{exporter: {{otlp_http: {{endpoint: "http://logs:1/x"}}}}}}\n'
    )
    named("otlp_grpc: {}", beside=logs)
    assert events_exporter().is_on
    endpoint = endpoint_from_environment(protocol=events_exporter().protocol, signal="logs")
    assert (endpoint.address, endpoint.protocol) == ("http://logs:1/x", "http/protobuf")
    assert endpoint_from_environment(protocol="grpc").address == "localhost:4317"
    named("otlp_grpc: {}")
    assert not events_exporter().is_on
