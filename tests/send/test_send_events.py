"""Events that were written to files or left in a spool are delivered to an endpoint of logs, each once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from log_receiver import LogReceiver, attributes_of, receiver

import esper_otel
from esper_otel import EsperSettings
from esper_otel.cli import main
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

AWAY = "http://127.0.0.1:1"
TRAIN = """
import os, signal
import esper_otel
telemetry = esper_otel.start(run_id="left")
for _ in range(3):
    telemetry.record_step({"loss": 1.0, "hook_latency_ms": 80.0}, epoch=0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[LogReceiver]:
    with MemoryCollector() as collector, receiver("http/protobuf") as logs:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", logs.endpoint)
        monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
        monkeypatch.setenv("ESPER_TOLARIA_STEP_ENRICHMENT_ENABLED", "false")
        yield logs


def numbers(logs: LogReceiver) -> list[int]:
    return sorted(attributes_of(record)["esper.event.number"] for record in logs.records)


def test_events_are_written_to_files_of_their_own_and_delivered_later(tmp_path: Path, logs: LogReceiver) -> None:
    """In the form of the collector's otlpjsonfile; a second call finds nothing to do."""
    with esper_otel.start(run_id="files", settings=EsperSettings(export_file=tmp_path)) as telemetry:
        telemetry.record_step({"loss": 1.0, "hook_latency_ms": 80.0}, epoch=0)
    [file] = tmp_path.glob("*-events-*.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    [scope] = lines[0]["resourceLogs"][0]["scopeLogs"]
    assert scope["scope"]["name"] == "esper_otel.events"
    assert {record["eventName"] for record in scope["logRecords"]} <= {
        *("esper.run.started", "esper.signal.entered", "esper.signal.left", "esper.run.ended"),
    }
    assert scope["logRecords"][0]["attributes"][0] == {"key": "esper.event.number", "value": {"intValue": "1"}}
    assert logs.records == []
    for _ in range(2):
        assert main(["send", "--within", "30", str(tmp_path)]) == 0
        assert numbers(logs) == [1, 2, 3, 4]


def test_a_damaged_first_line_does_not_hide_the_events_after_it(tmp_path: Path, logs: LogReceiver) -> None:
    with esper_otel.start(run_id="files", settings=EsperSettings(export_file=tmp_path)) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    [file] = tmp_path.glob("*-events-*.jsonl")
    file.write_bytes(b"damaged\n" + file.read_bytes())
    assert main(["send", "--within", "30", str(file)]) == 1, "a line was left out"
    assert numbers(logs) == [1, 2]


@pytest.mark.usefixtures("logs")
def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert main(["send", "--within", "1", str(tmp_path)]) == 2
    assert "folder.jsonl: it is not a plain file" in capsys.readouterr().err


def test_events_in_a_spool_are_delivered_with_its_steps(tmp_path: Path, logs: LogReceiver) -> None:
    environ = {**os.environ, "ESPER_SPOOL_DIR": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": AWAY}
    environ["OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"] = f"{AWAY}/v1/logs"
    killed = warm.run("-c", TRAIN, env=environ, imported=warm.PACKAGE)
    assert killed.returncode == -signal.SIGKILL
    assert main(["send", "--within", "30", str(tmp_path)]) == 0
    assert numbers(logs) == [1, 2, 3, 4]
    assert [record.event_name for record in logs.records][-1] == "esper.run.ended"
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_without_logs_takes_the_steps_and_leaves_the_events_for_the_next_call(
    tmp_path: Path, logs: LogReceiver, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be a proxy whose server is away: what can be taken later is not refused for good."""
    with esper_otel.start(run_id="files", settings=EsperSettings(export_file=tmp_path)) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    logs.answer = lambda _: 404
    assert main(["send", "--within", "30", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "/v1/logs, the rest is for the next call" in said
    assert "1 requests delivered" in said
    logs.answer = lambda _: 200
    assert main(["send", "--within", "30", str(tmp_path)]) == 0
    assert numbers(logs) == [1, 2]


def test_a_spool_keeps_events_that_an_endpoint_without_logs_has_not_taken(tmp_path: Path, logs: LogReceiver) -> None:
    logs.answer = lambda _: 404
    environ = {**os.environ, "ESPER_SPOOL_DIR": str(tmp_path)}
    warm.run("-c", TRAIN, env=environ, imported=warm.PACKAGE)
    assert main(["send", "--within", "30", str(tmp_path)]) == 1
    logs.answer = lambda _: 200
    assert main(["send", "--within", "30", str(tmp_path)]) == 0
    assert numbers(logs) == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []
