"""Shard: what a member knows of one partition, from requests that come in to records that go out.

A shard has an assembler of its own. Requests of one process are always in one partition, so no other shard needs to
know of its frames, and the whole shard can move to another member: everything it needs is in the topics.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from esper_otel.gateway.items import Item, Origin, Place, RunState
from esper_otel.gateway.kafka.hours import NO_HOURS, HoursOfWriter, phases_of
from esper_otel.gateway.kafka.topic_records import (
    MOST_BYTES,
    MOST_FRAMES,
    NO_DURATIONS,
    Counts,
    Durations,
    FrameBatch,
    FrameWithLoss,
    WriterState,
    merged_state,
    size_of,
)
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.ranks import durations_of
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.rebuild.shapes import PartShapes
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.log_records import decode_logs
from esper_otel.gateway.receive.request import Malformed, TooLarge
from esper_otel.gateway.store.memory import loss_of
from esper_otel.schema.events import EVENT_SCOPE

# Requests of this many bytes together are decoded as one: OTLP requests put together are a request.
_JOINED_BYTES = 512 * 1024
_MOST_DURATIONS = 64
_KINDS = 4
_MOST_BURIED = 100


class Caches(NamedTuple):
    """What makes reading requests fast, and takes memory for what is the same in all partitions."""

    decoder: Decoder
    shapes: PartShapes

    @classmethod
    def of(cls, limits: Limits) -> Caches:
        """Returns empty ones."""
        return cls(Decoder(limits), PartShapes())


class RequestRecord(NamedTuple):
    """A record with a request.

    Attributes:
        offset: its offset.
        time_unix_ns: when the broker received it.
        key: its key.
        value: the request.
    """

    offset: int
    time_unix_ns: int
    key: bytes | None
    value: bytes


class Commit(NamedTuple):
    """What is committed for a partition.

    Attributes:
        offset: that of the oldest record that something waits for.
        first: where to restore from in the topic of frames: frames that were made from that record or from later ones,
            and frames that are in no written state, are not before it.
        buried: offsets of later records that could not be used, some if there are very many.
    """

    offset: int
    first: int
    buried: tuple[int, ...] = ()

    @property
    def metadata(self) -> str:
        """What is committed with the offset."""
        return ",".join(map(str, (self.first, *self.buried)))

    @classmethod
    def of(cls, offset: int, metadata: str) -> Commit | None:
        """Returns what was committed; None if that was not by a member."""
        numbers = metadata.split(",")
        if offset < 0 or not all(each.isdecimal() for each in numbers):
            return None
        return cls(offset, int(numbers[0]), tuple(map(int, numbers[1:])))


class BadRecord(NamedTuple):
    """A record that cannot be used, and why."""

    record: RequestRecord
    reason: str


class _WaitingRecords(NamedTuple):
    """Records whose frames may not all be released, and where the topic of frames ended when they came."""

    offset: int
    received_s: float
    end: int


class _NewestDurations:
    """Durations of the newest steps of a writer."""

    __slots__ = ("_count", "_steps", "_times")

    def __init__(self) -> None:
        self._count = 0
        self._steps = np.zeros(_MOST_DURATIONS, np.uint64)
        self._times = np.zeros((_MOST_DURATIONS, _KINDS), np.float32)

    def add(self, step: int, times: Sequence[float]) -> None:
        place = self._count % _MOST_DURATIONS
        self._steps[place], self._times[place] = step, times
        self._count += 1

    def extend(self, durations: Durations) -> None:
        for step, times in zip(durations.steps.tolist(), durations.times.tolist(), strict=True):
            self.add(step, times)

    def all(self) -> Durations:
        """Returns them, oldest first."""
        places = np.arange(max(self._count - _MOST_DURATIONS, 0), self._count) % _MOST_DURATIONS
        return Durations(self._steps[places], self._times[places])


class _Memory:
    """What a shard keeps of a writer beside the assembler."""

    __slots__ = ("before", "count", "durations", "hours", "last", "loss", "newest", "place", "since")

    def __init__(self, since: int) -> None:
        self.since = self.last = since
        self.count = 0
        self.loss: float | None = None
        self.newest: FrameWithLoss | None = None
        self.place: Place | None = None
        self.before: RunState | None = None
        self.durations = _NewestDurations()
        self.hours = HoursOfWriter()

    def note(self, released: FrameWithLoss) -> None:
        frame = released.item.frame
        self.count += 1
        self.loss = loss_of(frame)
        if self.newest is None or frame.time_unix_ns >= self.newest.item.frame.time_unix_ns:
            self.newest = released
        if released.item.revision == 1:
            self.durations.add(frame.global_step, durations_of(frame))
            self.hours.add(frame)

    def received_unix_ns(self, state: RunState | None) -> int:
        """Returns when something last arrived from the writer; a run that failed before its first step has no frame."""
        of_states = (each.last_received_unix_ns for each in (state, self.before) if each is not None)
        newest = 0 if self.newest is None else self.newest.item.received_unix_ns
        return max(*of_states, newest, self.hours.last_unix_ns)

    def restore(self, known: WriterState) -> None:
        self.since, self.last, self.count = known.since, known.last, known.counts.writer
        self.before, self.newest, self.place = known.state, known.newest, known.place
        self.hours = HoursOfWriter(known.hours)
        self.loss = None if known.newest is None else loss_of(known.newest.item.frame)
        self.durations.extend(known.durations)


class Shard:
    """One partition.

    Args:
        partition: its number.
        limits: limits on senders.
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long a frame without a point count waits for further points.
        caches: what a member's shards share.

    Attributes:
        end: the offset at which the topic of frames ends.
        counts: points, steps, and others, by name.
        rejected: points that were refused for good, by reason.
        checked: where the topic of frames ended when all states were written last.
        written: what was committed last; see ``committed``.
        buried: offsets of records that could not be used, from the committed offset on.
    """

    def __init__(
        self, partition: int, *, limits: Limits, hold_s: float, linger_s: float, caches: Caches | None = None
    ) -> None:
        self.partition = partition
        self.end: int = 0
        self.checked: int = 0
        self.written: Commit | None = None
        self.buried: list[int] = []
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self._limits = limits
        self._decoder, shapes = caches or Caches.of(limits)
        self._assembler = Assembler(limits, hold_s=hold_s, linger_s=linger_s, recall=self._recall, shapes=shapes)
        self._waiting: deque[_WaitingRecords] = deque()
        self._next: int | None = None
        self._of_run: Counter[str] = Counter()
        self._of_rank: Counter[tuple[str, int]] = Counter()
        self._writers: dict[Origin, _Memory] = {}
        self._restored: dict[Origin, WriterState] = {}
        self._changed: set[Origin] = set()
        self._at_once: set[Origin] = set()
        self._now_s = 0.0

    # -- in ----------------------------------------------------------------------------------------------

    def take(self, records: Sequence[RequestRecord], now_s: float) -> list[BadRecord]:
        """Adds records, in order; returns those that cannot be used."""
        poisoned: list[BadRecord] = []
        self._now_s = now_s
        for group in _joined(records):
            self._waiting.append(_WaitingRecords(group[0].offset, now_s, self.end))
            poisoned += self._take(group, now_s)
        poisoned = [each for each in poisoned if each.record.offset not in self.buried]  # by the member before
        self.buried += [each.record.offset for each in poisoned]
        if records:
            self._next = records[-1].offset + 1
        return poisoned

    def _take(self, group: Sequence[RequestRecord], now_s: float) -> list[BadRecord]:
        try:
            for record in group:
                _check_no_events(record.value, self._limits)
            decoded = self._decoder.decode(b"".join(record.value for record in group))
            taken = self._assembler.take(decoded, now_s=now_s, received_unix_ns=group[-1].time_unix_ns)
        except Exception as error:  # noqa: BLE001 - it would fail again at each start: it is kept elsewhere
            if len(group) > 1:
                return [poisoned for record in group for poisoned in self._take([record], now_s)]
            return [BadRecord(group[0], f"{type(error).__name__}: {error}"[:500])]
        if taken.crowded and len(group) > 1:  # adding a request again changes nothing
            return [poisoned for record in group for poisoned in self._take([record], now_s)]
        for origin, phase in phases_of(decoded.phases):
            self._memory(origin).hours.add_phase(phase)
            self._changed.add(origin)
            self._at_once.add(origin)  # it is in no frame: it is written with the offset of its request
        self.counts["requests"] += len(group)
        self.counts["points"] += taken.accepted
        self.rejected.update(taken.rejected)
        self._changed.update(taken.alive)
        if taken.crowded:
            return [BadRecord(group[0], f"there is no room for run {taken.crowded[0]!r}: too many writers are active")]
        return []

    def limit(self, limits: Limits) -> None:
        """Changes how much memory it may take."""
        self._assembler.limit(limits)

    def due(self) -> float | None:
        """Returns when ``release`` must be called next, on the monotonic clock."""
        return self._assembler.due()

    # -- out ---------------------------------------------------------------------------------------------

    def release(self, now_s: float) -> list[FrameBatch]:
        """Releases the frames that are due, as blocks in order."""
        self._now_s = now_s
        items = self._assembler.release(now_s)
        ended = self._assembler.ended()
        places = {place.origin: place for place in self._assembler.places()}
        blocks = list(self._blocks(items, places))
        for origin, place in places.items():
            memory = self._memory(origin)
            memory.place = place
            self._changed.add(origin)
        released = {block.origin for block in blocks}
        self._at_once |= {*ended} | (places.keys() - released)
        self._changed |= {*ended}
        return blocks

    def _blocks(self, items: Iterable[Item], places: Mapping[Origin, Place]) -> Iterator[FrameBatch]:
        of_writers: dict[Origin, list[Item]] = {}
        for item in items:
            of_writers.setdefault(item.origin, []).append(item)
        for origin, some in of_writers.items():
            memory = self._memory(origin)
            frames: list[FrameWithLoss] = []
            size = 0
            for item in some:
                released = FrameWithLoss(item, memory.loss)
                memory.note(released)
                self.counts["steps"] += 1
                self.counts["incomplete_steps"] += not item.complete
                self.counts["corrections"] += item.revision > 1
                size += size_of(item.frame)
                if frames and (size > MOST_BYTES or len(frames) == MOST_FRAMES):
                    yield self._numbered(frames, places[origin])
                    frames, size = [], size_of(item.frame)
                frames.append(released)
            yield self._numbered(frames, places[origin])

    def _numbered(self, frames: Sequence[FrameWithLoss], place: Place) -> FrameBatch:
        run_id, _, rank, _ = place.origin
        block = FrameBatch(frames, self._of_run[run_id] + 1, self._of_rank[run_id, rank] + 1, place)
        self._of_run[run_id] += len(frames)
        self._of_rank[run_id, rank] += len(frames)
        return block

    def states(self, *, of_all: bool) -> list[WriterState]:
        """Returns the states to be written: of new and ended writers, or of all that have changed.

        The frames that were released before are in them. Call it after ``release``.
        """
        origins, self._at_once = (self._changed if of_all else self._at_once), set()
        if of_all:
            self._changed, self.checked = set(), self.end
        found: list[WriterState] = []
        for run_id in sorted({origin.run_id for origin in origins}):
            states = {state.origin: state for state in self._assembler.states_of(run_id, self._now_s)}
            found += [self._state(origin, states.get(origin)) for origin in origins if origin.run_id == run_id]
        return found

    def _state(self, origin: Origin, state: RunState | None) -> WriterState:
        memory = self._memory(origin)
        state = state or memory.before or RunState(origin, 1, "", None, None, 0, 0)
        memory.last = self.end
        counts = Counts(memory.count, self._of_rank[origin.run_id, origin.rank], self._of_run[origin.run_id])
        place = memory.place or Place(origin, None, None, 0, says_step=False, says_epoch=False, holes=())
        known = merged_state(state, memory.before if state is not memory.before else None)
        return WriterState(
            known,
            place,
            memory.newest,
            counts,
            memory.since,
            memory.last,
            memory.durations.all(),
            memory.hours.written(),
        )

    def committed(self) -> Commit | None:
        """Returns what to commit; None if nothing came."""
        since_s = self._assembler.since()
        while self._waiting and (since_s is None or self._waiting[0].received_s < since_s):
            self._waiting.popleft()
        if self._waiting:
            offset, first = self._waiting[0].offset, min(self._waiting[0].end, self.checked)
        elif self._next is None:
            return None
        else:
            offset, first = self._next, self.checked
        self.buried = [each for each in self.buried if each >= offset][-_MOST_BURIED:]
        return Commit(offset, first, tuple(self.buried))

    # -- going on from where another member stopped --------------------------------------------------------

    def restore(
        self, states: Iterable[WriterState], blocks: Sequence[FrameBatch], offsets: tuple[int, int], now_s: float
    ) -> None:
        """Restores the state from the topics.

        Args:
            states: the states of the partition's writers.
            blocks: the newest blocks of the partition.
            offsets: where they begin in the topic of frames, and where it ends.
            now_s: the monotonic clock.
        """
        self._now_s = now_s
        self.checked, self.end = offsets
        for known in states:
            origin = known.state.origin
            if known.is_of_steps:
                self._restored[origin] = known._replace(durations=NO_DURATIONS, hours=NO_HOURS)
            self._memory(origin).restore(known)
            self._note_numbers(origin, known.counts.of_run, known.counts.of_rank)
        self._at_once.clear()
        self._changed.clear()
        tails: dict[Origin, list[FrameWithLoss]] = {}
        for block in blocks:
            origin, memory = block.origin, self._memory(block.origin)
            written = 0 if origin not in self._restored else self._restored[origin].counts.of_rank
            for number, released in enumerate(block.frames, block.of_rank):
                tails.setdefault(origin, []).append(released)
                if number > written:
                    memory.note(released)
                    memory.place = block.place
                    self._note_numbers(origin, 0, number)
            self._note_numbers(origin, block.of_run + len(block.frames) - 1, 0)
        for origin, tail in tails.items():
            self._restore_writer(origin, tail)
            self._changed.add(origin)

    def _note_numbers(self, origin: Origin, of_run: int, of_rank: int) -> None:
        run_id, rank = origin.run_id, origin.rank
        self._of_run[run_id] = max(self._of_run[run_id], of_run)
        self._of_rank[run_id, rank] = max(self._of_rank[run_id, rank], of_rank)

    def _restore_writer(self, origin: Origin, tail: Sequence[FrameWithLoss]) -> None:
        known = self._restored.pop(origin, None)
        before = [] if known is None or known.newest is None else [known.newest]
        newest = {released.item.frame.time_unix_ns: released.item for released in (*before, *tail)}
        items = [newest[time_unix_ns] for time_unix_ns in sorted(newest)]
        memory = self._memory(origin)
        is_first = memory.count == len(newest)  # these are all frames that there were
        ended = {} if known is None or known.state.ended is None else {origin: known.state.ended}
        self._assembler.restore(
            [(item, is_first and number == 0) for number, item in enumerate(items)],
            ended,
            places=() if memory.place is None else (memory.place,),
            now_s=self._now_s,
        )

    def _recall(self, origin: Origin) -> None:
        """Restores a writer that sends again after a takeover or a long silence."""
        if origin in self._restored:
            self._restore_writer(origin, ())
            return
        memory = self._writers.get(origin)
        if memory is not None and memory.newest is not None:
            places = () if memory.place is None else (memory.place,)
            self._assembler.restore([(memory.newest.item, False)], {}, places=places, now_s=self._now_s)

    def _memory(self, origin: Origin) -> _Memory:
        memory = self._writers.get(origin)
        if memory is None:
            memory = self._writers[origin] = _Memory(self.end)
            self._at_once.add(origin)
            self._changed.add(origin)
        return memory

    # -- state -------------------------------------------------------------------------------------------

    def idle(self, oldest_unix_ns: int) -> list[Origin]:
        """Forgets writers of which nothing has arrived since a time, and returns them."""
        states = {state.origin: state for state in self._assembler.runs(self._now_s)}
        gone = [
            origin
            for origin, memory in self._writers.items()
            if memory.received_unix_ns(states.get(origin)) < oldest_unix_ns and origin not in self._changed
        ]
        for origin in gone:
            del self._writers[origin]
            self._restored.pop(origin, None)
        if gone:
            self._forget_numbers()
        return gone

    def _forget_numbers(self) -> None:
        """Forgets how many frames there were of ranks and runs that have no writer any more: theirs begin anew."""
        runs = {origin.run_id for origin in self._writers}
        ranks = {(origin.run_id, origin.rank) for origin in self._writers}
        self._of_run = Counter({run_id: count for run_id, count in self._of_run.items() if run_id in runs})
        self._of_rank = Counter({rank: count for rank, count in self._of_rank.items() if rank in ranks})

    @property
    def writers(self) -> int:
        """How many writers are known."""
        return len(self._writers)

    def missing(self) -> int:
        """Returns how many steps have not arrived although later ones have."""
        return sum(memory.place.missing for memory in self._writers.values() if memory.place is not None)


def _check_no_events(value: bytes, limits: Limits) -> None:
    """Checks that a request has no log records with events of runs; as metrics they would be lost without a word.

    Raises:
        Malformed: it has some.
    """
    if EVENT_SCOPE.encode() not in value:
        return
    try:
        decoded = decode_logs(value, limits)
    except (Malformed, TooLarge):
        return  # they are metrics: the same bytes are not valid as log records, or mean nothing
    if decoded.events or decoded.refused:
        raise Malformed("log records with events of runs: they belong in the topic of events")


def _joined(records: Sequence[RequestRecord]) -> Iterator[list[RequestRecord]]:
    """Yields the records in groups that are decoded together."""
    group: list[RequestRecord] = []
    size = 0
    for record in records:
        if group and size + len(record.value) > _JOINED_BYTES:
            yield group
            group, size = [], 0
        group.append(record)
        size += len(record.value)
    if group:
        yield group
