"""Benchmark of a gateway with many ranks, for ``make bench``; alone: ``python tests/bench/many_ranks.py``.

CPU time of the whole gateway process: a point of one-step frames from 512 ranks, in requests as a collector's batches
(ResourceMetrics are appended, not merged; a request is cut at exactly 8,000 points; fields in descending order), in
memory and with ``--store``; a step pulled by a first puller and by each further one; and in process, the CPU time of
comparing 4,000 ranks.

``--against PYTHON`` measures another version in turns, in that interpreter's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.resources import Resource

from esper_otel.export.encode import Encoder
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import blocks_of
from esper_otel.pull.messages import PullRequest, PullResponse, RunsRequest, RunsResponse
from esper_otel.schema import METRICS, STEP_METRICS

sys.path[:0] = [str(Path(__file__).parent.parent)]
from wire import as_collector  # noqa: E402 - it is next to this folder

RANKS, POINTS, IN_REQUEST = 512, 30, 8_000
WARM, STEPS, PULLED, PULLERS = 6, 20, 4_000, 10
_TIME, _STEP_NS = 1_790_000_000_000_000_000, 1_000_000
_EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_PULL, _RUNS = "/esper.gateway.v1.Pull/Pull", "/esper.gateway.v1.Pull/Runs"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_RANKS_SCRIPT = """
import sys, time
try:
    from esper_otel.frames.frame import Frame, Run
except ImportError:
    from esper_otel.frame import Frame, Run
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.ranks import Ranks
count, steps = 4000, 125
ranks = Ranks()
names = ("loss", "input_wait_ms", "step_latency_ms", "hook_latency_ms", "kasmina.finalize_ms")
runs = [Run("run", 1, rank=rank, world_size=count) for rank in range(count)]
spent = 0
for step in range(1, steps + 1):
    items = [
        Item(Origin("run", 1, rank),
             Frame(runs[rank], step, step, 0, step * 10**6, names, (1.0, 5.0, 50.0, 1.0, 1.0), {}), 1, True, 0)
        for rank in range(count)
    ]
    begun = time.thread_time()
    ranks.note(items)
    spent += time.thread_time() - begun
begun = time.thread_time()
view = ranks.view("run", 0)
viewed = time.thread_time() - begun
print(viewed, spent / count / steps, len(view.ranks), view.steps)
"""


class Cost(NamedTuple):
    """CPU time of one gateway, in microseconds.

    Attributes:
        memory: a point, in memory.
        store: a point, with ``--store``.
        first: a step, for the first puller.
        further: a step, for each further puller.
        ranks_ms: comparing 4,000 ranks, in milliseconds.
        noted: keeping a step for that comparison.
    """

    memory: float
    store: float
    first: float
    further: float
    ranks_ms: float
    noted: float


# -- requests as a collector sends them ----------------------------------------------------------------------------


def _frame(run: Run, step: int) -> Frame:
    names = (*(metric.name for metric in STEP_METRICS), "esper.optimizer.lr")
    numbers = tuple(float(2 + place) for place in range(len(names)))
    return Frame(run, step, step, 0, _TIME + step * _STEP_NS, names, numbers, {"esper.validation.loss": 50.0})


class _Skeleton(NamedTuple):
    """The bytes of a part of a rank's frame, and where its numbers are."""

    body: bytearray
    times: list[int]
    values: list[int]
    names: list[str]


