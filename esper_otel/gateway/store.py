"""FileStore: released frames in an SQLite file, and the requests of which something still waits.

A transaction that was committed survives the end of the process, however it ends: SQLite's write-ahead log is then
in the kernel's hands (synchronous = NORMAL). A power cut may take the last transactions; it never tears one.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from pathlib import Path

from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frame import Frame
from esper_otel.gateway.database import FILE, locked, opened, transaction
from esper_otel.gateway.frames import frame_from_bytes, frame_to_bytes
from esper_otel.gateway.items import Item, Origin, Place
from esper_otel.gateway.memory import loss_of
from esper_otel.gateway.stored import (
    NOTHING_ENDED,
    Entry,
    Found,
    Kept,
    StoreLimits,
    cursor_place,
    cursor_text,
)

_COLUMNS = "position, number, attempt, rank, writer, frame, revision, complete, received, loss_before"
_ROW_BYTES = 150
_RESTORED = 256
_NO_BODY = 2**62
_AGE_EVERY_S = 60.0


class _Run:
    """What is known of a run without asking the file."""

    def __init__(self, key: int, life: str) -> None:
        self.key = key
        self.life = life
        self.first = 1
        self.last = 0
        self.size = 0
        self.added_s = 0.0
        self.ranks: dict[int, int] = {}
        self.losses: dict[Origin, float | None] = {}
        self.counts: Counter[Origin] = Counter()
        self.outcomes: dict[Origin, str] = {}

    def copied(self) -> _Run:
        other = copy(self)
        other.ranks, other.losses, other.counts = dict(self.ranks), dict(self.losses), Counter(self.counts)
        other.outcomes = dict(self.outcomes)
        return other


class FileStore:
    """Keeps entries in ``<folder>/steps.sqlite3``. See ``Store``.

    Args:
        folder: made when it is not there; one gateway at a time has it.
        limits: how much is stored.
        clock: seconds that never go back; how old the store is, is counted with it over all its lives.
        read_only: only reads; a gateway may be writing.

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path | str,
        limits: StoreLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        read_only: bool = False,
    ) -> None:
        self._limits = limits or StoreLimits()
        self._clock, self._opened_s = clock, clock()
        self._age_before_s = self._age_noted_s = 0.0
        self._runs: dict[str, _Run] = {}
        self._bodies: list[int] = []
        self.dropped = 0
        self.size = 0
        path = self._folder = Path(folder)
        self._lock = None if read_only else locked(path)
        try:
            self._connection = opened(path / FILE, read_only=read_only)
            self._load()
        except sqlite3.Error as error:
            self.close()
            raise ConfigurationError(f"{path / FILE} is no store that this version can use: {error}") from error
        except BaseException:
            self.close()
            raise

    def add(
        self,
        items: Iterable[Item],
        *,
        ended: Mapping[Origin, str] = NOTHING_ENDED,
        places: Iterable[Place] = (),
        kept: Kept | None = None,
        first_kept: int | None = None,
    ) -> None:
        """Stores frames, outcomes and a body, all or nothing. See ``Store``."""
        items = list(items)
        bodies = [number for number in self._bodies if first_kept is not None and number >= first_kept]
        if not items and not ended and kept is None and bodies == self._bodies:
            return
        changed: dict[str, _Run] = {}
        dropped = 0
        with transaction(self._connection) as connection:
            if bodies != self._bodies:
                connection.execute("DELETE FROM bodies WHERE number < ?", (first_kept or _NO_BODY,))
            if kept is not None:
                connection.execute(
                    "INSERT INTO bodies VALUES (?, ?, ?, ?)",
                    (kept.number, kept.is_json, kept.received_unix_ns, kept.body),
                )
                bodies.append(kept.number)
            for item in items:
                self._insert(connection, item, changed)
            for origin, outcome in ended.items():
                self._end(connection, origin, outcome, changed)
            for place in places:
                self._place(connection, place, changed)
            for run in changed.values():
                connection.execute(
                    "UPDATE runs SET last = ?, added_s = ? WHERE id = ?", (run.last, run.added_s, run.key)
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO ranks VALUES (?, ?, ?)", [(run.key, *each) for each in run.ranks.items()]
                )
                dropped += self._shrink(connection, run)
            dropped += self._shrink_all(connection, changed)
        self._bodies = bodies
        self._runs |= changed
        self.size = sum(run.size for run in self._runs.values())
        self.dropped += dropped

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> Found:
        """Entries after a cursor. See ``Store``."""
        run = self._runs.get(run_id)
        if run is None:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        newest = run.last if rank is None else run.ranks.get(rank, 0)
        place = cursor_place(cursor, run.life, rank, newest)
        if rank is None:
            where, of_run = "run = ? AND position > ? ORDER BY position", (run.key, place)
        else:
            where, of_run = "run = ? AND rank = ? AND number > ? ORDER BY number", (run.key, rank, place)  # type: ignore[assignment]
        rows = self._connection.execute(f"SELECT {_COLUMNS} FROM items WHERE {where} LIMIT ?", (*of_run, most))  # noqa: S608
        entries = [_entry(run_id, row) for row in rows]
        places = [entry.position if rank is None else entry.number for entry in entries]
        last = places[-1] if places else newest
        gap = (places[0] if places else newest + 1) - place - 1
        return Found(entries, cursor_text(run.life, rank, last), gap)

    def counts(self) -> dict[Origin, int]:
        """How many entries each writer has."""
        return {origin: count for run in self._runs.values() for origin, count in run.counts.items() if count}

    def outcomes(self) -> dict[Origin, str]:
        """How the runs ended of which something is stored."""
        return {origin: outcome for run in self._runs.values() for origin, outcome in run.outcomes.items()}

    def expire(self) -> list[str]:
        """Drops runs that were idle for long."""
        oldest_s = self._age_s() - self._limits.idle_s
        if self._age_s() > self._age_noted_s + _AGE_EVERY_S:
            with transaction(self._connection) as connection:
                connection.execute("UPDATE age SET seconds = ?", (self._age_s(),))
            self._age_noted_s = self._age_s()
        gone = [run_id for run_id, run in self._runs.items() if run.added_s < oldest_s]
        for run_id in gone:
            run = self._runs[run_id]
            with transaction(self._connection) as connection:
                for table in ("items", "ranks", "ends", "places"):
                    connection.execute(f"DELETE FROM {table} WHERE run = ?", (run.key,))  # noqa: S608
                connection.execute("DELETE FROM runs WHERE id = ?", (run.key,))
            del self._runs[run_id]
            self.dropped += run.counts.total()
            self.size -= run.size
        return gone

    def newest(self) -> list[Item]:
        """The newest frames of each writer, oldest first: what an assembler goes on from."""
        items = []
        for run_id, run in self._runs.items():
            for origin in run.counts:
                rows = self._connection.execute(
                    f"SELECT {_COLUMNS} FROM items WHERE run = ? AND rank = ? AND attempt = ? AND writer = ? "  # noqa: S608
                    "ORDER BY number DESC LIMIT ?",
                    (run.key, origin.rank, origin.attempt, origin.writer, _RESTORED),
                )
                found: dict[int, Item] = {}
                for row in rows:
                    item = _entry(run_id, row).item
                    found.setdefault(item.frame.time_unix_ns, item)  # the newest revision comes first
                items += sorted(found.values(), key=lambda item: item.frame.time_unix_ns)
        return items

    def first_frames(self) -> dict[Origin, Frame]:
        """The oldest frame of each writer."""
        found = {}
        for origin in self.counts():
            key = self._runs[origin.run_id].key
            (frame,) = self._connection.execute(
                "SELECT frame FROM items WHERE run = ? AND rank = ? AND attempt = ? AND writer = ? "
                "ORDER BY number LIMIT 1",
                (key, origin.rank, origin.attempt, origin.writer),
            ).fetchone()
            found[origin] = frame_from_bytes(frame)
        return found

    def places(self) -> list[Place]:
        """Where the writers stand of which something is stored."""
        names = {run.key: run_id for run_id, run in self._runs.items()}
        rows = self._connection.execute(
            "SELECT run, attempt, rank, writer, next, lowest, missing, says_step, says_epoch, holes FROM places"
        )
        found = []
        for run, *origin, next_number, lowest, missing, says_step, says_epoch, holes in rows:
            place = (next_number, lowest, missing, bool(says_step), bool(says_epoch))
            found.append(Place(Origin(names[run], *origin), *place, tuple(map(tuple, json.loads(holes)))))
        counts = self.counts()
        return [place for place in found if place.origin in counts]

    def bodies(self) -> list[Kept]:
        """The bodies that are kept, oldest first."""
        return [self.body(number) for number in self._bodies]

    def body_numbers(self) -> list[int]:
        """The numbers of the bodies that are kept, oldest first."""
        return list(self._bodies)

    def body(self, number: int) -> Kept:
        """A body that is kept."""
        row = self._connection.execute("SELECT body, is_json, received FROM bodies WHERE number = ?", (number,))
        body, is_json, received = row.fetchone()
        return Kept(number, body, bool(is_json), received)

    def put_aside(self, number: int) -> Path:
        """Puts a body into a file of its own, where it is in nobody's way; returns the file."""
        body = self._connection.execute("SELECT body FROM bodies WHERE number = ?", (number,)).fetchone()[0]
        path = self._folder / f"body-{number}-{secrets.token_hex(4)}.refused"
        content = body if isinstance(body, bytes) else str(body).encode()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        with transaction(self._connection) as connection:
            connection.execute("DELETE FROM bodies WHERE number = ?", (number,))
        self._bodies.remove(number)
        return path

    def run_ids(self) -> list[str]:
        """The runs of which something is stored."""
        return sorted(self._runs)

    def close(self) -> None:
        """Closes the file."""
        if hasattr(self, "_connection"):
            self._connection.close()
        if self._lock is not None:
            self._lock.close()

    def _load(self) -> None:
        self._bodies = [number for (number,) in self._connection.execute("SELECT number FROM bodies ORDER BY number")]
        for key, run_id, life, last, added_s in self._connection.execute(
            "SELECT id, run_id, life, last, added_s FROM runs"
        ).fetchall():
            run = self._runs[run_id] = _Run(key, life)
            run.last, run.added_s = last, added_s
            run.ranks = dict(self._connection.execute("SELECT rank, last FROM ranks WHERE run = ?", (key,)))
            first, run.size = self._connection.execute(
                "SELECT coalesce(min(position), ?), coalesce(sum(size), 0) FROM items WHERE run = ?", (last + 1, key)
            ).fetchone()
            run.first = first
            writers = self._connection.execute(
                "SELECT attempt, rank, writer, count(*), max(position) FROM items WHERE run = ? "
                "GROUP BY attempt, rank, writer",
                (key,),
            ).fetchall()
            for attempt, rank, writer, count, position in writers:
                origin = Origin(run_id, attempt, rank, writer)
                run.counts[origin] = count
                (frame,) = self._connection.execute(
                    "SELECT frame FROM items WHERE run = ? AND position = ?", (key, position)
                ).fetchone()
                run.losses[origin] = loss_of(frame_from_bytes(frame))
            ends = self._connection.execute("SELECT attempt, rank, writer, outcome FROM ends WHERE run = ?", (key,))
            run.outcomes = {Origin(run_id, *origin): outcome for *origin, outcome in ends}
            self.size += run.size
        if self._lock is not None:
            (self._age_before_s,) = self._connection.execute("SELECT seconds FROM age").fetchone()
            # Not all of it may have been noted: what was added last was added by then.
            self._age_before_s = max([self._age_before_s, *(run.added_s for run in self._runs.values())])
            self._age_noted_s = self._age_before_s

    def _age_s(self) -> float:
        """For how long gateways have run on this folder."""
        return self._age_before_s + self._clock() - self._opened_s

    def _insert(self, connection: sqlite3.Connection, item: Item, changed: dict[str, _Run]) -> None:
        run_id, attempt, rank, writer = item.origin
        run = changed.get(run_id) or self._copied(run_id, changed)
        if run is None:
            life = secrets.token_hex(4)
            key = connection.execute("INSERT INTO runs (run_id, life) VALUES (?, ?)", (run_id, life)).lastrowid
            run = changed[run_id] = _Run(key or 0, life)
        frame = frame_to_bytes(item.frame)
        size = len(frame) + _ROW_BYTES
        run.last += 1
        run.ranks[rank] = run.ranks.get(rank, 0) + 1
        connection.execute(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(run.key, run.last, rank, run.ranks[rank], attempt, writer, item.revision, item.complete),
                *(item.received_unix_ns, run.losses.get(item.origin), size, frame),
            ),
        )
        run.losses[item.origin] = loss_of(item.frame)
        run.counts[item.origin] += 1
        run.size += size
        run.added_s = self._age_s()

    def _end(self, connection: sqlite3.Connection, origin: Origin, outcome: str, changed: dict[str, _Run]) -> None:
        """Stores an outcome, if anything else of the run is stored."""
        run = changed.get(origin.run_id) or self._copied(origin.run_id, changed)
        if run is not None:
            row = (run.key, origin.rank, origin.attempt, origin.writer, outcome)
            connection.execute("INSERT OR REPLACE INTO ends VALUES (?, ?, ?, ?, ?)", row)
            run.outcomes[origin] = outcome

    def _place(self, connection: sqlite3.Connection, place: Place, changed: dict[str, _Run]) -> None:
        """Stores where a writer stands, if anything of the run is stored."""
        origin = place.origin
        run = changed.get(origin.run_id) or self._copied(origin.run_id, changed)
        if run is not None:
            of_writer = (run.key, origin.rank, origin.attempt, origin.writer)
            row = (*of_writer, *place[1:-1], json.dumps(place.holes))
            connection.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _copied(self, run_id: str, changed: dict[str, _Run]) -> _Run | None:
        """A copy that a transaction may change; none when nothing of the run is stored."""
        before = self._runs.get(run_id)
        if before is not None:
            changed[run_id] = before.copied()
        return changed.get(run_id)

    def _shrink(self, connection: sqlite3.Connection, run: _Run, surplus: int = 0) -> int:
        """Drops the oldest entries of a run that is too large, or so many bytes; returns how many."""
        limit = min(self._limits.run_bytes, run.size - surplus)
        count = 0
        while run.first <= run.last and (run.size > limit or run.last - run.first >= self._limits.steps):
            of_entry = (run.key, run.first)
            attempt, rank, writer, size = connection.execute(
                "SELECT attempt, rank, writer, size FROM items WHERE run = ? AND position = ?", of_entry
            ).fetchone()
            connection.execute("DELETE FROM items WHERE run = ? AND position = ?", of_entry)
            run_id = next(iter(run.counts)).run_id
            run.counts[Origin(run_id, attempt, rank, writer)] -= 1
            run.size -= size
            run.first += 1
            count += 1
        return count

    def _shrink_all(self, connection: sqlite3.Connection, changed: dict[str, _Run]) -> int:
        count = 0
        while True:
            runs = self._runs | changed
            surplus = sum(run.size for run in runs.values()) - self._limits.all_bytes
            if surplus <= 0:
                return count
            run_id = max(runs, key=lambda run_id: runs[run_id].size)
            run = changed.setdefault(run_id, runs[run_id].copied())
            count += self._shrink(connection, run, surplus)


def _entry(run_id: str, row: tuple[int, int, int, int, str, bytes, int, int, int, float | None]) -> Entry:
    position, number, attempt, rank, writer, frame, revision, complete, received, loss_before = row
    origin = Origin(run_id, attempt, rank, writer)
    item = Item(origin, frame_from_bytes(frame), revision, bool(complete), received)
    return Entry(position, number, item, loss_before)
