"""Benchmark of the gateway: from bytes to items, against protobuf and a loop over the points.

Run it as ``python tests/bench/gateway.py``. Promised are 1 million points/s on one core, 4 times the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.resources import Resource

from esper_otel.export.encode import Encoder, Request
from esper_otel.frame import WIDTH, Frame, Run, SeedTable
from esper_otel.gateway.assemble import Assembler
from esper_otel.gateway.decode import Decoder
from esper_otel.schema import METRICS

SEEDS, FRAMES, ROUNDS = 500, 40, 5


def requests() -> list[Request]:
    """Frames of a run with many seeds."""

    def fault(what: str, error: Exception) -> None:
        raise RuntimeError(what) from error

    run = Run("bench", 1_790_000_000_000)
    luck, ids = np.random.default_rng(7), tuple(f"seed-{number:04}" for number in range(SEEDS))
    frames = []
    for step in range(1, FRAMES + 1):
        table = SeedTable(ids, luck.random((SEEDS, WIDTH)))
        time_unix_ns = 1_790_000_000_000_000_000 + step * 1_000_000
        frames.append(Frame(run, step, step, 0, time_unix_ns, ("loss",), (1.0,), {}, table, table))
    resource = Resource({"esper.run.id": run.run_id, "esper.run.attempt": run.attempt})
    encoder = Encoder({metric.name: metric for metric in METRICS}, lambda _: resource, fault)
    return list(encoder.requests(frames))


def ours(bodies: list[bytes]) -> None:
    """From bytes to items."""
    decoder, assembler, count = Decoder(), Assembler(), 0
    for body in bodies:
        assembler.take(decoder.decode(body), now_s=1.0, received_unix_ns=1)
        count += len(assembler.release(1.0))
    assert count == FRAMES


def loop(bodies: list[bytes]) -> None:
    """What is simplest: protobuf, and each point put into a dict by time, name and seed."""
    frames: dict[int, dict[tuple[str, str], float]] = {}
    for body in bodies:
        for of_resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for of_scope in of_resource.scope_metrics:
                for metric in of_scope.metrics:
                    for point in metric.gauge.data_points:
                        seed = next((a.value.string_value for a in point.attributes if a.key == "seed_id"), "")
                        frames.setdefault(point.time_unix_nano, {})[metric.name, seed] = point.as_double
    assert len(frames) == FRAMES


def best(what: Callable[[list[bytes]], None], bodies: list[bytes]) -> float:
    """CPU seconds of the fastest round."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        what(bodies)
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    made = requests()
    bodies, points = [request.body for request in made], sum(request.points for request in made)
    fast, slow = points / best(ours, bodies), points / best(loop, bodies)
    print(f"{points} points in {len(made)} requests, at least {min(request.points for request in made)} in each")
    print(f"bytes to items: {fast:,.0f} points/s; loop over protobuf: {slow:,.0f} points/s; {fast / slow:.1f} times")
