"""Stores released frames in an SQLite file, together with requests whose frames are not all released yet.

A committed transaction survives any end of the process, since SQLite's write-ahead log is then held by the kernel
(synchronous = NORMAL). A power failure can lose the last transactions, but never a part of one.

The gateway starts even if the file is damaged. A row that a gateway cannot have written is moved to a file in the
folder ``damaged``. A file that SQLite cannot read is renamed to a name with the time, and a new file is created.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frames.frame import Frame
from esper_otel.frames.records import DamagedRecord
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
from esper_otel.gateway.store.repair import Repair
from esper_otel.gateway.store.run_writer import OF_WRITER, ROW_BYTES, SHARE, FileRun, RunWriter
from esper_otel.gateway.store.stored_blocks import Blocks
from esper_otel.gateway.store.stored_runs import RunStore
from esper_otel.gateway.store.validity import DAMAGED, is_run, place_of
from esper_otel.log import Warnings

_COLUMNS = "position, number, attempt, rank, writer, revision, complete, received, loss_before, missed, block, place"
_RESTORED, _MOST_RESTORED, _RESTORED_IN_ALL = 256, 4_096, 65_536
_SWEPT_AT_ONCE, _SWEPT_WHEN_IDLE = 500, 4_000
_NO_BODY = 2**62
_AGE_EVERY_S = 60.0
_MOST_AGE_S = 1e10
_MOST_TRIES = 3


class FileStore(RunStore[FileRun]):
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
        self._warnings = Warnings(clock)
        self._repair = Repair(Path(folder), self._warnings, self.damaged)
        self._bodies: list[int] = []
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
        with self._writer.transaction() as connection:
            self._writer.sweep(_SWEPT_AT_ONCE)
            if bodies != self._bodies:
                connection.execute("DELETE FROM bodies WHERE number < ?", (first_kept or _NO_BODY,))
            if kept is not None:
                row = (kept.number, kept.is_json, kept.received_unix_ns, kept.body, kept.tenant)
                connection.execute(
                    "INSERT INTO bodies (number, is_json, received, body, tenant) VALUES (?, ?, ?, ?, ?)", row
                )
                bodies.append(kept.number)
            dropped = self._writer.write(new)
        self._bodies = bodies
        self._note_dropped(dropped)

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

    def _entries(self, run_id: str, run: FileRun, rank: int | None, place: int, most: int) -> list[StoredFrame]:
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

    def _entry(self, run_id: str, run: FileRun, row: tuple[Any, ...]) -> StoredFrame | None:
        """Returns the entry in a row. A damaged row or block is removed, and None returned."""
        position, number, attempt, rank, writer, revision, complete, received, loss_before, missed, block, place = row
        try:
            frame = self._blocks.frame(block, place)
        except DamagedRecord as error:
            if not self._read_only:
                self._remove(run_id, run, row, error)
            return None
        item = Item(Origin(run_id, attempt, rank, writer), frame, revision, bool(complete), received, missed)
        return StoredFrame(position, number, item, loss_before)

    def _remove(self, run_id: str, run: FileRun, row: tuple[Any, ...], error: DamagedRecord) -> None:
        """Removes a damaged row; if its block is damaged, all rows of that block. They are put aside."""
        run.is_torn = True
        position, block = row[0], row[-2]
        where, of_rows, aside = "run = ? AND position = ?", (run.key, position), repr(row).encode()
        if not self._blocks.is_decoded(block):
            where, of_rows = "run = ? AND block = ?", (run.key, block)
            kept = self._connection.execute("SELECT frames FROM blocks WHERE id = ?", (block,)).fetchone()
            aside = kept[0] if kept and type(kept[0]) is bytes else aside
        with suppress(StoreFull), transaction(self._connection) as connection:
            count = connection.execute(f"DELETE FROM items WHERE {where}", of_rows).rowcount  # noqa: S608
            if not self._blocks.is_decoded(block):
                connection.execute("DELETE FROM blocks WHERE id = ?", (block,))
            if count > 0:
                self._repair.put_aside("frame", [aside], f"step {position} of run {run_id}: {error}", count)

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
        oldest_s = self.age_s() - self._limits.idle_s
        if self.age_s() > self._age_noted_s + _AGE_EVERY_S:
            with transaction(self._connection) as connection:
                connection.execute("UPDATE age SET seconds = ?", (self.age_s(),))
            self._age_noted_s = self.age_s()
        if self._writer.has_left:
            with self._writer.transaction():
                self._writer.sweep(_SWEPT_WHEN_IDLE)
        gone = [run_id for run_id, run in self._runs.items() if run.added_s < oldest_s][:EXPIRED_AT_ONCE]
        for run_id in gone:
            with self._writer.transaction():
                dropped = self._writer.drop(run_id)
            self._note_dropped(dropped)
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
        places = self.places(*origins) if len(origins) == 1 else self.places()
        missing = {place.origin for place in places if place.missing}
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
        return list(self.newest([origin])), self.places(origin)

    def _newest_positions(self, run: FileRun, origin: Origin, most: int, *, is_missing: bool) -> tuple[list[int], bool]:
        """Returns the positions of a writer's newest frames in their newest revisions, and whether these are all.

        The newest frame is first.
        """
        with reading():
            # With max(), SQLite takes the other columns from the row that has the maximum.
            rows = self._connection.execute(
                f"SELECT max(position), complete FROM items WHERE {OF_WRITER} "  # noqa: S608
                "GROUP BY time ORDER BY time DESC LIMIT ?",
                (run.key, origin.rank, origin.attempt, origin.writer, min(_MOST_RESTORED, most)),
            ).fetchall()
        needed = len(rows)
        if not is_missing:
            incomplete = [place for place, (_, complete) in enumerate(rows) if not complete]
            needed = max(_RESTORED, incomplete[-1] + 2 if incomplete else 0)
        are_all = len(rows) <= needed and len(rows) < min(_MOST_RESTORED, most)
        return [position for position, _ in rows[:needed]], are_all

    def _at(self, run_id: str, run: FileRun, position: int) -> StoredFrame | None:
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
                    f"SELECT {_COLUMNS} FROM items WHERE {OF_WRITER} ORDER BY time, position LIMIT 1",  # noqa: S608
                    (run.key, origin.rank, origin.attempt, origin.writer),
                ).fetchone()
            entry = None if row is None else self._entry(origin.run_id, run, row)
            if entry is not None:
                found[origin] = entry.item.frame
        return found

    def places(self, of: Origin | None = None) -> list[Place]:
        """Returns the places that stored writers have reached: one writer, or all."""
        arguments: tuple[Any, ...] = ()
        if of is None:
            names, where = {run.key: run_id for run_id, run in self._runs.items()}, ""
        elif of.run_id in self._runs:
            key = self._runs[of.run_id].key
            names, where, arguments = {key: of.run_id}, f" WHERE {OF_WRITER}", (key, of.rank, of.attempt, of.writer)
        else:
            return []
        with reading():
            rows = self._connection.execute(
                "SELECT run, attempt, rank, writer, next, lowest, missing, says_step, says_epoch, holes, ends, "  # noqa: S608
                f"host, revision, settings, validation_loss, location, device, units FROM places{where}",
                arguments,
            ).fetchall()
        found = []
        for key, *row in rows:
            try:
                if key in names:
                    found.append(place_of(names[key], tuple(row)))
            except (ValueError, TypeError, RecursionError) as error:
                self._repair.put_aside("place", [(key, *row)], f"where a writer of run {names[key]} stands: {error}")
        return [place for place in found if self._runs[place.origin.run_id].counts.get(place.origin)]

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
        self._repair.put_aside("body", [kept.body], f"a request that was acknowledged: {why}")
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
            self._use(opened(self._path, read_only=self._read_only))
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
        before_s = self._age_before_s
        try:
            aside = moved_aside(self._path)
            connection = opened(self._path, read_only=False)
            self._runs, self._ledger, self._bodies, self._received = {}, Ledger(), [], {}
            self._use(connection)
            self._load()
            self._age_before_s = before_s  # events and phases are in other files, and noted by this age
        except (OSError, sqlite3.Error, DamagedStore) as error:
            raise StoreFull(f"the store is damaged ({damage}) and a new one cannot be created: {error}") from error
        self.damaged["store"] += 1
        self._warnings.say(
            "store file",
            "the store's file is damaged (%s): it is kept as %s and a new one was begun; its steps are not served",
            str(damage),
            aside,
        )

    def _use(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._blocks = Blocks(connection)
        self._writer = RunWriter(connection, self._runs, self._ledger, self._limits, self._blocks, self.age_s)

    def _load(self) -> None:
        self._age_before_s = self._age_noted_s = 0.0
        if not self._read_only:
            self._repair.mend_indexes(self._connection)
            with transaction(self._connection) as connection:
                self._repair.clean(connection)
        rows = self._connection.execute("SELECT id, run_id, life, last, added_s, tenant FROM runs").fetchall()
        for key, run_id, life, last, added_s, tenant in rows:
            self._writer.last_key = max(self._writer.last_key, key)
            if is_run((key, run_id, life, last, tenant)):
                run = self._runs[run_id] = FileRun(key, life, tenant)
                run.last = last
                run.added_s = (
                    float(added_s) if isinstance(added_s, (int, float)) and 0 <= added_s < _MOST_AGE_S else 0.0
                )
        if not self._read_only:
            numbers = self._connection.execute("SELECT number FROM bodies ORDER BY number")
            self._bodies = [number for (number,) in numbers]
            self._writer.last_block = self._connection.execute("SELECT max(id) FROM blocks").fetchone()[0] or 0
            ages = self._connection.execute("SELECT max(seconds) FROM age WHERE seconds < ?", (_MOST_AGE_S,))
            (found,) = ages.fetchone()
            # The recorded age may be behind; the store is at least as old as its newest addition.
            self._age_before_s = max([found or 0.0, *(run.added_s for run in self._runs.values())])
            self._age_noted_s = self._age_before_s
        self._load_writers()
        for run_id, run in sorted(self._runs.items(), key=lambda each: each[1].added_s):
            self._writer.note(run_id, run, has_news=True)

    def _load_writers(self) -> None:
        names = {run.key: run_id for run_id, run in self._runs.items()}
        ranks = self._connection.execute(f"SELECT run, rank, last FROM ranks WHERE NOT ({DAMAGED['ranks']})")  # noqa: S608
        for key, rank, last in ranks:
            if key in names:
                self._runs[names[key]].ranks[rank] = last
        groups = self._connection.execute(
            "SELECT run, attempt, rank, writer, count(*), min(position), max(position), max(number), "  # noqa: S608
            f"sum({SHARE}), max(received) FROM items WHERE NOT ({DAMAGED['items']}) "
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
            run.frame_bytes += int(size or 0) + count * ROW_BYTES
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

    def age_s(self) -> float:
        """Returns the total time in seconds that gateways have run on this folder."""
        return self._age_before_s + self._clock() - self._opened_s
