"""A run that fails before its first step is known by its name, attempt and outcome, on every way to the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from gateways import RunningGateway
from programs import until

import esper_otel
from esper_otel import EsperSettings, TamiyoClient
from esper_otel.cli import main
from esper_otel.errors import UnknownRun
from esper_otel.testing import MemoryCollector


def fail(run_id: str, settings: EsperSettings | None = None) -> int:
    telemetry = esper_otel.start(run_id=run_id, settings=settings)
    with pytest.raises(RuntimeError), telemetry:
        raise RuntimeError("the model does not fit")
    return telemetry.run.attempt


def test_it_is_known_at_the_gateway_and_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunningGateway("--ui", "--store", str(tmp_path / "store")) as gateway:
        attempts = {}
        for protocol, address in (("grpc", gateway.grpc), ("http/protobuf", gateway.http), ("http/json", gateway.http)):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
            attempts[protocol] = fail(protocol)
        attempts["file"] = fail("file", EsperSettings(export_file=tmp_path / "files"))
        assert main(["send", str(tmp_path / "files")]) == 0
        with TamiyoClient(gateway.grpc) as client:
            infos = {info.run_id: (info.attempt, info.rank, info.ended, info.run_ended) for info in client.runs()}
            assert infos == {name: (attempt, 0, "RuntimeError", "RuntimeError") for name, attempt in attempts.items()}
            with pytest.raises(UnknownRun, match=r"run 'grpc' has ended \(RuntimeError\) before its first step"):
                client.pull("grpc")
        rows = until("the page has all", lambda: requests.get(f"http://{gateway.http}/page/runs", timeout=30).json())
        found = {row["run_id"]: (row["state"], row["outcome"], row["last_step"]) for row in rows["runs"]}
        assert found == dict.fromkeys(attempts, ("failed", "RuntimeError", None))


LEFT = """
import os, signal
import esper_otel
telemetry = esper_otel.start(run_id="left")
END
"""


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed"),
        ("raise RuntimeError('the model does not fit')", "RuntimeError"),
        ("", None),
    ],
)
def test_with_a_spool_the_next_start_tells_of_it(
    end: str, outcome: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that was killed, or that failed while the endpoint was away; of one that just ended, there is nothing."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    away = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", LEFT.replace("END", end)], check=False, env=away, timeout=300)
    assert done.returncode == {"killed": -signal.SIGKILL, None: 0}.get(outcome, 1)
    with RunningGateway() as gateway, TamiyoClient(gateway.grpc) as client:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        with esper_otel.start(run_id="next"):
            until("the spool holds the new session alone", lambda: len(list(tmp_path.iterdir())) == 1)
        assert client.ended("left") == outcome
        if outcome is not None:
            names = [event.name for event in client.events("left")]
            assert names == ["esper.run.started", "esper.run.ended"]
    assert list(tmp_path.iterdir()) == []


SPAWNS = """
import multiprocessing, os, signal
import esper_otel

def rank():
    esper_otel.start(run_id="left")
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=rank)
    child.start()
    child.join()
"""


def test_a_process_that_may_be_a_rank_is_not_told_of_under_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that spawns its ranks tells them who they are between start() and the first step."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path / "spool"))
    (tmp_path / "train.py").write_text(SPAWNS, encoding="utf-8")
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        subprocess.run([sys.executable, tmp_path / "train.py"], check=True, timeout=300)
        esper_otel.start(run_id="next").close()
        assert not collector.requests


def test_one_in_which_nothing_went_wrong_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that only asks for help, or a cell of a notebook, leaves nothing to look at."""
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        esper_otel.start(run_id="nothing").close()
        esper_otel.start(run_id="stopped").close(outcome="exit")
        assert not collector.requests
        with esper_otel.start(run_id="evaluated") as telemetry, telemetry.phase("evaluation"):
            pass
        [ended] = [point for point in collector.points() if point.name == "esper.run.ended"]
    assert ended.resource["esper.run.id"] == "evaluated"
    assert ended.attributes == {"outcome": "completed"}
