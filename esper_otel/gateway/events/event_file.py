"""Keeps the events of runs in an SQLite file next to that of the steps, or in memory."""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from esper_otel.gateway.limits import Limits, SharedPlaces
from esper_otel.gateway.receive.log_records import NO_ROOM_FOR_EVENTS, TOO_MANY_EVENTS, EventRecord, Value
from esper_otel.gateway.receive.request import PointSender
from esper_otel.gateway.store.base import cursor_place, cursor_text
from esper_otel.gateway.store.side_file import SideFile
from esper_otel.log import Warnings
from esper_otel.schema.events import OUTCOME, RUN_ENDED
from esper_otel.text import printable

FILE = "events.sqlite3"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, run TEXT UNIQUE, life TEXT, last INTEGER, tenant TEXT, received REAL
);
CREATE TABLE IF NOT EXISTS events (
    run INTEGER, position INTEGER, rank INTEGER, attempt INTEGER, process TEXT, number INTEGER, missed INTEGER,
    time INTEGER, content TEXT, PRIMARY KEY (run, position)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS events_by_number ON events (run, rank, attempt, number, time);
"""
_RUNS = "SELECT id, run, life, last, tenant, received FROM runs"
_COUNTED = """
SELECT run, rank, attempt, max(number), count(DISTINCT number), count(*), max(position) FROM events GROUP BY 1, 2, 3
"""
_ROOM_AT_ONCE = 40  # the part of the room that is made at once, since looking for runs takes time
_MOST_POSITION, _MOST_NUMBER = 2**62, 2**53
_ENDED = "SELECT run, rank, attempt, content FROM events WHERE content LIKE ?"
_STRANGE = "it has rows that a gateway cannot have written"
_AFTER = """
SELECT position, rank, attempt, process, number, missed, time, content FROM events
WHERE run = ?1 AND position > ?2 AND (?3 IS NULL OR rank = ?3) ORDER BY position LIMIT ?4
"""
_NEWEST = """
SELECT position, rank, attempt, process, number, missed, time, content FROM events
WHERE run = ?1 AND rank = ?2 ORDER BY position DESC LIMIT ?3
"""

_LAST = 10**18  # a position that no event has
_VALUES = frozenset({str, int, float, bool})

_SURROGATE = re.compile("[\ud800-\udfff]")  # which no message can carry

# A rank and an attempt: whose events are numbered.
_Numbered: TypeAlias = tuple[int, int]


class StoredEvent(NamedTuple):
    """An event and its position.

    Attributes:
        position: 1, 2, ... within the run, in order of arrival.
        rank: rank of its process.
        attempt: attempt of its process.
        process: tells a process from the first one that claimed the same rank and attempt; empty for the first.
        number: 1, 2, ... within the rank and attempt.
        missed: how many events directly before it had not arrived when it did.
        time_unix_ns: when it happened.
        name: which kind of event it is.
        severity: severity number of OTLP; 0 if it is not known.
        text: the event as a sentence.
        step: the step in or after which it happened; None if it is not known.
        epoch: the epoch of that step; None if it is not known.
        attributes: what else is said of it.
    """

    position: int
    rank: int
    attempt: int
    process: str
    number: int
    missed: int
    time_unix_ns: int
    name: str
    severity: int
    text: str
    step: int | None
    epoch: int | None
    attributes: dict[str, Value]


class EventfulProcess(NamedTuple):
    """A process of which there are events.

    Attributes:
        attempt: its attempt.
        rank: its rank.
        silent_s: for how long no event of its run has arrived, while a gateway was running.
        ended: how it ended; None if no event says so.
        sender: who it is; None if it has sent no event since this gateway began.
    """

    attempt: int
    rank: int
    silent_s: float
    ended: str | None
    sender: PointSender | None


class StoredEventPage(NamedTuple):
    """The events after a cursor.

    Attributes:
        events: the events, in order of arrival.
        cursor: the cursor for the next page.
        gap: how many events directly before those here had not arrived when they did.
    """

    events: Sequence[StoredEvent]
    cursor: str
    gap: int


@dataclass(slots=True)
class _EventfulRun:
    """What is known of a run without reading the file.

    Attributes:
        id: its number in the file.
        life: tells its events from those of an earlier file.
        last: the position of its newest event.
        tenant: whose share it uses.
        received_s: when its newest event arrived, by the age of the store.
        count: how many events it has.
        numbers: of each rank and attempt, the highest number, and how many numbers there are.
        ended: of each that has said so, how it ended.
        senders: of each that has sent events since this gateway began, who it is.
    """

    id: int
    life: str
    last: int
    tenant: str
    received_s: float
    count: int = 0
    numbers: dict[_Numbered, tuple[int, int]] = field(default_factory=dict)
    ended: dict[_Numbered, str] = field(default_factory=dict)
    senders: dict[_Numbered, PointSender] = field(default_factory=dict)


class EventFile:
    """Events by run. Threads: one at a time.

    Args:
        folder: the folder of the store; None keeps everything in memory.
        limits: how many there may be.
        warnings: where damage is reported.
        age_s: a time in seconds that passes only while a gateway runs, and never jumps: see ``Store.age_s``.
        life: what cursors name of all runs, if other gateways have the same events at the same positions.

    Attributes:
        places: the room for events, and how much of it is used.
    """

    def __init__(
        self,
        folder: Path | None,
        limits: Limits,
        warnings: Warnings,
        age_s: Callable[[], float] = time.monotonic,
        life: str | None = None,
    ) -> None:
        self._limits = limits
        self._life = life
        self._age_s = age_s
        self._warnings = warnings
        self._runs: dict[str, _EventfulRun] = {}
        self.places: SharedPlaces = SharedPlaces(limits.all_events)
        self._file = SideFile(folder, FILE, _SCHEMA, "events", self._load, warnings)

    def _load(self, connection: sqlite3.Connection) -> None:
        """Reads what is known of each run.

        Raises:
            sqlite3.Error: the file is damaged, or has what a gateway cannot have written.
        """
        runs: dict[str, _EventfulRun] = {}
        by_id: dict[int, _EventfulRun] = {}
        for number, run, life, last, tenant, received_s in connection.execute(_RUNS):
            are_ours = list(map(type, (run, life, last, tenant, received_s))) == [str, str, int, str, float]
            if not are_ours or not life.isalnum() or not 0 <= last < _MOST_POSITION:
                raise sqlite3.DatabaseError(_STRANGE)
            # An earlier version noted Unix time; and after a kill, the store's age may be behind.
            runs[run] = by_id[number] = _EventfulRun(number, life, last, tenant, min(received_s, self._age_s()))
        for number, rank, attempt, highest, distinct, count, position in connection.execute(_COUNTED):
            if not type(rank) is type(attempt) is type(highest) is type(position) is int or highest < distinct:
                raise sqlite3.DatabaseError(_STRANGE)
            if number in by_id:
                if position > by_id[number].last:  # it would be given again
                    raise sqlite3.DatabaseError(_STRANGE)
                by_id[number].numbers[rank, attempt] = highest, distinct
                by_id[number].count += count
        for number, rank, attempt, content in connection.execute(_ENDED, (f'["{RUN_ENDED}",%',)):
            event = _event_of((0, 0, 0, "", 1, 0, 0), content)
            if number in by_id and event is not None:
                by_id[number].ended[rank, attempt] = _outcome(event.attributes)
        self._runs = runs
        self.places = SharedPlaces(self._limits.all_events)
        for found in runs.values():
            self.places.restore(found.tenant, found.count)

    def add(self, events: Sequence[EventRecord], tenant: str, first: int = 1) -> tuple[int, Counter[str]]:
        """Stores events, all or nothing; repeated ones are left out. Their positions are not below ``first``.

        Returns:
            How many were new, and how many were refused, by reason.

        Raises:
            StoreFull: nothing was stored.
        """
        refused: Counter[str] = Counter()
        added = 0
        opened = self._file.connection
        before = {run_id: self._copied(run_id) for run_id in {event.sender.run.run_id for event in events}}
        try:
            with self._file.transaction() as connection:
                for event in events:
                    outcome = self._add(connection, event, tenant, first)
                    if isinstance(outcome, str):
                        refused[outcome] += 1
                    else:
                        added += outcome
        except BaseException:
            if self._file.connection is opened:  # otherwise another file was begun and read
                self._restore(before)
            raise
        return added, refused

    def _copied(self, run_id: str) -> _EventfulRun | None:
        run = self._runs.get(run_id)
        if run is None:
            return None
        return replace(run, numbers=dict(run.numbers), ended=dict(run.ended), senders=dict(run.senders))

    def _restore(self, before: Mapping[str, _EventfulRun | None]) -> None:
        """Forgets what was not stored after all: a cursor must not be past events that come when they are repeated."""
        for run_id, run in before.items():
            now = self._runs.pop(run_id, None)
            if now is not None and now.count > (0 if run is None else run.count):
                self.places.give_back(now.tenant, now.count - (0 if run is None else run.count))
            if run is not None:
                self._runs[run_id] = run

    def _add(self, connection: sqlite3.Connection, event: EventRecord, tenant: str, first: int) -> bool | str:
        """Stores an event; returns whether it is new, or why it is refused.

        What a later process sends of an earlier one is known by number and time. The same number with another time is
        of a second process that claims the rank.
        """
        of = event.sender.run
        run = self._runs.get(of.run_id)
        times = [] if run is None else self._times(connection, run, event)
        if event.time_unix_ns in times:
            return False
        if run is not None and run.count >= self._limits.events:
            return TOO_MANY_EVENTS
        if not self.places.take(tenant if run is None else run.tenant):
            return NO_ROOM_FOR_EVENTS
        if run is None:
            run = self._runs[of.run_id] = self._begin(connection, of.run_id, tenant)
        run.last, run.count, run.received_s = max(run.last + 1, first), run.count + 1, self._age_s()
        process, missed = _digest(event.sender.process) if times else "", 0
        if not times:
            highest, count = run.numbers.get((of.rank, of.attempt), (0, 0))
            run.numbers[of.rank, of.attempt] = max(highest, event.number), count + 1
            missed = max(event.number - 1 - highest, 0)
            run.senders[of.rank, of.attempt] = event.sender
            if event.name == RUN_ENDED:
                run.ended[of.rank, of.attempt] = _outcome(event.attributes)
        place = (run.id, run.last, of.rank, of.attempt, process, event.number, missed)
        row = (*place, event.time_unix_ns, event.content())
        connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("UPDATE runs SET last = ?, received = ? WHERE id = ?", (run.last, run.received_s, run.id))
        return True

    def _times(self, connection: sqlite3.Connection, run: _EventfulRun, event: EventRecord) -> list[int]:
        """Returns the times of the stored events with the number of this one."""
        of = event.sender.run
        if event.number > run.numbers.get((of.rank, of.attempt), (0, 0))[0]:
            return []
        found = "SELECT time FROM events WHERE run = ? AND rank = ? AND attempt = ? AND number = ?"
        return [
            time_unix_ns for (time_unix_ns,) in connection.execute(found, (run.id, of.rank, of.attempt, event.number))
        ]

    def _begin(self, connection: sqlite3.Connection, run_id: str, tenant: str) -> _EventfulRun:
        life = self._life or secrets.token_hex(8)
        made = connection.execute(
            "INSERT INTO runs (run, life, last, tenant, received) VALUES (?, ?, 0, ?, 0)", (run_id, life, tenant)
        )
        return _EventfulRun(made.lastrowid or 0, life, 0, tenant, 0.0)

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredEventPage | None:
        """Returns the events after a cursor: of a rank, or of all; None if nothing of the run is stored.

        Raises:
            StaleCursor: the cursor is from an earlier store of the run, or was issued for other ranks.
            StoreFull: the file cannot be read at present.
        """
        run = self._runs.get(run_id)
        if run is None:
            return None
        newest = run.last if self._life is None else _LAST  # another gateway may have had newer ones already
        before = cursor_place(cursor, run.life, rank, newest, what="events")
        rows = self._file.rows(_AFTER, (run.id, before, rank, most))
        events = self._read(rows)
        place = rows[-1][0] if len(rows) == most else max(run.last, before)
        return StoredEventPage(events, cursor_text(run.life, rank, place), sum(event.missed for event in events))

    def newest(self, run_id: str, rank: int, most: int) -> list[StoredEvent]:
        """Returns the newest events of a rank, oldest first."""
        run = self._runs.get(run_id)
        if run is None:
            return []
        return self._read(self._file.rows(_NEWEST, (run.id, rank, most))[::-1])

    def _read(self, rows: Sequence[Any]) -> list[StoredEvent]:
        """Returns rows as events, without those that a gateway cannot have written."""
        events = []
        for *place, content in rows:
            event = _event_of(place, content)
            if event is None:
                self._warnings.say("damaged event", "an event cannot be read and is left out")
            else:
                events.append(event)
        return events

    def mark(self, run_id: str) -> str:
        """Returns a text that changes with each new event of a run; empty if it has none."""
        run = self._runs.get(run_id)
        return "" if run is None else cursor_text(run.life, None, run.last)

    def run_ids(self) -> set[str]:
        """Returns the runs that have events."""
        return {*self._runs}

    def processes(self, run_id: str) -> list[EventfulProcess]:
        """Returns the processes of a run that have sent events, by attempt and rank."""
        run = self._runs.get(run_id)
        if run is None:
            return []
        silent_s = max(self._age_s() - run.received_s, 0.0)
        return [
            EventfulProcess(attempt, rank, silent_s, run.ended.get((rank, attempt)), run.senders.get((rank, attempt)))
            for attempt, rank in sorted((attempt, rank) for rank, attempt in run.numbers)
        ]

    def missing(self) -> int:
        """Returns how many events have not arrived although later ones of their rank and attempt have."""
        return sum(highest - count for run in self._runs.values() for highest, count in run.numbers.values())

    def abandoned(self, is_known: Callable[[str], bool], idle_s: float) -> list[str]:
        """Returns the runs that are not known, and of which no event has arrived for so long."""
        before_s = self._age_s() - idle_s
        return [run_id for run_id, run in self._runs.items() if run.received_s < before_s and not is_known(run_id)]

    def count(self, run_id: str) -> int:
        """Returns how many events a run has."""
        run = self._runs.get(run_id)
        return 0 if run is None else run.count

    def forget(self, run_ids: Iterable[str]) -> None:
        """Deletes the events of these runs.

        Raises:
            StoreFull: nothing was deleted.
        """
        gone = {run_id: self._runs[run_id] for run_id in run_ids if run_id in self._runs}
        if not gone:
            return
        ids = [(run.id,) for run in gone.values()]
        with self._file.transaction() as connection:
            connection.executemany("DELETE FROM events WHERE run = ?", ids)
            connection.executemany("DELETE FROM runs WHERE id = ?", ids)
        for run_id, run in gone.items():
            del self._runs[run_id]
            self.places.give_back(run.tenant, run.count)

    def make_room(self, runs: Mapping[str, int], is_known: Callable[[str], bool]) -> list[str]:
        """Forgets runs until there is room, and returns them: first those that are not known, the longest silent first.

        It is for events that nobody can be refused: then old events give way to new ones.

        Args:
            runs: how many events are to be stored, by run; these runs are not forgotten.
            is_known: whether steps of a run are stored.
        """
        wanted = min(sum(runs.values()), self.places.most // 4)
        if self.places.left("") >= wanted:
            return []
        wanted = max(wanted, self.places.most // _ROOM_AT_ONCE)
        others = [(is_known(run_id), run.last, run_id) for run_id, run in self._runs.items() if run_id not in runs]
        gone: list[str] = []
        count = 0
        for _, _, run_id in sorted(others):
            if self.places.left("") + count >= wanted:
                break
            gone.append(run_id)
            count += self._runs[run_id].count
        self.forget(gone)
        return gone

    @property
    def damaged(self) -> int:
        """How many damaged files were put aside."""
        return self._file.damaged

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _event_of(place: Sequence[Any], content: str) -> StoredEvent | None:
    """Returns an event from its row; None if a gateway cannot have written it."""
    try:
        event = StoredEvent(*place, *json.loads(content))
        texts = (event.process, event.name, event.text, *event.attributes)
        values = event.attributes.values()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    small = (event.rank, event.severity)
    numbers = (*small, event.attempt, event.number, event.missed, event.time_unix_ns)
    further = [each for each in (event.step, event.epoch) if each is not None]
    texts = (*texts, *(each for each in values if type(each) is str))
    are_texts = all(type(each) is str and not _SURROGATE.search(each) for each in texts)
    are_numbers = all(type(each) is int and 0 <= each < 2**63 for each in (*numbers, *further))
    are_counts = are_numbers and event.missed < event.number < _MOST_NUMBER
    are_values = all(type(each) in _VALUES and (type(each) is not int or abs(each) < 2**63) for each in values)
    return event if are_texts and are_counts and are_values and max(small) < 2**31 else None


def _outcome(attributes: Mapping[str, Value]) -> str:
    """Returns the outcome in the event of a run's end."""
    return printable(attributes.get(OUTCOME.name, "")) or "ended"


def _digest(process: str) -> str:
    return blake2b(process.encode(errors="surrogateescape"), digest_size=8).hexdigest()
