"""Phases on their way: in order with the steps, once, kept while the endpoint is away, counted when they are lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import warm
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

import esper_otel
from esper_otel import EsperSettings
from esper_otel.export.folder import PHASES, Folder
from esper_otel.export.journal_file import stored_entries
from esper_otel.export.phase_points import in_one_request
from esper_otel.frames.phase_log import Phase, checked_phase
from esper_otel.testing import MemoryCollector
from esper_otel.testing.received import Point, points_of

pytestmark = pytest.mark.own_code


def phase_points(collector: MemoryCollector) -> list[Point]:
    return [point for point in collector.points() if point.scope == "esper_otel.phases"]


def numbers(collector: MemoryCollector, run_id: str = "phases") -> list[float | None]:
    found = [point for point in phase_points(collector) if point.resource["esper.run.id"] == run_id]
    return [point.value for point in found if point.name == "esper.phase.number"]


def use(monkeypatch: pytest.MonkeyPatch, collector: MemoryCollector) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")


@pytest.mark.parametrize("every_s", [0.0, 0.05])
def test_no_point_is_older_than_those_before_it(every_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases inside steps, between them, around them, and on another thread, which may end at any time."""

    def save(telemetry: esper_otel.Telemetry) -> None:
        with telemetry.phase("background"):
            time.sleep(0.15)

    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        with esper_otel.start(run_id="phases", settings=EsperSettings(export_every_s=every_s)) as telemetry:
            saving = threading.Thread(target=save, args=(telemetry,))
            saving.start()
            with telemetry.phase("epoch"):
                for _ in range(20):
                    with telemetry.step(epoch=0), telemetry.phase("checkpoint"):
                        time.sleep(0.01)
                    with telemetry.phase("data"):
                        pass
            saving.join()
            telemetry.record_step({"loss": 1.0}, epoch=0)
        requests = list(collector.requests)
        assert sorted(numbers(collector)) == [*range(1, 44)]  # type: ignore[type-var]
    for before, after in pairwise(requests):
        newest = max(point.time_unix_ns for point in points_of(before))
        assert min(point.time_unix_ns for point in points_of(after)) // 10**6 >= newest // 10**6
    totals = [point for request in requests for point in points_of(request) if point.name == "esper.phase_ms"]
    saves = [point.value for point in totals if point.attributes["phase"] == "checkpoint"]
    assert saves == sorted(saves)  # type: ignore[type-var]
    assert [point.value for point in totals if point.attributes["phase"] == "background"] == [0.0]


def test_phases_wait_for_an_endpoint_that_is_away_and_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    is_away = threading.Event()
    is_away.set()

    def answer(_request: ExportMetricsServiceRequest) -> Any:
        return 503 if is_away.is_set() else None

    with MemoryCollector(answer=answer) as collector:
        use(monkeypatch, collector)
        with esper_otel.start(run_id="phases", settings=EsperSettings(export_every_s=0.05)) as telemetry:
            for _ in range(3):
                telemetry.record_step({"loss": 1.0}, epoch=0)
                with telemetry.phase("checkpoint"):
                    pass
            time.sleep(0.2)
            is_away.clear()
        taken = [point for request in collector.requests for point in points_of(request)]
    found = [point.value for point in taken if point.name == "esper.phase.number"]
    assert found[-4:] == [1, 2, 3, 4]


def test_what_an_endpoint_refuses_for_good_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: ExportMetricsServiceRequest) -> Any:
        return 400 if any(point.scope == "esper_otel.phases" for point in points_of(request)) else None

    with MemoryCollector(answer=answer) as collector:
        use(monkeypatch, collector)
        telemetry = esper_otel.start(run_id="phases", settings=EsperSettings(export_every_s=0.05))
        telemetry.record_step({"loss": 1.0}, epoch=0)
        with telemetry.phase("checkpoint"):
            pass
        telemetry.close()
        assert telemetry._recorder.phases.log.dropped == 2


KILLED = """
import os, signal, time
import esper_otel
telemetry = esper_otel.start(run_id="killed")
for step in range(3):
    telemetry.record_step({"loss": 1.0}, epoch=0)
    with telemetry.phase("checkpoint"):
        pass
while WAITS():
    time.sleep(0.01)
with telemetry.phase("evaluation"):
    pass
telemetry.phase("open").__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("is_away", [True, False])
def test_a_kill_loses_no_phase_that_had_ended(is_away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next session sends what was not acknowledged, under the run that it belongs to."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        waits = "False" if is_away else "telemetry.health()['queue'] or telemetry._recorder.phases.log.count"
        program = KILLED.replace("WAITS()", waits)
        there = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} if is_away else {}
        killed = warm.run("-c", program, env={**os.environ, **there}, imported=warm.PACKAGE)
        assert killed.returncode == -signal.SIGKILL
        assert numbers(collector, "killed") == ([] if is_away else [1, 2, 3, 4])
        with esper_otel.start(run_id="next") as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        assert numbers(collector, "killed") == [1, 2, 3, 4, 5]
        names = [p.attributes["phase"] for p in phase_points(collector) if p.name == "esper.phase.number"]
        assert names[:5] == ["start_up", "checkpoint", "checkpoint", "checkpoint", "evaluation"]
        assert [point.value for point in collector.points() if point.name == "esper.run.ended"][:1] == [1.0]
    assert list(tmp_path.iterdir()) == []


def test_a_session_without_any_step_sends_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that only evaluates."""
    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        with esper_otel.start(run_id="phases") as telemetry, telemetry.phase("evaluation"):
            pass
        assert numbers(collector) == [1]


