"""What the collector of ``agent.yaml`` takes: ``python tests/bench/ladder.py [--seconds 5]``.

Gauge points a second through the queue on disk to an endpoint that only answers, by the size of requests; processor
time for a million points, and memory. Sender and endpoint run on the same cores. Prints the Markdown table of
collector-config/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import grpc
import psutil

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from gateway import EXPORT, requests  # noqa: E402
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: E402
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from programs import Collector  # noqa: E402

SIZES = (100, 1_000, 10_000)
IN_FLIGHT = 4
ONLY_ESPER = """
service: {{pipelines: {{metrics/prometheus: {{receivers: [otlp], processors: [], exporters: [prometheus]}}}}}}
extensions: {{file_storage/queue: {{fsync: {fsync}}}}}
"""


def bodies() -> dict[int, bytes]:
    """A request of about so many points, by that number."""
    whole = ExportMetricsServiceRequest.FromString(requests()[0].body)
    found = {}
    for size in SIZES:
        request = ExportMetricsServiceRequest()
        request.CopyFrom(whole)
        [scope] = request.resource_metrics[0].scope_metrics
        share = size / sum(len(metric.gauge.data_points) for metric in scope.metrics)
        for metric in scope.metrics:
            del metric.gauge.data_points[max(1, round(len(metric.gauge.data_points) * share)) :]
        found[size] = request.SerializeToString()
    return found


def count_of(body: bytes) -> int:
    """Points of a request."""
    request = ExportMetricsServiceRequest.FromString(body)
    return sum(len(metric.gauge.data_points) for metric in request.resource_metrics[0].scope_metrics[0].metrics)


async def sent(address: str, body: bytes, seconds: float) -> int:
    """How many requests it acknowledges in that time, a few in flight."""
    over_s = time.monotonic() + seconds
    count = 0
    async with grpc.aio.insecure_channel(address) as channel:
        export = channel.unary_unary(EXPORT, bytes, bytes)

        async def one() -> None:
            nonlocal count
            while time.monotonic() < over_s:
                try:
                    await export(body)
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.01)
                else:
                    count += 1

        await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
    return count


async def answering() -> tuple[grpc.aio.Server, str]:
    """A server that takes everything and looks at nothing."""
    empty = ExportMetricsServiceResponse().SerializeToString()

    async def take(_body: bytes, _context: object) -> bytes:
        return empty

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 2**20)])
    service, _, name = EXPORT.strip("/").partition("/")
    handler = grpc.unary_unary_rpc_method_handler(take)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    server, address = await answering()
    print("| points a request | fsync | points/s | CPU s a million points | memory |\n|---|---|---|---|---|")
    for fsync in ("false", "true"):
        for size, body in bodies().items():
            with tempfile.TemporaryDirectory() as folder:
                overlay = Path(folder) / "only.yaml"
                overlay.write_text(ONLY_ESPER.format(fsync=fsync), encoding="utf-8")
                unused = "http://127.0.0.1:1"
                agent = Collector(
                    Path(folder), "agent.yaml", overlay, ESPER_GATEWAY=address, ESPER_PROMETHEUS_OTLP=unused
                )
                with agent:
                    assert agent.process is not None
                    process = psutil.Process(agent.process.pid)
                    await sent(agent.grpc, body, 0.5)
                    before, started_s = sum(process.cpu_times()[:2]), time.monotonic()
                    points = await sent(agent.grpc, body, seconds) * count_of(body)
                    took_s = time.monotonic() - started_s
                    cpu_s = sum(process.cpu_times()[:2]) - before
                    mib = process.memory_info().rss / 2**20
                    agent.end(signal.SIGKILL)  # it would wait for an endpoint that this loop serves
            rate, cost = points / took_s, cpu_s / points * 1e6
            print(f"| {size:,} | {fsync} | {rate:,.0f} | {cost:.1f} | {mib:.0f} MiB |", flush=True)
    await server.stop(None)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    asyncio.run(main())
