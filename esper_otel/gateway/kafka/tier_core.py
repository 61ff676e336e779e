"""Core of a server: answers pullers from the topics. It keeps nothing that another server would need."""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from confluent_kafka import KafkaException

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.gateway.events.run_events import RunEvents
from esper_otel.gateway.faults import Busy
from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.gateway.items import Origin
from esper_otel.gateway.kafka.brokers import Brokers, meaning
from esper_otel.gateway.kafka.cursors import PullSelection, Stand, cursor_stands, cursor_text
from esper_otel.gateway.kafka.entries import Entry, FetchedEntries, Record, entries_of
from esper_otel.gateway.kafka.past import PastReader, PastReaders
from esper_otel.gateway.kafka.states import KnownStates
from esper_otel.gateway.kafka.topic_readers import EventTopicReader, NewEvents, NewState, StateReader, Tail, TailReader
from esper_otel.gateway.kafka.topic_records import NewerForm
from esper_otel.gateway.kafka.topics import Tier
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.pages import FREE, Bounds, PulledPage, packets_after, packets_of, page
from esper_otel.gateway.pull_core import PullCore, events_of
from esper_otel.gateway.security import BadRequest, Grant, check_puller
from esper_otel.gateway.store.base import NewData, Store, StoredFrame, StoredPage, StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.turns import Turn, in_turns, pause
from esper_otel.hours.account import Account
from esper_otel.hours.bar import RunHours
from esper_otel.leyline.packets import Page
from esper_otel.leyline.risk import RULES, Rule
from esper_otel.log import Warnings
from esper_otel.pull.messages import EventsRequest, EventsResponse, PullRequest

_MOST_TAIL_BYTES = 256 * 1024 * 1024
_UNUSED_S = 120.0
_TIDY_EVERY_S = 10.0
_ANSWER_S = 10.0
_LOOK_AGAIN_S = 1.0
_DEFAULT_PACKETS = 64
_NEWER = (
    "a newer esper-otel has written steps of run {!r}, which this server cannot read: update it, or pull from another"
)
_VIEWED, _VIEW_BYTES, _READ_AT_ONCE, _VIEWED_S = 16, 64 * 1024 * 1024, 500, 300.0
_ALL_VIEW_BYTES = 3 * _VIEW_BYTES
_MOST_EVENTS_OF_A_RECORD = 2**17  # more than there can be: positions follow from offsets, at each server the same
_MOST_NEWS = 8  # batches of states that wait to be noted


class TierStore(Store):
    """What ``PullCore`` asks a store, answered from the topic of states. Each request fetches its frames itself."""

    def __init__(self, known: KnownStates, size: Callable[[], int]) -> None:
        super().__init__()
        self._known, self._size = known, size

    @property
    def size(self) -> int:
        """Size of what is in memory, in bytes."""
        return self._size()

    def _add(self, new: NewData) -> None:
        """Does nothing: members write, servers read."""

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:  # noqa: ARG002
        """Raises UnknownRun: frames are fetched before they are read."""
        raise UnknownRun(f"no step of run {run_id!r} is here")

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns how many frames of a rank there were."""
        return self._known.last_number(run_id, rank)

    def holds(self, run_id: str) -> bool:
        """Whether the run is known."""
        return self._known.has(run_id)

    def run_ids(self) -> list[str]:
        """Returns the ids of the runs."""
        return sorted(self._known.run_ids())

    def counts(self, run_id: str | None = None) -> dict[Origin, int]:
        """Returns how many steps of each writer can be pulled."""
        return self._known.counts(run_id)

    def outcomes(self, run_id: str | None = None) -> dict[Origin, str]:
        """Returns how writers ended."""
        return self._known.outcomes(run_id)

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns how much memory the tails take, and the limit."""
        return {"tail bytes": (float(self._size()), float(_MOST_TAIL_BYTES))}