@cache
def _skeleton(run_id: str, rank: int, world_size: int, first: int, last: int) -> _Skeleton:
    """Points ``first`` to before ``last`` of a rank's frame, as a ResourceMetrics of its own."""
    run = Run(run_id, 1, rank=rank, world_size=world_size)
    resource = Resource(
        {
            "service.name": "esper-tolaria",
            "service.instance.id": f"{run_id}/{rank}",
            "esper.run.id": run_id,
            "esper.run.attempt": 1,
            "esper.rank": rank,
            "esper.world_size": world_size,
            "host.name": f"node-{rank // 8}",
            "process.pid": 1000 + rank % 8,
        }
    )
    encoder = Encoder({metric.name: metric for metric in METRICS}, lambda _: resource)
    [made] = encoder.requests(blocks_of([_frame(run, 1)]))
    assert made.points == POINTS, made.points
    request = ExportMetricsServiceRequest.FromString(made.body)
    (of_resource,) = request.resource_metrics
    (of_scope,) = of_resource.scope_metrics
    some = of_scope.metrics[first:last]
    del of_scope.metrics[:]
    of_scope.metrics.extend(some)
    marker = 0.123456789
    for metric in of_scope.metrics:
        metric.gauge.data_points[0].as_double = marker
    body = as_collector(request)
    pattern, time_pattern = np.float64(marker).tobytes(), (_TIME + _STEP_NS).to_bytes(8, "little")
    return _Skeleton(
        bytearray(body), _places(body, time_pattern), _places(body, pattern), [metric.name for metric in some]
    )


def _places(body: bytes, pattern: bytes) -> list[int]:
    found, place = [], body.find(pattern)
    while place >= 0:
        found.append(place)
        place = body.find(pattern, place + 1)
    return found


def _part(run_id: str, rank: int, world_size: int, step: int, first: int, last: int) -> bytes:
    skeleton = _skeleton(run_id, rank, world_size, first, last)
    body = skeleton.body
    time_bytes = (_TIME + step * _STEP_NS).to_bytes(8, "little")
    own = {"esper.global_step": step, "esper.frame.sequence": step, "esper.frame.points": POINTS, "esper.seeds": 0.0}
    own |= {"esper.epoch": 0.0, "esper.seeds.digest": 0.0}
    # Ordinary values: no step of the bench gives a risk signal.
    values = np.array([own.get(name, 0.005 * place + 0.001 * (step % 7)) for place, name in enumerate(skeleton.names)])
    for place in skeleton.times:
        body[place : place + 8] = time_bytes
    content = values.tobytes()
    for number, place in enumerate(skeleton.values):
        body[place : place + 8] = content[8 * number : 8 * number + 8]
    return bytes(body)


def requests(run_id: str, ranks: int, steps: range) -> Iterator[bytes]:
    """Steps of all ranks in turns, cut at exactly 8,000 points."""
    parts: list[bytes] = []
    room = IN_REQUEST
    for step in steps:
        for rank in range(ranks):
            first = 0
            while first < POINTS:
                last = min(POINTS, first + room)
                parts.append(_part(run_id, rank, ranks, step, first, last))
                room -= last - first
                first = last
                if not room:
                    yield b"".join(parts)
                    parts, room = [], IN_REQUEST
    if parts:
        yield b"".join(parts)


# -- a gateway -----------------------------------------------------------------------------------------------------


