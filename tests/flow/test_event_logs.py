"""Events of a run on their way to an endpoint of logs: after the steps, numbered, each once, and never in the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import warm
from log_receiver import LogReceiver, attributes_of, receiver

import esper_otel
from esper_otel import EsperSettings
from esper_otel.events.happenings import checkpoint, run_ended
from esper_otel.frames.event_log import EventLog
from esper_otel.schema import Stage
from esper_otel.session.environment import check_environment
from esper_otel.testing import MemoryCollector
from esper_otel.testing.received import points_of

PROTOCOLS = ["grpc", "http/protobuf", "http/json"]


@contextmanager
def endpoints(
    monkeypatch: pytest.MonkeyPatch, protocol: str = "http/protobuf", **settings: Any
) -> Iterator[tuple[MemoryCollector, LogReceiver]]:
    """Receivers of metrics and of logs, named in the environment."""
    with MemoryCollector(**settings) as collector, receiver(protocol) as logs:
        use(monkeypatch, collector, protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", logs.endpoint)
        yield collector, logs


def use(monkeypatch: pytest.MonkeyPatch, collector: MemoryCollector, protocol: str = "http/protobuf") -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    endpoint = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    monkeypatch.setenv("ESPER_TOLARIA_STEP_ENRICHMENT_ENABLED", "false")  # a busy machine has signals of its own


def names(logs: LogReceiver) -> list[str]:
    return [record.event_name for record in logs.records]


def numbers(logs: LogReceiver) -> list[int]:
    return [attributes_of(record)["esper.event.number"] for record in logs.records]


def of_run(logs: LogReceiver, run_id: str) -> list[Any]:
    """The records with the Resource of a run."""
    return [
        record
        for request in logs.requests
        for of_run in request.resource_logs
        if any(each.value.string_value == run_id for each in of_run.resource.attributes)
        for record in of_run.scope_logs[0].log_records
    ]


def fast(**settings: Any) -> EsperSettings:
    return EsperSettings(export_every_s=0.05, **settings)


def train(telemetry: esper_otel.Telemetry) -> None:
    """A run with an event of each kind."""
    for number in range(1, 14):
        values = {"loss": 1.0, "hook_latency_ms": 80.0 if number in {2, 3} else 1.0}
        stage = Stage.TRAINING if number < 5 else Stage.BLENDING
        telemetry.seeds(["s"], stage=[stage.value])
        telemetry.record_step(values, epoch=number // 10)
        if number == 4:
            with telemetry.phase("checkpoint"):
                pass
        with telemetry.phase("data"):
            pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_events_arrive_as_log_records_of_the_run(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, times, numbers, places and the Resource of the metrics, over each protocol."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-run=general")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    began_ns = time.time_ns()
    with endpoints(monkeypatch, protocol) as (collector, logs):
        with esper_otel.start(run_id="events", settings=fast()) as telemetry:
            train(telemetry)
        health = telemetry.health()
        records = {attributes_of(each)["esper.event.number"]: each for each in logs.records}
        assert logs.headers["x-run"] == "general"
    assert sorted(records) == [*range(1, 8)]
    by_name = {record.event_name: attributes_of(record) for record in records.values()}
    assert sorted(record.event_name for record in records.values()) == [
        *("esper.checkpoint", "esper.run.ended", "esper.run.started", "esper.seed.stage", "esper.seed.stage"),
        *("esper.signal.entered", "esper.signal.left"),
    ]
    assert records[1].event_name == "esper.run.started"
    assert "esper.global_step" not in by_name["esper.run.started"]
    assert records[7].event_name == "esper.run.ended"
    assert by_name["esper.run.ended"]["esper.outcome"] == "completed"
    assert (by_name["esper.checkpoint"]["esper.global_step"], by_name["esper.checkpoint"]["esper.epoch"]) == (4, 0)
    assert by_name["esper.seed.stage"] == {
        "esper.event.number": by_name["esper.seed.stage"]["esper.event.number"],
        "esper.epoch": 0,
        "esper.global_step": 5,
        "seed_id": "s",
        "esper.seed.stage": "BLENDING",
        "esper.seed.stage.previous": "TRAINING",
    }
    assert by_name["esper.signal.entered"]["esper.signal.value"] == 80.0
    assert by_name["esper.signal.left"]["esper.global_step"] == 13
    for record in records.values():
        assert began_ns <= record.time_unix_nano <= record.observed_time_unix_nano + 10**9
        assert record.severity_number in {9, 13}
        assert record.body.string_value.endswith(".")
    of_metrics = collector.requests[-1].resource_metrics[-1]
    of_logs = logs.requests[-1].resource_logs[-1]
    assert of_logs.resource == of_metrics.resource
    assert of_logs.schema_url == of_metrics.schema_url
    assert of_logs.scope_logs[0].scope.name == "esper_otel.events"
    assert of_logs.scope_logs[0].scope.version == of_metrics.scope_metrics[0].scope.version
    assert (health["events"], health["events_dropped"]) == (7, 0)


def test_events_come_after_the_steps_that_they_belong_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the endpoint takes steps late: nothing but what was before the first step arrives meanwhile."""
    is_away = threading.Event()
    is_away.set()
    seen: list[tuple[int, int]] = []
    with endpoints(monkeypatch, answer=lambda _: 503 if is_away.is_set() else None) as (collector, logs):

        def arrived(request: Any) -> None:
            steps = [p.value or 0.0 for p in collector.points() if p.name == "esper.global_step"]
            for of_run in request.resource_logs:
                for record in of_run.scope_logs[0].log_records:
                    seen.append((attributes_of(record).get("esper.global_step", 0), int(max(steps, default=0))))

        logs.arrived = arrived
        with esper_otel.start(run_id="events", settings=fast()) as telemetry:
            train(telemetry)
            assert collector.wait_for(lambda each: each.attempts > 1)
            assert logs.wait_for(lambda each: len(each.records) == 1)
            is_away.clear()
        assert len(names(logs)) == 7
    assert all(step <= sent for step, sent in seen), seen


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for exporters in ("", "console", "none"):
        with endpoints(monkeypatch) as (_, logs):
            monkeypatch.setenv("OTEL_LOGS_EXPORTER", exporters)
            with esper_otel.start(run_id="events", settings=fast()) as telemetry:
                train(telemetry)
            assert logs.records == []


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "oltp"}, "no exporter is called 'oltp'"),
        ({"OTEL_METRICS_EXPORTER": "console", "OTEL_LOGS_EXPORTER": "otlp"}, "so events are not either"),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_LOGS_EXPORTER": "oltp"}, ""),
        ({"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}, ""),
    ],
)
def test_where_no_steps_are_sent_it_is_said_that_events_are_not(
    environ: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    esper_otel.start(run_id="e").close()
    said = caplog.text + capsys.readouterr().err
    assert (words in said) if words else ("event" not in said)
    caplog.clear()
    check_environment()
    assert ("'oltp'" in caplog.text) == ("'oltp'" in words), "esper-otel run says the same"


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_an_endpoint_without_logs_says_so_once_and_steps_go_on(
    protocol: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """404 over HTTP, UNIMPLEMENTED over gRPC: what a receiver of metrics answers. It is no warning."""
    with MemoryCollector() as collector:
        use(monkeypatch, collector, protocol)
        telemetry = esper_otel.start(run_id="events", settings=fast())
        train(telemetry)
        telemetry.record_step({"loss": 1.0}, epoch=2)
        assert collector.wait_for(lambda each: each.frames_received == 14)
        began_s = time.monotonic()
        telemetry.close()
        assert time.monotonic() - began_s < 2.0, "closing does not wait for what has never been there"
        counts: Any = telemetry._wiring.counts()  # type: ignore[attr-defined]
        assert collector.frames_received == 14
    assert counts["esper.events.dropped", "the endpoint has no logs"] == 7
    assert telemetry.health()["events_dropped"] == 7
    assert telemetry.health()["last_error"] is None
    said = capsys.readouterr().err
    assert said.count("takes no OTLP logs") == 1
    assert "dropped 0, events dropped 7 (the endpoint has no logs: 7)" in said


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_a_proxy_whose_server_is_away_for_a_while_costs_no_event(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ingress answers 404, or UNIMPLEMENTED, while what stands after it is exchanged: at first, and once more."""
    missing = grpc.StatusCode.UNIMPLEMENTED if protocol == "grpc" else 404
    answers = [missing, missing]
    monkeypatch.setattr("esper_otel.export.outcome._FIRST_PAUSE_S", 0.05)
    with endpoints(monkeypatch, protocol) as (_, logs):
        logs.answer = lambda _: answers.pop() if answers else 200
        with esper_otel.start(run_id="events", settings=fast()) as telemetry:
            train(telemetry)
            assert logs.wait_for(lambda each: len(each.records) == 6)
            answers += [missing, missing]
            with telemetry.phase("checkpoint"):
                pass
        assert numbers(logs) == [*range(1, 9)]
    assert telemetry.health()["events_dropped"] == 0


def test_in_a_spool_events_wait_one_session_for_an_endpoint_without_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer, folders without end would pile up at a receiver that has none."""
    with endpoints(monkeypatch) as (_, logs):
        logs.answer = lambda _: 404
        for number in range(3):
            with esper_otel.start(run_id=f"run-{number}", settings=fast(spool_dir=tmp_path)) as telemetry:
                telemetry.record_step({"loss": 1.0}, epoch=0)
            assert telemetry.health()["events_dropped"] == (2 if number else 0)
            assert len(list(tmp_path.iterdir())) == 1
        logs.answer = lambda _: 200
        with esper_otel.start(run_id="next", settings=fast(spool_dir=tmp_path)):
            assert logs.wait_for(lambda each: len(of_run(each, "run-2")) == 2)
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_endpoint_of_logs_holds_up_neither_steps_nor_close(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoints(monkeypatch) as (collector, logs):
        logs.hang = True
        telemetry = esper_otel.start(run_id="events", settings=fast())
        train(telemetry)
        assert collector.wait_for(lambda each: each.frames_received == 13)
        began_s = time.monotonic()
        telemetry.close(timeout_s=1.0)
        assert time.monotonic() - began_s < 4.0
        assert telemetry.health()["events_dropped"] == 7
        assert telemetry.health()["dropped"] == 0


def test_an_outage_of_logs_loses_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the endpoint answers for a while, each arrives once, in the order of the numbers."""
    answers = [503, 429, 401, 503]
    with endpoints(monkeypatch) as (_, logs):
        logs.answer = lambda _: answers.pop() if answers else 200
        monkeypatch.setattr("esper_otel.export.outcome._FIRST_PAUSE_S", 0.05)
        with esper_otel.start(run_id="events", settings=fast()) as telemetry:
            train(telemetry)
        assert numbers(logs) == [*range(1, 8)]


def test_mistakes_and_exceptions_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoints(monkeypatch, "grpc") as (_, logs):
        with suppress(ValueError), esper_otel.start(run_id="e", settings=fast(on_mistake="warn")) as telemetry:
            for _ in range(3):
                telemetry.record_step({"loss": 1.0, "los": 2.0}, epoch=0)
            raise ValueError("diverged")
        records = logs.records
    mistakes = [record for record in records if record.event_name == "esper.mistake"]
    assert [attributes_of(record)["exception.type"] for record in mistakes] == ["UnknownMetric"]
    said = mistakes[0].body.string_value
    assert said.startswith("A mistake in test_event_logs.py:"), "without the folders of this machine"
    assert "'los'" in said
    ended = records[-1]
    assert (ended.event_name, ended.severity_number) == ("esper.run.ended", 17)
    assert attributes_of(ended)["exception.type"] == "ValueError"


def test_an_event_that_cannot_be_encoded_is_counted_and_the_others_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoints(monkeypatch) as (_, logs):
        telemetry = esper_otel.start(run_id="events", settings=fast())
        log = telemetry._wiring._events.log  # type: ignore[attr-defined]
        log.add_all([checkpoint(1, 2, 1, 0), checkpoint(1, 2, 1, 0)._replace(severity=2**40), checkpoint(1, 2, 1, 0)])  # type: ignore[arg-type]
        telemetry.record_step({"loss": 1.0}, epoch=0)
        telemetry.close()
        counts: Any = telemetry._wiring.counts()  # type: ignore[attr-defined]
        assert sorted(numbers(logs)) == [1, 2, 4, 5]
    assert counts["esper.events.dropped", "cannot be encoded"] == 1
    assert telemetry.health()["events_dropped"] == 1


def test_an_endpoint_of_logs_that_cannot_be_used_keeps_no_step_from_being_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with endpoints(monkeypatch) as (collector, _):
        monkeypatch.setenv("OTEL_PYTHON_EXPORTER_OTLP_HTTP_LOGS_CREDENTIAL_PROVIDER", "nobody")
        with pytest.raises(esper_otel.EsperOtelError, match="nobody"):
            esper_otel.start(run_id="events", settings=fast())
        with esper_otel.start(run_id="events", settings=fast(on_mistake="warn")) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        assert collector.frames_received == 1
    assert [record for record in caplog.records if "nobody" in record.getMessage()]


def test_only_an_exception_is_named_as_one() -> None:
    """An outcome that the program has given is its own word."""
    for outcome, exception in [
        ("early stop", None),
        ("diverged", None),
        ("SIGTERM", None),
        ("ValueError", "ValueError"),
    ]:
        attributes = run_ended(outcome, 1, None, None).attributes
        assert (attributes["esper.outcome"], attributes.get("exception.type")) == (outcome, exception)


def test_a_refused_record_is_counted_and_the_next_ones_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoints(monkeypatch, "grpc") as (_, logs):
        statuses = [200, grpc.StatusCode.INVALID_ARGUMENT]
        logs.answer = lambda _: statuses.pop() if statuses else 200
        with esper_otel.start(run_id="events", settings=fast()) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            while telemetry.health()["events_dropped"] == 0:
                time.sleep(0.01)
        assert names(logs) == ["esper.run.ended"]
        assert telemetry.health()["events_dropped"] == 1


def test_very_many_events_are_bounded_and_counted() -> None:
    log = EventLog(most=100)
    for number in range(250):
        log.add(checkpoint(number, number + 1, number, 0))
    assert (log.count, log.dropped, log.last) == (100, 150, 250)


def test_events_that_are_dropped_while_they_are_sent_count_once() -> None:
    """The oldest are dropped first, which are those on their way. They have arrived, unless the request fails."""
    log = EventLog(most=100)
    for number in range(100):
        log.add(checkpoint(number, number + 1, number, 0))
    assert len(log.waiting(None, 10)) == 10
    for number in range(4):
        log.add(checkpoint(number, number + 1, number, 0))
    log.waiting(None, 10)  # the request has failed
    for number in range(4):
        log.add(checkpoint(number, number + 1, number, 0))
    assert log.dropped == 8
    log.delivered(6)  # the last that fits into the request
    assert (log.count, log.dropped) == (100, 6)


@pytest.mark.parametrize("has_spool", [True, False])
def test_a_ctrl_c_while_the_last_events_are_sent_gives_up_only_these(
    has_spool: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is left to the next session, which sends the events and no other end of the run; or they count."""
    settings = fast(spool_dir=tmp_path) if has_spool else fast()
    with endpoints(monkeypatch) as (collector, logs):
        logs.answer = lambda _: 503
        telemetry = esper_otel.start(run_id="first", settings=settings)
        telemetry.record_step({"loss": 1.0}, epoch=0)
        assert collector.wait_for(lambda each: each.frames_received == 1)
        thread = telemetry._wiring._exporter._events._thread  # type: ignore[attr-defined]
        join = thread.join

        def interrupted(timeout_s: float) -> None:
            thread.join = join
            raise KeyboardInterrupt

        thread.join = interrupted
        with pytest.raises(KeyboardInterrupt):
            telemetry.close()
        assert telemetry.health()["events_dropped"] == (0 if has_spool else 2)
        logs.answer = lambda _: 200
        with esper_otel.start(run_id="second", settings=settings):
            assert not has_spool or logs.wait_for(lambda each: len(each.records) >= 2)
        outcomes = [point.attributes["outcome"] for point in collector.points() if point.name == "esper.run.ended"]
    assert outcomes == ["completed"]
    assert [attributes_of(record)["esper.event.number"] for record in of_run(logs, "first")] == [1, 2] * has_spool
    assert list(tmp_path.iterdir()) == []


def test_a_ctrl_c_while_steps_are_sent_does_not_wait_for_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoints(monkeypatch) as (_, logs):
        logs.hang = True
        telemetry = esper_otel.start(run_id="events", settings=fast())
        telemetry.record_step({"loss": 1.0}, epoch=0)
        exporter = telemetry._wiring._exporter  # type: ignore[attr-defined]

        def interrupted(_deadline_s: float) -> None:
            raise KeyboardInterrupt

        exporter.join = interrupted
        began_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            telemetry.close(timeout_s=20.0)
        assert exporter.events._deadline_s < began_s + 15.0


KILLED = """
import os, signal, time
import esper_otel
telemetry = esper_otel.start(run_id="killed")
for step in range(1, 31):
    telemetry.seeds(["s"], stage=[2 if step < 20 else 4])
    telemetry.record_step({"loss": 1.0, "hook_latency_ms": 80.0 if 5 < step < 9 or step > 25 else 1.0}, epoch=0)
    if step % 10 == 0:
        with telemetry.phase("checkpoint"):
            pass
    if step == 12:
        while WAITS():
            time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
NAMES = [
    *("esper.run.started", "esper.seed.stage", "esper.signal.entered", "esper.checkpoint", "esper.signal.left"),
    *("esper.checkpoint", "esper.seed.stage", "esper.signal.entered", "esper.checkpoint", "esper.signal.left"),
    "esper.run.ended",
]


@pytest.mark.parametrize("when", ["away", "amid", "after"])
def test_a_kill_loses_no_event(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next session delivers what was noted, and reads the others from the steps that were not sent."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with endpoints(monkeypatch) as (collector, logs):
        waits = "False" if when == "away" else "telemetry.health()['queue'] or telemetry.health()['events'] < 3"
        there = {}
        if when == "away":
            away = "http://127.0.0.1:1"
            there = {"OTEL_EXPORTER_OTLP_ENDPOINT": away, "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": away}
        program = KILLED.replace("WAITS()", waits)
        if when == "after":  # all steps are delivered by then
            program = program.replace("os.kill(", "while telemetry.health()['queue']:\n    time.sleep(0.01)\nos.kill(")
        killed = warm.run("-c", program, env={**os.environ, **there}, imported=warm.PACKAGE)
        assert killed.returncode == -signal.SIGKILL
        with esper_otel.start(run_id="next", settings=fast(spool_dir=tmp_path)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            assert logs.wait_for(lambda each: "esper.run.ended" in names(each))
        once = {attributes_of(record)["esper.event.number"]: record for record in of_run(logs, "killed")}
        steps = {p.value for p in collector.points() if p.name == "esper.global_step" and p.value}
    assert sorted(once) == [*range(1, 12)]
    assert sorted(record.event_name for record in once.values()) == sorted(NAMES)
    ended = attributes_of(once[11])
    assert (ended["esper.outcome"], ended["esper.global_step"]) == ("killed", 30)
    assert steps == {float(number) for number in range(1, 31)}
    assert list(tmp_path.iterdir()) == []


SETTLED_LATE = """
import dataclasses, os, signal, time
import esper_otel
telemetry = esper_otel.start(run_id="late")
telemetry._wiring._publisher.settle_run = lambda run: dataclasses.replace(run, rank=1, world_size=2)
telemetry.record_step({"loss": 1.0}, epoch=0)
while telemetry.health()["queue"]:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_was_settled_late_keeps_its_name_in_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its only event was noted before it knew its rank; the next session cannot send it either."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with endpoints(monkeypatch) as (_, logs):
        logs.answer = lambda _: 503
        killed = warm.run("-c", SETTLED_LATE, imported=warm.PACKAGE)
        assert killed.returncode == -signal.SIGKILL
        for status in (503, 200):
            logs.answer = lambda _, status=status: status  # type: ignore[misc]
            esper_otel.start(run_id="next", settings=fast(spool_dir=tmp_path)).close(timeout_s=1.0)
        resources = [each.resource for request in logs.requests for each in request.resource_logs]
        ranks = [
            {one.key: one.value.int_value for one in each.attributes}["esper.rank"]
            for each in resources
            if any(one.value.string_value == "late" for one in each.attributes)
        ]
        assert len(of_run(logs, "late")) == 2
    assert set(ranks) == {1}


def test_events_that_could_not_be_sent_wait_in_the_spool_and_steps_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint of logs that is away when a run ends: the next start delivers them, and nothing else again."""
    with endpoints(monkeypatch) as (collector, logs):
        logs.answer = lambda _: 503
        telemetry = esper_otel.start(run_id="first", settings=fast(spool_dir=tmp_path))
        train(telemetry)
        telemetry.close(timeout_s=1.0)
        assert telemetry.health()["events_dropped"] == 0
        assert len(list(tmp_path.glob("*/events"))) == 1
        before = len(collector.requests)
        logs.answer = lambda _: 200
        with esper_otel.start(run_id="second", settings=fast(spool_dir=tmp_path)):
            assert logs.wait_for(lambda each: "esper.run.ended" in names(each))
        assert [attributes_of(record)["esper.event.number"] for record in of_run(logs, "first")] == [*range(1, 8)]
        again = [point for request in collector.requests[before:] for point in points_of(request)]
        assert not [point for point in again if point.resource["esper.run.id"] == "first"]
    assert list(tmp_path.iterdir()) == []


ENDS = {"": (0, "completed", 9), "sys.exit(3)": (3, "SystemExit", 17), "1 / 0": (1, "ZeroDivisionError", 17)}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_has_the_exit_status_of_the_process(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        f"import sys, esper_otel\nt = esper_otel.start(run_id='e')\nt.record_step({{'loss': 1.0}}, epoch=0)\n{end}"
    )
    with endpoints(monkeypatch) as (_, logs):
        done = warm.run("-c", program, imported=warm.PACKAGE)
        ended = logs.records[-1]
    status, outcome, severity = ENDS[end]
    assert done.returncode == status
    said = attributes_of(ended)
    assert (said["process.exit.code"], said["esper.outcome"], ended.severity_number) == (status, outcome, severity)
    assert said.get("exception.type") == (outcome if end == "1 / 0" else None)


def test_a_session_without_any_step_has_events_if_something_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for its metrics: otherwise there is no run for anybody to see."""
    with endpoints(monkeypatch) as (_, logs):
        with esper_otel.start(run_id="e", settings=fast(spool_dir=tmp_path)):
            pass
        assert logs.records == []
        with suppress(ValueError), esper_otel.start(run_id="e", settings=fast(spool_dir=tmp_path)):
            raise ValueError("the model does not fit")
        assert names(logs) == ["esper.run.started", "esper.run.ended"]
    assert list(tmp_path.iterdir()) == []


def test_a_fork_adds_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a data loader has a copy of the session, and may save or make mistakes."""
    with endpoints(monkeypatch) as (_, logs):
        with esper_otel.start(run_id="e", settings=fast(on_mistake="warn")) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            with telemetry.phase("checkpoint"):
                child = os.fork()
                if not child:
                    telemetry.record_step({"los": 1.0}, epoch=0)
                    with telemetry.phase("checkpoint"):
                        pass
                    os._exit(0)
                os.waitpid(child, 0)
        assert names(logs) == ["esper.run.started", "esper.checkpoint", "esper.run.ended"]