def test_a_request_has_no_more_phases_than_fit_and_late_ones_are_moved() -> None:
    ms = 10**6
    phases = [Phase(number, "x" * 256, 0, number * ms, 0.0, None, 0.0, 0.0) for number in range(1, 1_001)]
    some = in_one_request(phases, after_unix_ns=5 * ms)
    assert 100 < len(some) < 250
    assert [phase.end_unix_ns for phase in some[:3]] == [5 * ms + 1, 6 * ms, 7 * ms]
    assert [phase.length_ms for phase in some] == [phase.length_ms for phase in phases[: len(some)]]
    assert in_one_request(phases[100:], after_unix_ns=5 * ms)[0] == phases[100]


def test_late_phases_of_one_name_all_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of another thread that ended while the request before was on its way: each at a time of its own."""
    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        with esper_otel.start(run_id="phases", settings=EsperSettings(export_every_s=0.05)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            while telemetry.health()["queue"]:
                time.sleep(0.01)
            log = telemetry._recorder.phases.log
            for number in range(1, 6):
                log.add("data", number * 10**9, number * 10**9 + 5, 1.0, None)
            telemetry.record_step({"loss": 1.0}, epoch=0)
            while telemetry.health()["queue"] or log.count:
                time.sleep(0.01)
            for number in range(6, 9):
                log.add("data", number * 10**9, number * 10**9 + 5, 1.0, None)
    ended = [p.time_unix_ns for p in phase_points(collector) if p.name == "esper.phase.number" and p.value != 1]
    assert len(ended) == 8
    assert ended == sorted(set(ended))


def test_a_full_disk_sends_no_phase_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_folder: Folder, _journal: str, _number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "acknowledge_entries", fail)
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        with (
            esper_otel.start(run_id="phases", settings=EsperSettings(close_timeout_s=2.0)) as telemetry,
            telemetry.phase("evaluation"),
        ):
            pass
        assert numbers(collector) == [1]


def test_a_phase_that_ends_after_close_is_counted_and_touches_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then, the number of the folder's descriptor may be that of any other file of the process."""
    opened: list[str] = []
    append_to = Folder.append_to

    def noted(folder: Folder, name: str) -> int:
        opened.append(name)
        return append_to(folder, name)

    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        telemetry = esper_otel.start(run_id="phases")
        telemetry.record_step({"loss": 1.0}, epoch=0)
        log = telemetry._recorder.phases.log
        with telemetry.phase("idle"):
            telemetry.close()
            before = log.dropped
            monkeypatch.setattr(Folder, "append_to", noted)
        assert log.dropped == before + 1
    assert opened == []


@pytest.mark.parametrize("is_full", [False, True])
def test_the_file_of_phases_keeps_only_those_that_wait(
    is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if some always wait; if the disk has no space for a second file, the old one is continued."""

    def fail(_folder: Folder, _name: str, _content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esper_otel.export.journal_file._RENEW_BYTES", 10_000)
    if is_full:
        monkeypatch.setattr(Folder, "renew", fail)
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with MemoryCollector() as collector:
        use(monkeypatch, collector)
        with esper_otel.start(run_id="phases") as telemetry:  # sends no phase before its first step
            log = telemetry._recorder.phases.log
            for number in range(1, 1001):
                log.add("data", number * 10**9, number * 10**9 + 5, 1.0, None)
                log.delivered(number - 5)
            (file,) = tmp_path.glob("*/phases")
            assert (file.stat().st_size < 12_000) is not is_full
            assert list(tmp_path.glob("*/new-*")) == []
            folder = log.added.__self__._folder  # type: ignore[union-attr]
            stored = stored_entries(folder, PHASES, checked_phase, folder.acknowledged_entries[PHASES])
            assert list(stored.entries)[-5:] == log.waiting(None, 9)
            assert (stored.run.run_id, stored.start_unix_ns) == ("phases", log.start_unix_ns)  # type: ignore[union-attr]
