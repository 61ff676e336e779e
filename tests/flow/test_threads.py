"""One session and several threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import esper_otel
from esper_otel import Telemetry
from esper_otel.errors import WrongState
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
        yield collector


def record(telemetry: Telemetry, loss: float) -> None:
    with telemetry.step(epoch=0) as now:
        now.put(loss=loss)
        now.seed("seed-1", alpha=0.5)


def losses(collector: MemoryCollector, run_id: str) -> list[float]:
    """In order of time; each time once."""
    points = [p for p in collector.points() if p.name == "loss" and p.value is not None]
    mine = {p.time_unix_ns: p.value for p in points if p.resource["esper.run.id"] == run_id}
    assert len(mine) == sum(p.resource["esper.run.id"] == run_id for p in points)
    return [value for _, value in sorted(mine.items()) if value is not None]


def test_steps_may_come_from_any_thread_one_after_the_other(collector: MemoryCollector) -> None:
    """A trainer that hands its loop to a worker, and one whose steps wander from thread to thread."""
    with (
        esper_otel.start(run_id="wandering") as telemetry,
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as other,
    ):
        for number in range(300):
            where = (one, other)[number % 2]
            where.submit(record, telemetry, float(number)).result()
            if number % 3 == 0:
                record(telemetry, number + 0.5)
    expected = sorted([float(n) for n in range(300)] + [n + 0.5 for n in range(0, 300, 3)])
    assert losses(collector, "wandering") == expected


def test_whoever_pulls_while_steps_are_recorded_misses_none(collector: MemoryCollector) -> None:
    """Two controllers, each with a cursor of its own, beside the exporter."""
    steps, over = 3_000, threading.Event()

    def pull(telemetry: Telemetry) -> list[int]:
        seen: list[int] = []
        page = telemetry.pull(f"{telemetry.run.attempt}:0", max_packets=50)
        while True:
            assert page.gap == 0
            seen += [packets.state.global_step for packets in page.packets]
            if over.is_set() and not page.packets and len(seen) >= steps:
                return seen
            page = telemetry.pull(page.cursor, max_packets=50)

    with esper_otel.start(run_id="pulled") as telemetry, ThreadPoolExecutor(2) as pool:
        pulling = [pool.submit(pull, telemetry) for _ in range(2)]
        for number in range(steps):
            record(telemetry, float(number))
        over.set()
        for each in pulling:
            assert each.result(120) == list(range(1, steps + 1))
    assert losses(collector, "pulled") == [float(number) for number in range(steps)]


def test_closing_from_another_thread_ends_recording_and_loses_no_step_that_was_published(
    collector: MemoryCollector,
) -> None:
    """A signal handler, or a supervisor's thread, closes the session while the loop runs."""
    telemetry = esper_otel.start(run_id="closed")
    started = threading.Event()

    def train() -> int:
        for number in range(10_000_000):
            try:
                record(telemetry, float(number))
            except WrongState as error:
                assert "closed" in str(error)  # noqa: PT017 - the number is wanted as well
                return number
            if number == 100:
                started.set()
        raise AssertionError

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        assert started.wait(120)
        telemetry.close(timeout_s=120)
        recorded = training.result(120)
    health = telemetry.health()
    assert health["faults"] == 0
    assert isinstance(health["recorded"], int)
    assert recorded == health["recorded"]
    # The step that was under way when the end came may be one too late to be sent; then it is counted.
    sent = losses(collector, "closed")
    assert sent == [float(number) for number in range(len(sent))]
    assert len(sent) + int(health["dropped"] or 0) == recorded


def test_two_steps_at_once_are_refused_to_the_second(collector: MemoryCollector) -> None:
    """One thread records at a time; the one that comes too soon is told, and the other's step is unharmed."""
    with esper_otel.start(run_id="both") as telemetry, ThreadPoolExecutor(1) as pool:
        with telemetry.step(epoch=0) as now:
            with pytest.raises(WrongState, match="still open"):
                pool.submit(record, telemetry, 2.0).result()
            now.put(loss=1.0)
        pool.submit(record, telemetry, 3.0).result()
    assert losses(collector, "both") == [1.0, 3.0]


def test_two_sessions_recorded_from_two_threads_each_have_their_own(collector: MemoryCollector) -> None:
    """Two models trained side by side in one process."""

    def train(run_id: str, first: float) -> None:
        with esper_otel.start(run_id=run_id) as telemetry:
            for number in range(1_000):
                record(telemetry, first + number)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(train, "left", 0.0), pool.submit(train, "right", 5_000.0)]:
            done.result(120)
    assert losses(collector, "left") == [float(number) for number in range(1_000)]
    assert losses(collector, "right") == [5_000.0 + number for number in range(1_000)]
    frames = Counter(p.resource["esper.run.id"] for p in collector.points() if p.name == "esper.frame.points")
    assert set(frames) == {"left", "right"}
