"""What one session sends never goes back in time, whatever it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

import esper_otel
from esper_otel import EsperSettings
from esper_otel.export import exporter
from esper_otel.export.streams import before_a_return
from esper_otel.frames.block import Block
from esper_otel.testing import MemoryCollector
from esper_otel.testing.received import Point, points_of

REPEATED = {"esper_otel.health", "esper_otel.device"}


def in_order(requests: list[ExportMetricsServiceRequest]) -> list[Point]:
    """All points; no request has an older one than those before it, and no stream has two values for one time."""
    newest_ns = 0
    seen: dict[tuple[str, str, int], str] = {}
    found = []
    for request in requests:
        points = list(points_of(request))
        assert min(point.time_unix_ns for point in points) >= newest_ns
        newest_ns = max(point.time_unix_ns for point in points)
        for point in points:
            stream = (point.name, repr(point.attributes), point.time_unix_ns // 10**6)
            assert point.scope in REPEATED or stream not in seen
            assert seen.setdefault(stream, repr(point.value)) == repr(point.value)
        found += points
    return found


@pytest.mark.parametrize("every_s", [0.0, 0.05])
def test_counts_go_with_frames_and_never_before_a_step_that_is_open(
    every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts are due all the time; a step stays open meanwhile, and its frame has the time of its beginning."""
    monkeypatch.setattr(exporter, "HEALTH_EVERY_S", 0.01)
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="open", settings=EsperSettings(export_every_s=every_s)) as telemetry:
            for number in range(4):
                with telemetry.step(epoch=0) as now:
                    now.seed(f"seed-{number // 2}", alpha=0.5)
                    time.sleep(0.12)
                if number % 2:
                    telemetry.retire_seed(f"seed-{number // 2}")
        points = in_order(list(collector.requests))
    exported = [p.value for p in points if p.name == "esper.frames.exported"]
    assert exported[-1] == 4
    assert exported == sorted(exported)  # type: ignore[type-var] # none is missing
    frames = {p.time_unix_ns for p in points if p.name == "esper.frame.points" and not p.flags}
    assert frames.isdisjoint(p.time_unix_ns for p in points if p.scope == "esper_otel.health")
    [ended] = [p for p in points if p.name == "esper.run.ended"]
    assert ended.time_unix_ns // 10**6 == max(frames) // 10**6 + 1


