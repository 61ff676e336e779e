"""Every ``OTEL_*`` variable that is read: set, empty, at its bounds, and with a value that cannot be used.

By the specification (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/) an empty one is
not set, and a number, switch or word that cannot be used is warned about and counts as not set. An address, header or
file that cannot be used is refused instead: without it steps would go elsewhere, or in vain.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

import esper_otel
from esper_otel.check.one_frame import run_check
from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.provider import OwnProvider, exporters_from_environment
from esper_otel.export.resource import resource_for
from esper_otel.frames.frame import Run
from esper_otel.session.environment import check_environment
from esper_otel.testing import MemoryCollector

EXPORTER, E, M = "OTEL_METRICS_EXPORTER", "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_METRICS_"
HTTP = {f"{E}PROTOCOL": "http/protobuf", f"{E}ENDPOINT": "http://localhost:4318"}
NAMED = {f"{E}ENDPOINT": "dns:collector:4317"}
CONSOLE = {EXPORTER: "console"}
INTERVAL, TIMEOUT = "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT"


class Row(NamedTuple):
    """What becomes of a variable's value.

    Attributes:
        name: the variable.
        text: its value.
        setting: what is looked at.
        value: what that is then.
        said: words of the warning; empty when there is none.
        beside: other variables.
    """

    name: str
    text: str
    setting: str
    value: object
    said: str = ""
    beside: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


ROWS = [
    Row("OTEL_SDK_DISABLED", "", "steps", True),
    Row("OTEL_SDK_DISABLED", "TRUE", "off", "OTEL_SDK_DISABLED=true"),
    Row("OTEL_SDK_DISABLED", "False", "steps", True),
    *(Row("OTEL_SDK_DISABLED", text, "steps", True, "is neither true nor false") for text in ("1", "yes", "on", "0")),
    Row(EXPORTER, "", "steps", True),
    Row(EXPORTER, " , ,", "steps", True),
    Row(EXPORTER, "OTLP", "steps", True),
    Row(EXPORTER, "none", "off", "OTEL_METRICS_EXPORTER=none"),
    Row(EXPORTER, "None", "steps", False),
    Row(EXPORTER, "otlp_proto_http", "protocol", "http/protobuf"),
    Row(EXPORTER, "console,otlp,console", "readers", ("console",)),
    Row(EXPORTER, "console", "steps", False),
    Row(EXPORTER, "nonsense", "steps", True, "no installed package offers 'nonsense'.*the default is otlp"),
    Row(EXPORTER, "logging,console", "readers", ("console",), "'logging'"),
    Row(EXPORTER, "logging,console", "steps", False, "'logging'"),
    Row(EXPORTER, "none,otlp", "steps", True, "'none' cannot be combined with other exporters"),
    Row(EXPORTER, "none,nonsense", "steps", True, "'none' cannot be combined"),
    Row(f"{E}PROTOCOL", "", "protocol", "grpc"),
    Row(f"{E}PROTOCOL", "HTTP/Protobuf", "protocol", "http/protobuf"),
    Row(f"{E}PROTOCOL", "http/json", "protocol", "http/json"),
    Row(f"{M}PROTOCOL", "HTTP/JSON", "target", "http://localhost:4318/v1/metrics"),
    Row(f"{E}PROTOCOL", "thrift", "protocol", "grpc", "one of grpc, http/protobuf, http/json; .* the default is grpc"),
    Row(f"{M}PROTOCOL", "thrift", "protocol", "http/protobuf", "is not supported", HTTP),
    Row(f"{M}PROTOCOL", "", "protocol", "http/protobuf", "", HTTP),
    Row(f"{E}ENDPOINT", "", "target", "localhost:4317"),
    Row(f"{M}ENDPOINT", " ", "target", "http://localhost:4318/v1/metrics", "", HTTP),
    Row(f"{E}INSECURE", "", "is_insecure", True),
    Row(
        f"{E}INSECURE", "1", "is_insecure", True, "is neither true nor false; it counts as not set, the default is true"
    ),
    Row(f"{E}INSECURE", "1", "is_insecure", False, "the default is false", NAMED),
    Row(f"{E}INSECURE", "True", "is_insecure", True, "", NAMED),
    Row(f"{M}INSECURE", "yes", "is_insecure", True, f"{M}INSECURE='yes'", {**NAMED, f"{E}INSECURE": "true"}),
    Row(f"{E}INSECURE", "1", "is_insecure", True, "", HTTP),  # of gRPC alone
    Row(f"{E}COMPRESSION", "", "compression", "none"),
    Row(f"{E}COMPRESSION", "GZIP", "compression", "gzip"),
    Row(f"{E}COMPRESSION", "zstd", "compression", "none", "is not supported over grpc: set it to one of none, gzip;"),
    Row(f"{E}COMPRESSION", "deflate", "compression", "none", "is not supported over grpc"),
    Row(f"{E}COMPRESSION", "deflate", "compression", "deflate", "", HTTP),
    Row(f"{M}COMPRESSION", "zstd", "compression", "gzip", "over http/protobuf", {**HTTP, f"{E}COMPRESSION": "gzip"}),
    Row(f"{E}TIMEOUT", "", "timeout_s", 10.0),
    Row(f"{E}TIMEOUT", " 2.5 ", "timeout_s", 2.5),
    Row(f"{E}TIMEOUT", "0.001", "timeout_s", 0.001),
    Row(f"{E}TIMEOUT", "1e300", "timeout_s", 86_400.0),
    *(
        Row(f"{E}TIMEOUT", text, "timeout_s", 10.0, "is not a number of seconds above 0; .* the default is 10")
        for text in ("0", "-0.0", "-1", "soon", "nan", "inf", "10s")
    ),
    Row(f"{M}TIMEOUT", "soon", "timeout_s", 3.0, f"{M}TIMEOUT='soon'", {f"{E}TIMEOUT": "3"}),
    Row(f"{M}TIMEOUT", "", "timeout_s", 3.0, "", {f"{E}TIMEOUT": "3"}),
    *(
        Row(f"{prefix}{name}", "", setting, nothing)
        for prefix in (E, M)
        for name, setting, nothing in (
            ("HEADERS", "headers", ()),
            ("CERTIFICATE", "certificate", None),
            ("CLIENT_KEY", "client_key", None),
            ("CLIENT_CERTIFICATE", "client_certificate", None),
        )
    ),
    *(
        Row(f"OTEL_PYTHON_EXPORTER_OTLP_{kind}CREDENTIAL_PROVIDER", " ", "credential_provider", None)
        for kind in ("GRPC_", "GRPC_METRICS_", "HTTP_", "HTTP_METRICS_")
    ),
    Row(INTERVAL, "", "interval_ms", 60_000.0, "", CONSOLE),
    Row(INTERVAL, "5000", "interval_ms", 5_000.0, "", CONSOLE),
    Row(INTERVAL, "2147483647", "interval_ms", 2_147_483_647.0, "", CONSOLE),
    *(
        Row(INTERVAL, text, "interval_ms", 60_000.0, "is not a number of milliseconds above 0", CONSOLE)
        for text in ("0", "-1", "soon", "nan", "inf")
    ),
    Row(TIMEOUT, "", "wait_ms", 30_000.0, "", CONSOLE),
    Row(TIMEOUT, "500", "wait_ms", 500.0, "", CONSOLE),
    *(
        Row(TIMEOUT, text, "wait_ms", 30_000.0, "is not a number of milliseconds above 0", CONSOLE)
        for text in ("0", "-1", "soon")
    ),
    Row("OTEL_METRICS_EXEMPLAR_FILTER", "", "readers", ("console",), "", CONSOLE),
    Row("OTEL_METRICS_EXEMPLAR_FILTER", "sometimes", "readers", ("console",), "", CONSOLE),  # there are no exemplars
    Row("OTEL_SERVICE_NAME", "", "service", "esper-tolaria"),
    Row("OTEL_SERVICE_NAME", "mine", "service", "mine"),
    Row("OTEL_RESOURCE_ATTRIBUTES", "", "service", "esper-tolaria"),
    Row("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine", "service", "mine"),
    Row(
        "OTEL_RESOURCE_ATTRIBUTES", "nonsense", "service", "esper-tolaria", "Invalid key value resource attribute pair"
    ),
    Row("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "", "service", "esper-tolaria"),
    Row("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "nonsense", "service", "esper-tolaria", "nonsense"),
]
REFUSED = [
    ({f"{E}ENDPOINT": "ftp://host:1"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
    ({f"{M}ENDPOINT": "http://host:99999"}, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"),
    ({f"{E}HEADERS": "token"}, "OTEL_EXPORTER_OTLP_HEADERS"),
    ({f"{E}CERTIFICATE": "/no/such.pem"}, "OTEL_EXPORTER_OTLP_CERTIFICATE"),
    ({f"{E}CLIENT_KEY": "/no/such.key"}, "OTEL_EXPORTER_OTLP_CLIENT_KEY"),
    ({"OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": "nobody", f"{E}ENDPOINT": "https://host"}, "'nobody'"),
    ({"ESPER_EXPORT_EVERY_S": "-1"}, "ESPER_EXPORT_EVERY_S"),
    ({"ESPER_RISK_THRESHOLDS": '{"nonsense": 1}'}, "nonsense"),
    ({"ESPER_TOKEN_FILE": "/no/such"}, "ESPER_TOKEN_FILE"),
]


def settings() -> dict[str, object]:
    """What a session reads of the environment, by the same functions."""
    exporters = exporters_from_environment()
    endpoint = endpoint_from_environment(protocol=exporters.protocol)
    resource = resource_for(Run("run", 1))
    provider = OwnProvider(resource, exporters.readers)
    read: dict[str, Any] = {
        "steps": exporters.steps,
        "off": exporters.off,
        "readers": exporters.readers,
        "service": resource.attributes["service.name"],
        **{name: getattr(endpoint, name) for name in endpoint.__slots__},
    }
    for reader in provider._metric_readers:
        if isinstance(reader, PeriodicExportingMetricReader):
            read |= {"interval_ms": reader._export_interval_millis, "wait_ms": reader._export_timeout_millis}
    provider.shutdown()
    return read


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}={row.text}, {row.setting}")
def test_every_variable_is_read_as_the_specification_wants(
    row: Row, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {**row.beside, row.name: row.text}.items():
        monkeypatch.setenv(name, text)
    assert settings()[row.setting] == row.value
    assert bool(caplog.records) == bool(row.said), caplog.text
    if row.said:
        assert re.search(row.said, caplog.text)
        assert caplog.records[0].name != "esper_otel" or f"{row.name}={row.text.strip()!r}" in caplog.text
    else:
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "environ",
    [
        {f"{E}PROTOCOL": "http/json"},
        {f"{E}INSECURE": "1", f"{E}TIMEOUT": "0", f"{E}COMPRESSION": "zstd"},
        {EXPORTER: "otlp,console,nonsense", INTERVAL: "0", "OTEL_METRICS_EXEMPLAR_FILTER": "sometimes"},
    ],
    ids=str,
)
def test_a_session_starts_and_its_steps_arrive(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be used costs a warning, not the training."""
    with MemoryCollector() as collector:
        is_http = f"{E}PROTOCOL" in environ
        monkeypatch.setenv(f"{E}ENDPOINT", collector.http_endpoint if is_http else collector.grpc_endpoint)
        for name, text in environ.items():
            monkeypatch.setenv(name, text)
        caplog.set_level("INFO")
        with esper_otel.start(run_id="run") as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        assert collector.frames_received == 1
    ignored = [record for record in caplog.records if record.levelname == "WARNING"]
    assert {record.getMessage().split("=")[0].split(": ")[-1] for record in ignored} == environ.keys() - {
        "OTEL_METRICS_EXEMPLAR_FILTER",
        f"{E}PROTOCOL",
    }
    assert "over http/json" in caplog.text or not is_http


