"""Bad weather between a session and its endpoint: what was recorded arrives exactly, or is counted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from grpc import StatusCode
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

import esper_otel
from esper_otel import Telemetry
from esper_otel.record.clock import Clock
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

PROTOCOLS = ["grpc", "http/protobuf"]


@pytest.fixture
def collector() -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        yield collector


@pytest.fixture
def start(collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Telemetry]:
    """Starts a session that sends each step at once over a protocol."""

    def started(protocol: str) -> Telemetry:
        address = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
        return esper_otel.start(run_id="weather")

    return started


def record(telemetry: Telemetry, steps: int) -> list[tuple[int, float]]:
    """Time and loss of each step; NaN and infinity among them."""
    recorded = []
    for number in range(steps):
        loss = {3: math.nan, 5: math.inf}.get(number % 10, number / 8)
        with telemetry.step(epoch=0) as now:
            now.put(loss=loss)
            now.seed("seed-1", alpha=0.5)
        recorded.append((now.time_unix_ns, loss))
    return recorded


def received(collector: MemoryCollector) -> list[tuple[int, float]]:
    """What came of the loss, in the order of arrival."""
    return [(p.time_unix_ns, p.value) for p in collector.points() if p.name == "loss" and p.value is not None]


def assert_exact(collector: MemoryCollector, recorded: list[tuple[int, float]]) -> None:
    """Each once, in order, to the bit."""
    assert [(at, str(value)) for at, value in received(collector)] == [(at, str(value)) for at, value in recorded]
    milliseconds = [at // 1_000_000 for at, _ in recorded]
    assert all(first < second for first, second in pairwise(milliseconds))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_endpoint_that_names_a_pause_is_asked_again_after_it(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RetryInfo or Retry-After: not sooner, and nothing is lost meanwhile."""
    busy: StatusCode | int = StatusCode.RESOURCE_EXHAUSTED if protocol == "grpc" else 429
    asked: list[float] = []

    def answer(_: ExportMetricsServiceRequest) -> StatusCode | int | None:
        asked.append(time.monotonic())
        return busy if len(asked) == 1 else None

    with MemoryCollector(answer=answer, retry_after_s=2.0) as collector:
        address = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
        with esper_otel.start(run_id="weather") as telemetry:
            recorded = record(telemetry, 30)
            assert collector.wait_for(lambda _: len(asked) >= 2)
            assert asked[1] - asked[0] >= 1.9  # of our own accord it is 0.5 to 1 s
            assert telemetry.health()["dropped"] == 0
        assert_exact(collector, recorded)


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.UNAUTHENTICATED, 503, 401, 429])
def test_what_may_pass_keeps_the_data(
    code: StatusCode | int, collector: MemoryCollector, start: Callable[[str], Telemetry]
) -> None:
    """Without a hint as well; a credential that is refused may be put right."""
    collector.answer = lambda _: code if collector.attempts <= 2 else None
    with start("http/protobuf" if isinstance(code, int) else "grpc") as telemetry:
        recorded = record(telemetry, 30)
        assert collector.wait_for(lambda c: bool(c.frames_received), 15.0)
    assert telemetry.health()["dropped"] == 0
    assert_exact(collector, recorded)


