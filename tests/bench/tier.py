"""A member of a tier on Kafka beside the single gateway: CPU a million points, in turns, and the age of a step.

    PYTHONPATH=tests .venv/bin/python tests/bench/tier.py --turns 3

Only CPU seconds of our process and ratios within a turn mean something on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import requests
from brokers import shared_broker
from frame_examples import RUN, make_frame
from gateways import RunningGateway
from tiers import Tier
from wire import encoder

from esper_otel import TamiyoClient
from esper_otel.frames.frame import NO_SEEDS
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.serve.grpc_port import OTLP_SERVICE
from esper_otel.schema import STEP_METRICS

METRICS = [metric.name for metric in STEP_METRICS][:21]
RANKS, TOGETHER, ROUNDS, PAUSE_S = 64, 5, 40, 0.1
POINTS_A_REQUEST = 8_192


def rounds(run_id: str) -> Iterator[list[tuple[str, bytes, int]]]:
    """What all ranks send at once, again and again: keys, requests and their numbers of points."""
    encoders = [encoder(f"process-{rank}") for rank in range(RANKS)]
    for first in range(1, ROUNDS * TOGETHER, TOGETHER):
        now_ns = time.time_ns()
        made = []
        for rank in range(RANKS):
            frames = [
                make_frame(
                    run=replace(RUN, run_id=run_id, rank=rank, world_size=RANKS),
                    sequence=step,
                    global_step=step,
                    time_unix_ns=now_ns - (first + TOGETHER - 1 - step) * 10**6,
                    recorded=dict.fromkeys(METRICS, step / 7 + rank),
                    seeds=NO_SEEDS,
                    live=NO_SEEDS,
                )
                for step in range(first, first + TOGETHER)
            ]
            for request in encoders[rank].requests(blocks_of(frames)):
                made.append((f"{run_id}/{rank}", request.body, request.points))
        yield made


def cpu_s(*processes: RunningGateway) -> float:
    """The CPU time of processes so far."""
    times = [psutil.Process(process.process.pid).cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def metric(process: RunningGateway, name: str) -> float:
    text = requests.get(f"http://{process.http}/metrics", timeout=60).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"esper_gateway_{name} "))


def until_taken(processes: list[RunningGateway], steps: int) -> None:
    deadline_s = time.monotonic() + 240
    while sum(metric(process, "steps_total") for process in processes) < steps:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def measured(
    processes: list[RunningGateway],
    send: Callable[[list[tuple[str, bytes, int]]], None],
    server: RunningGateway,
    run: str,
) -> tuple[float, float]:
    """CPU seconds a million points, and the median age of rank 0's steps in seconds."""
    points, before = 0, cpu_s(*processes)
    ages: list[float] = []
    cursor = None
    with TamiyoClient(server.grpc) as client:
        for made in rounds(run):
            send(made)
            points += sum(count for _, _, count in made)
            begun_s = time.monotonic()
            try:
                page = client.pull(run, cursor, rank=0, wait_s=5)
                cursor, ages = page.cursor, ages + [packets.age_s for packets in page][-1:]
            except Exception:
                pass
            time.sleep(max(PAUSE_S - (time.monotonic() - begun_s), 0))
    until_taken(processes, RANKS * ROUNDS * TOGETHER)
    return (cpu_s(*processes) - before) / points * 1e6, statistics.median(ages[5:])


@contextmanager
def sending_to(gateway: RunningGateway) -> Iterator[Callable[[list[tuple[str, bytes, int]]], None]]:
    """Sends requests as a collector does: of many ranks together."""
    with gateway.channel() as channel:
        export = channel.unary_unary(f"/{OTLP_SERVICE}/Export", bytes, bytes)

        def send(made: list[tuple[str, bytes, int]]) -> None:
            together: list[bytes] = []
            points = 0
            for _, body, count in made:
                if points + count > POINTS_A_REQUEST:
                    export(b"".join(together), wait_for_ready=True)
                    together, points = [], 0
                together.append(body)
                points += count
            export(b"".join(together), wait_for_ready=True)

        yield send


def gateway_turn(number: int, *options: str) -> tuple[float, float]:
    with RunningGateway(*options) as gateway, sending_to(gateway) as send:
        return measured([gateway], send, gateway, f"turn-{number}")


def tier_turn(broker: str, number: int, members: int) -> tuple[float, float]:
    tier = Tier(broker, 8)
    with ExitStack() as running:
        processes: list[RunningGateway] = [
            running.enter_context(tier.member(f"member-{each}")) for each in range(members)
        ]
        server = running.enter_context(tier.server())
        while sum(metric(process, "kafka_partitions") for process in processes) < 8 or not all(
            metric(process, "kafka_partitions") for process in processes
        ):
            time.sleep(0.2)

        def send(made: list[tuple[str, bytes, int]]) -> None:
            for key, body, _ in made:
                tier.send(key, body)

        return measured(processes, send, server, f"turn-{number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, shared_broker(Path(folder) / "kafka") as broker:
        for turn in range(options.turns):
            store = ("--store", f"{folder}/store-{turn}")
            for name, take in (
                ("gateway, memory", partial(gateway_turn, turn)),
                ("gateway --store", partial(gateway_turn, turn, *store)),
                ("one member", partial(tier_turn, broker, turn, 1)),
                ("two members", partial(tier_turn, broker, turn, 2)),
            ):
                found.setdefault(name, []).append(take())
                print(turn, name, *(f"{each:.3f}" for each in found[name][-1]), flush=True)
    for name, each in found.items():
        cpu, age = (statistics.median(values) for values in zip(*each, strict=True))
        print(f"{name}: {cpu:.2f} CPU s/M points, age p50 {age * 1000:.0f} ms")


if __name__ == "__main__":
    main()
