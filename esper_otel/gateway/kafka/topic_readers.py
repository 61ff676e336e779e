"""The topics as servers read them: states from the beginning, frames at their tails and in their past.

Calls of librdkafka wait, so each of these readers has a thread of its own; what they read is handed to the event loop.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from esper_otel.gateway.items import Origin
from esper_otel.gateway.kafka.brokers import Brokers, meaning
from esper_otel.gateway.kafka.entries import Record
from esper_otel.gateway.kafka.partition_reader import value_of
from esper_otel.gateway.kafka.topic_records import NewerForm, UnknownForm, WriterState, origin_of, state_of
from esper_otel.gateway.kafka.topics import TIER_KEY, Tier
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.log_records import DecodedLogs, decode_logs
from esper_otel.gateway.receive.request import Malformed, TooLarge
from esper_otel.log import Warnings

_POLL_S = 0.1
_AT_ONCE = 1_000
_LOWS_EVERY_S = 10.0
_ASKED_S = 10.0


class NewState(NamedTuple):
    """A record of the topic of states.

    Attributes:
        partition: its partition.
        origin: the writer.
        state: its state; None if the writer is to be forgotten, or a newer version has written it.
        is_newer: whether a newer version has written it.
    """

    partition: int
    origin: Origin
    state: WriterState | None
    is_newer: bool = False


class _ReadingThread:
    """A thread with a consumer of its own."""

    def __init__(self, connection: Brokers, name: str, **properties: Any) -> None:
        self._consumer: Consumer = connection.consumer(**properties)
        self._warnings = Warnings()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"esper-otel-{name}", daemon=True)
        self.faults: int = 0

    def start(self) -> None:
        """Starts reading."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._consumer.close()

    def _run(self) -> None:
        try:
            self._begin()
            while not self._stop.is_set():
                try:
                    self._work()
                except KafkaException as error:
                    self._say(error.args[0])
                    self._stop.wait(1.0)
        finally:
            self._consumer.close()

    def _begin(self) -> None:
        """Is called once, in the thread."""

    def _work(self) -> None:
        raise NotImplementedError

    def _polled(self) -> list[Message]:
        """Returns what has arrived: at once when something has."""
        first = self._consumer.poll(_POLL_S)
        if first is None:
            return []
        return [first, *self._consumer.consume(_AT_ONCE, 0)]

    def _say(self, error: KafkaError) -> None:
        self._warn(f"reading {error.name()}", meaning(error))

    def _warn(self, kind: str, message: str) -> None:
        """Counts a fault and logs it."""
        self.faults += 1
        self._warnings.say(kind, "%s", message)


class StateReader(_ReadingThread):
    """Reads the topic of states, all of it, and then what is new.

    Args:
        connection: the way to the brokers.
        tier: the topics.
        found: called in the thread with new states, and with the partitions that were read up to their ends.
        lows: called in the thread, with the first offset of each partition of the topic of frames.
    """

    def __init__(
        self,
        connection: Brokers,
        tier: Tier,
        found: Callable[[list[NewState], set[int]], None],
        lows: Callable[[dict[int, int]], None],
    ) -> None:
        super().__init__(connection, "kafka-states", **{"enable.partition.eof": True})
        self._tier, self._found, self._lows = tier, found, lows
        self._lows_s = 0.0

    def _begin(self) -> None:
        runs = self._tier.topics.runs
        self._consumer.assign([TopicPartition(runs, each, OFFSET_BEGINNING) for each in range(self._tier.partitions)])

    def _work(self) -> None:
        newest: dict[tuple[int, bytes], Message] = {}
        ends: set[int] = set()
        for message in self._polled():
            error = message.error()
            if error is None:  # many are of the same writers when a server starts
                newest[message.partition() or 0, message.key() or b""] = message
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - public, but for its name
                ends.add(message.partition() or 0)
            else:
                self._say(error)
        states = [state for state in map(self._state, newest.values()) if state is not None]
        if states or ends:
            self._found(states, ends)
        if time.monotonic() > self._lows_s:
            self._lows_s = time.monotonic() + _LOWS_EVERY_S
            self._lows(self._first_offsets())

    def _state(self, message: Message) -> NewState | None:
        key, value = message.key() or b"", value_of(message)
        if key == TIER_KEY:
            return None
        partition = message.partition() or 0
        try:
            origin = origin_of(key)
            try:
                return NewState(partition, origin, state_of(key, value) if value else None)
            except NewerForm as error:
                self._warn("newer", f"{self._tier.topics.runs}, run {origin.run_id!r}: {error}; update this server")
                return NewState(partition, origin, None, is_newer=True)
        except UnknownForm as error:
            self._warn("states", f"{self._tier.topics.runs}: {error}")
            return None

    def _first_offsets(self) -> dict[int, int]:
        found = {}
        for partition in range(self._tier.partitions):
            with suppress(KafkaException):
                place = TopicPartition(self._tier.topics.frames, partition)
                found[partition], _ = self._consumer.get_watermark_offsets(place, timeout=_ASKED_S)
        return found


