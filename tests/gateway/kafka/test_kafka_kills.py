"""Whatever dies in a tier: no step is lost, none is there twice, and the steps of a rank stay in order."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack

import pytest
import requests
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


def test_members_and_servers_die_and_hang(broker: str) -> None:
    """One dies inside a transaction and comes back, one hangs for longer than its session, a server is killed."""
    tier = Tier(broker)
    ranks = Ranks(tier, "kills", 8)
    with ExitStack() as running:
        first = running.enter_context(tier.member("first", patch=DIES_INSIDE))
        second = running.enter_context(tier.member("second"))
        servers: list[RunningGateway] = [running.enter_context(tier.server()) for _ in range(2)]
        puller = Puller("kills", servers)
        until("both work", lambda: all(_partitions(each) for each in (first, second)))
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


def _partitions(member: RunningGateway) -> float:
    text = requests.get(f"http://{member.http}/metrics", timeout=10).text
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("esper_gateway_kafka_partitions ")
    )
