"""Watches whether each partition has a member."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from esper_otel.gateway.kafka.brokers import Brokers

_LOOK_EVERY_S = 5.0
_TIMES = 2  # that it looks before it believes it: while a group divides partitions, some have none for a moment
_ANSWER_S = 10.0


class GroupWatch:
    """Notices partitions that no member works on although the group is at rest.

    A member that is killed while the group divides its partitions anew, and comes back under its name before it is
    missed, is given what it was given last, and nobody else is asked. What it was about to hand over has no member.
    The brokers have no call that makes a group divide again: one of its members must be missed.

    Args:
        connection: the way to the brokers.
        group: the name of the group.
        topic: the topic that its members share.
        partitions: how many partitions the topic has.
        name: the name of this member.
    """

    def __init__(self, connection: Brokers, group: str, topic: str, partitions: int, name: str) -> None:
        self._connection, self._group, self._topic, self._name = connection, group, topic, name
        self._all = frozenset(range(partitions))
        self._client: AdminClient | None = None
        self._answer: Future[Any] | None = None
        self._asked_s = 0.0
        self._times = 0  # that it has looked and found such partitions

    def left(self, now_s: float) -> frozenset[int]:
        """Returns the partitions without a member if it is this member that must be missed; asks, and does not wait.

        It is the first one by name; the next one if that does nothing, as one of an earlier version.

        Args:
            now_s: the monotonic clock.
        """
        if self._answer is None:
            if now_s - self._asked_s >= _LOOK_EVERY_S:
                self._asked_s = now_s
                self._ask()
            return frozenset()
        if not self._answer.done():
            return frozenset()
        answer, self._answer = self._answer, None
        with suppress(KafkaException):  # it is asked again
            return self._judged(answer.result())
        return frozenset()

    def _ask(self) -> None:
        if self._client is None:
            self._client = self._connection.admin()
        with suppress(KafkaException):
            asked = self._client.describe_consumer_groups([self._group], request_timeout=_ANSWER_S)
            self._answer = asked[self._group]

    def _judged(self, described: Any) -> frozenset[int]:
        names = sorted(str(member.group_instance_id) for member in described.members)
        lacking = self._without_member(described)
        self._times = self._times + 1 if lacking and self._name in names else 0
        if not self._times or self._times < _TIMES * (1 + names.index(self._name)):
            return frozenset()
        self._times = 0
        return lacking

    def _without_member(self, described: Any) -> frozenset[int]:
        if described.state != ConsumerGroupState.STABLE:
            return frozenset()
        given = {
            place.partition
            for member in described.members
            for place in member.assignment.topic_partitions
            if place.topic == self._topic
        }
        return self._all - given
