"""FileStore: released frames in an SQLite file, and the requests of which something still waits.

A transaction that was committed survives the end of the process, however it ends: SQLite's write-ahead log is then
in the kernel's hands (synchronous = NORMAL). A power cut may take the last transactions; it never tears one.

Whatever is found in the file, the gateway starts. A row that cannot be ours is written to a file of its own in the
folder ``damaged`` and taken out; a file that SQLite cannot read gets a name with the time, and a new one is begun.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frames.encoded import DamagedFrame, frame_from_bytes, frame_to_bytes, stored_time
from esper_otel.frames.frame import Frame
from esper_otel.gateway.items import Item, Origin, Place
from esper_otel.gateway.store.base import (
    NO_TENANTS,
    NOTHING_ENDED,
    RANK_BYTES,
    RUN_BYTES,
    WRITER_BYTES,
    KeptRequest,
    StoredFrame,
    StoredPage,
    StoreFull,
    StoreLimits,
    cursor_place,
    cursor_text,
)
from esper_otel.gateway.store.database import FILE, Damaged, locked, moved_aside, opened, reading, transaction
from esper_otel.gateway.store.ledger import Ledger, use_of
from esper_otel.gateway.store.memory import loss_of
from esper_otel.gateway.store.quarantine import Quarantine
from esper_otel.gateway.store.validity import DAMAGED, is_run, place_of
from esper_otel.log import Warnings

_COLUMNS = "position, number, attempt, rank, writer, frame, revision, complete, received, loss_before"
_ROW_BYTES = 150
_OF_WRITER = "run = ? AND rank = ? AND attempt = ? AND writer = ?"
_RESTORED, _MOST_RESTORED, _RESTORED_IN_ALL = 256, 4_096, 65_536
_AT_ONCE = 64
_NO_BODY = 2**62
_AGE_EVERY_S = 60.0
_MOST_AGE_S = 1e10
_MOST_TRIES = 3
_MOST_ASIDE = 1_000  # rows of one table


class _KnownRun:
    """What is known of a run without asking the file."""

    def __init__(self, key: int, life: str, tenant: str) -> None:
        self.key = key
        self.life = life
        self.tenant = tenant
        self.first = 1
        self.last = 0
        self.frame_bytes = 0
        self.added_s = 0.0
        self.ranks: dict[int, int] = {}
        self.losses: dict[Origin, float | None] = {}
        self.newest: dict[Origin, int] = {}  # positions of those whose losses have not been read yet
        self.counts: Counter[Origin] = Counter()
        self.outcomes: dict[Origin, str] = {}

    @property
    def size(self) -> int:
        """About what it takes."""
        of_writers = WRITER_BYTES * max(len(self.counts), len(self.outcomes)) + RANK_BYTES * len(self.ranks)
        return RUN_BYTES + of_writers + self.frame_bytes

    def copied(self) -> _KnownRun:
        other = copy(self)
        other.ranks, other.losses, other.counts = dict(self.ranks), dict(self.losses), Counter(self.counts)
        other.newest, other.outcomes = dict(self.newest), dict(self.outcomes)
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
        self._path, self._read_only = Path(folder) / FILE, read_only
        self._aside, self._warnings = Quarantine(Path(folder)), Warnings(clock)
        self._runs: dict[str, _KnownRun] = {}
        self._ledger = Ledger()
        self._bodies: list[int] = []
        self._received: dict[Origin, int] = {}  # when something of a writer came last before the start
        self._age_before_s = self._age_noted_s = 0.0
        self.dropped = 0
        self.damaged: Counter[str] = Counter()
        self._lock = None if read_only else locked(Path(folder))
        try:
            self._open()
        except (sqlite3.Error, Damaged, StoreFull) as error:
            self.close()
            raise ConfigurationError(f"{self._path} is no store that this version can use: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """About how many bytes the entries take."""
        return self._ledger.size

    def add(
        self,
        items: Iterable[Item],
        *,
        ended: Mapping[Origin, str] = NOTHING_ENDED,
        places: Iterable[Place] = (),
        tenants: Mapping[str, str] = NO_TENANTS,
        kept: KeptRequest | None = None,
        first_kept: int | None = None,
    ) -> None:
        """Stores frames, outcomes and a body, all or nothing. See ``Store``."""
        new = _New(list(items), ended, list(places), tenants, kept, first_kept)
        try:
            self._add(new)
        except Damaged as error:
            self.begin_anew(error)
            with suppress(Damaged):  # a new file that is damaged again: the next request tries another one
                self._add(new)

    def _add(self, new: _New) -> None:
        kept, first_kept = new.kept, new.first_kept
        bodies = [number for number in self._bodies if first_kept is not None and number >= first_kept]
        if not (new.items or new.ended or new.places) and kept is None and bodies == self._bodies:
            return
        changed: dict[str, _KnownRun | None] = {}
        try:
            with transaction(self._connection) as connection:
                if bodies != self._bodies:
                    connection.execute("DELETE FROM bodies WHERE number < ?", (first_kept or _NO_BODY,))
                if kept is not None:
                    row = (kept.number, kept.is_json, kept.received_unix_ns, kept.body, kept.tenant)
                    connection.execute(
                        "INSERT INTO bodies (number, is_json, received, body, tenant) VALUES (?, ?, ?, ?, ?)", row
                    )
                    bodies.append(kept.number)
                dropped = self._write(connection, new, changed)
        except BaseException:
            for run_id in changed:  # as it was before
                self._note(run_id, self._runs.get(run_id))
            raise
        self._bodies = bodies
        for run_id, run in changed.items():
            if run is None:
                self._runs.pop(run_id, None)
            else:
                self._runs[run_id] = run
        self.dropped += dropped

    def _write(self, connection: sqlite3.Connection, new: _New, changed: dict[str, _KnownRun | None]) -> int:
        """Writes what there is of runs; returns how many entries were dropped."""
        for item in new.items:
            self._insert(connection, item, changed, new.tenants)
        for origin, outcome in new.ended.items():
            self._end(connection, origin, outcome, changed)
        for place in new.places:
            self._place(connection, place, changed)
        dropped = 0
        for run_id, run in list(changed.items()):
            if run is None:
                continue
            connection.execute("UPDATE runs SET last = ?, added_s = ? WHERE id = ?", (run.last, run.added_s, run.key))
            connection.executemany(
                "INSERT OR REPLACE INTO ranks VALUES (?, ?, ?)", [(run.key, *each) for each in run.ranks.items()]
            )
            dropped += self._shrink(connection, run_id, run, changed, self._is_too_large)
            if changed[run_id] is not None:
                self._note(run_id, run, has_news=True)
        return dropped + self._make_room(connection, changed)

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Entries after a cursor, up to the next hole that a damaged one has left. See ``Store``."""
        run = self._runs.get(run_id)
        if run is None:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        newest = run.last if rank is None else run.ranks.get(rank, 0)
        place = cursor_place(cursor, run.life, rank, newest)
        try:
            found = self._entries(run_id, run, rank, place, most)
        except Damaged as error:
            if self._read_only:
                raise ConfigurationError(f"{self._path} is damaged: {error}") from error
            self.begin_anew(error)
            raise UnknownRun(f"the store was damaged: no step of run {run_id!r} is here any more") from error
        places = [entry.position if rank is None else entry.number for entry in found]
        last = places[-1] if places else newest
        gap = (places[0] if places else newest + 1) - place - 1
        return StoredPage(found, cursor_text(run.life, rank, last), gap)

    def _entries(self, run_id: str, run: _KnownRun, rank: int | None, place: int, most: int) -> list[StoredFrame]:
        """Entries without a hole between them, the first of those that there are."""
        if rank is None:
            where, of_run = "run = ? AND position > ? ORDER BY position", (run.key, place)
        else:
            where, of_run = "run = ? AND rank = ? AND number > ? ORDER BY number", (run.key, rank, place)  # type: ignore[assignment]
        if self._read_only:  # whoever may write has taken these rows out
            where = f"NOT ({DAMAGED['items']}) AND {where}"
        with reading():
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM items WHERE {where} LIMIT ?", (*of_run, most))  # noqa: S608
            found: list[StoredFrame] = []
            last = 0
            for row in rows.fetchall():
                number = row[0] if rank is None else row[1]
                if found and number != last + 1:
                    break
                entry = self._entry(run_id, run, row)
                if entry is None and found:
                    break
                if entry is not None:
                    found.append(entry)
                    last = number
        return found

    def _entry(self, run_id: str, run: _KnownRun, row: tuple[Any, ...]) -> StoredFrame | None:
        """The entry of a row; None, and the row is taken out, if it is damaged."""
        try:
            return _entry(run_id, row)
        except DamagedFrame as error:
            if not self._read_only:
                self._put_aside("frame", [row], f"step {row[0]} of run {run_id}: {error}")
                with suppress(StoreFull), transaction(self._connection) as connection:
                    connection.execute("DELETE FROM items WHERE run = ? AND position = ?", (run.key, row[0]))
            return None

    def holds(self, run_id: str) -> bool:
        """Whether a step of the run is stored. See ``Store``."""
        return run_id in self._runs

    def counts(self) -> dict[Origin, int]:
        """How many entries each writer has."""
        return {origin: count for run in self._runs.values() for origin, count in run.counts.items() if count}

    def outcomes(self) -> dict[Origin, str]:
        """How the runs ended of which something is stored."""
        return {origin: outcome for run in self._runs.values() for origin, outcome in run.outcomes.items()}

    def tenant(self, run_id: str) -> str:
        """Whose share of the room a run takes."""
        return self._ledger.tenant(run_id)

    def use(self) -> Mapping[str, tuple[float, float]]:
        """How much of each bound is used, and the bound."""
        return use_of(self._ledger, self._limits)

    def expire(self) -> list[str]:
        """Drops runs that were idle for long."""
        try:
            return self._expired()
        except Damaged as error:
            self.begin_anew(error)
            return []

    def _expired(self) -> list[str]:
        oldest_s = self._age_s() - self._limits.idle_s
        if self._age_s() > self._age_noted_s + _AGE_EVERY_S:
            with transaction(self._connection) as connection:
                connection.execute("UPDATE age SET seconds = ?", (self._age_s(),))
            self._age_noted_s = self._age_s()
        gone = [run_id for run_id, run in self._runs.items() if run.added_s < oldest_s]
        for run_id in gone:
            run = self._runs[run_id]
            with transaction(self._connection) as connection:
                _delete_run(connection, run)
            del self._runs[run_id]
            self._note(run_id, None)
            self.dropped += run.counts.total()
        return gone

    # -- what a gateway goes on from ---------------------------------------------------------------------

    def writers(self, most: int) -> list[Origin]:
        """The writers of which something came last before the start."""
        return sorted(self._received, key=lambda origin: -self._received[origin])[:most]

    def newest(self, writers: Sequence[Origin] | None = None) -> Iterator[tuple[Item, bool]]:
        """The newest frames of each writer, oldest first, each in its newest revision: what an assembler goes on from.

        They begin before the oldest frame that something of is still to come, if that is not too far back. With each
        comes whether it is the first one of its writer that was ever stored.
        """
        origins = list(self.counts()) if writers is None else writers
        most = max(_RESTORED_IN_ALL // max(len(origins), 1), 1)
        missing = {place.origin for place in self.places() if place.missing}
        for origin in origins:
            run = self._runs.get(origin.run_id)
            if run is None:
                continue
            positions, are_all = self._newest_positions(run, origin, most, is_missing=origin in missing)
            is_first = are_all and run.first == 1  # none of the run was dropped
            before_unix_ns = -1
            for position in reversed(positions):
                entry = self._at(origin.run_id, run, position)
                if entry is not None and entry.item.frame.time_unix_ns > before_unix_ns:  # else the row is damaged
                    before_unix_ns = entry.item.frame.time_unix_ns
                    yield entry.item, is_first
                is_first = False

    def _newest_positions(
        self, run: _KnownRun, origin: Origin, most: int, *, is_missing: bool
    ) -> tuple[list[int], bool]:
        """Where the newest revisions of a writer's newest frames are, the newest frame first, and if these are all."""
        with reading():
            # Beside max(), SQLite gives the other columns of the row that has it.
            rows = self._connection.execute(
                f"SELECT max(position), complete FROM items WHERE {_OF_WRITER} "  # noqa: S608
                "GROUP BY time ORDER BY time DESC LIMIT ?",
                (run.key, origin.rank, origin.attempt, origin.writer, min(_MOST_RESTORED, most)),
            ).fetchall()
        needed = len(rows)
        if not is_missing:
            incomplete = [place for place, (_, complete) in enumerate(rows) if not complete]
            needed = max(_RESTORED, incomplete[-1] + 2 if incomplete else 0)
        are_all = len(rows) <= needed and len(rows) < min(_MOST_RESTORED, most)
        return [position for position, _ in rows[:needed]], are_all

    def _at(self, run_id: str, run: _KnownRun, position: int) -> StoredFrame | None:
        with reading():
            row = self._connection.execute(
                f"SELECT {_COLUMNS} FROM items WHERE run = ? AND position = ?",  # noqa: S608
                (run.key, position),
            ).fetchone()
        return None if row is None else self._entry(run_id, run, row)

    def first_frames(self, writers: Sequence[Origin] | None = None) -> dict[Origin, Frame]:
        """The oldest frame of each writer."""
        found = {}
        for origin in list(self.counts()) if writers is None else writers:
            run = self._runs.get(origin.run_id)
            if run is None:
                continue
            with reading():
                row = self._connection.execute(
                    f"SELECT {_COLUMNS} FROM items WHERE {_OF_WRITER} ORDER BY time, position LIMIT 1",  # noqa: S608
                    (run.key, origin.rank, origin.attempt, origin.writer),
                ).fetchone()
            entry = None if row is None else self._entry(origin.run_id, run, row)
            if entry is not None:
                found[origin] = entry.item.frame
        return found

    def places(self) -> list[Place]:
        """Where the writers stand of which something is stored."""
        names = {run.key: run_id for run_id, run in self._runs.items()}
        with reading():
            rows = self._connection.execute(
                "SELECT run, attempt, rank, writer, next, lowest, missing, says_step, says_epoch, holes, ends "
                "FROM places"
            ).fetchall()
        found = []
        for key, *row in rows:
            try:
                if key in names:
                    found.append(place_of(names[key], tuple(row)))
            except (ValueError, TypeError, RecursionError) as error:
                self._put_aside("place", [(key, *row)], f"where a writer of run {names[key]} stands: {error}")
        counts = self.counts()
        return [place for place in found if place.origin in counts]

    def bodies(self) -> Iterator[KeptRequest]:
        """The bodies that are kept, oldest first.

        That they are being processed is noted in the file: of all at once, and of each one when a start has ended with
        them. One with which several starts have ended is put aside.
        """
        with reading():
            tries = dict(self._connection.execute("SELECT number, tries FROM bodies"))
        self._note_tries("tries = max(tries, 1)")
        for number in list(self._bodies):
            with reading():
                row = self._connection.execute(
                    "SELECT number, body, is_json, received, tenant FROM bodies WHERE number = ?", (number,)
                ).fetchone()
            if row is None:
                continue
            _, body, is_json, received, tenant = row
            kept = KeptRequest(number, body, bool(is_json), received, tenant)
            before = tries.get(number, 0)
            if before >= _MOST_TRIES:
                self.put_aside(kept, f"the gateway has ended {before} times while it processed it")
                continue
            if before:
                self._note_tries("tries = tries + 1 WHERE number = ?", number)
            yield kept
            if before:
                self._note_tries("tries = 1 WHERE number = ?", number)
        self._note_tries("tries = 0")

    def body_sizes(self) -> dict[int, int]:
        """The numbers of the bodies that are kept, oldest first, each with its bytes."""
        with reading():
            return dict(self._connection.execute("SELECT number, length(body) FROM bodies ORDER BY number"))

    def put_aside(self, kept: KeptRequest, why: str) -> None:
        """Takes a body out that cannot be processed."""
        self._put_aside("body", [kept.body], f"a request that was acknowledged: {why}")
        with suppress(StoreFull), transaction(self._connection) as connection:
            connection.execute("DELETE FROM bodies WHERE number = ?", (kept.number,))
        self._bodies = [number for number in self._bodies if number != kept.number]

    def _note_tries(self, change: str, *number: int) -> None:
        if not self._read_only and self._bodies:
            with suppress(StoreFull), transaction(self._connection) as connection:
                connection.execute(f"UPDATE bodies SET {change}", number)  # noqa: S608

    def run_ids(self) -> list[str]:
        """The runs of which something is stored."""
        return sorted(self._runs)

    def close(self) -> None:
        """Closes the file."""
        if hasattr(self, "_connection"):
            self._connection.close()
        if self._lock is not None:
            self._lock.close()

    # -- opening -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Opens the file; one that is damaged as a whole is moved aside, and a new one begun."""
        try:
            self._connection = opened(self._path, read_only=self._read_only)
            with reading():
                self._load()
        except Damaged as error:
            if self._read_only:
                raise
            self.begin_anew(error)

    def begin_anew(self, damage: Damaged) -> None:
        """Begins a new file. The old one, as it is, gets another name; nothing of it is deleted."""
        if hasattr(self, "_connection"):
            self._connection.close()
        try:
            aside = moved_aside(self._path)
            self._connection = opened(self._path, read_only=False)
            self._runs, self._ledger, self._bodies, self._received = {}, Ledger(), [], {}
            self._load()
        except (OSError, sqlite3.Error, Damaged) as error:
            raise StoreFull(f"the store is damaged ({damage}) and cannot be begun anew: {error}") from error
        self.damaged["store"] += 1
        self._warnings.say(
            "store file",
            "the store's file is damaged (%s): it is kept as %s and a new one was begun; its steps are not served",
            str(damage),
            aside,
        )

    def _load(self) -> None:
        self._age_before_s = self._age_noted_s = 0.0
        if not self._read_only:
            self._mend_indexes()
            with transaction(self._connection) as connection:
                self._clean(connection)
        columns = "id, run_id, life, last, added_s, " + ("''" if self._read_only else "tenant")
        rows = self._connection.execute(f"SELECT {columns} FROM runs").fetchall()  # noqa: S608
        for key, run_id, life, last, added_s, tenant in rows:
            if is_run((key, run_id, life, last, tenant)):
                run = self._runs[run_id] = _KnownRun(key, life, tenant)
                run.last = last
                run.added_s = (
                    float(added_s) if isinstance(added_s, (int, float)) and 0 <= added_s < _MOST_AGE_S else 0.0
                )
        if not self._read_only:
            numbers = self._connection.execute("SELECT number FROM bodies ORDER BY number")
            self._bodies = [number for (number,) in numbers]
            ages = self._connection.execute("SELECT max(seconds) FROM age WHERE seconds < ?", (_MOST_AGE_S,))
            (found,) = ages.fetchone()
            # Not all of it may have been noted: what was added last was added by then.
            self._age_before_s = max([found or 0.0, *(run.added_s for run in self._runs.values())])
            self._age_noted_s = self._age_before_s
        self._load_writers()
        for run_id, run in sorted(self._runs.items(), key=lambda each: each[1].added_s):
            self._note(run_id, run, has_news=True)

    def _load_writers(self) -> None:
        names = {run.key: run_id for run_id, run in self._runs.items()}
        ranks = self._connection.execute(f"SELECT run, rank, last FROM ranks WHERE NOT ({DAMAGED['ranks']})")  # noqa: S608
        for key, rank, last in ranks:
            if key in names:
                self._runs[names[key]].ranks[rank] = last
        groups = self._connection.execute(
            "SELECT run, attempt, rank, writer, count(*), min(position), max(position), max(number), "  # noqa: S608
            f"sum(length(frame)), max(received) FROM items WHERE NOT ({DAMAGED['items']}) "
            "GROUP BY run, attempt, rank, writer"
        )
        firsts: dict[str, int] = {}
        for key, attempt, rank, writer, count, first, last, number, size, received in groups:
            if key not in names:
                continue
            run_id = names[key]
            run, origin = self._runs[run_id], Origin(run_id, attempt, rank, writer)
            run.counts[origin], run.newest[origin] = count, last
            self._received[origin] = received
            run.frame_bytes += size + count * _ROW_BYTES
            run.last = max(run.last, last)
            run.ranks[rank] = max(run.ranks.get(rank, 0), number)
            firsts[run_id] = min(firsts.get(run_id, first), first)
        for run_id, run in self._runs.items():
            run.first = firsts.get(run_id, run.last + 1)
        for key, attempt, rank, writer, outcome in self._connection.execute(
            f"SELECT run, attempt, rank, writer, outcome FROM ends WHERE NOT ({DAMAGED['ends']})"  # noqa: S608
        ):
            if key in names:
                self._runs[names[key]].outcomes[Origin(names[key], attempt, rank, writer)] = outcome

    def _mend_indexes(self) -> None:
        """Makes the indexes anew if something in the file is damaged: a row that one lacks could not be pulled."""
        (found,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            try:
                with transaction(self._connection) as connection:
                    connection.execute("REINDEX")
            except StoreFull as error:
                if isinstance(error.__cause__, sqlite3.IntegrityError):  # two rows have one number
                    raise Damaged(f"{found}; {error}") from error
                self._warnings.say("damaged index", "the store's file is damaged (%s), and %s", found, error)
            else:
                self.damaged["index"] += 1
                self._warnings.say("damaged index", "the store's file is damaged (%s): its indexes are new", found)

    def _clean(self, connection: sqlite3.Connection) -> None:
        """Takes out the rows that no gateway can have written, and what belongs to no run."""
        for table, damaged in DAMAGED.items():
            blob = {"items": "frame", "bodies": "body"}.get(table)
            columns = "*" if blob is None else f"*, CASE WHEN length({blob}) <= 1000000 THEN {blob} END"
            kind = {"items": "frame", "bodies": "body"}.get(table, "row")
            rows = connection.execute(f"SELECT {columns} FROM {table} WHERE {damaged} LIMIT {_MOST_ASIDE}").fetchall()  # noqa: S608
            if rows:
                connection.execute(f"DELETE FROM {table} WHERE {damaged}")  # noqa: S608
                self._put_aside(kind, rows, f"{len(rows)} rows of {table}")
        runs = connection.execute("SELECT id, run_id, life, last, tenant, * FROM runs").fetchall()
        bad = [row for row in runs if not is_run(row[:5])]
        if bad:
            self._put_aside("row", bad, f"{len(bad)} rows of runs")
            connection.executemany("DELETE FROM runs WHERE id = ?", [row[:1] for row in bad])
        for table in ("items", "ranks", "ends", "places"):
            connection.execute(f"DELETE FROM {table} WHERE run NOT IN (SELECT id FROM runs)")  # noqa: S608
        if connection.execute("SELECT count(*) FROM age WHERE typeof(seconds) = 'real'").fetchone()[0] != 1:
            connection.execute("DELETE FROM age")
            connection.execute("INSERT INTO age VALUES (0.0)")

    def _put_aside(self, kind: str, rows: Sequence[Any], what: str) -> None:
        """Writes what is damaged to files of their own, as far as there is room, counts it, and says so."""
        names = [self._aside.put(kind, row if isinstance(row, bytes) else repr(row).encode()) for row in rows]
        self.damaged[kind] += len(rows)
        where = f"kept in {self._aside.path / names[0]}" if names and names[0] else "there is no room to keep it"
        self._warnings.say(f"damaged {kind}", "damage in the store was taken out, %s; %s", what, where)

    def _age_s(self) -> float:
        """For how long gateways have run on this folder."""
        return self._age_before_s + self._clock() - self._opened_s

    # -- writing -----------------------------------------------------------------------------------------

    def _insert(
        self,
        connection: sqlite3.Connection,
        item: Item,
        changed: dict[str, _KnownRun | None],
        tenants: Mapping[str, str],
    ) -> None:
        run_id, attempt, rank, writer = item.origin
        run = self._copied(run_id, changed)
        if run is None:
            life, tenant = secrets.token_hex(4), tenants.get(run_id, "")
            row = (run_id, life, tenant)
            key = connection.execute("INSERT INTO runs (run_id, life, tenant) VALUES (?, ?, ?)", row).lastrowid
            run = changed[run_id] = _KnownRun(key or 0, life, tenant)
        frame = frame_to_bytes(item.frame)
        size = len(frame) + _ROW_BYTES
        run.last += 1
        run.ranks[rank] = run.ranks.get(rank, 0) + 1
        connection.execute(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(run.key, run.last, rank, run.ranks[rank], attempt, writer, item.revision, item.complete),
                *(item.received_unix_ns, self._loss_before(connection, run, item.origin), size, frame),
                stored_time(item.frame.time_unix_ns),
            ),
        )
        run.losses[item.origin] = loss_of(item.frame)
        run.counts[item.origin] += 1
        run.frame_bytes += size
        run.added_s = self._age_s()

    def _loss_before(self, connection: sqlite3.Connection, run: _KnownRun, origin: Origin) -> float | None:
        """The loss of the writer's step before; of the first one since the start it is in the file."""
        position = run.newest.pop(origin, None)
        if position is not None and origin not in run.losses:
            row = connection.execute(
                "SELECT frame FROM items WHERE run = ? AND position = ?", (run.key, position)
            ).fetchone()
            with suppress(DamagedFrame):  # found and put aside when it is pulled
                run.losses[origin] = None if row is None else loss_of(frame_from_bytes(row[0]))
        return run.losses.get(origin)

    def _end(
        self, connection: sqlite3.Connection, origin: Origin, outcome: str, changed: dict[str, _KnownRun | None]
    ) -> None:
        """Stores an outcome, if anything else of the run is stored."""
        run = self._copied(origin.run_id, changed)
        if run is not None:
            row = (run.key, origin.rank, origin.attempt, origin.writer, outcome)
            connection.execute("INSERT OR REPLACE INTO ends VALUES (?, ?, ?, ?, ?)", row)
            run.outcomes[origin] = outcome

    def _place(self, connection: sqlite3.Connection, place: Place, changed: dict[str, _KnownRun | None]) -> None:
        """Stores where a writer stands, if anything of the run is stored."""
        origin = place.origin
        run = self._copied(origin.run_id, changed)
        if run is not None:
            of_writer = (run.key, origin.rank, origin.attempt, origin.writer)
            row = (*of_writer, *place[1:-2], json.dumps(place.holes), json.dumps(place.ends))
            connection.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _copied(self, run_id: str, changed: dict[str, _KnownRun | None]) -> _KnownRun | None:
        """A copy that a transaction may change; none when nothing of the run is stored."""
        if run_id not in changed and run_id in self._runs:
            changed[run_id] = self._runs[run_id].copied()
        return changed.get(run_id)

    # -- dropping ----------------------------------------------------------------------------------------

    def _note(self, run_id: str, run: _KnownRun | None, *, has_news: bool = False) -> None:
        """Notes what a run takes."""
        if run is None:
            self._ledger.forget(run_id)
        else:
            self._ledger.note(run_id, run.tenant, run.size, max(len(run.counts), 1), has_news=has_news)

    def _is_too_large(self, run: _KnownRun) -> bool:
        return run.size > self._limits.run_bytes or run.last - run.first >= self._limits.steps

    def _make_room(self, connection: sqlite3.Connection, changed: dict[str, _KnownRun | None]) -> int:
        """Drops what makes too much of all runs; returns how many entries."""
        count = 0
        while self._ledger.size > self._limits.all_bytes:
            surplus = self._ledger.size - self._limits.all_bytes
            run_id = self._ledger.largest()
            run = self._copied(run_id, changed)
            assert run is not None
            limit = run.size - surplus
            count += self._shrink(connection, run_id, run, changed, lambda run: run.size > limit)  # noqa: B023
        while self._ledger.writers > self._limits.writers:
            surplus = self._ledger.writers - self._limits.writers
            run_id, is_only = self._ledger.longest_silent()
            run = self._copied(run_id, changed)
            assert run is not None
            most = len(run.counts) - surplus if is_only else 0
            count += self._shrink(connection, run_id, run, changed, lambda run: len(run.counts) > most)  # noqa: B023
        return count

    def _shrink(
        self,
        connection: sqlite3.Connection,
        run_id: str,
        run: _KnownRun,
        changed: dict[str, _KnownRun | None],
        is_too_large: Callable[[_KnownRun], bool],
    ) -> int:
        """Drops the oldest entries of a run for as long as it is too large; one without entries is dropped itself."""
        count = 0
        while run.first <= run.last and is_too_large(run):
            rows = connection.execute(
                "SELECT position, attempt, rank, writer, length(frame) FROM items "
                "WHERE run = ? AND position >= ? ORDER BY position LIMIT ?",
                (run.key, run.first, _AT_ONCE),
            ).fetchall()
            if not rows:
                run.first = run.last + 1
            for position, attempt, rank, writer, size in rows:
                if not is_too_large(run):
                    break
                run.first = position + 1
                run.frame_bytes -= size + _ROW_BYTES
                self._drop(connection, run, Origin(run_id, attempt, rank, writer))
                count += 1
            connection.execute("DELETE FROM items WHERE run = ? AND position < ?", (run.key, run.first))
        if run.first > run.last:
            _delete_run(connection, run)
            changed[run_id] = None
        self._note(run_id, changed[run_id])
        return count

    def _drop(self, connection: sqlite3.Connection, run: _KnownRun, origin: Origin) -> None:
        """One entry of this writer is gone; with the last one what else is known of it."""
        run.counts[origin] -= 1
        if run.counts[origin] <= 0:
            del run.counts[origin]
            run.losses.pop(origin, None)
            run.newest.pop(origin, None)
            run.outcomes.pop(origin, None)
            of_writer = (run.key, origin.rank, origin.attempt, origin.writer)
            for table in ("ends", "places"):
                connection.execute(f"DELETE FROM {table} WHERE {_OF_WRITER}", of_writer)  # noqa: S608


class _New(NamedTuple):
    """What is to be stored together."""

    items: list[Item]
    ended: Mapping[Origin, str]
    places: list[Place]
    tenants: Mapping[str, str]
    kept: KeptRequest | None
    first_kept: int | None


def _delete_run(connection: sqlite3.Connection, run: _KnownRun) -> None:
    for table in ("items", "ranks", "ends", "places"):
        connection.execute(f"DELETE FROM {table} WHERE run = ?", (run.key,))  # noqa: S608
    connection.execute("DELETE FROM runs WHERE id = ?", (run.key,))


def _entry(run_id: str, row: tuple[Any, ...]) -> StoredFrame:
    position, number, attempt, rank, writer, frame, revision, complete, received, loss_before = row
    if type(frame) is not bytes:
        raise DamagedFrame("not bytes")
    origin = Origin(run_id, attempt, rank, writer)
    item = Item(origin, frame_from_bytes(frame), revision, bool(complete), received)
    return StoredFrame(position, number, item, loss_before)
