"""Stores released frames in an SQLite file, together with requests whose frames are not all released yet.

A committed transaction survives any end of the process, since SQLite's write-ahead log is then held by the kernel
(synchronous = NORMAL). A power failure can lose the last transactions, but never a part of one.

The gateway starts even if the file is damaged. A row that a gateway cannot have written is moved to a file in the
folder ``damaged``. A file that SQLite cannot read is renamed to a name with the time, and a new file is created.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frames.frame import Frame
from esper_otel.frames.quarantine import Quarantine
from esper_otel.frames.records import DamagedRecord, RecordWriter, frames_in
from esper_otel.gateway.items import Item, Origin, Place
from esper_otel.gateway.store.base import (
    EXPIRED_AT_ONCE,
    KeptRequest,
    NewData,
    StoredFrame,
    StoredPage,
    StoreFull,
    StoreLimits,
    cursor_place,
    cursor_text,
)
from esper_otel.gateway.store.database import FILE, DamagedStore, locked, moved_aside, opened, reading, transaction
from esper_otel.gateway.store.ledger import Ledger
from esper_otel.gateway.store.memory import loss_of
from esper_otel.gateway.store.runs import RunStore, StoredRun
from esper_otel.gateway.store.validity import DAMAGED, is_run, place_of
from esper_otel.log import Warnings

_COLUMNS = "position, number, attempt, rank, writer, revision, complete, received, loss_before, missed, block, place"
# A frame's share of its block.
_SHARE = "(SELECT length(frames) / max(count, 1) FROM blocks WHERE id = block)"
_ROW_BYTES = 150
# A block holds frames of one writer that were stored together, at most this many and about this many bytes.
_MOST_FRAMES, _MOST_BLOCK_BYTES = 256, 256 * 1024
_MOST_DECODED_BYTES = 16 * 1024 * 1024
_OF_WRITER = "run = ? AND rank = ? AND attempt = ? AND writer = ?"
_RESTORED, _MOST_RESTORED, _RESTORED_IN_ALL = 256, 4_096, 65_536
_AT_ONCE = 64
_SWEPT_AT_ONCE, _SWEPT_WHEN_IDLE = 500, 4_000
_NO_BODY = 2**62
_LARGEST_INTEGER = 2**63 - 1  # that SQLite has
_AGE_EVERY_S = 60.0
_MOST_AGE_S = 1e10
_MOST_TRIES = 3
_MOST_ASIDE = 1_000  # rows of one table that are kept in the folder ``damaged``


class _CachedRun(StoredRun):
    """The part of a run's state that is kept in memory, so that it need not be read from the file."""

    def __init__(self, key: int, life: str, tenant: str) -> None:
        super().__init__(life, tenant)
        self.key = key
        self.first = 1
        self.last = 0
        self.is_torn = False  # whether entries were lost that were not the oldest ones
        self.ranks: dict[int, int] = {}
        self.moved: set[int] = set()  # ranks that have new entries in this transaction
        self.newest: dict[Origin, int] = {}  # position of each writer's last entry, until its loss is read

    def copied(self) -> _CachedRun:
        other = copy(self)
        other.ranks, other.losses, other.counts = dict(self.ranks), dict(self.losses), Counter(self.counts)
        other.newest, other.outcomes, other.moved = dict(self.newest), dict(self.outcomes), set()
        return other