def test_what_is_too_large_is_split_and_sent_once(
    collector: MemoryCollector, start: Callable[[str], Telemetry]
) -> None:
    """An endpoint, or a proxy before it, with a smaller limit than ours; gRPC's is tested with its sender."""
    holding = threading.Event()

    def small(request: ExportMetricsServiceRequest) -> int | None:
        holding.wait(5.0)  # so that many steps wait and go together
        return 413 if request.ByteSize() > 20_000 else None

    collector.answer = small
    with start("http/protobuf") as telemetry:
        recorded = record(telemetry, 200)
        holding.set()
    assert collector.attempts > len(collector.requests)
    assert_exact(collector, recorded)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_points_that_are_refused_are_counted_and_the_next_goes_on(
    protocol: str, collector: MemoryCollector, start: Callable[[str], Telemetry]
) -> None:
    """Partial success: the endpoint has the rest, so that nothing is sent again."""
    answer = ExportMetricsServiceResponse()
    answer.partial_success.rejected_data_points = 2
    answer.partial_success.error_message = "too old"
    collector.answer = lambda _: answer if collector.attempts == 1 else None
    with start(protocol) as telemetry:
        recorded = record(telemetry, 20)
        assert collector.wait_for(lambda c: c.frames_received == 20)
    assert_exact(collector, recorded)
    rejected = [p.value for p in collector.points() if p.name == "esper.points.rejected"]
    assert rejected[-1] == 2.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_that_is_refused_for_good_is_counted_and_the_next_goes_on(
    protocol: str, collector: MemoryCollector, start: Callable[[str], Telemetry]
) -> None:
    """One bad request must not stand before all that follow."""
    refusal = StatusCode.INVALID_ARGUMENT if protocol == "grpc" else 400
    collector.answer = lambda _: refusal if collector.attempts == 1 else None
    with start(protocol) as telemetry:
        record(telemetry, 50)
    dropped = int(str(telemetry.health()["dropped"]))
    assert dropped >= 1
    assert len(received(collector)) == 50 - dropped


def test_a_wall_clock_that_jumps_is_counted_and_not_followed(
    collector: MemoryCollector, start: Callable[[str], Telemetry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back, a day forward: the run's time goes on, and each stamp is later than the last."""
    jump_ns = [0]
    init = Clock.__init__
    monkeypatch.setattr(Clock, "__init__", lambda self: init(self, wall_ns=lambda: time.time_ns() + jump_ns[0]))
    with start("grpc") as telemetry:
        recorded = record(telemetry, 20)
        for jumps, by_ns in enumerate((-3_600 * 10**9, 86_400 * 10**9), 1):
            jump_ns[0] = by_ns
            recorded += record(telemetry, 20)
            count = len(recorded)
            assert collector.wait_for(lambda c, count=count: c.frames_received == count)  # type: ignore[misc]
            until_s = time.monotonic() + 120
            while telemetry._recorder.clock.jumps < jumps and time.monotonic() < until_s:  # seen once in a while
                time.sleep(0.01)
    assert_exact(collector, recorded)
    assert recorded[-1][0] - recorded[0][0] < 60 * 10**9
    assert [p.value for p in collector.points() if p.name == "esper.clock.jumps"][-1] == 2.0


def test_five_thousand_steps_a_second_lose_none(collector: MemoryCollector, start: Callable[[str], Telemetry]) -> None:
    """Five stamps fall into each millisecond; they run ahead of the clock, and each step has one of its own."""
    with start("grpc") as telemetry:
        recorded = []
        started = time.monotonic()
        for second in range(10):
            recorded += record(telemetry, 500)
            time.sleep(max(started + 0.1 * (second + 1) - time.monotonic(), 0.0))
    assert_exact(collector, recorded)


def test_a_buffer_that_is_full_drops_the_oldest_and_counts_them(
    collector: MemoryCollector, start: Callable[[str], Telemetry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint hangs for longer than memory lasts."""
    monkeypatch.setenv("ESPER_BUFFER_BYTES", str(2**20))
    collector.answer = lambda _: StatusCode.UNAVAILABLE
    with start("grpc") as telemetry:
        recorded = record(telemetry, 1)
        assert collector.wait_for(lambda c: c.attempts == 1)
        recorded += record(telemetry, 8_000)
        collector.answer = None
    dropped = int(str(telemetry.health()["dropped"]))
    assert 0 < dropped < 8_001
    assert_exact(collector, recorded[dropped:])
    reasons = {
        p.attributes["reason"]: p.value for p in collector.points() if p.name == "esper.frames.dropped" and p.value
    }
    assert reasons == {"buffer full": dropped}
