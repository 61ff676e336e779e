"""Topics: their names, and whether they are as the tier needs them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined] # not marked as exported

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.kafka.brokers import BrokerFault, Brokers

_START_S = 10.0
# What a record may grow by when values that cannot be compressed are, and what Kafka adds to it.
_EXPANSION, _OVERHEAD = 200, 512
# The key of the record in which the number of partitions is kept; no key of a writer begins like this.
TIER_KEY = b"tier"


class Topics(NamedTuple):
    """The topics of a tier.

    Attributes:
        otlp: requests, from the collector.
        frames: released frames.
        runs: states of writers; compacted.
        dead: records that could not be used.
        events: requests with log records, from the collector; servers read them.
    """

    otlp: str
    frames: str
    runs: str
    dead: str
    events: str

    @classmethod
    def of(cls, prefix: str) -> Topics:
        """Returns the topics whose names begin with a prefix."""
        return cls(*(f"{prefix}.{name}" for name in cls._fields))


class Tier(NamedTuple):
    """The topics of a tier as the brokers have them.

    Attributes:
        topics: their names.
        partitions: how many partitions the first three have. The others have one.
        generation: tells this topic of frames from another one of its name.
        of_events: likewise, for the topic of events; empty for a member, which does not use it.
    """

    topics: Topics
    partitions: int
    generation: str
    of_events: str = ""


def tier_at(connection: Brokers, prefix: str, *, is_member: bool) -> Tier:
    """Returns the tier that the brokers have.

    Args:
        connection: the way to the brokers.
        prefix: of the names of its topics.
        is_member: whether the topics that only members use are needed, too.

    Raises:
        BrokerFault: the brokers cannot be reached, or refuse.
        ConfigurationError: topics do not exist, or do not fit together.
    """
    topics = Topics.of(prefix)
    needed = topics[:4] if is_member else (topics.frames, topics.runs, topics.events)
    admin: AdminClient = connection.admin()
    connection.asked(lambda: admin.list_topics(timeout=_START_S), admin)
    found = {}
    missing: list[str] = []
    futures = admin.describe_topics(TopicCollection(list(needed)), request_timeout=_START_S)
    for name, future in futures.items():
        try:
            found[name] = connection.asked(future.result, admin)
        except BrokerFault as fault:
            if "does not exist" not in str(fault):
                raise BrokerFault(f"topic {name}: {fault}") from None
            missing.append(name)
    if missing:
        raise ConfigurationError(
            f"there is no topic {', '.join(missing)} at --kafka {connection.brokers}: create the topics with "
            f"deploy/kafka/topics.py, or give their prefix with --kafka-topics (it is {prefix!r})"
        )
    partitions = {name: len(found[name].partitions) for name in needed if name not in (topics.dead, topics.events)}
    if topics.events in found and len(found[topics.events].partitions) != 1:
        raise ConfigurationError(
            f"topic {topics.events} must have one partition: events have one order, which cursors name. Create it "
            "again with deploy/kafka/topics.py"
        )
    if len(set(partitions.values())) > 1:
        counted = ", ".join(f"{name} {count}" for name, count in partitions.items())
        raise ConfigurationError(
            f"the topics must have the same number of partitions, which must never change: {counted}. Steps of a "
            "process would move to another partition; create new topics with another prefix, for --kafka-topics"
        )
    generations = [_generation(str(found[name].topic_id)) for name in (topics.frames, topics.events) if name in found]
    return Tier(topics, partitions[topics.frames], *generations)


def largest_records(connection: Brokers, topics: Sequence[str]) -> dict[str, int]:
    """Returns how large a record of each topic may be before it is compressed; nothing if the brokers do not tell."""
    admin: AdminClient = connection.admin()
    asked = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics]
    found: dict[str, int] = {}
    for resource, future in admin.describe_configs(asked, request_timeout=_START_S).items():
        try:
            entries = connection.asked(future.result, admin)
            allowed = min(int(entries[name].value) for name in ("max.message.bytes", "segment.bytes"))
        except (BrokerFault, KeyError, TypeError, ValueError):
            continue  # the user may not ask: what is too large is learnt from the brokers' refusals
        found[resource.name] = max(allowed - allowed // _EXPANSION - _OVERHEAD, 1)
    return found


def _generation(topic_id: str) -> str:
    """Returns a short text for a topic's id, without characters that cursors use."""
    return "".join(character if character.isalnum() else "x" for character in topic_id)[:12]


def tier_bytes(tier: Tier) -> bytes:
    """Returns what is kept of a tier, to notice a change."""
    return json.dumps({"partitions": tier.partitions}).encode()


def check_unchanged(tier: Tier, kept: bytes | None) -> None:
    """Raises ConfigurationError if the number of partitions has changed since the tier was begun."""
    if kept is None:
        return
    try:
        before = json.loads(kept)["partitions"]
    except (ValueError, TypeError, KeyError):
        return
    if before != tier.partitions:
        raise ConfigurationError(
            f"topic {tier.topics.frames} has {tier.partitions} partitions, and had {before} when the tier was begun: "
            "steps of a process would move to another partition. Create new topics with another prefix, point the "
            "collector and --kafka-topics to them, and let the old ones expire"
        )
