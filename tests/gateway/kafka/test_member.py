"""What a member and a server do at moments that a real broker gives only by chance, and what needs no broker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from unittest.mock import Mock

import pytest
from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException
from frame_examples import RUN, make_frame

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.kafka import member as module
from esper_otel.gateway.kafka import member_process
from esper_otel.gateway.kafka.brokers import SESSION_MS, Brokers, MemberEnds
from esper_otel.gateway.kafka.cursors import PullSelection, Stand
from esper_otel.gateway.kafka.entries import Entry, FetchedEntries
from esper_otel.gateway.kafka.group_watch import GroupWatch
from esper_otel.gateway.kafka.member import Member, MemberOptions
from esper_otel.gateway.kafka.tier_core import TierCore
from esper_otel.gateway.kafka.topics import Tier, Topics
from esper_otel.gateway.store.base import StoredFrame
from esper_otel.pull.messages import PullRequest


@pytest.fixture
def member() -> Any:
    """A member that has not begun."""
    return Member(Brokers("nowhere:1", {}), Tier(Topics.of("esper"), 2, "one"), MemberOptions("one"))


def test_records_of_a_partition_that_was_revoked_meanwhile_are_left_to_its_next_member(member: Any) -> None:
    message = Mock()
    message.error.return_value = None
    message.timestamp.return_value = (1, 5)
    message.offset.return_value, message.partition.return_value = 7, 1
    message.key.return_value, message.value.return_value = b"key", b"value"
    member._consumer, member._producer = Mock(), Mock()
    member._consumer.consume.return_value = [message]
    member._cycle()
    member._producer.begin_transaction.assert_not_called()


def test_a_commit_is_tried_until_the_member_is_to_stop(member: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The brokers are away: each try runs out of time."""
    monkeypatch.setattr(module, "_TRANSACTION_S", 0.0)
    tries: list[float] = []

    def fail(timeout_s: float) -> None:
        tries.append(timeout_s)
        if len(tries) == 5:
            member.stop()
        assert len(tries) < 50
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer", retriable=True))

    member._producer = Mock(commit_transaction=fail)
    with pytest.raises(KafkaException, match="no answer"):
        member._commit()
    assert len(tries) == 5