class FileStore(RunStore[_CachedRun]):
    """Keeps entries in ``<folder>/steps.sqlite3``. See ``Store``.

    Args:
        folder: the store's folder, created if it does not exist; only one gateway at a time can use it.
        limits: how much is stored.
        clock: a monotonic clock in seconds; it measures the store's age, which continues over restarts.
        read_only: only reads the store; a gateway may be writing to it at the same time.

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
        super().__init__(limits, clock)
        self._opened_s = clock()
        self._path, self._read_only = Path(folder) / FILE, read_only
        self._aside, self._warnings = Quarantine(Path(folder)), Warnings(clock)
        self._bodies: list[int] = []
        self._last_key = 0
        self._dropped: list[int] = []  # keys of runs that this transaction drops
        self._left: list[int] = []  # keys of dropped runs of which entries are left in the file
        self._decoded: OrderedDict[int, _DecodedBlock] = OrderedDict()
        self._decoded_bytes = 0
        self._last_block = 0
        self._received: dict[Origin, int] = {}  # when each writer was last received from before this start
        self._age_before_s = self._age_noted_s = 0.0
        self._lock = None if read_only else locked(Path(folder))
        try:
            self._open()
        except (sqlite3.Error, DamagedStore, StoreFull) as error:
            self.close()
            raise ConfigurationError(f"{self._path} is not a store that this version can use: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._path.parent

    def _add(self, new: NewData) -> None:
        try:
            self._store(new)
        except DamagedStore as error:
            self.begin_anew(error)
            with suppress(DamagedStore):  # if the new file is damaged as well, the next request creates another one
                self._store(new)

    def _store(self, new: NewData) -> None:
        kept, first_kept = new.kept, new.first_kept
        bodies = [number for number in self._bodies if first_kept is not None and number >= first_kept]
        if not (new.items or new.ended or new.places) and kept is None and bodies == self._bodies:
            return
        changed: dict[str, _CachedRun | None] = {}
        self._dropped = []
        try:
            with transaction(self._connection) as connection:
                self._sweep(connection, _SWEPT_AT_ONCE)
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
            for run_id in changed:  # restore the ledger
                self._note(run_id, self._runs.get(run_id))
            raise
        self._bodies = bodies
        self._left += self._dropped
        for run_id, run in changed.items():
            if run is None:
                self._runs.pop(run_id, None)
            else:
                self._runs[run_id] = run
        self.dropped += dropped

    def _write(self, connection: sqlite3.Connection, new: NewData, changed: dict[str, _CachedRun | None]) -> int:
        """Writes frames, outcomes and places of runs; returns how many entries were dropped."""
        self._insert(connection, new, changed)
        for origin, outcome in new.ended.items():
            self._end(connection, origin, outcome, changed)
        self._place(connection, new.places, changed)
        dropped = 0
        for run_id, run in list(changed.items()):
            if run is None:
                continue
            connection.execute("UPDATE runs SET last = ?, added_s = ? WHERE id = ?", (run.last, run.added_s, run.key))
            connection.executemany(
                "INSERT OR REPLACE INTO ranks VALUES (?, ?, ?)",
                [(run.key, rank, run.ranks[rank]) for rank in run.moved],
            )
            dropped += self._shrink(connection, run_id, run, changed, self._is_too_large)
            if changed[run_id] is not None:
                self._note(run_id, run, has_news=True)
        return dropped + self._make_room(connection, changed)

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Returns the entries after a cursor, up to the next gap left by a damaged entry. See ``Store``."""
        run = self._runs.get(run_id)
        if run is None:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        newest = run.last if rank is None else run.ranks.get(rank, 0)
        place = cursor_place(cursor, run.life, rank, newest)
        try:
            found = self._entries(run_id, run, rank, place, most)
        except DamagedStore as error:
            if self._read_only:
                raise ConfigurationError(f"{self._path} is damaged: {error}") from error
            self.begin_anew(error)
            raise UnknownRun(f"the store was damaged: no step of run {run_id!r} is here any more") from error
        places = [entry.position if rank is None else entry.number for entry in found]
        last = places[-1] if places else newest
        gap = (places[0] if places else newest + 1) - place - 1
        return StoredPage(found, cursor_text(run.life, rank, last), gap)

    def _entries(self, run_id: str, run: _CachedRun, rank: int | None, place: int, most: int) -> list[StoredFrame]:
        """Returns the first entries after a position, up to the next gap."""
        if rank is None:
            where, of_run = "run = ? AND position > ? ORDER BY position", (run.key, place)
        else:
            where, of_run = "run = ? AND rank = ? AND number > ? ORDER BY number", (run.key, rank, place)  # type: ignore[assignment]
        if self._read_only:  # otherwise damaged rows were removed when the file was opened
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

    def _entry(self, run_id: str, run: _CachedRun, row: tuple[Any, ...]) -> StoredFrame | None:
        """Returns the entry in a row. A damaged row or block is removed, and None returned."""
        position, number, attempt, rank, writer, revision, complete, received, loss_before, missed, block, place = row
        try:
            frame = self._frame(block, place)
        except DamagedRecord as error:
            if not self._read_only:
                self._remove(run_id, run, row, error)
            return None
        item = Item(Origin(run_id, attempt, rank, writer), frame, revision, bool(complete), received, missed)
        return StoredFrame(position, number, item, loss_before)

    def _frame(self, block: int, place: int) -> Frame:
        """Returns a frame of a block.

        Raises:
            DamagedRecord: the block is damaged, or has no such frame.
        """
        known = self._decoded.get(block)
        if known is None:
            row = self._connection.execute("SELECT frames FROM blocks WHERE id = ?", (block,)).fetchone()
            if row is None or type(row[0]) is not bytes:
                raise DamagedRecord("not bytes")
            known = self._decoded[block] = _DecodedBlock(frames_in(row[0]), len(row[0]))
            self._decoded_bytes += known.size
            while self._decoded_bytes > _MOST_DECODED_BYTES and len(self._decoded) > 1:
                self._decoded_bytes -= self._decoded.popitem(last=False)[1].size
        else:
            self._decoded.move_to_end(block)
        if not 0 <= place < len(known.frames):
            raise DamagedRecord(f"its block has no frame {place}")
        return known.frames[place]

    def _remove(self, run_id: str, run: _CachedRun, row: tuple[Any, ...], error: DamagedRecord) -> None:
        """Removes a damaged row; if its block is damaged, all rows of that block. They are put aside."""
        run.is_torn = True
        position, block = row[0], row[-2]
        where, of_rows, aside = "run = ? AND position = ?", (run.key, position), repr(row).encode()
        if block not in self._decoded:
            where, of_rows = "run = ? AND block = ?", (run.key, block)
            kept = self._connection.execute("SELECT frames FROM blocks WHERE id = ?", (block,)).fetchone()
            aside = kept[0] if kept and type(kept[0]) is bytes else aside
        with suppress(StoreFull), transaction(self._connection) as connection:
            count = connection.execute(f"DELETE FROM items WHERE {where}", of_rows).rowcount  # noqa: S608
            if block not in self._decoded:
                connection.execute("DELETE FROM blocks WHERE id = ?", (block,))
            if count > 0:
                self._put_aside("frame", [aside], f"step {position} of run {run_id}: {error}", count)

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank. See ``Store``."""
        run = self._runs.get(run_id)
        return 0 if run is None else run.ranks.get(rank, 0)

    def expire(self) -> list[str]:
        """Drops runs that were idle for too long. See ``Store``."""
        try:
            return self._expired()
        except DamagedStore as error:
            self.begin_anew(error)
            return []

    def _expired(self) -> list[str]:
        oldest_s = self._age_s() - self._limits.idle_s
        if self._age_s() > self._age_noted_s + _AGE_EVERY_S:
            with transaction(self._connection) as connection:
                connection.execute("UPDATE age SET seconds = ?", (self._age_s(),))
            self._age_noted_s = self._age_s()
        if self._left:
            with transaction(self._connection) as connection:
                self._sweep(connection, _SWEPT_WHEN_IDLE)
        gone = [run_id for run_id, run in self._runs.items() if run.added_s < oldest_s][:EXPIRED_AT_ONCE]
        for run_id in gone:
            run = self._runs[run_id]
            self._dropped = []
            with transaction(self._connection) as connection:
                self._delete(connection, run)
            self._left += self._dropped
            del self._runs[run_id]
            self._note(run_id, None)
            self.dropped += run.counts.total()
        return gone

    # -- restoring a gateway's state ---------------------------------------------------------------------

    def writers(self, most: int) -> list[Origin]:
        """Returns up to ``most`` writers, those that were received from last before this start first."""
        return sorted(self._received, key=lambda origin: -self._received[origin])[:most]

    def newest(self, writers: Sequence[Origin] | None = None) -> Iterator[tuple[Item, bool]]:
        """Yields the newest frames of each writer, oldest first, each in its newest revision.

        An assembler restores its state from them. They start before the writer's oldest incomplete frame, unless that
        is too far back. Each comes with a flag: whether it is the first frame of its writer that was ever stored.
        """
        origins = list(self.counts()) if writers is None else writers
        most = max(_RESTORED_IN_ALL // max(len(origins), 1), 1)
        missing = {place.origin for place in self.places() if place.missing}
        for origin in origins:
            run = self._runs.get(origin.run_id)
            if run is None:
                continue
            positions, are_all = self._newest_positions(run, origin, most, is_missing=origin in missing)
            is_first = are_all and run.first == 1  # no entry of the run was dropped
            before_unix_ns = -1
            for position in reversed(positions):
                entry = self._at(origin.run_id, run, position)
                if entry is not None and entry.item.frame.time_unix_ns > before_unix_ns:  # else the row is damaged
                    before_unix_ns = entry.item.frame.time_unix_ns
                    yield entry.item, is_first
                is_first = False

    def is_torn(self, run_id: str) -> bool:
        """Whether entries of the run were lost to damage, with entries before and after them left."""
        return run_id in self._runs and self._runs[run_id].is_torn

    def recalled(self, origin: Origin) -> tuple[list[tuple[Item, bool]], list[Place]]:
        """Returns the newest frames of a writer, and its position. See ``Store``."""
        run = self._runs.get(origin.run_id)
        if run is None or origin not in run.counts:
            return [], []
        return list(self.newest([origin])), [place for place in self.places() if place.origin == origin]

    def _newest_positions(
        self, run: _CachedRun, origin: Origin, most: int, *, is_missing: bool
    ) -> tuple[list[int], bool]:
        """Returns the positions of a writer's newest frames in their newest revisions, and whether these are all.

        The newest frame is first.
        """
        with reading():
            # With max(), SQLite takes the other columns from the row that has the maximum.
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

    def _at(self, run_id: str, run: _CachedRun, position: int) -> StoredFrame | None:
        with reading():
            row = self._connection.execute(
                f"SELECT {_COLUMNS} FROM items WHERE run = ? AND position = ?",  # noqa: S608
                (run.key, position),
            ).fetchone()
        return None if row is None else self._entry(run_id, run, row)

    def first_frames(self, writers: Sequence[Origin] | None = None) -> dict[Origin, Frame]:
        """Returns the oldest frame of each writer."""
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
        """Returns the places that stored writers have reached."""
        names = {run.key: run_id for run_id, run in self._runs.items()}
        with reading():
            rows = self._connection.execute(
                "SELECT run, attempt, rank, writer, next, lowest, missing, says_step, says_epoch, holes, ends, "
                "host, revision, settings, validation_loss FROM places"
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
        """Yields the kept bodies, oldest first.

        The file records that they are being processed: first for all together, and for each one separately if a
        previous start of the gateway ended while it processed them. A body with which several starts ended is put
        aside.
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
        """Returns the numbers of the kept bodies, oldest first, each with its size in bytes."""
        with reading():
            return dict(self._connection.execute("SELECT number, length(body) FROM bodies ORDER BY number"))

    def put_aside(self, kept: KeptRequest, why: str) -> None:
        """Removes a body that cannot be processed, and keeps a copy in the folder ``damaged``."""
        self._put_aside("body", [kept.body], f"a request that was acknowledged: {why}")
        with suppress(StoreFull), transaction(self._connection) as connection:
            connection.execute("DELETE FROM bodies WHERE number = ?", (kept.number,))
        self._bodies = [number for number in self._bodies if number != kept.number]

    def _note_tries(self, change: str, *number: int) -> None:
        if not self._read_only and self._bodies:
            with suppress(StoreFull), transaction(self._connection) as connection:
                connection.execute(f"UPDATE bodies SET {change}", number)  # noqa: S608

    def close(self) -> None:
        """Closes the file."""
        if hasattr(self, "_connection"):
            self._connection.close()
        if self._lock is not None:
            self._lock.close()

    # -- opening -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Opens the file. If it is damaged as a whole, it is renamed and a new one is created."""
        try:
            self._connection = opened(self._path, read_only=self._read_only)
            with reading():
                self._load()
        except DamagedStore as error:
            if self._read_only:
                raise
            self.begin_anew(error)

    def begin_anew(self, damage: DamagedStore) -> None:
        """Renames the damaged file, without changing it, and creates a new one."""
        if hasattr(self, "_connection"):
            self._connection.close()
        try:
            aside = moved_aside(self._path)
            self._connection = opened(self._path, read_only=False)
            self._runs, self._ledger, self._bodies, self._received = {}, Ledger(), [], {}
            self._left, self._last_key = [], 0
            self._decoded.clear()
            self._decoded_bytes = self._last_block = 0
            self._load()
        except (OSError, sqlite3.Error, DamagedStore) as error:
            raise StoreFull(f"the store is damaged ({damage}) and a new one cannot be created: {error}") from error
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
        rows = self._connection.execute("SELECT id, run_id, life, last, added_s, tenant FROM runs").fetchall()
        for key, run_id, life, last, added_s, tenant in rows:
            self._last_key = max(self._last_key, key)
            if is_run((key, run_id, life, last, tenant)):
                run = self._runs[run_id] = _CachedRun(key, life, tenant)
                run.last = last
                run.added_s = (
                    float(added_s) if isinstance(added_s, (int, float)) and 0 <= added_s < _MOST_AGE_S else 0.0
                )
        if not self._read_only:
            numbers = self._connection.execute("SELECT number FROM bodies ORDER BY number")
            self._bodies = [number for (number,) in numbers]
            self._last_block = self._connection.execute("SELECT max(id) FROM blocks").fetchone()[0] or 0
            ages = self._connection.execute("SELECT max(seconds) FROM age WHERE seconds < ?", (_MOST_AGE_S,))
            (found,) = ages.fetchone()
            # The recorded age may be behind; the store is at least as old as its newest addition.
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
            f"sum({_SHARE}), max(received) FROM items WHERE NOT ({DAMAGED['items']}) "
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
            run.frame_bytes += int(size or 0) + count * _ROW_BYTES
            run.last = max(run.last, last)
            run.ranks[rank] = max(run.ranks.get(rank, 0), number)
            firsts[run_id] = min(firsts.get(run_id, first), first)
        for run_id, run in self._runs.items():
            run.first = firsts.get(run_id, run.last + 1)
            run.is_torn = run.counts.total() <= run.last - run.first
        for key, attempt, rank, writer, outcome in self._connection.execute(
            f"SELECT run, attempt, rank, writer, outcome FROM ends WHERE NOT ({DAMAGED['ends']})"  # noqa: S608
        ):
            if key in names:
                self._runs[names[key]].outcomes[Origin(names[key], attempt, rank, writer)] = outcome

    def _mend_indexes(self) -> None:
        """Rebuilds the indexes if the file is damaged, since a row missing from an index could not be pulled."""
        (found,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            try:
                with transaction(self._connection) as connection:
                    connection.execute("REINDEX")
            except StoreFull as error:
                if isinstance(error.__cause__, sqlite3.IntegrityError):  # two rows have the same number
                    raise DamagedStore(f"{found}; {error}") from error
                self._warnings.say("damaged index", "the store's file is damaged (%s), and %s", found, error)
            else:
                self.damaged["index"] += 1
                self._warnings.say("damaged index", "the store's file is damaged (%s): its indexes are new", found)

    def _clean(self, connection: sqlite3.Connection) -> None:
        """Removes rows that a gateway cannot have written, and rows that do not belong to a run."""
        for table, damaged in DAMAGED.items():
            blob = {"blocks": "frames", "bodies": "body"}.get(table)
            columns = "*" if blob is None else f"*, CASE WHEN length({blob}) <= 1000000 THEN {blob} END"
            kind = {"items": "frame", "blocks": "frame", "bodies": "body"}.get(table, "row")
            rows = connection.execute(f"SELECT {columns} FROM {table} WHERE {damaged} LIMIT {_MOST_ASIDE}").fetchall()  # noqa: S608
            if rows:
                connection.execute(f"DELETE FROM {table} WHERE {damaged}")  # noqa: S608
                self._put_aside(kind, rows, f"{len(rows)} rows of {table}")
        runs = connection.execute("SELECT id, run_id, life, last, tenant, * FROM runs").fetchall()
        bad = [row for row in runs if not is_run(row[:5])]
        if bad:
            self._put_aside("row", bad, f"{len(bad)} rows of runs")
            connection.executemany("DELETE FROM runs WHERE id = ?", [row[:1] for row in bad])
        for table in ("items", "ranks", "ends", "places", "blocks"):
            connection.execute(f"DELETE FROM {table} WHERE run NOT IN (SELECT id FROM runs)")  # noqa: S608
        lost = connection.execute("DELETE FROM items WHERE block NOT IN (SELECT id FROM blocks) RETURNING *").fetchall()
        if lost and not self.damaged["frame"]:  # otherwise the reason is known
            self._put_aside("frame", lost[:_MOST_ASIDE], f"{len(lost)} steps without their block", len(lost))
        connection.execute("DELETE FROM blocks WHERE id NOT IN (SELECT block FROM items)")
        if connection.execute("SELECT count(*) FROM age WHERE typeof(seconds) = 'real'").fetchone()[0] != 1:
            connection.execute("DELETE FROM age")
            connection.execute("INSERT INTO age VALUES (0.0)")

    def _put_aside(self, kind: str, rows: Sequence[Any], what: str, count: int | None = None) -> None:
        """Writes damaged rows to files in the folder ``damaged`` up to its limit, counts them, and logs a warning."""
        names = [self._aside.put(kind, row if isinstance(row, bytes) else repr(row).encode()) for row in rows]
        self.damaged[kind] += len(rows) if count is None else count
        where = f"kept in {self._aside.path / names[0]}" if names and names[0] else "there is no room to keep it"
        self._warnings.say(f"damaged {kind}", "damage in the store was taken out, %s; %s", what, where)

    def _age_s(self) -> float:
        """Returns the total time in seconds that gateways have run on this folder."""
        return self._age_before_s + self._clock() - self._opened_s

    # -- writing -----------------------------------------------------------------------------------------

    def _insert(self, connection: sqlite3.Connection, new: NewData, changed: dict[str, _CachedRun | None]) -> None:
        """Writes frames: consecutive ones of a writer as one block, and a row for each."""
        rows: list[tuple[Any, ...]] = []
        blocks: dict[Origin, _NewBlock] = {}
        full: list[_NewBlock] = []
        for item in new.items:
            run_id, attempt, rank, writer = origin = item.origin
            run = self._copied(run_id, changed)
            if run is None:
                life, tenant = secrets.token_hex(4), new.tenants.get(run_id, "")
                self._last_key += 1  # SQLite would give the key of a dropped run again, of which entries may be left
                row = (self._last_key, run_id, life, tenant)
                connection.execute("INSERT INTO runs (id, run_id, life, tenant) VALUES (?, ?, ?, ?)", row)
                run = changed[run_id] = _CachedRun(self._last_key, life, tenant)
            block = blocks.get(origin)
            if block is None or block.is_full:
                self._last_block += 1
                block = blocks[origin] = _NewBlock(self._last_block, run)
                full.append(block)
            run.last += 1
            run.ranks[rank] = run.ranks.get(rank, 0) + 1
            run.moved.add(rank)
            rows.append(
                (
                    *(run.key, run.last, rank, run.ranks[rank], attempt, writer, item.revision, item.complete),
                    *(item.received_unix_ns, self._loss_before(connection, run, origin)),
                    *(min(item.frame.time_unix_ns, _LARGEST_INTEGER), block.id, block.count, item.missed),
                )
            )
            block.add(item.frame, run.last)
            run.losses[origin] = loss_of(item.frame)
            run.counts[origin] += 1
            run.added_s = self._age_s()
        encoded = []
        for block in full:
            encoded.append((block.id, block.run.key, block.last, block.count, b"".join(block.records)))
            block.run.frame_bytes += block.count * (block.size // block.count + _ROW_BYTES)
        connection.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", encoded)
        connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _loss_before(self, connection: sqlite3.Connection, run: _CachedRun, origin: Origin) -> float | None:
        """Returns the loss of the writer's previous step, read from the file for the first step since the start."""
        position = run.newest.pop(origin, None)
        if position is not None and origin not in run.losses:
            row = connection.execute(
                "SELECT block, place FROM items WHERE run = ? AND position = ?", (run.key, position)
            ).fetchone()
            with suppress(DamagedRecord):  # it is put aside when it is pulled
                run.losses[origin] = None if row is None else loss_of(self._frame(*row))
        return run.losses.get(origin)

    def _end(
        self, connection: sqlite3.Connection, origin: Origin, outcome: str, changed: dict[str, _CachedRun | None]
    ) -> None:
        """Stores an outcome, if a step of the run is stored."""
        run = self._copied(origin.run_id, changed)
        if run is not None:
            row = (run.key, origin.rank, origin.attempt, origin.writer, outcome)
            connection.execute("INSERT OR REPLACE INTO ends VALUES (?, ?, ?, ?, ?)", row)
            run.outcomes[origin] = outcome

    def _place(
        self, connection: sqlite3.Connection, places: Sequence[Place], changed: dict[str, _CachedRun | None]
    ) -> None:
        """Stores the places that writers have reached, if a step of their run is stored."""
        rows = []
        for place in places:
            run_id, attempt, rank, writer = place.origin
            run = self._copied(run_id, changed)
            if run is not None:
                holes, ends = (json.dumps(each) if each else "[]" for each in (place.holes, place.ends))
                about = (place.host, place.revision, place.settings, place.validation_loss)
                rows.append((run.key, rank, attempt, writer, *place[1:6], holes, ends, *about))
        connection.executemany(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
        )

    def _copied(self, run_id: str, changed: dict[str, _CachedRun | None]) -> _CachedRun | None:
        """Returns a copy of a run's state for a transaction to change; None when nothing of the run is stored."""
        if run_id not in changed and run_id in self._runs:
            changed[run_id] = self._runs[run_id].copied()
        return changed.get(run_id)

    # -- dropping ----------------------------------------------------------------------------------------

    def _note(self, run_id: str, run: _CachedRun | None, *, has_news: bool = False) -> None:
        """Updates the ledger for a run; None removes the run."""
        if run is None:
            self._ledger.forget(run_id)
        else:
            self._ledger.note(run_id, run.tenant, run.size, max(len(run.counts), 1), has_news=has_news)

    def _is_too_large(self, run: _CachedRun) -> bool:
        return run.size > self._limits.run_bytes or run.last - run.first >= self._limits.steps

    def _make_room(self, connection: sqlite3.Connection, changed: dict[str, _CachedRun | None]) -> int:
        """Drops entries until all runs together are within the limits; returns how many."""
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
            count += self._shrink(
                *(connection, run_id, run, changed),
                lambda run: len(run.counts) > most,  # noqa: B023
                is_all=not is_only,
            )
        return count

    def _shrink(
        self,
        connection: sqlite3.Connection,
        run_id: str,
        run: _CachedRun,
        changed: dict[str, _CachedRun | None],
        is_too_large: Callable[[_CachedRun], bool],
        *,
        is_all: bool = False,
    ) -> int:
        """Drops the oldest entries of a run while it is too large; drops the run itself when none are left."""
        count = 0
        if is_all:
            count, run.first = run.counts.total(), run.last + 1
        while run.first <= run.last and is_too_large(run):
            rows = connection.execute(
                f"SELECT position, attempt, rank, writer, {_SHARE} FROM items "  # noqa: S608
                "WHERE run = ? AND position >= ? ORDER BY position LIMIT ?",
                (run.key, run.first, _AT_ONCE),
            ).fetchall()
            if not rows:
                run.first = run.last + 1
            for position, attempt, rank, writer, size in rows:
                if not is_too_large(run):
                    break
                run.first = position + 1
                run.frame_bytes -= int(size or 0) + _ROW_BYTES
                self._drop(connection, run, Origin(run_id, attempt, rank, writer))
                count += 1
            connection.execute("DELETE FROM items WHERE run = ? AND position < ?", (run.key, run.first))
            connection.execute("DELETE FROM blocks WHERE run = ? AND last < ?", (run.key, run.first))
        if run.first > run.last:
            self._delete(connection, run)
            changed[run_id] = None
        self._note(run_id, changed[run_id])
        return count

    def _delete(self, connection: sqlite3.Connection, run: _CachedRun) -> None:
        """Deletes a run. Its entries are left to ``_sweep``, since there may be very many, or to the next start."""
        for table in ("ranks", "ends", "places"):
            connection.execute(f"DELETE FROM {table} WHERE run = ?", (run.key,))  # noqa: S608
        connection.execute("DELETE FROM runs WHERE id = ?", (run.key,))
        self._dropped.append(run.key)

    def _sweep(self, connection: sqlite3.Connection, most: int) -> None:
        """Deletes up to this many entries, and as many blocks, of runs that were dropped."""
        if not self._left:
            return
        key = self._left[-1]
        count = 0
        for table in ("items", "blocks"):
            some = f"SELECT rowid FROM {table} WHERE run = ? LIMIT ?"  # noqa: S608
            of_run = (key, most)
            count += connection.execute(f"DELETE FROM {table} WHERE rowid IN ({some})", of_run).rowcount  # noqa: S608
        if not count:
            self._left.pop()

    def _drop(self, connection: sqlite3.Connection, run: _CachedRun, origin: Origin) -> None:
        """Counts an entry of this writer as dropped; after its last one, forgets everything about the writer."""
        run.counts[origin] -= 1
        if run.counts[origin] <= 0:
            del run.counts[origin]
            run.losses.pop(origin, None)
            run.newest.pop(origin, None)
            run.outcomes.pop(origin, None)
            of_writer = (run.key, origin.rank, origin.attempt, origin.writer)
            for table in ("ends", "places"):
                connection.execute(f"DELETE FROM {table} WHERE {_OF_WRITER}", of_writer)  # noqa: S608


class _DecodedBlock(NamedTuple):
    """The frames of a block that was read, and its size in bytes."""

    frames: list[Frame]
    size: int


class _NewBlock:
    """Consecutive frames of one writer, to be stored as one block."""

    def __init__(self, block: int, run: _CachedRun) -> None:
        self.id = block
        self.run = run
        self.records: list[bytes] = []
        self.count = self.size = self.last = 0
        self._writer = RecordWriter()

    def add(self, frame: Frame, position: int) -> None:
        record = self._writer.frame(frame)
        self.records.append(record)
        self.count += 1
        self.size += len(record)
        self.last = position

    @property
    def is_full(self) -> bool:
        return self.count >= _MOST_FRAMES or self.size >= _MOST_BLOCK_BYTES
