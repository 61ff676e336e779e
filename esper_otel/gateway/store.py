"""FileStore: released frames in an SQLite file, and the requests of which something still waits.

A transaction that was committed survives the end of the process, however it ends: SQLite's write-ahead log is then
in the kernel's hands (synchronous = NORMAL). A power cut may take the last transactions; it never tears one.
"""

from __future__ import annotations

import fcntl
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.frames import frame_from_bytes, frame_to_bytes
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.memory import loss_of
from esper_otel.gateway.stored import (
    Entry,
    Found,
    Kept,
    StoreFull,
    StoreLimits,
    UnknownRun,
    cursor_place,
    cursor_text,
)

_FILE = "steps.sqlite3"
_LOCK = "lock"
_VERSION = 1
_SCHEMA = """
CREATE TABLE runs (id INTEGER PRIMARY KEY, run_id TEXT UNIQUE, life TEXT, last INTEGER, added_s REAL);
CREATE TABLE ranks (run INTEGER, rank INTEGER, last INTEGER, PRIMARY KEY (run, rank)) WITHOUT ROWID;
CREATE TABLE items (
    run INTEGER, position INTEGER, rank INTEGER, number INTEGER, attempt INTEGER, writer TEXT, revision INTEGER,
    complete INTEGER, received INTEGER, loss_before REAL, size INTEGER, frame BLOB
);
CREATE UNIQUE INDEX items_by_position ON items (run, position);
CREATE UNIQUE INDEX items_by_number ON items (run, rank, number);
CREATE TABLE bodies (id INTEGER PRIMARY KEY, is_json INTEGER, received INTEGER, body BLOB);
"""
_COLUMNS = "position, number, attempt, rank, writer, frame, revision, complete, received, loss_before"
_ROW_BYTES = 150
_RESTORED = 256


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

    def copied(self) -> _Run:
        other = copy(self)
        other.ranks, other.losses, other.counts = dict(self.ranks), dict(self.losses), Counter(self.counts)
        return other


class FileStore:
    """Keeps entries in ``<folder>/steps.sqlite3``. See ``Store``.

    Args:
        folder: made when it is not there; one gateway at a time has it.
        limits: how much is stored.
        clock: Unix time, in seconds.
        read_only: only reads; a gateway may be writing.

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path | str,
        limits: StoreLimits | None = None,
        clock: Callable[[], float] = time.time,
        *,
        read_only: bool = False,
    ) -> None:
        self._limits = limits or StoreLimits()
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._body_count = 0
        self.dropped = 0
        self.size = 0
        path = Path(folder)
        self._lock = None if read_only else _locked(path)
        try:
            self._connection = _opened(path / _FILE, read_only=read_only)
            self._load()
        except sqlite3.Error as error:
            self.close()
            raise ConfigurationError(f"{path / _FILE} is no store that this version can use: {error}") from error
        except BaseException:
            self.close()
            raise

    def add(self, items: Iterable[Item], *, kept: Kept | None = None, nothing_waits: bool = True) -> None:
        """Stores frames and a body, all or nothing. See ``Store``."""
        items = list(items)
        if not items and kept is None and not (nothing_waits and self._body_count):
            return
        changed: dict[str, _Run] = {}
        dropped = 0
        with self._transaction() as connection:
            bodies = self._body_count
            if nothing_waits and bodies:
                connection.execute("DELETE FROM bodies")
                bodies = 0
            if kept is not None:
                connection.execute(
                    "INSERT INTO bodies (is_json, received, body) VALUES (?, ?, ?)",
                    (kept.is_json, kept.received_unix_ns, kept.body),
                )
                bodies += 1
            for item in items:
                self._insert(connection, item, changed)
            for run in changed.values():
                connection.execute(
                    "UPDATE runs SET last = ?, added_s = ? WHERE id = ?", (run.last, run.added_s, run.key)
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO ranks VALUES (?, ?, ?)", [(run.key, *each) for each in run.ranks.items()]
                )
                dropped += self._shrink(connection, run)
            dropped += self._shrink_all(connection, changed)
        self._body_count = bodies
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

    def counts(self) -> dict[tuple[str, int, int, str], int]:
        """How many entries each writer has."""
        return {origin: count for run in self._runs.values() for origin, count in run.counts.items() if count}

    def expire(self) -> list[str]:
        """Drops runs that were idle for long."""
        oldest_s = self._clock() - self._limits.idle_s
        gone = [run_id for run_id, run in self._runs.items() if run.added_s < oldest_s]
        for run_id in gone:
            run = self._runs[run_id]
            with self._transaction() as connection:
                for table in ("items", "ranks"):
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

    def bodies(self) -> list[Kept]:
        """The bodies that are kept, oldest first."""
        rows = self._connection.execute("SELECT body, is_json, received FROM bodies ORDER BY id")
        return [Kept(body, bool(is_json), received) for body, is_json, received in rows]

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
        self._body_count = self._connection.execute("SELECT count(*) FROM bodies").fetchone()[0]
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
            self.size += run.size

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreFull(f"the store cannot be written: {error}") from error
            raise

    def _insert(self, connection: sqlite3.Connection, item: Item, changed: dict[str, _Run]) -> None:
        run_id, attempt, rank, writer = item.origin
        run = changed.get(run_id)
        if run is None:
            before = self._runs.get(run_id)
            if before is None:
                life = secrets.token_hex(4)
                key = connection.execute("INSERT INTO runs (run_id, life) VALUES (?, ?)", (run_id, life)).lastrowid
                run = _Run(key or 0, life)
            else:
                run = before.copied()
            changed[run_id] = run
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
        run.added_s = self._clock()

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


def _locked(folder: Path):  # type: ignore[no-untyped-def] # the type of an open file has no short name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise ConfigurationError(f"--store {folder}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigurationError(f"--store {folder}: another gateway is using it") from None
    return lock


def _opened(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if read_only and not path.is_file():
        raise ConfigurationError(f"{path} is not there: give a folder that a gateway has stored to")
    connection = sqlite3.connect(path, isolation_level=None, timeout=1.0)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0 and not read_only:
        connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_VERSION};COMMIT;")
    elif version != _VERSION:
        connection.close()
        raise ConfigurationError(f"{path} has version {version}, not {_VERSION}: it was written by another esper_otel")
    return connection


def _entry(run_id: str, row: tuple[int, int, int, int, str, bytes, int, int, int, float | None]) -> Entry:
    position, number, attempt, rank, writer, frame, revision, complete, received, loss_before = row
    origin = Origin(run_id, attempt, rank, writer)
    item = Item(origin, frame_from_bytes(frame), revision, bool(complete), received)
    return Entry(position, number, item, loss_before)
