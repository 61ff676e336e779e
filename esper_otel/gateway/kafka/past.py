"""Past: reads frames that are no longer at the tails, for pullers that are far behind."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from esper_otel.gateway.kafka.brokers import Brokers
from esper_otel.gateway.kafka.cursors import Stand
from esper_otel.gateway.kafka.entries import Entry, entries_of
from esper_otel.gateway.kafka.topic_readers import record_of
from esper_otel.gateway.kafka.topics import Tier

_AT_ONCE = 200
_UNUSED_S = 30.0
_CHUNK_S = 0.5
_MOST_BUFFERED, _FEWEST = 4_000, 100  # frames: in all, and of a partition


class PastRead(NamedTuple):
    """What was read of the past.

    Attributes:
        entries: frames, in order.
        stands: where the puller stands now, in each partition.
    """

    entries: list[Entry]
    stands: dict[int, Stand]


class PastReader:
    """Reads a run's frames from cursors that are far behind, in order of their times over all partitions.

    It is made for one puller, and goes on where it stopped when the puller returns. Threads: one at a time.

    Args:
        connection: the way to the brokers.
        tier: the topics.
        run_id: the run.
        rank: one rank; None for all.
        stands: where it begins, by partition.
    """

    def __init__(
        self, connection: Brokers, tier: Tier, run_id: str, rank: int | None, stands: Mapping[int, Stand]
    ) -> None:
        self._topic, self._run_id, self._rank = tier.topics.frames, run_id, rank
        self._consumer: Consumer = connection.consumer(**{"enable.partition.eof": True})
        self._stands = dict(stands)
        self._entries: dict[int, deque[tuple[int, Entry]]] = {partition: deque() for partition in stands}
        self._read: dict[int, int] = {partition: stand.offset for partition, stand in stands.items()}
        self._ahead: dict[int, Stand] = dict(stands)
        self._ended: set[int] = set()
        self._paused: set[int] = set()
        self.used_s: float = time.monotonic()
        places = [TopicPartition(self._topic, partition, stand.offset) for partition, stand in stands.items()]
        self._consumer.assign(places)

    def read(self, untils: Mapping[int, int], most: int) -> PastRead:
        """Returns up to ``most`` frames before the offsets at which the tails begin; fewer if that takes long.

        Raises:
            KafkaException: the brokers refuse.
        """
        found: list[Entry] = []
        self._ended.clear()  # there may be more by now
        until_s = time.monotonic() + _CHUNK_S
        while len(found) < most:
            if not self._fill(untils, until_s):
                break
            heads = [
                (of_partition[0][0], partition) for partition, of_partition in self._entries.items() if of_partition
            ]
            if not heads:
                break
            heapq.heapify(heads)
            _, partition = heads[0]
            _, entry = self._entries[partition].popleft()
            self._stands[partition] = entry.after
            found.append(entry)
        for partition, waiting in self._entries.items():
            if not waiting and self._read[partition] > self._stands[partition].offset:
                self._stands[partition] = Stand(self._read[partition], 0, self._stands[partition].number)
        return PastRead(found, dict(self._stands))

    def _fill(self, untils: Mapping[int, int], until_s: float) -> bool:
        """Reads until each partition has a frame or has reached its end; returns False if that takes too long."""
        while True:
            lacking = [
                partition
                for partition, waiting in self._entries.items()
                if not waiting and partition not in self._ended and self._read[partition] < untils[partition]
            ]
            if not lacking:
                return True
            if time.monotonic() > until_s:
                return False
            self._pause(lacking)
            for message in self._consumer.consume(_AT_ONCE, 0.05):
                self._take(message)

    def _pause(self, lacking: Sequence[int]) -> None:
        """Lets those partitions wait of which much has been read."""
        most = max(_MOST_BUFFERED // len(self._entries), _FEWEST)
        full = {partition for partition, waiting in self._entries.items() if len(waiting) > most}
        if new := full - self._paused:
            self._consumer.pause([TopicPartition(self._topic, partition) for partition in new])
        if over := {partition for partition in self._paused if partition in lacking}:
            self._consumer.resume([TopicPartition(self._topic, partition) for partition in over])
        self._paused = (self._paused | full) - over

    def _take(self, message: Message) -> None:
        partition, offset = message.partition() or 0, message.offset() or 0
        error = message.error()
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - public, but for its name
                self._ended.add(partition)
                self._read[partition] = max(self._read[partition], offset)
            elif not error.retriable():
                raise KafkaException(error)
            return
        self._ended.discard(partition)
        self._read[partition] = offset + 1
        record = record_of(message)
        if record.is_wanted(self._run_id, self._rank):
            for entry in entries_of(record, self._ahead[partition], self._rank):
                self._entries[partition].append((record.time_ms, entry))
                self._ahead[partition] = entry.after

    def close(self) -> None:
        """Ends its connection."""
        self._consumer.close()


class PastReaders:
    """The readers of pullers that are behind, each found again by the cursor at which it stopped.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._readers: OrderedDict[str, PastReader] = OrderedDict()

    def taken(self, cursor: str) -> PastReader | None:
        """Returns the reader that stopped at a cursor, if it is still there; it is the caller's now."""
        return self._readers.pop(cursor, None)

    def put(self, cursor: str, reader: PastReader) -> list[PastReader]:
        """Keeps a reader; returns those that are to be closed."""
        reader.used_s = time.monotonic()
        before = self._readers.pop(cursor, None)
        self._readers[cursor] = reader
        closed = [] if before is None else [before]
        while len(self._readers) > self._most:
            closed.append(self._readers.popitem(last=False)[1])
        return closed

    def unused(self) -> list[PastReader]:
        """Returns the readers that nobody has used for a while, to be closed."""
        now_s = time.monotonic()
        old = [cursor for cursor, reader in self._readers.items() if now_s - reader.used_s > _UNUSED_S]
        return [self._readers.pop(cursor) for cursor in old]

    def all(self) -> list[PastReader]:
        """Returns all readers, to be closed."""
        readers = list(self._readers.values())
        self._readers.clear()
        return readers
