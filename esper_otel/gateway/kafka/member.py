"""Member: one of a group that share the partitions of ``esper.otlp``, and make frames of what is in them.

A member reads some requests, puts frames together, and commits in one transaction the frames, the states of their
writers and the offsets up to which the requests are used up. Whatever ends it, another member goes on from there: no
step is lost, and none is there twice.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

from esper_otel.errors import EsperOtelError
from esper_otel.gateway.kafka.brokers import (
    MOST_RECORD_BYTES,
    REFUSALS,
    SESSION_MS,
    BrokerFault,
    Brokers,
    MemberEnds,
    meaning,
)
from esper_otel.gateway.kafka.group_watch import GroupWatch
from esper_otel.gateway.kafka.partition_reader import PartitionReader, value_of
from esper_otel.gateway.kafka.shard import BadRecord, Caches, Commit, RequestRecord, Shard
from esper_otel.gateway.kafka.topic_records import (
    FrameBatch,
    FrameWithLoss,
    UnknownForm,
    block_bytes,
    block_of,
    key_of,
    state_bytes,
    state_of,
)
from esper_otel.gateway.kafka.topics import TIER_KEY, Tier, check_unchanged, largest_records, tier_bytes
from esper_otel.gateway.limits import Limits
from esper_otel.log import Warnings, announce

# How long requests are collected before they are used: each time costs a transaction.
_COLLECT_S = 0.03
_MOST_RECORDS = 2_000
_STATES_EVERY_S = 5.0
_TIDY_EVERY_S = 60.0
_LAG_EVERY_S = 1.0
_AGAIN_S = 1.0
_TRANSACTION_S, _STUCK_S = 30.0, 120.0
_AWAY_S = 120.0
_STABLE_S = 5.0  # longer than a transaction may take
_HEARTBEATS = 5  # within a session
_CHANGING = frozenset({KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.UNKNOWN_MEMBER_ID})
_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, 18})  # 18: larger than a segment


class _OutgoingRecord(NamedTuple):
    """A record to be written.

    Attributes:
        topic: the topic.
        partition: the partition; -1 for any.
        key: its key.
        value: its value.
        shard: the shard that made it, if it is one of frames.
        about: what is in it, for people.
        headers: what is said of it.
    """

    topic: str
    partition: int
    key: bytes
    value: bytes
    shard: Shard | None = None
    about: str = ""
    headers: Mapping[str, str] = MappingProxyType({})

    @property
    def size(self) -> int:
        """How large it is, in bytes, without what Kafka adds."""
        return len(self.key) + len(self.value)


# More than a gateway has: of writers in each partition, and of points that wait, some 40 bytes each, in all partitions.
MEMBER_LIMITS = Limits(runs=20_000, waiting_points=8_000_000)


@dataclass(frozen=True, slots=True)
class MemberOptions:
    """How a member works.

    Attributes:
        name: its own name in the group; after a restart under the same name it goes on with the same partitions.
        limits: limits on senders. What they allow for frames is divided among the partitions that the member has.
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long a frame without a point count waits for further points.
        idle_s: after so long without a step, a writer is forgotten.
    """

    name: str
    limits: Limits = MEMBER_LIMITS
    hold_s: float = 2.0
    linger_s: float = 0.05
    idle_s: float = 24 * 3600.0


class _BeginAnew(Exception):
    """The transaction failed, or partitions were lost: what was not committed is read again."""


class _GroupChanged(_BeginAnew):
    """It failed since the group was changing, or partitions have no member.

    If the member came back at once under its name, the brokers would give it what it had been given last, and ask
    nobody: partitions that it was about to hand over would have no member. So it stays away until it is missed.
    """


class Member:
    """Works until it is told to stop. Threads: ``run`` blocks one; everything else may be called from others.

    Args:
        connection: the way to the brokers.
        tier: the topics.
        options: how it works.

    Attributes:
        counts: what it has done, by name.
        rejected: points that were refused for good, by reason.
    """

    def __init__(self, connection: Brokers, tier: Tier, options: MemberOptions) -> None:
        self._connection, self._tier, self._options = connection, tier, options
        self._limits = options.limits
        self._caches = Caches.of(self._limits)
        self._stop = threading.Event()
        self._shards: dict[int, Shard] = {}
        self._states_s = self._tidied_s = time.monotonic()
        self._turns: set[int] = set()  # partitions whose states have been written lately
        self._cycle_s = -math.inf
        self._warnings = Warnings()
        self._group = GroupWatch(connection, group_of(tier), tier.topics.otlp, tier.partitions, options.name)
        self._has_joined = False
        self._lag, self._lag_s = 0, 0.0
        self._called_s = math.inf  # since when a call has waited that librdkafka may not end
        self._is_leaving = False
        self._fault: EsperOtelError | KafkaException | None = None
        self._ended_counts: Counter[str] = Counter()
        self._ended_rejected: Counter[str] = Counter()
        self._own: Counter[str] = Counter()
        self._most: dict[str, int] = {}  # of topics whose brokers have refused less than ``MOST_RECORD_BYTES``
        self._allowed: dict[str, int] = {}  # what topics are set to allow
        self._has_batches = True
        self._is_refused = False
        self._unreadable: dict[int, int] = {}  # partitions that are left alone, with the offsets that are committed

    # -- its life ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Works until ``stop``.

        Raises:
            BrokerFault: it cannot go on; the message says what to do.
            ConfigurationError: the topics have changed.
        """
        while not self._stop.is_set():
            try:
                self._live()
            except MemberEnds:
                raise
            except _GroupChanged as reason:
                self._begin_anew(str(reason), SESSION_MS / 1000 + _AGAIN_S)
            except (_BeginAnew, BrokerFault) as reason:
                self._begin_anew(str(reason))
            except KafkaException as error:
                fault = error.args[0]
                if fault.code() in REFUSALS:
                    raise MemberEnds(f"Kafka at {self._connection.brokers}: {meaning(fault)}") from None
                self._begin_anew(meaning(fault))

    def _begin_anew(self, reason: str, after_s: float = _AGAIN_S) -> None:
        self._own["restarts"] += 1
        self._warnings.say("anew", "%s; the member goes on from what is committed", reason)
        self._stop.wait(after_s)

    def stop(self) -> None:
        """Lets ``run`` end, after the transaction it is in."""
        self._stop.set()

    def _live(self) -> None:
        """Joins the group and works; ends when it is told to, or by an exception."""
        self._drop([*self._shards, *self._unreadable])
        self._is_leaving, self._fault = False, None
        name, topics = self._options.name, self._tier.topics
        self._tail = PartitionReader(self._connection)
        self._allowed = largest_records(self._connection, (topics.frames, topics.runs, topics.dead))
        self._producer: Producer = self._connection.producer(
            f"{topics.frames}-{name}",
            most_bytes=min(self._allowed.values(), default=MOST_RECORD_BYTES),
            has_batches=self._has_batches,
        )
        self._consumer: Consumer = self._connection.consumer(
            **{
                "group.id": group_of(self._tier),
                "group.instance.id": name,
                "session.timeout.ms": SESSION_MS,
                "heartbeat.interval.ms": SESSION_MS // _HEARTBEATS,
                "partition.assignment.strategy": "cooperative-sticky",
            }
        )
        try:
            self._producer.init_transactions(_TRANSACTION_S)
            self._begin_tier()
            self._consumer.subscribe(
                [topics.otlp], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
            )
            while not self._stop.is_set():
                self._cycle()
            if self._shards:
                self._write(list(self._shards), [], with_states=self._shards.keys())
        finally:
            self._is_leaving = True
            self._drop([*self._shards, *self._unreadable])
            self._has_joined = False
            self._consumer.close()
            self._tail.close()

    def _begin_tier(self) -> None:
        """Compares the tier with what was kept of it, and keeps it if it is new."""
        kept = None
        for message in self._tail.read(self._tier.topics.runs, 0):
            if message.key() == TIER_KEY:
                kept = value_of(message)
        self._tail.close()
        check_unchanged(self._tier, kept)
        if kept is None:
            self._producer.begin_transaction()
            self._producer.produce(self._tier.topics.runs, tier_bytes(self._tier), TIER_KEY, partition=0)
            self._producer.commit_transaction(_TRANSACTION_S)

    # -- partitions --------------------------------------------------------------------------------------

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._is_leaving:
            return
        self._has_joined = True
        share = self._share(len(self._shards) + len(partitions))
        try:
            begins: list[TopicPartition] = []
            for place in self._committed(consumer, partitions):
                offset = place.offset if place.offset >= 0 else OFFSET_BEGINNING
                begins.append(TopicPartition(place.topic, place.partition, offset))
                try:
                    self._shards[place.partition] = self._restored(consumer, place, share)
                except UnknownForm as error:
                    self._leave_alone(place, error)
            consumer.incremental_assign(begins)  # with offsets: it would wait for an open transaction itself
            if alone := [place for place in partitions if place.partition in self._unreadable]:
                consumer.pause(alone)
            self._divide()
        except (EsperOtelError, KafkaException) as error:  # librdkafka's own code lies between here and _cycle
            self._fault = error
            return
        finally:
            self._tail.close()
        if partitions:
            announce("kafka member", f"works on partitions {', '.join(map(str, sorted(self._shards)))}")

    def _share(self, partitions: int) -> Limits:
        """Returns how much memory each of so many partitions may take for frames: the member's is the same for all."""
        count = max(partitions, 1)
        kept, waiting = self._limits.kept_bytes // count, self._limits.waiting_points // count
        return replace(self._limits, kept_bytes=max(kept, 1), waiting_points=max(waiting, 1))

    def _divide(self) -> None:
        """Divides memory among the partitions that there are now."""
        share = self._share(len(self._shards))
        for shard in self._shards.values():
            shard.limit(share)

    def _committed(self, consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """Returns what is committed for partitions, with its metadata.

        A transaction of the member before may be open, and is waited for. After a broker was killed, it may be open for
        ever. Then the offsets before it are used: what was made of later requests is in the frames that are restored.
        """
        try:
            return consumer.committed(partitions, SESSION_MS / 1000 + _STABLE_S)
        except KafkaException as error:
            if error.args[0].code() != KafkaError._TIMED_OUT:  # noqa: SLF001 - public, but for its name
                raise
        other = self._connection.consumer(**{"group.id": group_of(self._tier), "isolation.level": "read_uncommitted"})
        try:
            found = other.committed(partitions, _TRANSACTION_S)
        finally:
            other.close()
        message = "an earlier transaction of group %s does not end: the member goes on from the offsets before it"
        self._warnings.say("unstable", message, group_of(self._tier))
        return found

    def _restored(self, consumer: Consumer, place: TopicPartition, limits: Limits) -> Shard:
        """Returns a shard with the state that the topics have, and sets nothing else."""
        partition, topics, options = place.partition, self._tier.topics, self._options
        times = {"hold_s": options.hold_s, "linger_s": options.linger_s}
        shard = Shard(partition, limits=limits, **times, caches=self._caches)
        newest = {message.key(): value_of(message) for message in self._tail.read(topics.runs, partition)}
        states = [state_of(key, value) for key, value in newest.items() if key not in (TIER_KEY, None) and value]
        committed = Commit.of(place.offset, place.metadata or "")
        first = OFFSET_BEGINNING if committed is None else committed.first
        shard.buried = [] if committed is None else list(committed.buried)
        blocks = []
        begins = None
        for message in self._tail.read(topics.frames, partition, first):
            begins = message.offset() if begins is None else begins
            blocks.append(block_of(message.key() or b"", value_of(message)))
        end = self._tail.end
        shard.restore(states, blocks, (end if begins is None else begins, end), time.monotonic())
        if place.offset >= 0:
            low, _ = consumer.get_watermark_offsets(TopicPartition(topics.otlp, partition), timeout=_TRANSACTION_S)
            if low > place.offset:
                self._own["expired_records"] += low - place.offset
                self._warnings.say(
                    f"expired {partition}",
                    "%d records of %s expired before a member read them",
                    low - place.offset,
                    topics.otlp,
                )
        return shard

    def _leave_alone(self, place: TopicPartition, error: UnknownForm) -> None:
        """Leaves a partition alone in which a newer version has been at work: a guess could lose steps."""
        self._unreadable[place.partition] = max(place.offset, 0)
        message = (
            "partition %d is left alone, and its requests wait: %s. Update this member too; until then, "
            "no step of the partition goes on, and none is lost"
        )
        self._warnings.say(f"unreadable {place.partition}", message, place.partition, error)

    def _revoked(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._drop([place.partition for place in partitions])

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._own["lost_sessions"] += 1
        self._revoked(consumer, partitions)

    def _drop(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._unreadable.pop(partition, None)
            shard = self._shards.pop(partition, None)
            if shard is not None:
                self._ended_counts.update(shard.counts)
                self._ended_rejected.update(shard.rejected)
        self._divide()

    # -- work --------------------------------------------------------------------------------------------

    def _cycle(self) -> None:
        """Uses what has arrived within a short time, in one transaction."""
        messages = self._consumer.consume(_MOST_RECORDS, self._patience_s())
        self._check_name()
        if self._fault is not None:
            raise self._fault
        self._cycle_s = now_s = time.monotonic()
        records: dict[int, list[RequestRecord]] = {}
        for message in messages:
            error = message.error()
            if error is None:
                _, time_ms = message.timestamp()
                received = RequestRecord(
                    message.offset() or 0, max(time_ms, 0) * 10**6, message.key(), value_of(message)
                )
                records.setdefault(message.partition() or 0, []).append(received)
            else:
                self._check(error)
        poisoned: list[tuple[int, BadRecord]] = []
        for partition, some in records.items():
            shard = self._shards.get(partition)
            if shard is not None:  # otherwise it was revoked meanwhile, and its next member reads them
                poisoned += [(partition, each) for each in shard.take(some, now_s)]
        turn = self._turn(now_s)
        is_due = any(due_s is not None and due_s <= now_s for due_s in self._due())
        if records or is_due or turn:
            self._write(list(self._shards) if is_due else [*records.keys() | turn], poisoned, with_states=turn)
        if now_s > self._lag_s:
            self._lag_s = now_s + _LAG_EVERY_S
            self._note_lag()
        if now_s - self._tidied_s > _TIDY_EVERY_S:
            self._tidied_s = now_s
            self._tidy()
        if left := self._group.left(now_s):
            given = ", ".join(map(str, sorted(left)))
            raise _GroupChanged(f"partitions {given} have no member: this one lets the group divide them again")

    def _turn(self, now_s: float) -> set[int]:
        """Returns the partitions whose turn it is to have all states written: all of them within a few seconds.

        One after the other, since a transaction with the states of thousands of ranks could take longer than it may.
        """
        if not self._shards or now_s - self._states_s < _STATES_EVERY_S / len(self._shards):
            return set()
        self._states_s = now_s
        waiting = [partition for partition in self._shards if partition not in self._turns]
        if not waiting:
            self._turns.clear()
            waiting = list(self._shards)
        self._turns.add(waiting[0])
        return {waiting[0]}

    def _patience_s(self) -> float:
        """Returns how long to wait for requests: while frames wait, no longer than until one is due."""
        now_s = time.monotonic()
        due_s = min((due_s for due_s in self._due() if due_s is not None), default=now_s + _COLLECT_S)
        return min(max(due_s - now_s, 0.001), _COLLECT_S)

    def _due(self) -> list[float | None]:
        return [shard.due() for shard in self._shards.values()]

    def _check(self, error: KafkaError) -> None:
        """Raises if an error of the consumer means that it cannot go on."""
        self._connection.note_name(error)
        self._check_name()
        if error.code() in REFUSALS:
            raise MemberEnds(f"Kafka at {self._connection.brokers}: {meaning(error)}")
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001 - public, but for its name
            raise _BeginAnew(meaning(error))
        self._warnings.say(f"consumer {error.name()}", "%s", meaning(error))

    def _check_name(self) -> None:
        """Raises if another member has this one's name.

        After the brokers were away, that may be itself: a request to join that is sent again counts as another's.
        """
        if self._connection.is_name_taken and self._connection.was_away(_AWAY_S):
            self._connection.is_name_taken = False
            raise _BeginAnew("the brokers have taken this member for another one of its name")
        if self._connection.is_name_taken:
            raise MemberEnds(
                f"another member has the name {self._options.name!r}, so this one ends: give each another --member"
            )

    def _write(
        self, partitions: Sequence[int], poisoned: Sequence[tuple[int, BadRecord]], *, with_states: Collection[int]
    ) -> None:
        """Writes frames, states and offsets in one transaction; for some partitions, the states of all writers."""
        topic, now_s = self._tier.topics.otlp, time.monotonic()
        records = [self._buried(partition, each) for partition, each in poisoned]
        counted = Counter(poisoned=len(records), transactions=1)
        offsets: list[TopicPartition] = []
        for partition in partitions:
            shard = self._shards.get(partition)
            if shard is None:
                continue
            records += self._released(shard, now_s, of_all=partition in with_states)
            committed = shard.committed()
            if committed is not None and committed != shard.written:
                shard.written = committed
                offsets.append(TopicPartition(topic, partition, committed.offset, committed.metadata))
        if not (records or offsets):
            return
        try:
            self._producer.begin_transaction()
            for record in records:
                counted["too_large"] += not self._produce(record)
            if offsets:
                self._send(offsets)
            self._commit()
        except (KafkaException, BufferError) as error:
            self._failed(error)
        self._own.update(counted)

    def _released(self, shard: Shard, now_s: float, *, of_all: bool) -> list[_OutgoingRecord]:
        """Returns what a shard has to write: frames, and then states."""
        topics, partition = self._tier.topics, shard.partition
        records = [record for block in shard.release(now_s) for record in self._fitting(block, shard)]
        for known in shard.states(of_all=of_all):
            record = _OutgoingRecord(topics.runs, partition, key_of(known.state.origin), state_bytes(known))
            if record.size > self._room_of(topics.runs):  # a takeover can do without the frame
                record = record._replace(value=state_bytes(known._replace(newest=None)))
            records.append(record)
        return records

    def _fitting(self, block: FrameBatch, shard: Shard) -> Iterator[_OutgoingRecord]:
        """Yields the records of a block, in order: more than one if the topic does not allow one of its size."""
        topic, key = self._tier.topics.frames, key_of(block.origin)
        record = _OutgoingRecord(topic, shard.partition, key, block_bytes(block), shard, _steps_of(block.frames))
        if record.size <= self._room_of(topic) or len(block.frames) == 1:
            yield record
        else:
            for half in block.halves():
                yield from self._fitting(half, shard)

    def _send(self, offsets: list[TopicPartition]) -> None:
        """Adds offsets to the transaction. It can take for ever: see ``Connection.producer`` and ``is_stuck``."""
        self._called_s = time.monotonic()
        try:
            self._producer.send_offsets_to_transaction(
                offsets, self._consumer.consumer_group_metadata(), _TRANSACTION_S
            )
        finally:
            self._called_s = math.inf

    def _failed(self, error: KafkaException | BufferError) -> NoReturn:
        """Aborts the transaction after an error."""
        self._abort()
        if self._is_refused:
            self._is_refused = self._has_batches = False
            raise _BeginAnew("the brokers refuse records as too large: each is sent by itself now") from None
        until_s = time.monotonic() + 2 * SESSION_MS / _HEARTBEATS / 1000
        if isinstance(error, KafkaException) and error.args[0].fatal():
            while time.monotonic() < until_s:  # has another one its name, or was it only silent for too long?
                message = self._consumer.poll(0.1)
                fault = None if message is None else message.error()
                if fault is not None:
                    self._connection.note_name(fault)
                self._check_name()
        if isinstance(error, KafkaException) and error.args[0].code() in REFUSALS:
            raise MemberEnds(f"Kafka at {self._connection.brokers}: {_text(error)}") from None
        is_changing = isinstance(error, KafkaException) and error.args[0].code() in _CHANGING
        raise (_GroupChanged if is_changing else _BeginAnew)(f"a transaction failed: {_text(error)}") from None

    def _commit(self) -> None:
        """Commits the transaction, however long the brokers are away; while stopping, no longer than it may take."""
        until_s = time.monotonic() + _TRANSACTION_S
        while True:
            try:
                self._producer.commit_transaction(_TRANSACTION_S)
            except KafkaException as error:
                is_over = self._stop.is_set() and time.monotonic() >= until_s
                if is_over or not error.args[0].retriable():
                    raise
            else:
                return

    def _produce(self, record: _OutgoingRecord) -> bool:
        """Hands a record to the producer; returns whether it is written as it is.

        One that is too large is left out, and a record without a value, which says so, is kept for people instead.
        """
        is_whole = record.size <= self._most_of(record.topic)
        if not is_whole:
            reason = f"{record.size} bytes are more than {record.topic} allows"
            message = "%s is left out: %s. Raise max.message.bytes there if it is below %d, and start the members again"
            what = record.about or f"a record of {record.topic}"
            self._warnings.say(f"too large {record.topic}", message, what, reason, MOST_RECORD_BYTES)
            headers = {"esper.topic": record.topic, "esper.reason": reason, **record.headers}
            headers |= {"esper.about": record.about, "esper.size": f"{record.size}"}
            record = _OutgoingRecord(self._tier.topics.dead, -1, record.key, b"", headers=headers)
        while True:
            try:
                self._producer.produce(
                    record.topic,
                    record.value,
                    record.key,
                    partition=record.partition,
                    on_delivery=self._noting(record),
                    headers=[(name, value.encode(errors="replace")) for name, value in record.headers.items()],
                )
            except BufferError:
                self._producer.poll(0.1)
            else:
                return is_whole

    def _noting(self, record: _OutgoingRecord) -> Callable[[Any, Any], None]:
        """Returns what notes where the topic of frames ends, and what the brokers refuse as too large."""
        topic, size, shard = record.topic, record.size, record.shard

        def note(error: Any, message: Any) -> None:
            if error is None and shard is not None:
                shard.end = max(shard.end, message.offset() + 1)
            elif error is not None and error.code() in _TOO_LARGE:
                if not self._has_batches:  # otherwise it may be one of several that are too large together
                    self._most[topic] = min(self._most_of(topic), size - 1)
                self._is_refused = True

        return note

    def _most_of(self, topic: str) -> int:
        """Returns how large a record of a topic may be, in bytes."""
        return self._most.get(topic, MOST_RECORD_BYTES)

    def _room_of(self, topic: str) -> int:
        """Returns how large a record of a topic should be at most; a larger one fits if it can be compressed."""
        return min(self._allowed.get(topic, MOST_RECORD_BYTES), self._most_of(topic))

    def _buried(self, partition: int, poisoned: BadRecord) -> _OutgoingRecord:
        """Returns the record with which one that cannot be used is kept."""
        record, topics = poisoned.record, self._tier.topics
        message = "record %d of %s, partition %d, cannot be used: %s; it is kept in %s"
        self._warnings.say("poisoned", message, record.offset, topics.otlp, partition, poisoned.reason, topics.dead)
        headers = {
            "esper.topic": topics.otlp,
            "esper.partition": f"{partition}",
            "esper.offset": f"{record.offset}",
            "esper.reason": poisoned.reason,
        }
        about = f"record {record.offset} of {topics.otlp}, partition {partition}, which cannot be used,"
        return _OutgoingRecord(topics.dead, -1, record.key or b"", record.value, about=about, headers=headers)

    def _abort(self) -> None:
        self._own["aborts"] += 1
        try:
            self._producer.abort_transaction(_TRANSACTION_S)
        except KafkaException as error:
            self._warnings.say(
                "abort", "a transaction could not be ended: %s; the brokers end it", meaning(error.args[0])
            )

    def _tidy(self) -> None:
        """Forgets writers that have been silent for very long, also in the topic of states."""
        oldest_unix_ns = time.time_ns() - int(self._options.idle_s * 1e9)
        gone = [
            (partition, origin) for partition, shard in self._shards.items() for origin in shard.idle(oldest_unix_ns)
        ]
        if not gone:
            return
        try:
            self._producer.begin_transaction()
            for partition, origin in gone:
                self._producer.produce(self._tier.topics.runs, None, key_of(origin), partition=partition)
            self._commit()
        except (KafkaException, BufferError) as error:
            self._failed(error)

    # -- state -------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether it has joined the group and has been at work lately."""
        return self._has_joined and time.monotonic() - self._cycle_s < 30.0

    @property
    def is_stuck(self) -> bool:
        """Whether a call waits for much longer than it was to, and may do so for ever."""
        return time.monotonic() - self._called_s > _STUCK_S

    @property
    def counts(self) -> Counter[str]:
        """What it has done, by name."""
        total = self._ended_counts + self._own
        for shard in list(self._shards.values()):
            total.update(shard.counts)
        return total

    @property
    def rejected(self) -> Counter[str]:
        """Points that were refused for good, by reason."""
        total = Counter(self._ended_rejected)
        for shard in list(self._shards.values()):
            total.update(shard.rejected)
        return total

    def gauges(self) -> dict[str, float]:
        """Returns its current values, by name."""
        shards = list(self._shards.values())
        return {
            "partitions": len(shards),
            "writers": sum(shard.writers for shard in shards),
            "missing_steps": sum(shard.missing() for shard in shards),
            "lag_records": self._lag,
            "unreadable_partitions": len(self._unreadable),
        }

    def _note_lag(self) -> None:
        """Notes how many records have not been read yet."""
        self._lag = sum(self._lag_of(partition) for partition in [*self._shards, *self._unreadable])

    def _lag_of(self, partition: int) -> int:
        place = TopicPartition(self._tier.topics.otlp, partition)
        alone = self._unreadable.get(partition)
        try:
            if alone is not None:  # nothing is known of what is not fetched
                _, high = self._consumer.get_watermark_offsets(place, timeout=_LAG_EVERY_S)
                return max(high - alone, 0)
            _, high = self._consumer.get_watermark_offsets(place, cached=True)
            (at,) = self._consumer.position([place])
        except (KafkaException, RuntimeError):
            return 0
        return max(high - at.offset, 0) if at.offset >= 0 and high >= 0 else 0


def group_of(tier: Tier) -> str:
    """Returns the name of the consumer group of a tier's members."""
    return f"{tier.topics.otlp.rpartition('.')[0]}-gateway"


def _steps_of(frames: Sequence[FrameWithLoss]) -> str:
    """Says which steps are in a record."""
    first, last = frames[0].item, frames[-1].item
    steps = f"step {first.frame.global_step}"
    if len(frames) > 1:
        steps = f"steps {first.frame.global_step} to {last.frame.global_step}"
    return f"{steps} of rank {first.origin.rank} of run {first.origin.run_id!r}"


def _text(error: Exception) -> str:
    return meaning(error.args[0]) if isinstance(error, KafkaException) else str(error)