@pytest.mark.parametrize("every_s", [0.0, 0.05])
def test_counts_go_on_while_no_step_comes_and_are_repeated_while_one_is_open(
    every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation may take long; a step that hangs must not become older than what was sent, but its process lives."""
    monkeypatch.setattr(exporter, "HEALTH_EVERY_S", 0.1)

    def exported(collector: MemoryCollector) -> list[float | None]:
        return [p.value for p in collector.points() if p.name == "esper.frames.exported"]

    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="idle", settings=EsperSettings(export_every_s=every_s)) as telemetry:
            for _ in range(3):
                telemetry.record_step({"loss": float("nan")}, epoch=0)
            assert collector.wait_for(lambda c: exported(c)[-1:] == [3.0] and len(exported(c)) > 3)
            with telemetry.step(epoch=0):
                before = len(exported(collector))
                assert collector.wait_for(lambda c: len(exported(c)) > before + 5)
            telemetry.record_step({"loss": 1.0}, epoch=0)
            assert collector.wait_for(lambda c: exported(c)[-1:] == [5.0])
        points = in_order(list(collector.requests))
    assert [p.value for p in points if p.name == "esper.global_step" and not p.flags] == [1, 2, 3, 4, 5]
    assert len([p for p in points if p.name == "esper.run.ended"]) == 1


def test_an_endpoint_that_refuses_all_steps_hears_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts that go with refused steps are refused as well; they come again in a request of their own."""
    monkeypatch.setattr(exporter, "HEALTH_EVERY_S", 0.0)
    taken: list[bool] = []

    def answer(request: ExportMetricsServiceRequest) -> Any:
        has_frames = any(point.name == "esper.frame.points" for point in points_of(request))
        taken.append(not has_frames or len(taken) == 0)
        return None if taken[-1] else 400

    with MemoryCollector(answer=answer) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")

        def dropped() -> list[float | None]:
            return [point.value for point in collector.points() if point.name == "esper.frames.dropped"]

        with esper_otel.start(run_id="refused", settings=EsperSettings(export_every_s=0.0)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            assert collector.wait_for(lambda c: bool(c.points()))
            for count in (1.0, 2.0):
                telemetry.record_step({"loss": 1.0}, epoch=0)
                assert collector.wait_for(lambda _, last=count: dropped()[-1:] == [last])  # type: ignore[misc]
            assert {*dropped()} == {1.0, 2.0}  # counts may be said again


def test_steps_of_one_period_go_in_one_request_whatever_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector with several consumers may reorder requests, and a backend then refuses the older points."""
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "60")
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="one request") as telemetry:
            for step in range(500):
                telemetry.seeds([f"seed-{step // 5}"], alpha=[0.5])
                telemetry.record_step({"loss": 1.0}, epoch=0)
                if step % 5 == 4:
                    telemetry.retire_seed(f"seed-{step // 5}")
        assert collector.frames_received == 500
        assert len(collector.requests) == 1


def test_steps_published_while_a_period_is_sent_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that follow each other at once may be reordered on the way."""
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0.2")
    times_s: list[float] = []

    def answered(_request: ExportMetricsServiceRequest) -> None:
        times_s.append(time.monotonic())

    def slowly(blocks: list[Block]) -> list[Block]:
        time.sleep(0.01)  # in which some steps are published
        return before_a_return(blocks)

    monkeypatch.setattr(exporter, "before_a_return", slowly)
    with MemoryCollector(answer=answered) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="periods") as telemetry:
            step = 0
            while len(times_s) < 8:
                telemetry.seeds([f"seed-{step // 5}"], alpha=[0.5])
                telemetry.record_step({"loss": 1.0}, epoch=0)
                time.sleep(0.0002)  # so that the exporter's thread runs
                step += 1
            periods_s = [later - sooner for sooner, later in pairwise(times_s[:8])]
        assert min(periods_s) >= 0.2
        assert collector.frames_received == step


@pytest.mark.parametrize(("close_timeout_s", "is_whole"), [("60", True), ("1", False)])
def test_closing_goes_on_while_steps_are_taken_and_the_end_of_the_run_is_sent(
    close_timeout_s: str, monkeypatch: pytest.MonkeyPatch, *, is_whole: bool
) -> None:
    """Beyond the limit, what is left is given up, and the last counts say how much."""
    monkeypatch.setattr(exporter, "_FRAMES_AT_ONCE", 10)
    monkeypatch.setenv("ESPER_CLOSE_TIMEOUT_S", close_timeout_s)
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "60")
    with MemoryCollector(answer=lambda _: time.sleep(0.2)) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        telemetry = esper_otel.start(run_id="slow")
        for _ in range(400):
            telemetry.record_step({"loss": 1.0}, epoch=0)
        telemetry.close()
        points = in_order(list(collector.requests))
    [ended] = [point for point in points if point.name == "esper.run.ended"]
    assert ended.attributes["outcome"] == "completed"
    dropped = [point.value for point in points if point.name == "esper.frames.dropped"]
    health = telemetry.health()
    assert (health["exported"] == 400) is is_whole
    assert (dropped[-1:] or [0]) == [health["dropped"]] == [400 - collector.frames_received + unanswered(health)]


def test_who_closes_again_with_a_limit_brings_the_end_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal does that arrives meanwhile. The end of the run is sent even so."""
    monkeypatch.setattr(exporter, "_FRAMES_AT_ONCE", 10)
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "60")
    with MemoryCollector(answer=lambda _: time.sleep(0.2)) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        telemetry = esper_otel.start(run_id="slow")
        for _ in range(3_000):
            telemetry.record_step({"loss": 1.0}, epoch=0)
        closing = threading.Thread(target=telemetry.close)
        closing.start()
        assert collector.wait_for(lambda so_far: bool(so_far.requests))
        telemetry.close(timeout_s=1.0, outcome="SIGTERM")
        closing.join()
        [ended] = [point for point in collector.points() if point.name == "esper.run.ended" and not point.flags]
    assert ended.attributes["outcome"] == "completed"
    assert collector.frames_received < 2_000


def unanswered(health: Mapping[str, Any]) -> int:
    """The steps of a request that was taken, but not acknowledged in time: they are counted as dropped."""
    return 10 if "no answer" in str(health["last_error"]) else 0
