"""A tier on Kafka against a real broker: what pullers get, and what is said when something is wrong."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions
from log_requests import body as event_body
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from programs import Redis, until
from tiers import Puller, Ranks, RunningTierProcess, Tier, broker

from esper_otel import StaleCursor, TamiyoClient, UnknownRun
from esper_otel.gateway.core import Core
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.hours.bar import RunHours
from esper_otel.leyline.packets import Packets
from esper_otel.pull.calls import page_of
from esper_otel.pull.messages import PullRequest, RanksRequest, RanksResponse
from esper_otel.pull.views import run_ranks

__all__ = ["broker"]
pytestmark = pytest.mark.lengthy
STATE = b"\x08\x01"  # how a bus message begins that has a system state


def of_ranks(packets: Iterable[Packets]) -> dict[int, list[Packets]]:
    found: dict[int, list[Packets]] = {}
    for each in packets:
        found.setdefault(each.rank, []).append(each)
    return found


def halves(body: bytes) -> tuple[bytes, bytes]:
    """Two requests, each with some of the metrics."""
    whole = ExportMetricsServiceRequest.FromString(body)
    parts = []
    for half in range(2):
        part = ExportMetricsServiceRequest()
        part.CopyFrom(whole)
        metrics = part.resource_metrics[0].scope_metrics[0].metrics
        kept = [metric for place, metric in enumerate(metrics) if place % 2 == half]
        del metrics[:]
        metrics.extend(kept)
        parts.append(part.SerializeToString())
    return parts[0], parts[1]


def awkward(ranks: Ranks) -> Iterator[tuple[int, bytes]]:
    """Requests of ranks, with their numbers: a late step, a repeated one, and a correction."""
    for step in range(1, 21):
        for rank in range(ranks.ranks):
            if (rank, step) == (2, 7):  # the rest of it comes last of all
                yield rank, halves(ranks.body(rank, [step]))[0]
            elif (rank, step) != (1, 5):  # comes late
                yield rank, ranks.body(rank, [step])
        if step == 10:
            yield 1, ranks.body(1, [5])
            yield 3, ranks.body(3, [9])


class OfOneGateway(NamedTuple):
    """What a single gateway makes of requests: its packets, its comparison of ranks, and where the hours went."""

    packets: list[Packets]
    compared: bytes
    hours: RunHours


def in_process(bodies: Iterable[bytes], run_id: str) -> OfOneGateway:
    async def made() -> OfOneGateway:
        core = Core(MemoryStore(), hold_s=30)
        for body in bodies:
            core.receive(body)
        response = await core.pull(PullRequest(run_id=run_id, max_packets=1000))
        compared = (await core.ranks(RanksRequest(run_id=run_id))).SerializeToString(deterministic=True)
        hours = await core.run_hours(run_id)
        core.close()
        return OfOneGateway(list(page_of(run_id, response)), compared, hours)

    return asyncio.run(made())


def test_packets_are_those_of_one_gateway(broker: str) -> None:
    """Requests that are split, late or repeated, a poisoned record, and a member that joins between two halves."""
    tier = Tier(broker)
    ranks = Ranks(tier, "same", 6)
    sent: list[bytes] = []

    def send(rank: int, body: bytes) -> None:
        sent.append(body)
        tier.send(f"same/{rank}", body)

    with ExitStack() as running:
        first = running.enter_context(tier.member("first", "--hold", "30"))
        server = running.enter_context(tier.server())
        for rank, body in awkward(ranks):
            send(rank, body)
        tier.send("same/4", b"\x0a\xff\xff")
        later = [(rank, *halves(ranks.body(rank, range(21, 31)))) for rank in range(6)]
        for rank, half, _ in later:
            send(rank, half)
        tier.flush()
        puller = Puller("same", [server])
        puller.pull(6 * 20 - 14)  # rank 2 waits for the rest of its step 7
        second = running.enter_context(tier.member("second", "--hold", "30"))
        until("both work", lambda: first.metric("kafka_partitions") == second.metric("kafka_partitions") == 2)
        for rank, _, half in later:
            send(rank, half)
        send(2, halves(ranks.body(2, [7]))[1])
        tier.flush()
        puller.pull(6 * 30)
        expected = in_process(sent, "same")
        assert of_ranks(puller.packets) == of_ranks(expected.packets)
        assert puller.gap == 0
        assert first.metric("kafka_poisoned_total") + second.metric("kafka_poisoned_total") == 1
        _check_views(server, expected)
    (dead,) = tier.records("dead")
    headers = dict(dead.headers())
    assert (dead.value(), headers["esper.topic"]) == (b"\x0a\xff\xff", f"{tier.prefix}.otlp".encode())
    assert headers["esper.reason"].startswith(b"Malformed")


def _check_views(server: RunningTierProcess, expected: OfOneGateway) -> None:
    """One rank, parts of the run, the list of runs, the comparison of ranks, and the hours."""
    packets = expected.packets
    with TamiyoClient(server.grpc) as client:
        assert list(client.pull("same", rank=2)) == of_ranks(packets)[2]
        parts = [client.pull("same", shard=(part, 2), max_packets=1000) for part in range(2)]
        assert {**of_ranks(parts[0]), **of_ranks(parts[1])} == of_ranks(packets)
        assert len(parts[0]) + len(parts[1]) == len(packets)
        with pytest.raises(StaleCursor, match="came from pulling shard 0/2"):
            client.pull("same", parts[0].cursor)
        with pytest.raises(UnknownRun, match="no step of run 'other'"):
            client.pull("other")
        until("states", lambda: [run.last_step for run in client.runs("same")] == [30] * 6)
        assert {(run.rank, run.first_step, run.stored, run.missing) for run in client.runs()} == {
            (rank, 1, 30, 0) for rank in range(6)
        }
        until("durations", lambda: client.ranks("same").last_step == 30)
        assert client.ranks("same") == run_ranks(RanksResponse.FromString(expected.compared))
        hours = client.hours("same")
        assert hours.run.parts == pytest.approx(expected.hours.run.parts)
        assert hours.ranks.keys() == expected.hours.ranks.keys()


def test_retention_that_overtakes_a_puller_is_a_gap(broker: str) -> None:
    """Exact for one rank and for all, on any server; a puller without a cursor begins with what is left."""
    tier = Tier(broker, partitions=1)
    ranks = Ranks(tier, "gap", 3)
    with tier.member("first"), tier.server() as server:
        ranks.send(10)
        tier.flush()
        one, every = Puller("gap", [server], rank=1), Puller("gap", [server])
        one.pull(10)
        every.pull(30)
        ranks.send(20)
        tier.flush()
        whole = Puller("gap", [server])
        for _ in range(10):  # in records of their own
            whole.pull(3 * ranks.step)
            ranks.send(1)
            tier.flush()
        whole.pull(3 * ranks.step)
    records = tier.records("frames")
    admin = AdminClient({"bootstrap.servers": broker, "log_level": 0})
    place = TopicPartition(f"{tier.prefix}.frames", 0, records[-12].offset())
    for future in admin.delete_records([place]).values():
        future.result()
    with tier.server() as server:
        one.servers = every.servers = [server]
        one.pull(10)
        every.pull(30)
        assert one.gap == 40 - len(one.losses[1])
        assert one.losses[1][10:] == ranks.expected()[1][10 + one.gap :]
        assert every.gap == 120 - len(every.packets)
        assert one.gap > 0


def test_events_have_one_order_at_all_servers(broker: str) -> None:
    """A cursor of one server is valid at another one, and at one that began later; what comes again is left out."""
    tier = Tier(broker)

    def send(*bodies: bytes) -> None:
        for body in bodies:
            tier.send("", body, topic="events")
        tier.flush()

    def pulled(
        server: RunningTierProcess, cursor: str | None, most: int = 64, wait_s: float = 30
    ) -> tuple[list[int], str, int]:
        with TamiyoClient(server.grpc, timeout_s=60) as client:
            page = client.events("run", cursor, max_events=most, wait_s=wait_s)
        return [event.number for event in page], page.cursor, page.gap

    with tier.server() as first, tier.server() as second:
        send(event_body("run", 1, 2), b"\x0a\xff\xff", event_body("run", 2, 3, 6), event_body("other", 1))
        assert pulled(second, None, 1)[0] == [1]
        numbers, cursor, gap = pulled(first, None)
        assert (numbers, gap) == ([1, 2, 3, 6], 2)
        send(event_body("run", 7), event_body("run", 1, rank=1))
        numbers, _, gap = pulled(second, cursor)
        assert (numbers[:1], gap) == ([7], 0)
        assert second.metric("events_total") == 7
        assert second.metric("repeated_events_total") == 1
    assert "is left out: not an ExportLogsServiceRequest" in second.said
    with tier.server() as third:
        until("it has read them", lambda: third.metric("events_total") == 7)
        numbers, last, _ = pulled(third, cursor)
        assert numbers == [7, 1]
        assert pulled(third, last, wait_s=0) == ([], last, 0)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="Redis is not installed")
def test_a_server_publishes_on_oona_and_the_next_one_goes_on(broker: str, tmp_path: Path) -> None:
    with Redis(tmp_path) as redis, ExitStack() as running:
        tier = Tier(broker)
        running.enter_context(tier.member("m"))
        client = running.enter_context(redis.client())

        def published() -> int:
            """Steps: each is one message with its state, and others."""
            entries = [entry for stream in ("oona.normal", "oona.emergency") for _, entry in client.xrange(stream)]
            return sum(entry[b"payload"].startswith(STATE) for entry in entries)

        ranks = Ranks(tier, "bus", 2)
        for count in (20, 40):
            with tier.server("--oona", redis.url) as server:
                ranks.send(10)
                until("all are published", lambda count=count: published() >= count)
                server.kill()
        assert published() == 40


def test_what_is_wrong_is_said(broker: str) -> None:
    """Before anything is done, with the option to change."""
    tier = Tier(broker, partitions=2)

    def said(*options: str, command: str = "gateway") -> str:
        process = RunningTierProcess(command, *options)
        with pytest.raises(AssertionError) as failed, process:
            pass
        return str(failed.value)

    assert "no topic none.otlp" in said("--kafka", broker, "--kafka-topics", "none")
    assert "--store does not go with --kafka" in said(*tier.options(), "--store", "x")
    away = said("--kafka", "127.0.0.1:9", command="serve")
    assert "no broker could be reached at --kafka 127.0.0.1:9" in away
    assert "Connection refused" in away
    with tier.member("one") as one:
        until("it works", lambda: one.metric("kafka_partitions") == 2)
        with tier.member("one") as other:
            ended = one.said_at_last()
            assert other.metric("writers") == 0
        assert "another member has the name 'one'" in ended
    admin = AdminClient({"bootstrap.servers": broker, "log_level": 0})
    for topics, message in (
        (
            ["otlp"],
            f"number of partitions, which must never change: {tier.prefix}.otlp 3",
        ),
        (["frames", "runs"], f"topic {tier.prefix}.frames has 3 partitions, and had 2 when the tier was begun"),
    ):
        for future in admin.create_partitions([NewPartitions(f"{tier.prefix}.{name}", 3) for name in topics]).values():
            future.result()
        process = tier.member("one")
        try:
            process.__enter__()
            text = process.said_at_last()
        except AssertionError as error:
            text = str(error)
        assert message in text


def test_the_command_line_needs_no_broker() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "esper_otel", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--kafka-config FILE" in help_text