def test_the_switch_is_judged_where_a_provider_is_given_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from opentelemetry.sdk.metrics import MeterProvider

    monkeypatch.setenv("OTEL_SDK_DISABLED", "1")
    with esper_otel.start(meter_provider=MeterProvider(shutdown_on_exit=False)):
        assert "OTEL_SDK_DISABLED='1' is neither true nor false" in caplog.text


@pytest.mark.parametrize(("environ", "words"), REFUSED, ids=str)
def test_what_steps_need_to_arrive_is_refused(
    environ: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError, match=words):
        esper_otel.start()


def followed(tmp_path: Path, environ: dict[str, str]) -> warm.Done:
    (tmp_path / "train.py").write_text("print('trained')", encoding="utf-8")
    command = ("-m", "esper_otel", "run", "train.py")
    return warm.run(*command, cwd=tmp_path, env={**os.environ, **environ}, imported=warm.PACKAGE)


def test_run_warns_as_start_does_and_goes_on(tmp_path: Path) -> None:
    """The script's own streams are left alone, so that it is said before the script begins."""
    done = followed(tmp_path, {f"{E}PROTOCOL": "thrift", f"{E}TIMEOUT": "0"})
    assert (done.returncode, done.stdout) == (0, "trained\n")
    first, second, *_ = done.stderr.splitlines()  # then that nothing listens
    assert first.startswith("esper_otel setting ignored: OTEL_EXPORTER_OTLP_PROTOCOL='thrift'")
    assert second.startswith("esper_otel setting ignored: OTEL_EXPORTER_OTLP_TIMEOUT='0'")