class NewEvents(NamedTuple):
    """A record of the topic of events."""

    offset: int
    logs: DecodedLogs


class EventTopicReader(_ReadingThread):
    """Reads the topic of events, all of it, and then what is new.

    Args:
        connection: the way to the brokers.
        tier: the topics.
        found: called in the thread with new events, and whether the end was reached.
    """

    def __init__(self, connection: Brokers, tier: Tier, found: Callable[[list[NewEvents], bool], None]) -> None:
        super().__init__(connection, "kafka-events", **{"enable.partition.eof": True})
        self._topic, self._found, self._limits = tier.topics.events, found, Limits()

    def _begin(self) -> None:
        self._consumer.assign([TopicPartition(self._topic, 0, OFFSET_BEGINNING)])

    def _work(self) -> None:
        events: list[NewEvents] = []
        is_end = False
        for message in self._polled():
            error = message.error()
            if error is None:
                with suppress(Malformed, TooLarge):
                    events.append(NewEvents(message.offset() or 0, self._logs(message)))
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - public, but for its name
                is_end = True
            else:
                self._say(error)
        if events or is_end:
            self._found(events, is_end)

    def _logs(self, message: Message) -> DecodedLogs:
        try:
            return decode_logs(value_of(message), self._limits)
        except (Malformed, TooLarge) as error:
            self._warn("events", f"{self._topic}, record {message.offset()}, is left out: {error}")
            raise


class Tail:
    """The newest records of one partition. Threads: that of the event loop.

    Attributes:
        first: the offset from which on all records are here.
        end: the offset of the record to come.
        used_s: when it was last used.
        size: of its records, in bytes.
    """

    def __init__(self, first: int) -> None:
        self.first: int = first
        self.end: int = first
        self.used_s: float = time.monotonic()
        self.size: int = 0
        self._records: deque[Record] = deque()
        self._runs: dict[str, deque[Record]] = {}

    def add(self, record: Record) -> None:
        """Adds a record at the end."""
        self._records.append(record)
        self.end = record.offset + 1
        self.size += record.size
        if record.origin is not None:
            self._runs.setdefault(record.origin.run_id, deque()).append(record)

    def drop_oldest(self) -> None:
        """Drops the oldest record."""
        record = self._records.popleft()
        self.size -= record.size
        self.first = record.offset + 1
        if record.origin is not None:
            of_run = self._runs[record.origin.run_id]
            of_run.popleft()
            if not of_run:
                del self._runs[record.origin.run_id]

    def __len__(self) -> int:
        return len(self._records)

    def after(self, offset: int, run_id: str, rank: int | None) -> Iterable[Record]:
        """Yields the records of a run, or of one of its ranks, from an offset on."""
        newest = self._runs.get(run_id, ())
        later: list[Record] = []
        for record in reversed(newest):
            if record.offset < offset:
                break
            later.append(record)
        return (record for record in reversed(later) if record.is_wanted(run_id, rank))


class TailReader(_ReadingThread):
    """Follows the ends of those partitions that somebody reads.

    Args:
        connection: the way to the brokers.
        tier: the topics.
        found: called in the thread with new records.
    """

    def __init__(self, connection: Brokers, tier: Tier, found: Callable[[list[Record]], None]) -> None:
        super().__init__(connection, "kafka-tail")
        self._topic, self._found = tier.topics.frames, found
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def follow(self, partition: int, begun: Callable[[int], None]) -> None:
        """Begins to follow a partition; calls ``begun`` in the thread with the offset of the next record."""

        def order() -> None:
            place = TopicPartition(self._topic, partition)
            _, place.offset = self._consumer.get_watermark_offsets(place, timeout=_ASKED_S)
            self._consumer.incremental_assign([place])
            begun(place.offset)

        self._orders.put(order)

    def leave(self, partition: int) -> None:
        """Stops following a partition."""
        self._orders.put(lambda: self._consumer.incremental_unassign([TopicPartition(self._topic, partition)]))

    def _work(self) -> None:
        with suppress(queue.Empty):
            while True:
                order = self._orders.get_nowait()
                try:
                    order()
                except KafkaException as error:
                    self._say(error.args[0])
                    self._orders.put(order)
                    self._stop.wait(0.5)
                    break
        records = []
        for message in self._polled():
            fault = message.error()
            if fault is None:
                records.append(record_of(message))
            else:
                self._say(fault)
        if records:
            self._found(records)


def record_of(message: Message) -> Record:
    """Returns a record."""
    _, time_ms = message.timestamp()
    return Record(message.partition() or 0, message.offset() or 0, time_ms, message.key() or b"", value_of(message))