class TierCore(PullCore):
    """Answers pullers from the topics of a tier.

    Args:
        connection: the way to the brokers.
        tier: the topics.
        rules: the risk rules.
        latency_budget_ms: see ``PullCore``.
    """

    def __init__(
        self, connection: Brokers, tier: Tier, *, rules: tuple[Rule, ...] = RULES, latency_budget_ms: float = 10.0
    ) -> None:
        self._known = KnownStates()
        self._tails: dict[int, Tail] = {}
        store = TierStore(self._known, self._size)
        super().__init__(store, self._known, rules=rules, latency_budget_ms=latency_budget_ms)
        self._events = RunEvents(None, Limits(), self.counts, self._warnings, life=tier.of_events or None)
        self._connection, self._tier = connection, tier
        self._ranks = self._known.ranks
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._past = PastReaders()
        self._viewed: OrderedDict[tuple[str, int], ViewedRank] = OrderedDict()
        self._newer: set[str] = set()  # runs of which a newer version has written something
        self._unread = set(range(tier.partitions))
        self._news_of: asyncio.Queue[tuple[list[NewState], set[int]]] = asyncio.Queue()
        self._room_for_news = threading.Semaphore(_MOST_NEWS)
        self._has_unread_events = True
        self._events_read: asyncio.Queue[tuple[list[NewEvents], bool]] = asyncio.Queue()
        self._room_for_events = threading.Semaphore(_MOST_NEWS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._tier_warnings = Warnings()

    def start(self) -> None:
        """Starts reading; call it in the event loop."""
        loop = asyncio.get_running_loop()

        def soon(call: Callable[..., None], *arguments: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(call, *arguments)

        self._soon = soon
        self._state_reader = StateReader(
            self._connection,
            self._tier,
            self._hand_over,
            lambda lows: soon(self._known.lows.update, lows),
        )
        self._tail_reader = TailReader(self._connection, self._tier, lambda records: soon(self._add, records))
        self._event_reader = EventTopicReader(self._connection, self._tier, self._hand_events_over)
        self._state_reader.start()
        self._tail_reader.start()
        self._event_reader.start()
        for work in (self._note_states(), self._note_events(), self._tidy_tails()):
            self._tasks.add(loop.create_task(work))

    def _hand_over(self, states: list[NewState], ends: set[int]) -> None:
        """Hands states from the thread that read them to the event loop; waits while many have not been noted."""
        self._room_for_news.acquire(timeout=_ANSWER_S)
        self._soon(self._news_of.put_nowait, (states, ends))

    def _hand_events_over(self, events: list[NewEvents], is_end: bool) -> None:
        """Likewise, events."""
        self._room_for_events.acquire(timeout=_ANSWER_S)
        self._soon(self._events_read.put_nowait, (events, is_end))

    def close(self) -> None:
        """Answers waiting pullers; the readers have ended."""
        self.end_waiting()
        self._events.close()

    async def stop(self) -> None:
        """Ends the readers; call it before ``close``."""
        for room in (self._room_for_news, self._room_for_events):
            room.release(_MOST_NEWS)  # nobody notes anything any more
        for task in self._tasks:
            task.cancel()
        for viewed in self._viewed.values():
            viewed.close()
        readers = (self._state_reader, self._tail_reader, self._event_reader)
        closing = [*(reader.close for reader in readers), *(reader.close for reader in self._past.all())]
        for close in closing:
            await asyncio.to_thread(close)

    @property
    def is_ready(self) -> bool:
        """Whether the states of all runs and their events have been read once."""
        return not self._unread and not self._has_unread_events

    # -- what arrives ------------------------------------------------------------------------------------

    async def _note_states(self) -> None:
        while True:
            states, ends = await self._news_of.get()
            turn = Turn()
            for partition, origin, known, is_newer in states:
                if is_newer:
                    self._newer.add(origin.run_id)
                elif known is None:
                    self._known.forget(partition, origin)
                else:
                    self._known.note(partition, known)
                if turn.is_over:
                    await pause()
                    turn = Turn()
            self._room_for_news.release()
            self._unread -= ends
            runs = {each.origin.run_id for each in states}
            self.changed.note(runs)
            self.wake(runs)

    def _add(self, records: list[Record]) -> None:
        runs = set()
        for record in records:
            tail = self._tails.get(record.partition)
            if tail is not None and record.offset >= tail.end:
                tail.add(record)
                if record.origin is not None:
                    runs.add(record.origin.run_id)
        size = self._size()
        while size > _MOST_TAIL_BYTES:
            largest = max(self._tails.values(), key=lambda tail: tail.size)
            before = largest.size
            largest.drop_oldest()
            size -= before - largest.size
        self.changed.note(runs)
        self.wake(runs)

    def _size(self) -> int:
        return sum(tail.size for tail in self._tails.values())

    async def _tidy_tails(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_EVERY_S)
            now_s = time.monotonic()
            for partition in [each for each, tail in self._tails.items() if now_s - tail.used_s > _UNUSED_S]:
                del self._tails[partition]
                self._tail_reader.leave(partition)
            self._events.drop((), self._store.holds)  # those of which nothing else is known, after a day
            for reader in self._past.unused():
                await asyncio.to_thread(reader.close)
            for key in [key for key, viewed in self._viewed.items() if now_s - viewed.used_s > _VIEWED_S]:
                self._viewed.pop(key).close()

    def _accounting(self, run_id: str) -> Generator[None, None, tuple[RunHours, dict[AttemptRank, Account]]]:
        """Returns them as they were up to five seconds ago. See ``PullCore``."""
        return self._known.hours(run_id)

    # -- pulling -----------------------------------------------------------------------------------------

    async def _page(self, request: PullRequest, bounds: Bounds) -> PulledPage:
        wanted = _wanted(request)
        most = request.max_packets or _DEFAULT_PACKETS
        fetched = await self.fetch(request.run_id, request.cursor, wanted, most)
        made = self._making(request)
        request.cursor, has_cursor = fetched.first, bool(request.cursor)
        found = await page(fetched, request, *made, self._clock_ns, bounds)
        if not found.steps and not found.gap:
            request.cursor = found.cursor  # what was passed over need not be read again while the puller waits
        self.counts["pulled_steps"] += found.steps
        self.counts["gap_steps"] += found.gap if has_cursor else 0
        return found

    async def packets(self, run_id: str, cursor: str, most: int) -> Page:
        """Returns the steps after a cursor, for a reader in this process. See ``PullCore``."""
        fetched = await self.fetch(run_id, cursor, PullSelection(), most)
        made = partial(packets_of, rules=self._rules, latency_budget_ms=self._latency_budget_ms)
        found = await packets_after(fetched, run_id, fetched.first, most, made, self._clock_ns)
        self.counts["pulled_steps"] += len(found)
        self.counts["gap_steps"] += found.gap if cursor else 0
        return found

    async def _news(self, run_id: str, deadline_s: float) -> bool:
        """Waits for a step of the run, but looks again from time to time: a puller may be behind the tails."""
        await self.news(run_id, min(deadline_s - time.monotonic(), _LOOK_AGAIN_S))
        return time.monotonic() < deadline_s

    async def news(self, run_id: str, within_s: float) -> None:
        """Waits until something new of a run arrives, at most so long."""
        await super()._news(run_id, time.monotonic() + within_s)

    async def fetch(self, run_id: str, cursor: str, wanted: PullSelection, most: int) -> FetchedEntries:
        """Reads up to ``most`` entries after a cursor.

        Raises:
            UnknownRun, StaleCursor: the run or the cursor cannot be used.
            Busy: the brokers do not answer, or only a newer version can read what is next.
        """
        if run_id in self._newer:
            raise Busy(_NEWER.format(run_id))
        try:
            return await self._fetch(run_id, cursor, wanted, most)
        except NewerForm:
            self._newer.add(run_id)
            raise Busy(_NEWER.format(run_id)) from None

    async def _fetch(self, run_id: str, cursor: str, wanted: PullSelection, most: int) -> FetchedEntries:
        generation = self._tier.generation
        stands = cursor_stands(cursor, generation, wanted)
        firsts = self._known.partitions(run_id, wanted.rank)
        if run_id not in self._known.run_ids() or not (firsts or stands):
            if not self.is_ready:
                raise Busy("the states of the runs have not all been read yet")
            raise UnknownRun(f"no step of run {run_id!r} is here")
        for partition, first in firsts.items():
            if wanted.has(partition):
                stands.setdefault(partition, Stand(first, 0, 0))
        if any(partition >= self._tier.partitions for partition in stands):
            raise StaleCursor(f"cursor {cursor[:80]!r} was not issued by this gateway; pull without one to begin")
        while True:
            tails = await self._tails_of(stands)
            behind = {partition: stand for partition, stand in stands.items() if stand.offset < tails[partition].first}
            if not behind:
                return self._newest(run_id, wanted, stands, tails, most)
            fetched, later = await self._from_past(run_id, wanted, stands, behind, tails, most)
            if len(fetched) or later == stands:
                return fetched
            stands = later

    async def _tails_of(self, partitions: Iterable[int]) -> dict[int, Tail]:
        """Returns the tails of partitions; those that nobody has read lately are begun."""
        new = [partition for partition in partitions if partition not in self._tails]
        for partition in new:
            if partition not in self._waiting:
                self._waiting[partition] = asyncio.get_running_loop().create_future()
                self._tail_reader.follow(partition, partial(self._soon, self._begun, partition))
        try:
            async with asyncio.timeout(_ANSWER_S):
                for partition in new:
                    if partition in self._waiting:
                        await asyncio.shield(self._waiting[partition])
        except TimeoutError:
            raise Busy("the brokers do not answer") from None
        now_s = time.monotonic()
        for partition in partitions:
            self._tails[partition].used_s = now_s
        return {partition: self._tails[partition] for partition in partitions}

    def _begun(self, partition: int, offset: int) -> None:
        self._tails[partition] = Tail(offset)
        waiting = self._waiting.pop(partition)
        if not waiting.done():
            waiting.set_result(None)

    def _newest(
        self, run_id: str, wanted: PullSelection, stands: Mapping[int, Stand], tails: Mapping[int, Tail], most: int
    ) -> FetchedEntries:
        """Returns entries from the tails, in order of their times."""
        later = dict(stands)
        found: list[Entry] = []
        records = heapq.merge(
            *(tails[partition].after(stand.offset, run_id, wanted.rank) for partition, stand in stands.items()),
            key=lambda record: (record.time_ms, record.partition, record.offset),
        )
        for record in records:
            for entry in entries_of(record, later[record.partition], wanted.rank):
                found.append(entry)
                later[record.partition] = entry.after
                if len(found) == most:
                    return FetchedEntries(self._tier.generation, wanted, stands, found, later)
        for partition, stand in later.items():
            if tails[partition].end > stand.offset:
                later[partition] = Stand(tails[partition].end, 0, stand.number)
        return FetchedEntries(self._tier.generation, wanted, stands, found, later)

    async def _from_past(
        self,
        run_id: str,
        wanted: PullSelection,
        stands: Mapping[int, Stand],
        behind: Mapping[int, Stand],
        tails: Mapping[int, Tail],
        most: int,
    ) -> tuple[FetchedEntries, dict[int, Stand]]:
        """Returns entries from before the tails, and where the puller stands then."""
        untils = {partition: tails[partition].first for partition in behind}
        place = f"{run_id} {cursor_text(self._tier.generation, wanted, behind)}"
        reader = self._past.taken(place)
        if reader is None:
            reader = await asyncio.to_thread(PastReader, self._connection, self._tier, run_id, wanted.rank, behind)
        reading = asyncio.ensure_future(asyncio.to_thread(reader.read, untils, most))
        try:
            read = await asyncio.shield(reading)
        except asyncio.CancelledError:
            reading.add_done_callback(lambda _: self._close_soon(reader))
            raise
        except NewerForm:
            await asyncio.to_thread(reader.close)
            raise
        except KafkaException as error:
            await asyncio.to_thread(reader.close)
            self._tier_warnings.say("past", "%s", meaning(error.args[0]))
            raise Busy("the brokers do not answer") from None
        later = {**stands, **read.stands}
        still = {partition: stand for partition, stand in read.stands.items() if stand.offset < untils[partition]}
        closing = [reader]
        if still.keys() == behind.keys():
            closing = self._past.put(f"{run_id} {cursor_text(self._tier.generation, wanted, still)}", reader)
        for each in closing:
            await asyncio.to_thread(each.close)
        return FetchedEntries(self._tier.generation, wanted, stands, read.entries, later), later

    async def events(self, request: EventsRequest, grant: Grant | None = None, bounds: Bounds = FREE) -> EventsResponse:
        """Returns the events after a cursor. See ``PullCore``.

        Raises:
            Busy: they have not all been read yet.
        """
        if self._has_unread_events:
            check_puller(request.run_id, grant)
            raise Busy("the events of the runs have not all been read yet")
        return await super().events(request, grant, bounds)

    async def _note_events(self) -> None:
        while True:
            records, is_end = await self._events_read.get()
            for offset, logs in records:
                self._events.make_room(logs.events, self._store.holds)
                taking = self._events.taking(logs.events, "", offset * _MOST_EVENTS_OF_A_RECORD + 1)
                refused = await in_turns(taking)
                refused.update(logs.refused)
                self._events.note(refused, logs.ignored)
            self._room_for_events.release()
            self._has_unread_events &= not is_end
            self.wake(events_of(event.sender.run.run_id) for _, logs in records for event in logs.events)

    def _check_shard(self, request: PullRequest) -> None:
        if request.shards and (request.HasField("rank") or request.shard >= request.shards):
            raise BadRequest("shard must be below shards, and there must be no rank")

    def _close_soon(self, reader: PastReader) -> None:
        """Closes a reader whose puller has left."""
        asyncio.get_running_loop().run_in_executor(None, reader.close)

    # -- the live page -----------------------------------------------------------------------------------

    def entries(self, run_id: str, cursor: str, most: int, rank: int | None = None) -> StoredPage:
        """Returns entries of a rank that somebody looks at; its steps are read while the page shows them.

        Raises:
            UnknownRun, StaleCursor: the run or the cursor cannot be used.
        """
        store = self._view(run_id, rank or 0).store
        if not store.holds(run_id):
            return StoredPage((), cursor, 0)
        return store.after(run_id, cursor, rank or 0, most)

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank; 0 if there is none."""
        if not self._known.last_number(run_id, rank):
            return 0
        return max(self._view(run_id, rank).store.last_number(run_id, rank), self._known.last_number(run_id, rank))

    def _view(self, run_id: str, rank: int) -> ViewedRank:
        viewed = self._viewed.get((run_id, rank))
        if viewed is None:
            viewed = self._viewed[run_id, rank] = ViewedRank(self, run_id, rank)
            while len(self._viewed) > _VIEWED:
                self._viewed.popitem(last=False)[1].close()
        self._viewed.move_to_end((run_id, rank))
        viewed.used_s = time.monotonic()
        return viewed

    def trim_views(self) -> None:
        """Drops the ranks that were looked at longest ago if all take too much memory together."""
        while len(self._viewed) > 1 and sum(each.store.size for each in self._viewed.values()) > _ALL_VIEW_BYTES:
            self._viewed.popitem(last=False)[1].close()


class ViewedRank:
    """The steps of a rank that somebody looks at on the live page, read into memory.

    Args:
        core: reads the topics.
        run_id: the run.
        rank: the rank.

    Attributes:
        store: the steps.
        used_s: when the page asked last.
    """

    def __init__(self, core: TierCore, run_id: str, rank: int) -> None:
        self.store: MemoryStore = MemoryStore(StoreLimits(run_bytes=_VIEW_BYTES, all_bytes=_VIEW_BYTES))
        self.used_s: float = time.monotonic()
        self._core, self._run_id, self._rank = core, run_id, rank
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        cursor, wanted = "", PullSelection(self._rank)
        while True:
            found: Sequence[StoredFrame] = ()
            with suppress(UnknownRun, StaleCursor, Busy):
                fetched = await self._core.fetch(self._run_id, cursor, wanted, _READ_AT_ONCE)
                after = fetched.after(self._run_id, fetched.first, self._rank, len(fetched))
                self.store.add(entry.item for entry in after.entries)
                self._core.trim_views()
                found, cursor = after.entries, after.cursor
            if found:
                self._core.changed.note([self._run_id])
                await pause()
            else:
                await self._core.news(self._run_id, _LOOK_AGAIN_S)

    def close(self) -> None:
        """Stops reading."""
        self._reading.cancel()


def _wanted(request: PullRequest) -> PullSelection:
    rank = request.rank if request.HasField("rank") else None
    return PullSelection(rank, request.shard, request.shards)
