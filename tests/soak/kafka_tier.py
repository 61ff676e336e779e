"""A tier on Kafka for a long time: ``python tests/soak/kafka_tier.py outage|ranks [--seconds 600] [--ranks N]``.

``outage``: the broker is killed and stays away; the collector's queue on disk takes what ranks send meanwhile. Each
step must be there once, in the order of its rank. With ``--kill``, the collector is killed half-way as well, and what
it was sending may come last. With ``--control``, its queue is in memory: then this must fail.

``ranks``: a run of very many ranks at a low rate. Each step of each rank must be there once, the comparison must have
all ranks, and memory must stay where it was.

Both go the whole way: requests to the collector, its queue, Kafka, a member, a server, a puller. The tests of
``tests/collector/test_to_kafka.py`` run them in small.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent.parent)]

import psutil  # noqa: E402
import requests  # noqa: E402
from brokers import Broker  # noqa: E402
from gateways import RunningGateway, post  # noqa: E402
from programs import Collector, until  # noqa: E402
from tiers import Puller, Ranks, RunningTierProcess, Tier  # noqa: E402

from esper_otel import GatewayError, TamiyoClient  # noqa: E402

CONFIGS = ("agent.yaml", "to-kafka.yaml", "to-kafka-plain.yaml")
_TOGETHER = 50  # ranks in a request, as a node's collector sends them
_STEPS = 60  # of each of 4,000 ranks: every allowance of memory is used up half-way
_MOST_GROWTH = 1.15
_SHARDS = 4  # pullers that share a large run
_QUEUE = re.compile(r'^otelcol_exporter_queue_size\{[^}]*exporter="kafka/esper"[^}]*\} (\S+)', re.MULTILINE)


class Outage(NamedTuple):
    """What an outage of the broker did.

    Attributes:
        expected: the losses that each rank has sent, in order.
        pulled: the losses that were pulled.
        gap: how many steps pullers were told to be gone.
        queued_bytes: the most that waited in the collector's queue.
        back_s: after so many seconds, everything was there.
    """

    expected: dict[int, list[float]]
    pulled: dict[int, list[float]]
    gap: int
    queued_bytes: float
    back_s: float


class ManyRanks(NamedTuple):
    """What a run of many ranks did.

    Attributes:
        expected: the losses that each rank has sent, in order.
        pulled: the losses that were pulled.
        compared: how many ranks the comparison has.
        gap: how many steps pullers were told to be gone.
        member_mib: resident memory of the member, early and at the end.
        server_mib: resident memory of the server, early and at the end.
        cpu: CPU seconds by process.
    """

    expected: dict[int, list[float]]
    pulled: dict[int, list[float]]
    compared: int
    gap: int
    member_mib: tuple[float, float]
    server_mib: tuple[float, float]
    cpu: dict[str, float]


def send(collector: Collector, ranks: Ranks, steps: int = 1) -> None:
    """Lets each rank send further steps to the collector."""
    last = ranks.step + steps
    for step in range(ranks.step + 1, last + 1):
        for first in range(0, ranks.ranks, _TOGETHER):
            some = range(first, min(first + _TOGETHER, ranks.ranks))
            status, said = post(collector.http, b"".join(ranks.body(rank, [step]) for rank in some))
            assert status == 200, said
    ranks.step = last


def queued(collector: Collector) -> float:
    """How many bytes wait in the collector's queue for Kafka."""
    with suppress(requests.ConnectionError):
        text = requests.get(f"http://127.0.0.1:{collector.metrics_port}/metrics", timeout=60).text
        return sum(map(float, _QUEUE.findall(text)))
    return 0.0


def outage(
    broker: Broker,
    collector: Collector,
    server: RunningGateway,
    ranks: Ranks,
    seconds: float,
    every_s: float,
    *,
    kills: bool = False,
    patience_s: float = 600.0,
) -> Outage:
    """The broker is killed, stays away for so long, and comes back; every rank sends a step each ``every_s``.

    With ``kills``, the collector is killed half-way, and begins again. All steps must be there within ``patience_s``.
    """
    puller = Puller(ranks.run_id, [server])
    send(collector, ranks, 10)
    puller.pull(ranks.ranks * ranks.step)
    broker.kill()
    until_s, most = time.monotonic() + seconds, 0.0
    while (now_s := time.monotonic()) < until_s:
        if kills and now_s > until_s - seconds / 2:
            kills = False
            collector.end(signal.SIGKILL)
            collector.start()
        send(collector, ranks)
        most = max(most, queued(collector))
        time.sleep(every_s)
    most = max(most, until("requests wait", lambda: queued(collector)))
    broker.start()
    back_s = time.monotonic()
    send(collector, ranks, 10)
    with suppress(AssertionError):  # whoever asked compares what is there
        puller.pull(ranks.ranks * ranks.step, timeout_s=patience_s)
    return Outage(ranks.expected(), puller.losses, puller.gap, most, time.monotonic() - back_s)


