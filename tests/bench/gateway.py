"""Benchmark of the gateway, for ``make bench``; alone: ``python tests/bench/gateway.py``.

Points a second from bytes to items, against protobuf and a loop over the points; requests a second of one step each,
against a gRPC server that only parses them; the time from the end of a trainer's step to its packets in a controller's
hands.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.resources import Resource

import esper_otel
from esper_otel import EsperSettings, Stage, TamiyoClient
from esper_otel.export.encode import Encoder, Request
from esper_otel.frames.frame import ABSENT, WIDTH, Frame, Run, SeedTable
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.schema import METRICS, SEED_METRICS, STEP_METRICS

SEEDS, FRAMES, ROUNDS = 500, 40, 5
SINGLE, IN_FLIGHT = 4_000, 16
STEPS, PER_S = 1_000, 100.0
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


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
    encoder = Encoder({metric.name: metric for metric in METRICS}, lambda _: resource)
    return list(encoder.requests(blocks_of(frames)))


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


class Decoding(NamedTuple):
    """Points a second."""

    ours: float
    loop: float
    points: int
    requests: int


def decoding() -> Decoding:
    """From bytes to items, on one core."""
    made = requests()
    bodies, points = [request.body for request in made], sum(request.points for request in made)
    return Decoding(points / best(ours, bodies), points / best(loop, bodies), points, len(made))


def single_steps() -> list[bytes]:
    """Requests of a step each: 21 metrics and 8 seeds x 10."""
    run, ids = Run("single", 1_790_000_000_000), tuple(f"seed-{number}" for number in range(8))
    names = tuple(metric.name for metric in STEP_METRICS)
    cells = np.full((8, WIDTH), 0.5)
    cells[:, len(SEED_METRICS) :] = ABSENT
    table = SeedTable(ids, cells)
    resource = Resource({"esper.run.id": run.run_id, "esper.run.attempt": run.attempt})
    bodies = []
    encoder = Encoder({metric.name: metric for metric in METRICS}, lambda _: resource)
    for step in range(1, SINGLE + 1):
        time_unix_ns = 1_790_000_000_000_000_000 + step * 1_000_000
        frame = Frame(run, step, step, 0, time_unix_ns, names, (1.0,) * len(names), {}, table, table)
        bodies += [request.body for request in encoder.requests(blocks_of([frame]))]
    assert len(bodies) == SINGLE
    return bodies


@contextmanager
def started(*command: str) -> Iterator[str]:
    """The address that a process says first, while it runs."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().replace('{"grpc": "', "").partition('"')[0].strip()
    finally:
        process.kill()
        process.wait()


def gateway() -> Any:
    """A gateway in a process of its own."""
    return started("-m", "esper_otel", "gateway", "--grpc", "127.0.0.1:0", "--http", "none", "--json")


def bare() -> Any:
    """A server that parses requests and answers, and does nothing else."""
    return started(__file__, "--bare")


async def serve_bare() -> None:
    """See ``bare``."""

    async def export(_request: Any, _context: Any) -> ExportMetricsServiceResponse:
        return ExportMetricsServiceResponse()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        export, ExportMetricsServiceRequest.FromString, ExportMetricsServiceResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXPORT.split("/")[1], {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def requests_per_second(address: str, bodies: list[bytes]) -> float:
    """From one client, some requests in flight."""

    async def send() -> float:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(EXPORT, None, ExportMetricsServiceResponse.FromString)
            left = iter(bodies)

            async def sender() -> None:
                for body in left:
                    response = await call(body)
                    assert not response.partial_success.rejected_data_points

            await call(bodies[0])
            start = time.perf_counter()
            await asyncio.gather(*(sender() for _ in range(IN_FLIGHT)))
            return len(bodies) / (time.perf_counter() - start)

    return asyncio.run(send())


def receiving() -> tuple[float, float]:
    """Requests of one step a second: the gateway, and a server that only parses."""
    bodies = single_steps()
    rates = []
    for server in (gateway, bare):
        with server() as address:
            rates.append(requests_per_second(address, bodies))
    return rates[0], rates[1]


def latencies_ms() -> np.ndarray[Any, np.dtype[np.float64]]:
    """From the end of each step to its packets in the hands of a controller in another process."""
    with gateway() as address:
        os.environ["OTEL_METRICS_EXPORTER"] = "otlp"
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{address}"
        puller = subprocess.Popen([sys.executable, __file__, "--pull", address], stdout=subprocess.PIPE, text=True)
        assert puller.stdout is not None
        assert puller.stdout.readline() == "ready\n"
        ended_ns = []
        with esper_otel.start(run_id="latency", settings=EsperSettings(export_every_s=0)) as telemetry:
            for step in range(STEPS):
                with telemetry.step(epoch=0) as now:
                    now.put(loss=1.0, gradient_norm=1.0, accuracy=0.5)
                    for number in range(8):
                        now.seed(f"seed-{number}", stage=Stage.TRAINING, alpha=step / STEPS)
                ended_ns.append(time.monotonic_ns())
                time.sleep(1 / PER_S)
        lines, _ = puller.communicate(timeout=60)
    pulled_ns = [int(line) for line in lines.splitlines()]
    return np.array([came - went for came, went in zip(pulled_ns, ended_ns, strict=True)]) / 1e6


def pull_all(address: str) -> None:
    """Prints when each step came, on the machine's monotonic clock."""
    count, cursor, times = 0, None, []
    with TamiyoClient(address) as client:
        client.runs()
        print("ready", flush=True)
        while count < STEPS:
            page = client.pull("latency", cursor, wait_s=30)
            times += [time.monotonic_ns()] * len(page)
            count, cursor = count + len(page), page.cursor
    print("\n".join(map(str, times)))


def main() -> None:
    """Measures and prints."""
    fast, slow, points, count = decoding()
    print(f"{points} points in {count} requests: {fast:,.0f}/s; a loop over protobuf {slow:,.0f}/s; {fast / slow:.1f}x")
    mine, parsed = receiving()
    print(f"requests of a step: {mine:,.0f}/s; a server that only parses them {parsed:,.0f}/s")
    taken = latencies_ms()
    print(f"step to packet: p50 {np.percentile(taken, 50):.1f} ms, p99 {np.percentile(taken, 99):.1f} ms")


if __name__ == "__main__":
    if sys.argv[1:] == ["--bare"]:
        asyncio.run(serve_bare())
    elif sys.argv[1:2] == ["--pull"]:
        pull_all(sys.argv[2])
    else:
        main()
