"""Many seeds, and seeds that come and go."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import esper_otel
from esper_otel.export import provider
from esper_otel.export.encode import FRAME_SCOPE
from esper_otel.schema import SEED_METRICS
from esper_otel.testing import MemoryCollector
from esper_otel.testing.received import points_of

pytestmark = pytest.mark.lengthy

SEEDS = 5_000
FIELDS = {metric.name: metric.field for metric in SEED_METRICS}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        yield collector


def test_thousands_of_seeds_arrive_to_the_last_value(collector: MemoryCollector) -> None:
    """More than fit into one request, and than the SDK would tell apart."""
    ids = [f"seed-{number}" for number in range(SEEDS)]
    columns = {field: np.arange(SEEDS) + place / 16 for place, field in enumerate(FIELDS.values())}
    columns["stage"] = np.full(SEEDS, 4.0)  # BLENDING, where every field counts
    with esper_otel.start(run_id="many") as telemetry:
        for step in range(2):
            telemetry.seeds(ids, **{**columns, "alpha": columns["alpha"] + 1e6 * step})
            telemetry.record_step({"loss": 1.0}, epoch=0)
        telemetry.close(120.0)  # the receiver has as much to do as the sender
    assert collector.frames_received == 2
    assert len(collector.requests) > 2
    points = [p for p in collector.points() if p.value is not None]
    times = sorted({p.time_unix_ns for p in points if p.name == "loss"})
    received = {
        (p.name, p.attributes["seed_id"], times.index(p.time_unix_ns)): p.value for p in points if p.name in FIELDS
    }
    assert received == {
        (name, seed_id, step): columns[field][number] + (1e6 * step if field == "alpha" else 0.0)
        for name, field in FIELDS.items()
        for number, seed_id in enumerate(ids)
        for step in range(2)
    }
    assert max(request.ByteSize() for request in collector.requests) < 4 * 2**20  # gRPC's usual limit


def test_seeds_come_and_go_without_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of days grows and prunes the same few hundred slots; nothing may pile up, here or at the end."""
    with MemoryCollector(keep=1) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        monkeypatch.setenv("ESPER_BUFFER_BYTES", str(2**20))
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
        with esper_otel.start(run_id="churn") as telemetry:

            def live(generations: int) -> None:
                for generation in range(generations):
                    ids = [f"slot-{(generation * 7 + number) % 300}" for number in range(20)]
                    for _ in range(2):
                        telemetry.seeds(ids, alpha=np.linspace(0.0, 1.0, 20))
                        telemetry.record_step({"loss": 1.0}, epoch=0)
                    for seed_id in ids:
                        telemetry.retire_seed(seed_id)
                    if generation % 25 == 0:  # the buffer is small
                        sent()

            def sent() -> None:
                while telemetry.health()["queue"]:
                    time.sleep(0.001)

            def settled() -> int:
                """Memory in use, without the receiver's, which remembers the newest 10,000 frames."""
                sent()
                gc.collect()
                others = [tracemalloc.Filter(False, path) for path in ("*/esper_otel/testing/*", tracemalloc.__file__)]
                return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(others).traces)

            tracemalloc.start()
            try:
                live(300)  # then everything in the buffer has been traced
                before, growth = settled(), 2**30
                for _ in range(3):  # what piles up does so each time
                    if growth > 40_000:  # eight bytes for each seed that came and went
                        live(250)
                        growth = settled() - before
                        before += growth
            finally:
                tracemalloc.stop()
            assert growth < 40_000
            assert telemetry.health()["dropped"] == 0
            assert telemetry.health()["faults"] == 0


def test_a_seed_that_comes_back_begins_a_series_of_its_own(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end goes out with the step that it is gone from, before its new beginning; at close every series ends."""
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "60")  # all in one go
    with esper_otel.start(run_id="back") as telemetry:
        for life in range(3):
            for _ in range(2):
                telemetry.seeds(["slot-1", "slot-2"], alpha=[0.5 + life, 0.25])
                telemetry.record_step({"loss": 1.0}, epoch=0)
            telemetry.retire_seed("slot-1")
            telemetry.record_step({"loss": 1.0}, epoch=0)
    series: list[float | None] = []
    newest_ns = 0
    for request in collector.requests:
        times = [point.time_unix_ns for point in points_of(request)]
        assert min(times) >= newest_ns
        newest_ns = max(times)
    gone = sorted({p.time_unix_ns for p in collector.points() if p.name == "loss" and not p.flags})[2::3]
    ends = [p.time_unix_ns for p in collector.points() if p.flags and p.attributes.get("seed_id") == "slot-1"]
    assert ends == gone
    for point in collector.points():
        if point.name == "kasmina.seed.alpha" and point.attributes["seed_id"] == "slot-1":
            series.append(point.value)
    assert series == [0.5, 0.5, None, 1.5, 1.5, None, 2.5, 2.5, None]
    last = {(point.name, str(point.attributes.get("seed_id"))): point.value for point in collector.points()}
    frames = {(p.name, str(p.attributes.get("seed_id"))) for p in collector.points() if p.scope == FRAME_SCOPE}
    assert {stream for stream in frames if last[stream] is not None} == {("esper.seed.retired", "slot-1")}  # an event


def test_a_seed_that_is_back_at_once_goes_on_where_it_has_values(collector: MemoryCollector) -> None:
    """One time cannot hold both the end of a series and its next point."""
    with esper_otel.start(run_id="at once") as telemetry:
        telemetry.seeds(["slot-1"], alpha=[0.5], fallback_used=[1.0])
        telemetry.record_step({"loss": 1.0}, epoch=0)
        telemetry.retire_seed("slot-1")
        telemetry.seeds(["slot-1"], alpha=[0.25])
        telemetry.record_step({"loss": 1.0}, epoch=0)
    of_seed = [point for point in collector.points() if point.attributes.get("seed_id") == "slot-1"]
    assert [p.value for p in of_seed if p.name == "kasmina.seed.alpha"] == [0.5, 0.25, None]
    fallback = [(p.value, p.time_unix_ns) for p in of_seed if p.name == "kasmina.seed.fallback_used"]
    assert [value for value, _ in fallback] == [1.0, None]
    assert fallback[1][1] == max(p.time_unix_ns for p in of_seed if p.value == 0.25)


def test_readers_of_our_own_tell_more_seeds_apart_than_the_sdk_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit is 2,000 over an instrument's life; the rest would be one point that says nothing."""
    reader = InMemoryMetricReader()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "console")
    monkeypatch.setattr(provider, "_reader", lambda _name: reader)
    with esper_otel.start(run_id="read") as telemetry:
        for generation in range(3):
            ids = [f"seed-{generation}-{number}" for number in range(1_500)]
            telemetry.seeds(ids, alpha=np.linspace(0.0, 1.0, 1_500))
            telemetry.record_step({"loss": 1.0}, epoch=0)
            data = reader.get_metrics_data()
            assert data is not None
            seen = [
                (point.attributes or {}).get("seed_id")
                for resource in data.resource_metrics
                for scope in resource.scope_metrics
                for metric in scope.metrics
                if metric.name == "kasmina.seed.alpha"
                for point in metric.data.data_points
            ]
            assert sorted(map(str, seen)) == sorted(ids)
            for seed_id in ids:
                telemetry.retire_seed(seed_id)