def many_ranks(
    collector: Collector, member: RunningGateway, server: RunningGateway, ranks: Ranks, steps: int, every_s: float
) -> ManyRanks:
    """Each rank sends a step each ``every_s``, or as fast as this machine can; pullers share the run."""
    pullers = [Puller(ranks.run_id, [server], shard=(shard, _SHARDS)) for shard in range(_SHARDS)]
    early: tuple[float, float] | None = None
    for number in range(steps):
        begun_s = time.monotonic()
        send(collector, ranks)
        if number == steps // 2:
            early = memory(member), memory(server)
        time.sleep(max(every_s - (time.monotonic() - begun_s), 0.0))
    assert early is not None
    deadline_s = time.monotonic() + 600
    while (pulled := sum(len(puller.packets) for puller in pullers)) < ranks.ranks * steps:
        assert time.monotonic() < deadline_s, f"{pulled} of {ranks.ranks * steps} steps"
        for puller in pullers:
            puller.pull(len(puller.packets), timeout_s=600)  # whatever is there
    with TamiyoClient(server.grpc, timeout_s=60) as client:
        until("the comparison has the last step", lambda: _last_compared(client, ranks.run_id) == steps)
        compared = len(client.ranks(ranks.run_id).ranks)
    losses: dict[int, list[float]] = {}
    for puller in pullers:
        for rank, some in puller.losses.items():
            losses.setdefault(rank, []).extend(some)
    cpu = {name: cpu_s(each) for name, each in (("member", member), ("server", server))}
    gap = sum(puller.gap for puller in pullers)
    mib = (early[0], memory(member)), (early[1], memory(server))
    return ManyRanks(ranks.expected(), losses, compared, gap, *mib, cpu)


def _last_compared(client: TamiyoClient, run_id: str) -> int:
    with suppress(GatewayError):
        return client.ranks(run_id).last_step
    return 0


def memory(process: RunningGateway) -> float:
    """The resident memory of a process, in MiB."""
    return float(psutil.Process(process.process.pid).memory_info().rss) / 2**20


def cpu_s(process: RunningGateway) -> float:
    """The CPU time of a process so far, in seconds."""
    times = psutil.Process(process.process.pid).cpu_times()
    return float(times.user + times.system)


def differing(expected: dict[int, list[float]], pulled: dict[int, list[float]]) -> tuple[int, int, int]:
    """How many steps are missing, are there again, and how many ranks have theirs in another order."""
    missing = sum(len({*losses} - {*pulled.get(rank, ())}) for rank, losses in expected.items())
    again = sum(len(losses) - len({*losses}) for losses in pulled.values())
    return missing, again, sum(losses != sorted(losses) for losses in pulled.values())


def _with_all(
    folder: Path,
    work: Callable[[Broker, Collector, RunningTierProcess, RunningTierProcess, Tier], None],
    *configs: str | Path,
) -> None:
    broker = Broker(folder / "broker")
    broker.format()
    broker.start()
    try:
        tier = Tier(broker.address, 16)
        variables = {"ESPER_KAFKA": broker.address, "ESPER_KAFKA_TOPICS": tier.prefix}
        collector = Collector(folder / "collector", *CONFIGS, *configs, **variables)
        with collector, tier.member("one") as member, tier.server() as server:
            work(broker, collector, member, server, tier)
    finally:
        broker.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["outage", "ranks"])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the broker is away")
    parser.add_argument("--ranks", type=int, help="8 for the outage, 4000 otherwise")
    parser.add_argument("--steps", type=int, default=_STEPS, help="of each rank")
    parser.add_argument("--every", type=float, help="seconds between steps: 0.2 for the outage, 10 otherwise")
    parser.add_argument("--kill", action="store_true", help="kill the collector half-way through the outage")
    parser.add_argument("--control", action="store_true", help="keep the collector's queue in memory: steps are lost")
    options = parser.parse_args(arguments)
    failed: list[bool] = []

    def work(
        broker: Broker, collector: Collector, member: RunningTierProcess, server: RunningTierProcess, tier: Tier
    ) -> None:
        if options.what == "outage":
            ranks = Ranks(tier, "outage", options.ranks or 8)
            patience_s = 60.0 if options.control else 600.0
            every_s, seconds = options.every or 0.2, options.seconds
            kills = options.kill or options.control
            away = outage(broker, collector, server, ranks, seconds, every_s, kills=kills, patience_s=patience_s)
            expected, pulled, gap = away[:3]
            print(f"at most {away.queued_bytes / 2**20:.1f} MiB in the queue; all there after {away.back_s:.0f} s")
        else:
            ranks = Ranks(tier, "ranks", options.ranks or 4_000, apart=4096)
            every_s = 10.0 if options.every is None else options.every
            many = many_ranks(collector, member, server, ranks, options.steps, every_s)
            expected, pulled, gap = many.expected, many.pulled, many.gap
            for name, (early, late) in (("member", many.member_mib), ("server", many.server_mib)):
                print(f"{name}: {early:.0f} MiB half-way, {late:.0f} MiB at the end, {many.cpu[name]:.1f} CPU s")
                failed.append(late > early * _MOST_GROWTH and options.steps >= _STEPS)
            print(f"{many.compared} of {ranks.ranks} ranks are compared")
            failed.append(many.compared != ranks.ranks)
        missing, again, disordered = differing(expected, pulled)
        steps = sum(map(len, expected.values()))
        print(f"{len(pulled)} ranks, {steps:,} steps: {missing} missing, {again} twice, {disordered} ranks in disorder")
        failed.append(bool(missing or again or gap or (disordered and not options.kill)))

    with tempfile.TemporaryDirectory() as folder:
        configs = []
        if options.control:
            configs.append(Path(folder) / "in-memory.yaml")
            configs[0].write_text("exporters: {kafka/esper: {sending_queue: {storage: null}}}\n", encoding="utf-8")
        _with_all(Path(folder), work, *configs)
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