def test_a_call_that_never_returns_ends_the_process(member: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As librdkafka's may when a coordinator comes back: it is started again by whoever supervises it."""
    monkeypatch.setattr(module, "_STUCK_S", 0.0)
    monkeypatch.setattr(member_process, "_LOOK_EVERY_S", 0.01)
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    async def watch() -> None:
        await asyncio.wait_for(member_process._watch(member), 60)

    def send(*_: object) -> None:
        asyncio.run(watch())

    member._consumer, member._producer = Mock(), Mock(send_offsets_to_transaction=send)
    assert not member.is_stuck
    member._send([])
    assert statuses == [70]
    assert not member.is_stuck


def test_a_member_that_the_brokers_take_for_another_one_after_an_outage_begins_anew(member: Any) -> None:
    """A request to join that is sent again gets another id, and the first one is refused: both are its own."""
    refused = KafkaError(KafkaError.FENCED_INSTANCE_ID)
    member._connection._note(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    member._connection.note_name(refused)
    with pytest.raises(module._BeginAnew, match="have taken this member for another"):
        member._check_name()
    member._check_name()
    member._connection._away_s -= 1_000
    member._connection.note_name(refused)
    with pytest.raises(MemberEnds, match="give each another --member"):
        member._check_name()


def test_states_are_written_partition_by_partition(member: Any) -> None:
    """All within some seconds, but never together: a transaction may only take so long."""
    member._shards = {partition: Mock() for partition in range(4)}
    now_s = member._states_s
    assert member._turn(now_s) == set()
    turns = [member._turn(now_s + 1.25 * number) for number in range(1, 9)]
    assert turns == [{partition} for partition in (0, 1, 2, 3, 0, 1, 2, 3)]


def test_the_partitions_of_a_member_share_its_memory(member: Any) -> None:
    """However many it has: those of one that takes over all of them do not take more."""
    whole = member._limits
    for count in (1, 4):
        member._shards = {partition: Mock() for partition in range(count)}
        member._divide()
        for shard in member._shards.values():
            [limits] = shard.limit.call_args.args
            assert limits.kept_bytes == whole.kept_bytes // count == 128 * 2**20 // count
            assert limits.waiting_points == whole.waiting_points // count
            assert limits.runs == 20_000


def test_a_member_has_room_for_more_ranks_unless_it_is_told_otherwise() -> None:
    assert member_process._limits_of([]) == module.MEMBER_LIMITS
    assert member_process._limits_of(["runs=50", "kept_bytes=7"]).runs == 50
    with pytest.raises(ConfigurationError, match="stored_writers, http_connections, grpc_connections do not go with"):
        member_process._limits_of(["stored_writers=5"])


def test_partitions_without_a_member_are_noticed_when_the_group_is_at_rest() -> None:
    """Not at once: while a group divides them, some have none for a moment. Then one member must be missed."""

    def found(name: str, groups: Sequence[tuple[str, int]]) -> list[int]:
        """After which looks a member must be missed; in each group, so many of four partitions have one."""
        watch = GroupWatch(Mock(), "group", "otlp", 4, name)
        watch._client = Mock()
        missed = []
        for number, (state, given) in enumerate(groups):
            answer = Future[Any]()
            watch._client.describe_consumer_groups.return_value = {"group": answer}
            now_s = 100.0 * (number + 1)
            assert not watch.left(now_s) | watch.left(now_s)
            places = [Mock(topic="otlp", partition=partition) for partition in range(given)]
            places.append(Mock(topic="other", partition=3))
            members = [Mock(group_instance_id=each) for each in ("one", "two")]
            for member, some in zip(members, ([], places), strict=True):
                member.assignment.topic_partitions = some
            answer.set_result(Mock(state=ConsumerGroupState[state], members=members))
            left = watch.left(now_s)
            assert left in (set(), set(range(given, 4)))
            missed += [number] if left else []
        return missed

    changing = [("STABLE", 1), ("PREPARING_REBALANCING", 0), *[("STABLE", 3)] * 4, ("STABLE", 4)]
    assert found("one", changing) == [3, 5]
    assert found("two", changing) == [5]
    assert found("three", changing) == []


@pytest.mark.parametrize("code", [KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS])
def test_a_member_that_fails_while_the_group_changes_stays_away_until_it_is_missed(
    member: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would get what it had been given last, and what it was to hand over would have no member."""
    member._producer = Mock()
    waits: list[float] = []

    def wait(after_s: float) -> None:
        waits.append(after_s)
        member.stop()

    monkeypatch.setattr(member, "_live", lambda: member._failed(KafkaException(KafkaError(code))))
    monkeypatch.setattr(member._stop, "wait", wait)
    member.run()
    assert waits == [SESSION_MS / 1000 + module._AGAIN_S]


def test_a_server_tells_values_that_packets_have_no_place_for_to_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one gateway does: a report of a run on a tier has them, too."""
    frame = make_frame(recorded={"loss": 2.5, "esper.tokens_per_s": 7.0})
    stored = StoredFrame(1, 1, Item(Origin(RUN.run_id, 1, 0, ""), frame, 1, True, 1), None)

    async def fetch(*_: Any) -> FetchedEntries:
        return FetchedEntries("g", PullSelection(), {0: Stand(0, 0, 0)}, [Entry(stored, 0, Stand(1, 0, 1), 0)], {})

    async def pulled(*, with_values: bool) -> bool:
        response = await core.pull(PullRequest(run_id=RUN.run_id, with_values=with_values))
        return "esper.tokens_per_s" in response.steps[0].value_names

    core = TierCore(Brokers("nowhere:1", {}), Tier(Topics.of("esper"), 1, "g"))
    monkeypatch.setattr(core, "fetch", fetch)
    assert [asyncio.run(pulled(with_values=each)) for each in (False, True)] == [False, True]
