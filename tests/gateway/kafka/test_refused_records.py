"""Records that cannot be written or read: too large for the brokers, or of another version of the program."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
from programs import until
from tiers import Puller, Ranks, RunningTierProcess, Tier, broker

__all__ = ["broker"]
pytestmark = pytest.mark.lengthy

# A version to come: what it writes has another form, and it can still read the form of today.
NEWER = """
import esper_otel.gateway.kafka.topic_records as records
records.VERSION = 2
records._check_version = lambda value: None
"""
ALLOWED = 60_000
POISON = b"\x0a\xff\xff" + random.Random(1).randbytes(2 * ALLOWED)


def test_a_step_that_the_brokers_refuse_is_left_out(broker: str) -> None:
    """The topics allow less than they should: the step is a gap, counted once, and nothing else stands still."""
    tier = Tier(broker, partitions=1)
    for topic in ("frames", "runs", "dead"):
        tier.change(topic, max_message_bytes=f"{ALLOWED}")
    ranks = Ranks(tier, "large", 2)
    with tier.member("one") as member, tier.server() as server:
        ranks.send(3)
        tier.send("large/1", ranks.large_body(1, 4))
        tier.send("large/0", ranks.body(0, [4]))
        ranks.step = 4
        tier.send("large/0", POISON)  # a poisoned one, larger than the topic for such records allows
        ranks.send(3)
        tier.flush()
        puller = Puller("large", [server], rank=1)
        puller.pull(6)
        other = Puller("large", [server], rank=0)
        other.pull(7)
        assert (puller.gap, other.gap) == (1, 0)
        expected = ranks.expected()
        assert puller.losses[1] == [loss for loss in expected[1] if loss != 1e6 + 4]
        assert other.losses[0] == expected[0]
        until("they are counted", lambda: member.metric("kafka_too_large_total") == 2)
        assert member.metric("kafka_poisoned_total") == 1
    dead = {dict(each.headers())["esper.topic"].decode().rpartition(".")[2]: each for each in tier.records("dead")}
    assert {name: each.value() for name, each in dead.items()} == {"frames": b"", "otlp": b""}
    headers = dict(dead["frames"].headers())
    assert headers["esper.about"] == b"step 4 of rank 1 of run 'large'"
    assert b"bytes are more than" in headers["esper.reason"]
    assert dict(dead["otlp"].headers())["esper.size"] == b"%d" % (len(POISON) + len("large/0"))
    assert "step 4 of rank 1 of run 'large' is left out" in member.said
    assert "Raise max.message.bytes there" in member.said


def test_steps_that_are_too_many_for_one_record_are_in_several(broker: str) -> None:
    """The topic of frames allows less than a record may have: nothing is left out, and nothing is refused."""
    tier = Tier(broker, partitions=1)
    tier.change("frames", max_message_bytes="8000")
    ranks = Ranks(tier, "split", 1, together=200)
    with tier.member("one") as member, tier.server() as server:
        ranks.send(200)
        tier.flush()
        puller = Puller("split", [server])
        puller.pull(200)
        assert puller.losses == ranks.expected()
        assert puller.gap == 0
        assert member.metric("kafka_too_large_total") == member.metric("kafka_restarts_total") == 0
    sizes = [len(each.value()) for each in tier.records("frames")]
    assert len(sizes) > 2
    assert max(sizes) < 8_000


def test_an_older_version_leaves_alone_what_a_newer_one_has_written(broker: str) -> None:
    """Its requests wait until it is updated too: nothing is lost, and nothing is there twice."""
    tier = Tier(broker, partitions=2)
    ranks = Ranks(tier, "upgrade", 4)
    with ExitStack() as running:

        def process(command: str, patch: str = "") -> RunningTierProcess:
            made = tier.member("one", patch=patch) if command == "member" else tier.server(patch=patch)
            return running.enter_context(made)

        old, old_server = process("member"), process("server")
        puller = Puller("upgrade", [old_server])
        ranks.send(5)
        tier.flush()
        puller.pull(20)
        old.end()
        new_server, new = process("server", NEWER), process("member", NEWER)
        ranks.send(5)
        tier.flush()
        whole = Puller("upgrade", [new_server])
        whole.pull(40)
        assert "update it, or pull from another" in puller.said()
        new.end()
        old = process("member")
        until("it says so", lambda: old.metric("kafka_unreadable_partitions") == len(tier.partitions_of("frames")))
        ranks.send(5)
        tier.flush()
        until("requests wait", lambda: old.metric("kafka_lag_records") >= 20)
        old.end()
        assert "is left alone, and its requests wait: a newer esper-otel has written it (form 2" in old.said
        process("member", NEWER)
        puller.servers = [new_server]
        for each in (whole, puller):
            each.pull(60)
            assert each.losses == ranks.expected()
            assert each.gap == 0