@pytest.mark.parametrize(
    "environ",
    [
        {INTERVAL: "-1"},
        {EXPORTER: "console", INTERVAL: "x", TIMEOUT: "0"},
        {EXPORTER: "otlp,console", INTERVAL: "nan"},
        {EXPORTER: "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "70000"},
        {EXPORTER: "none,otlp", "OTEL_LOGS_EXPORTER": "oltp"},
        {EXPORTER: "none", "OTEL_LOGS_EXPORTER": "oltp"},
        {"OTEL_SDK_DISABLED": "1"},
    ],
    ids=str,
)
def test_run_and_check_say_all_that_start_says(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of numbers that are needed only once a session is there."""
    for name, text in environ.items():
        monkeypatch.setenv(name, text)

    def ignored() -> set[str]:
        said = {each for record in caplog.records if "setting ignored" in (each := record.getMessage())}
        caplog.clear()
        return said

    esper_otel.start(run_id="run").close(timeout_s=0.0)
    by_start = ignored()
    check_environment()
    assert ignored() == by_start != set()
    assert run_check(environ=environ).stages[0].ok is False


def test_run_refuses_what_start_refuses(tmp_path: Path) -> None:
    """Before the script begins."""
    done = followed(tmp_path, {f"{E}ENDPOINT": "ftp://host:1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("esper-otel: OTEL_EXPORTER_OTLP_ENDPOINT='ftp://host:1' has the scheme 'ftp'")
