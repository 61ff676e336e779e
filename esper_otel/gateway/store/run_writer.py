"""Changes the runs of a store's file: what is added, what is dropped for it, and what is then known of each run."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

from esper_otel.frames.records import DamagedRecord
from esper_otel.gateway.items import Origin, Place
from esper_otel.gateway.store.base import NewData, StoreLimits
from esper_otel.gateway.store.database import transaction
from esper_otel.gateway.store.ledger import Ledger
from esper_otel.gateway.store.memory import loss_of
from esper_otel.gateway.store.stored_blocks import Blocks, NewBlock
from esper_otel.gateway.store.stored_runs import StoredRun

# A frame's share of its block.
SHARE = "(SELECT length(frames) / max(count, 1) FROM blocks WHERE id = block)"
ROW_BYTES = 150
OF_WRITER = "run = ? AND rank = ? AND attempt = ? AND writer = ?"
_AT_ONCE = 64
_LARGEST_INTEGER = 2**63 - 1  # that SQLite has


class FileRun(StoredRun):
    """The part of a run's state that is kept in memory, so that it need not be read from the file.

    ``first`` and ``last`` are the positions of its oldest and newest entry; ``ranks`` has the number of each rank's
    newest entry, ``newest`` the position of each writer's, until its loss is read.
    """

    def __init__(self, key: int, life: str, tenant: str) -> None:
        super().__init__(life, tenant)
        self.key = key
        self.first: int = 1
        self.last: int = 0
        self.is_torn: bool = False  # whether entries were lost that were not the oldest ones
        self.ranks: dict[int, int] = {}
        self.moved: set[int] = set()  # ranks that have new entries in this transaction
        self.newest: dict[Origin, int] = {}

    def copied(self) -> FileRun:
        """Returns a copy for a transaction to change."""
        other = copy(self)
        other.ranks, other.losses, other.counts = dict(self.ranks), dict(self.losses), Counter(self.counts)
        other.newest, other.outcomes, other.moved = dict(self.newest), dict(self.outcomes), set()
        return other


class RunWriter:
    """Writes into one open file. A transaction changes copies of what is known of its runs; they count once it is over.

    ``last_key`` and ``last_block`` are the highest numbers that a run and a block have had.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        runs: dict[str, FileRun],
        ledger: Ledger,
        limits: StoreLimits,
        blocks: Blocks,
        age_s: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._runs = runs
        self._ledger = ledger
        self._limits = limits
        self._blocks = blocks
        self._age_s = age_s
        self.last_key: int = 0
        self.last_block: int = 0
        self._changed: dict[str, FileRun | None] = {}  # None: the run was dropped
        self._deleted: list[int] = []  # keys of runs that this transaction drops
        self._left: list[int] = []  # keys of dropped runs of which entries are left in the file

    @property
    def has_left(self) -> bool:
        """Whether entries of dropped runs are left."""
        return bool(self._left)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Changes everything in its block, or nothing.

        Raises:
            StoreFull, DamagedStore: nothing was changed.
        """
        self._changed, self._deleted = {}, []
        try:
            with transaction(self._connection):
                yield self._connection
        except BaseException:
            for run_id in self._changed:  # restore the ledger
                if run_id in self._runs:
                    self.note(run_id, self._runs[run_id])
                else:
                    self._ledger.forget(run_id)
            raise
        self._left += self._deleted
        for run_id, run in self._changed.items():
            if run is None:
                self._runs.pop(run_id, None)
            else:
                self._runs[run_id] = run

    def write(self, new: NewData) -> int:
        """Writes frames, outcomes and places of runs; returns how many entries were dropped."""
        self._insert(new)
        for origin, outcome in new.ended.items():
            self._end(origin, outcome)
        self._place(new.places)
        dropped = 0
        for run_id, run in list(self._changed.items()):
            if run is None:
                continue
            self._connection.execute(
                "UPDATE runs SET last = ?, added_s = ? WHERE id = ?", (run.last, run.added_s, run.key)
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO ranks VALUES (?, ?, ?)",
                [(run.key, rank, run.ranks[rank]) for rank in run.moved],
            )
            dropped += self._shrink(run_id, run, self._is_too_large)
            if self._changed[run_id] is not None:
                self.note(run_id, run, has_news=True)
        return dropped + self._make_room()

    def drop(self, run_id: str) -> int:
        """Drops a run; returns how many entries it had."""
        run = self._runs[run_id]
        self._delete(run_id, run)
        return run.counts.total()

    def _insert(self, new: NewData) -> None:
        """Writes frames: consecutive ones of a writer as one block, and a row for each."""
        rows: list[tuple[Any, ...]] = []
        blocks: dict[Origin, NewBlock] = {}
        made: list[tuple[NewBlock, FileRun]] = []
        for item in new.items:
            run_id, attempt, rank, writer = origin = item.origin
            run = self._copied(run_id)
            if run is None:
                life, tenant = secrets.token_hex(4), new.tenants.get(run_id, "")
                self.last_key += 1  # SQLite would give the key of a dropped run again, of which entries may be left
                row = (self.last_key, run_id, life, tenant)
                self._connection.execute("INSERT INTO runs (id, run_id, life, tenant) VALUES (?, ?, ?, ?)", row)
                run = self._changed[run_id] = FileRun(self.last_key, life, tenant)
            block = blocks.get(origin)
            if block is None or block.is_full:
                self.last_block += 1
                block = blocks[origin] = NewBlock(self.last_block)
                made.append((block, run))
            run.last += 1
            run.ranks[rank] = run.ranks.get(rank, 0) + 1
            run.moved.add(rank)
            rows.append(
                (
                    *(run.key, run.last, rank, run.ranks[rank], attempt, writer, item.revision, item.complete),
                    *(item.received_unix_ns, self._loss_before(run, origin)),
                    *(min(item.frame.time_unix_ns, _LARGEST_INTEGER), block.id, block.count, item.missed),
                )
            )
            block.add(item.frame, run.last)
            run.losses[origin] = loss_of(item.frame)
            run.counts[origin] += 1
            run.added_s = self._age_s()
        encoded = []
        for block, run in made:
            encoded.append((block.id, run.key, block.last, block.count, b"".join(block.records)))
            run.frame_bytes += block.count * (block.size // block.count + ROW_BYTES)
        self._connection.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", encoded)
        self._connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _loss_before(self, run: FileRun, origin: Origin) -> float | None:
        """Returns the loss of the writer's previous step, read from the file for the first step since the start."""
        position = run.newest.pop(origin, None)
        if position is not None and origin not in run.losses:
            row = self._connection.execute(
                "SELECT block, place FROM items WHERE run = ? AND position = ?", (run.key, position)
            ).fetchone()
            with suppress(DamagedRecord):  # it is put aside when it is pulled
                run.losses[origin] = None if row is None else loss_of(self._blocks.frame(*row))
        return run.losses.get(origin)

    def _end(self, origin: Origin, outcome: str) -> None:
        """Stores an outcome, if a step of the run is stored."""
        run = self._copied(origin.run_id)
        if run is not None:
            row = (run.key, origin.rank, origin.attempt, origin.writer, outcome)
            self._connection.execute("INSERT OR REPLACE INTO ends VALUES (?, ?, ?, ?, ?)", row)
            run.outcomes[origin] = outcome

    def _place(self, places: Sequence[Place]) -> None:
        """Stores the places that writers have reached, if a step of their run is stored."""
        rows = []
        for place in places:
            run_id, attempt, rank, writer = place.origin
            run = self._copied(run_id)
            if run is not None:
                lists = (place.holes, place.ends, place.units)
                holes, ends, units = (json.dumps(each) if each else "[]" for each in lists)
                rows.append((run.key, rank, attempt, writer, *place[1:6], holes, ends, *place[8:-1], units))
        self._connection.executemany(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
        )

    def _copied(self, run_id: str) -> FileRun | None:
        """Returns a copy of a run's state for a transaction to change; None when nothing of the run is stored."""
        if run_id not in self._changed and run_id in self._runs:
            self._changed[run_id] = self._runs[run_id].copied()
        return self._changed.get(run_id)

    def note(self, run_id: str, run: FileRun, *, has_news: bool = False) -> None:
        """Updates the ledger for a run."""
        self._ledger.note(run_id, run.tenant, run.size, max(len(run.counts), 1), has_news=has_news)

    def _is_too_large(self, run: FileRun) -> bool:
        return run.size > self._limits.run_bytes or run.last - run.first >= self._limits.steps

    def _make_room(self) -> int:
        """Drops entries until all runs together are within the limits; returns how many."""
        count = 0
        while self._ledger.size > self._limits.all_bytes:
            surplus = self._ledger.size - self._limits.all_bytes
            run_id = self._ledger.largest()
            run = self._copied(run_id)
            assert run is not None
            limit = run.size - surplus
            count += self._shrink(run_id, run, lambda run: run.size > limit)  # noqa: B023
        while self._ledger.writers > self._limits.writers:
            surplus = self._ledger.writers - self._limits.writers
            run_id, is_only = self._ledger.longest_silent()
            run = self._copied(run_id)
            assert run is not None
            most = len(run.counts) - surplus if is_only else 0
            count += self._shrink(
                *(run_id, run),
                lambda run: len(run.counts) > most,  # noqa: B023
                is_all=not is_only,
            )
        return count

    def _shrink(
        self,
        run_id: str,
        run: FileRun,
        is_too_large: Callable[[FileRun], bool],
        *,
        is_all: bool = False,
    ) -> int:
        """Drops the oldest entries of a run while it is too large; drops the run itself when none are left."""
        count = 0
        if is_all:
            count, run.first = run.counts.total(), run.last + 1
        while run.first <= run.last and is_too_large(run):
            rows = self._connection.execute(
                f"SELECT position, attempt, rank, writer, {SHARE} FROM items "  # noqa: S608
                "WHERE run = ? AND position >= ? ORDER BY position LIMIT ?",
                (run.key, run.first, _AT_ONCE),
            ).fetchall()
            if not rows:
                run.first = run.last + 1
            for position, attempt, rank, writer, size in rows:
                if not is_too_large(run):
                    break
                run.first = position + 1
                run.frame_bytes -= int(size or 0) + ROW_BYTES
                self._drop(run, Origin(run_id, attempt, rank, writer))
                count += 1
            self._connection.execute("DELETE FROM items WHERE run = ? AND position < ?", (run.key, run.first))
            self._connection.execute("DELETE FROM blocks WHERE run = ? AND last < ?", (run.key, run.first))
        if run.first > run.last:
            self._delete(run_id, run)
        else:
            self.note(run_id, run)
        return count

    def _delete(self, run_id: str, run: FileRun) -> None:
        """Deletes a run. Its entries are left to ``sweep``, since there may be very many, or to the next start."""
        for table in ("ranks", "ends", "places"):
            self._connection.execute(f"DELETE FROM {table} WHERE run = ?", (run.key,))  # noqa: S608
        self._connection.execute("DELETE FROM runs WHERE id = ?", (run.key,))
        self._deleted.append(run.key)
        self._changed[run_id] = None
        self._ledger.forget(run_id)

    def sweep(self, most: int) -> None:
        """Deletes up to this many entries, and as many blocks, of runs that were dropped."""
        if not self._left:
            return
        key = self._left[-1]
        count = 0
        for table in ("items", "blocks"):
            some = f"SELECT rowid FROM {table} WHERE run = ? LIMIT ?"  # noqa: S608
            of_run = (key, most)
            count += self._connection.execute(f"DELETE FROM {table} WHERE rowid IN ({some})", of_run).rowcount  # noqa: S608
        if not count:
            self._left.pop()

    def _drop(self, run: FileRun, origin: Origin) -> None:
        """Counts an entry of this writer as dropped; after its last one, forgets everything about the writer."""
        run.counts[origin] -= 1
        if run.counts[origin] <= 0:
            del run.counts[origin]
            run.losses.pop(origin, None)
            run.newest.pop(origin, None)
            run.outcomes.pop(origin, None)
            of_writer = (run.key, origin.rank, origin.attempt, origin.writer)
            for table in ("ends", "places"):
                self._connection.execute(f"DELETE FROM {table} WHERE {OF_WRITER}", of_writer)  # noqa: S608
