"""A long run: ``python tests/soak/soak.py [--steps 5000000] [--rate 1000]``.

A trainer records 21 metrics and 8 seeds x 10 a step; seeds come and go under ids that are used again. Its endpoint, in
another process, goes away for a while and comes back, over and over. Memory and threads of the trainer must stay flat
once the buffer, which keeps what was sent for pull(), is full: the table says how they went, the exit status whether
they did.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from esper_otel.schema import SEED_METRICS, STEP_METRICS

# What memory may grow by in the second half: pages that the allocator keeps, and the buffer while the endpoint is away.
MOST_GROWTH = 0.05
_LIVES = 1_000  # steps that a seed lives
_OUTAGE_EVERY = 20  # of the run's steps, in parts: an outage in each
_FIELDS = [metric.field for metric in SEED_METRICS]


class Sample(NamedTuple):
    """The trainer at one time."""

    steps: int
    resident_mb: float
    threads: int
    waiting: int
    dropped: int


def sample(steps: int, health: dict[str, object]) -> Sample:
    """What the system and the session say."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    threads = len(list(Path("/proc/self/task").iterdir()))
    return Sample(steps, resident, threads, int(str(health["queue"])), int(str(health["dropped"])))


class Endpoint:
    """A receiver in a process of its own, always on the same port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Takes requests from now on."""
        self._process = subprocess.Popen([sys.executable, __file__, "--receive", str(self.port)])

    def stop(self) -> None:
        """Is gone, with its connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def receive(port: int) -> None:
    """The endpoint's process: says yes to everything."""
    from concurrent import futures

    import grpc

    def export(_request: bytes, _context: object) -> bytes:
        return b""

    handler = grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.metrics.v1.MetricsService",
        {"Export": grpc.unary_unary_rpc_method_handler(export)},
    )
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def train(steps: int, rate: float, rows: int, endpoint: Endpoint) -> list[Sample]:
    """The run; a sample at each of ``rows`` times."""
    import esper_otel

    samples: list[Sample] = []
    names = [metric.name for metric in STEP_METRICS]
    with esper_otel.start(run_id="soak") as telemetry:
        ids = [f"slot-{number}" for number in range(8)]
        started_s = time.monotonic()
        part = max(steps // _OUTAGE_EVERY, 1)
        for step in range(steps):
            with telemetry.step(epoch=step // 1_000, samples=32) as now:
                now.put(dict.fromkeys(names, step % 97 / 97))
                for seed_id in ids:
                    now.seed(seed_id, **{field: 4.0 if field == "stage" else 0.5 for field in _FIELDS})
            if step % _LIVES == _LIVES - 1:
                number = step // _LIVES
                telemetry.retire_seed(ids[number % 8])
                ids[number % 8] = f"slot-{number % 8 + 8 * (number // 8 % 50)}"
            if step % part == part // 2:
                endpoint.stop()
                threading.Timer(min(10.0, part / 4 / (rate or 10_000)), endpoint.start).start()
            if (step + 1) % max(steps // rows, 1) == 0:
                samples.append(sample(step + 1, dict(telemetry.health())))
                print("| {:,} | {:.0f} | {} | {:,} | {:,} |".format(*samples[-1]), flush=True)
            if rate:
                ahead_s = (step + 1) / rate - (time.monotonic() - started_s)
                if ahead_s > 0.002:
                    time.sleep(ahead_s)
    return samples


def is_flat(samples: list[Sample]) -> bool:
    """Whether memory and threads of the second half are those of the first."""
    half = len(samples) // 2
    first, second = samples[half // 2 : half], samples[half:]
    most_mb = max(each.resident_mb for each in first)
    return (
        max(each.resident_mb for each in second) <= most_mb * (1.0 + MOST_GROWTH)
        and max(each.threads for each in second) <= max(each.threads for each in first)
        and samples[-1].dropped == samples[half].dropped
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000_000)
    parser.add_argument("--rate", type=float, default=1_000.0, help="steps a second; 0: as many as there can be")
    parser.add_argument("--receive", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive is not None:
        receive(options.receive)
        return 0
    endpoint = Endpoint()
    os.environ.setdefault("ESPER_BUFFER_BYTES", str(64 * 2**20))  # full, and so flat, after about 14,000 steps
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{endpoint.port}"
    endpoint.start()
    print("| steps | memory MB | threads | waiting | dropped |\n|---|---|---|---|---|")
    try:
        samples = train(options.steps, options.rate, 40, endpoint)
    finally:
        time.sleep(0.1)
        endpoint.stop()
    flat = is_flat(samples)
    print(
        "flat" if flat else f"not flat: more than {MOST_GROWTH:.0%} in the second half, another thread, or steps lost"
    )
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
