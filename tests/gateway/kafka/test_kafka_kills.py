"""Whatever dies in a tier: no step is lost, none is there twice, and the steps of a rank stay in order."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from frame_examples import make_frame
from gateways import RunningGateway
from programs import until
from tiers import SESSION_MS, Puller, Ranks, Tier, broker

from esper_otel.gateway.kafka.topic_records import block_of

__all__ = ["broker", "make_frame"]
pytestmark = pytest.mark.lengthy

# A member that is killed inside its fourth transaction, when the brokers have its frames.
DIES_INSIDE = """
def commit(self, commit=member.Member._commit):
    self._number = getattr(self, "_number", 0) + 1
    if self._number == 4:
        self._producer.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self)
member.Member._commit = commit
"""

# A session that lasts until a member that was killed is back, and a look at the group every second.
PATIENT = """
import esper_otel.gateway.kafka.group_watch as watch
member.SESSION_MS, watch._LOOK_EVERY_S = 10_000, 1.0
"""
# A member that is killed when it is to hand over some of its partitions.
DIES_HANDING_OVER = f"""
{PATIENT}
member.Member._revoked = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_members_and_servers_die_and_hang(broker: str) -> None:
    """One dies inside a transaction and comes back, one hangs for longer than its session, a server is killed."""
    tier = Tier(broker)
    ranks = Ranks(tier, "kills", 8)
    with ExitStack() as running:
        first = running.enter_context(tier.member("first", patch=DIES_INSIDE))
        second = running.enter_context(tier.member("second"))
        servers: list[RunningGateway] = [running.enter_context(tier.server()) for _ in range(2)]
        puller = Puller("kills", servers)
        until("both work", lambda: all(each.metric("kafka_partitions") for each in (first, second)))
        while first.process.poll() is None:
            ranks.send(2)
            time.sleep(0.05)
        again = running.enter_context(tier.member("first"))
        ranks.send(20)
        puller.pull(8 * ranks.step)
        second.stop()
        stopped_s = time.monotonic()
        ranks.send(20)
        servers[0].end(signal.SIGKILL)
        puller.servers = servers[1:]
        while time.monotonic() < stopped_s + SESSION_MS / 1000 + 2:
            ranks.send(2)
            time.sleep(0.1)
        second.go_on()
        ranks.send(40)
        tier.flush()
        puller.pull(8 * ranks.step)
        again.end()
        assert puller.losses == ranks.expected()
        assert puller.gap == 0
    all_frames = sum(
        len(block_of(message.key(), message.value()).frames) for message in tier.records("frames", "read_uncommitted")
    )
    assert all_frames > 8 * ranks.step  # the control: without transactions, steps would be there twice


def test_partitions_that_a_member_was_about_to_hand_over_find_one(broker: str) -> None:
    """It is back under its name before it is missed: the brokers give it what it had last, and ask nobody else."""
    tier = Tier(broker)
    ranks = Ranks(tier, "left", 8)
    with ExitStack() as running:
        dying = running.enter_context(tier.member("first", patch=DIES_HANDING_OVER))
        until("it has all", lambda: dying.metric("kafka_partitions") == 4)
        members = [running.enter_context(tier.member("second", patch=PATIENT))]
        until("it is dead", lambda: dying.process.poll() is not None)
        members.append(running.enter_context(tier.member("first", patch=PATIENT)))
        until("all have one", lambda: sum(each.metric("kafka_partitions") for each in members) == 4)
        ranks.send(10)
        tier.flush()
        puller = Puller("left", [running.enter_context(tier.server())])
        puller.pull(80)
        assert puller.losses == ranks.expected()
        for each in members:
            each.end()
    assert any("have no member: this one lets the group divide them again" in each.said for each in members)


def test_a_transaction_that_never_ends_holds_up_nobody(broker: str) -> None:
    """As a broker that was killed may leave one: the offsets before it count, and no step is there twice."""
    tier = Tier(broker, partitions=1)
    ranks = Ranks(tier, "open", 2)
    with tier.member("one"):
        ranks.send(5)
        tier.flush()
        with tier.server() as server:
            Puller("open", [server]).pull(10)
    own = {"bootstrap.servers": broker, "log_level": 0}
    group = Consumer({**own, "group.id": f"{tier.prefix}-gateway"})
    left = Producer({**own, "transactional.id": f"{tier.prefix}-left", "transaction.timeout.ms": 600_000})
    left.init_transactions(60)
    left.begin_transaction()
    left.send_offsets_to_transaction([TopicPartition(f"{tier.prefix}.otlp", 0, 3)], group.consumer_group_metadata(), 60)
    with tier.member("one") as member, tier.server() as server:
        ranks.send(5)
        tier.flush()
        puller = Puller("open", [server])
        puller.pull(20)
        assert puller.losses == ranks.expected()
        assert puller.gap == 0
    assert "an earlier transaction of group" in member.said
    left.abort_transaction(60)
    group.close()