class Gateway:
    """A gateway in a process of its own."""

    def __init__(self, python: str, *options: str) -> None:
        command = [python, "-m", "esper_otel", "gateway", "--grpc", "127.0.0.1:0", "--http", "none", "--json", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tempfile.gettempdir()
        )
        assert self.process.stdout is not None
        self.channel = grpc.insecure_channel(
            json.loads(self.process.stdout.readline())["grpc"], [("grpc.max_receive_message_length", -1)]
        )

    def call(self, method: str, request: bytes) -> bytes:
        answer: bytes = self.channel.unary_unary(method, None, None)(request, timeout=60)
        return answer

    def send(self, body: bytes) -> None:
        answer = ExportMetricsServiceResponse.FromString(self.call(_EXPORT, body))
        assert not answer.partial_success.rejected_data_points, answer

    def cpu_s(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def stored(self, run_id: str) -> int:
        runs = RunsResponse.FromString(self.call(_RUNS, RunsRequest().SerializeToString())).runs
        return sum(run.stored for run in runs if run.run_id == run_id and not run.incomplete)

    def pull_all(self, run_id: str) -> int:
        """Pulls every step; returns how many there were."""
        count, cursor = 0, ""
        while True:
            request = PullRequest(run_id=run_id, cursor=cursor).SerializeToString()
            page = PullResponse.FromString(self.call(_PULL, request))
            if not page.steps:
                return count
            count, cursor = count + len(page.steps), page.cursor


@contextmanager
def running(python: str, *options: str) -> Iterator[Gateway]:
    gateway = Gateway(python, *options)
    try:
        yield gateway
    finally:
        gateway.channel.close()
        gateway.process.kill()
        gateway.process.wait()


def receiving(python: str, *options: str) -> float:
    """Microseconds a point."""
    with running(python, *options) as gateway:
        for body in requests("ranks", RANKS, range(1, WARM + 1)):
            gateway.send(body)
        begun_s = gateway.cpu_s()
        for body in requests("ranks", RANKS, range(WARM + 1, WARM + STEPS + 1)):
            gateway.send(body)
        deadline_s = time.monotonic() + 20
        spent_s = gateway.cpu_s() - begun_s
        while gateway.stored("ranks") < RANKS * (WARM + STEPS):
            assert time.monotonic() < deadline_s, gateway.stored("ranks")
            time.sleep(0.1)
    return spent_s * 1e6 / (RANKS * STEPS * POINTS)


def storing(python: str) -> float:
    """Microseconds a point, with ``--store``."""
    with tempfile.TemporaryDirectory() as folder:
        return receiving(python, "--store", folder)


def pulling(python: str) -> tuple[float, float]:
    """Microseconds a step, for the first puller and for each further one."""
    with running(python) as gateway:
        for body in requests("pulled", 1, range(1, PULLED + 101)):
            gateway.send(body)
        gateway.send(b"".join(requests("warm", 1, range(1, 201))))
        assert gateway.pull_all("warm") == 200
        spent = []
        for _ in range(PULLERS):
            begun_s = gateway.cpu_s()
            assert gateway.pull_all("pulled") == PULLED + 100
            spent.append((gateway.cpu_s() - begun_s) * 1e6 / (PULLED + 100))
    return spent[0], statistics.fmean(spent[1:])


def comparing(python: str) -> tuple[float, float]:
    """Milliseconds for comparing 4,000 ranks, and microseconds for each step that is kept for it."""
    said = subprocess.run(
        [python, "-c", _RANKS_SCRIPT], capture_output=True, text=True, check=True, cwd=tempfile.gettempdir()
    ).stdout.split()
    assert said[2:] == ["4000", "125"], said
    return float(said[0]) * 1e3, float(said[1]) * 1e6


def cost(python: str, parts: str) -> Cost:
    """One round."""
    none = float("nan")
    memory = receiving(python) if "m" in parts else none
    stored = storing(python) if "s" in parts else none
    pulled = pulling(python) if "p" in parts else (none, none)
    compared = comparing(python) if "r" in parts else (none, none)
    return Cost(memory, stored, *pulled, *compared)


def median(rounds: list[Cost]) -> Cost:
    return Cost(*(statistics.median(each) for each in zip(*rounds, strict=True)))


def measured(rounds: int, pythons: list[str], parts: str = "mspr") -> list[Cost]:
    """The median of some rounds, for each of the interpreters, in turns."""
    found: dict[str, list[Cost]] = {python: [] for python in pythons}
    for _ in range(rounds):
        for python in pythons:
            found[python].append(cost(python, parts))
    return [median(found[python]) for python in pythons]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="PYTHON", help="the interpreter of another version's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="mspr", help="memory, store, pull, ranks")
    options = parser.parse_args()
    ours, *theirs = measured(
        options.rounds, [sys.executable, *([options.against] if options.against else [])], options.parts
    )
    for number, name in enumerate(Cost._fields):
        line = f"{name:10} {ours[number]:8.2f}"
        if theirs:
            line += f"   against {theirs[0][number]:8.2f}: {theirs[0][number] / ours[number]:.1f}x"
        print(line)


if __name__ == "__main__":
    main()
