"""A member of a tier on Kafka beside the single gateway: CPU a million points, in turns, and the age of a step.

    PYTHONPATH=tests .venv/bin/python tests/bench/tier.py --turns 3

At last, two members against one on the same backlog: how long each takes, and the CPU time of all members. Only CPU
seconds of our processes and ratios within a turn mean something on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import requests
from brokers import shared_broker
from frame_examples import RUN, make_frame
from gateways import RunningGateway
from tiers import Tier
from wire import encoder

from esper_otel import GatewayUnavailable, TamiyoClient, UnknownRun
from esper_otel.frames.frame import NO_SEEDS
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.serve.grpc_port import OTLP_SERVICE
from esper_otel.schema import STEP_METRICS

METRICS = [metric.name for metric in STEP_METRICS][:21]
RANKS, TOGETHER, ROUNDS, PAUSE_S = 64, 5, 40, 0.1
BACKLOG = 160  # rounds
POINTS_A_REQUEST, PARTITIONS = 8_192, 8


class Cost(NamedTuple):
    """What a turn has cost.

    Attributes:
        cpu: CPU seconds a million points.
        p50: the median age of a step of rank 0 when it was pulled, in seconds.
        p99: its 99th percentile, in seconds.
    """

    cpu: float
    p50: float
    p99: float


class Backlog(NamedTuple):
    """How members have worked off a backlog.

    Attributes:
        cpu: CPU seconds a million points, of all members.
        wall_s: how long it took, in seconds.
    """

    cpu: float
    wall_s: float


def rounds(run_id: str, count: int = ROUNDS) -> Iterator[list[tuple[str, bytes, int]]]:
    """What all ranks send at once, again and again: keys, requests and their numbers of points."""
    encoders = [encoder(f"process-{rank}") for rank in range(RANKS)]
    for first in range(1, count * TOGETHER, TOGETHER):
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


def balanced(members: Sequence[RunningGateway]) -> None:
    """Waits until each of the members has partitions, and all partitions have a member."""
    while not all(of := [metric(member, "kafka_partitions") for member in members]) or sum(of) < PARTITIONS:
        time.sleep(0.2)


def until_taken(processes: list[RunningGateway], steps: int) -> None:
    deadline_s = time.monotonic() + 240
    while sum(metric(process, "steps_total") for process in processes) < steps:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def measured(
    processes: list[RunningGateway],
    send: Callable[[list[tuple[str, bytes, int]]], None],
    server: RunningGateway,
    run: str,
) -> Cost:
    """Sends at a steady pace and pulls rank 0."""
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
                cursor, ages = page.cursor, ages + [packets.age_s for packets in page]
            except (UnknownRun, GatewayUnavailable):
                pass  # its first step is on its way
            time.sleep(max(PAUSE_S - (time.monotonic() - begun_s), 0))
    until_taken(processes, RANKS * ROUNDS * TOGETHER)
    ages = sorted(ages[5 * TOGETHER :])
    cpu = (cpu_s(*processes) - before) / points * 1e6
    return Cost(cpu, statistics.median(ages), ages[int(0.99 * len(ages))])


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


def gateway_turn(number: int, *options: str) -> Cost:
    with RunningGateway(*options) as gateway, sending_to(gateway) as send:
        return measured([gateway], send, gateway, f"turn-{number}")


def tier_turn(broker: str, number: int) -> Cost:
    tier = Tier(broker, PARTITIONS)
    with tier.member("member") as member, tier.server() as server:
        balanced([member])

        def send(made: list[tuple[str, bytes, int]]) -> None:
            for key, body, _ in made:
                tier.send(key, body)

        return measured([member], send, server, f"turn-{number}")


def backlog_turn(broker: str, members: int) -> Backlog:
    """Many more requests than members can use at once."""
    tier = Tier(broker, PARTITIONS)
    made = [request for some in rounds("backlog", BACKLOG) for request in some]
    with ExitStack() as running:
        processes = [running.enter_context(tier.member(f"member-{each}")) for each in range(members)]
        balanced(processes)
        before, begun_s = cpu_s(*processes), time.monotonic()
        for number, (key, body, _) in enumerate(made):
            tier.send(key, body, number % RANKS % PARTITIONS)  # evenly
        until_taken([*processes], RANKS * BACKLOG * TOGETHER)
        wall_s = time.monotonic() - begun_s
        cpu = (cpu_s(*processes) - before) / sum(points for _, _, points in made) * 1e6
    return Backlog(cpu, wall_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[Cost]] = {}
    backlogs: dict[int, list[Backlog]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, shared_broker(Path(folder) / "kafka") as broker:
        for turn in range(options.turns):
            store = ("--store", f"{folder}/store-{turn}")
            for name, take in (
                ("gateway, memory", partial(gateway_turn, turn)),
                ("gateway --store", partial(gateway_turn, turn, *store)),
                ("member", partial(tier_turn, broker, turn)),
            ):
                found.setdefault(name, []).append(take())
                print(turn, name, *(f"{each:.3f}" for each in found[name][-1]), flush=True)
            for members, of_members in backlogs.items():
                of_members.append(backlog_turn(broker, members))
                print(turn, f"backlog, {members}", *(f"{each:.3f}" for each in of_members[-1]), flush=True)
    medians = {name: Cost(*map(statistics.median, zip(*costs, strict=True))) for name, costs in found.items()}
    stored = medians["gateway --store"]
    for name, (cpu, p50, p99) in medians.items():
        ages = f"age p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"
        print(f"{name}: {cpu:.2f} CPU s/M points ({cpu / stored.cpu:.2f}x of --store), {ages}")
    one, two = (Backlog(*map(statistics.median, zip(*each, strict=True))) for each in backlogs.values())
    print(
        f"a backlog by two members: {one.wall_s / two.wall_s:.2f}x as fast as by one, {two.cpu / one.cpu:.2f}x its CPU"
    )


if __name__ == "__main__":
    main()
