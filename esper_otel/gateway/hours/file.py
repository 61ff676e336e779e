"""Keeps phases, and sums over steps, in an SQLite file next to that of the steps, or in memory."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from esper_otel.gateway.limits import Limits, SharedPlaces
from esper_otel.gateway.store.side_file import SideFile
from esper_otel.hours.account import Account, PhaseTimes
from esper_otel.log import Warnings

FILE = "hours.sqlite3"
_MOST_PHASES = 20_000  # of a run; the oldest are dropped first, but never the newest of a name, which has the totals
_FEWER = 19_000
_MOST_NEWEST = 100_000  # of a run, with those that have the totals: then the oldest attempts' are dropped as well
_PROCESSES = "SELECT DISTINCT rank, attempt FROM phases WHERE run = ? LIMIT ?"
_MOST_PROCESSES = 1_024
_AT_ONCE = 250  # rows
_NOTED_EVERY_S = 60.0
_LONGEST_SILENCE_S = 1e8  # some years
_MOST_RANK = 2**31
_SCHEMA = """
CREATE TABLE IF NOT EXISTS phases (
    run TEXT, rank INTEGER, attempt INTEGER, name TEXT, ended INTEGER,
    total REAL, inside REAL, length REAL, own REAL, number INTEGER, step INTEGER,
    PRIMARY KEY (run, rank, attempt, name, ended)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS senders (run TEXT PRIMARY KEY, tenant TEXT, received REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cursors (run TEXT PRIMARY KEY, cursor TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (
    run TEXT, rank INTEGER, attempt INTEGER, account TEXT, PRIMARY KEY (run, rank, attempt)
) WITHOUT ROWID;
"""
_TABLES = ("phases", "senders", "cursors", "accounts")
_INSERT = "INSERT OR IGNORE INTO phases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_COMPLETE = """
UPDATE phases SET
    total = coalesce(?6, total), inside = coalesce(?7, inside), length = coalesce(?8, length),
    own = coalesce(?9, own), number = coalesce(?10, number), step = coalesce(?11, step)
WHERE run = ?1 AND rank = ?2 AND attempt = ?3 AND name = ?4 AND ended = ?5
"""
_REMOVE = "DELETE FROM phases WHERE run = ? AND rank = ? AND attempt = ? AND name = ? AND ended = ?"
_AFTER = """
SELECT * FROM phases WHERE run = ?1 AND (rank, attempt, name, ended) > (?2, ?3, ?4, ?5)
ORDER BY rank, attempt, name, ended LIMIT ?6
"""
_ACCOUNTS_AFTER = """
SELECT rank, attempt, account FROM accounts WHERE run = ?1 AND (rank, attempt) > (?2, ?3)
ORDER BY rank, attempt LIMIT ?4
"""
# The oldest phases of a run, without the newest of each rank, attempt and name.
_DELETE = """
DELETE FROM phases WHERE run = ?1 AND ended IN (SELECT ended FROM phases WHERE run = ?1 ORDER BY ended LIMIT ?2)
AND EXISTS (
    SELECT 1 FROM phases AS later WHERE later.run = phases.run AND later.rank = phases.rank
    AND later.attempt = phases.attempt AND later.name = phases.name AND later.ended > phases.ended
)
"""
_DELETE_SOME = """
DELETE FROM phases WHERE (run, rank, attempt, name, ended) IN (
    SELECT run, rank, attempt, name, ended FROM phases WHERE run = ?1 LIMIT ?2
)
"""
# The phases of the oldest attempts of a run, whatever they have.
_DELETE_NEWEST = """
DELETE FROM phases WHERE (run, rank, attempt, name, ended) IN (
    SELECT run, rank, attempt, name, ended FROM phases WHERE run = ?1 ORDER BY attempt, ended LIMIT ?2
)
"""


class AttemptRank(NamedTuple):
    """One process of a run: a rank of an attempt."""

    rank: int
    attempt: int


class ReceivedPhase(NamedTuple):
    """A phase, or a part of one, of a process."""

    run_id: str
    writer: AttemptRank
    phase: PhaseTimes


class StoredAccounts(NamedTuple):
    """The sums over a run's steps up to a cursor of the store of steps."""

    cursor: str
    accounts: dict[AttemptRank, Account]


@dataclass(slots=True)
class _PhasesOfRun:
    """What is known of the phases of a run without reading the file.

    Attributes:
        tenant: whose share they use.
        received_s: when the newest arrived, by the age of the store, to about a minute.
        count: how many there are.
        shrink_at: above how many the oldest are dropped.
    """

    tenant: str
    received_s: float
    count: int = 0
    shrink_at: int = 0


class HoursFile:
    """Phases and sums by run. Threads: one at a time.

    A file that cannot be read is renamed and a new one begun, since steps are more important than their sums.

    Args:
        folder: the folder of the store; None keeps everything in memory.
        limits: how many phases there may be.
        warnings: where damage, and what is dropped, are reported.
        age_s: see ``Store.age_s``.

    Attributes:
        dropped_totals: phases dropped although they had the totals of a rank, attempt and name.
        places: the room for phases, and how much of it is used.
    """

    def __init__(
        self, folder: Path | None, limits: Limits, warnings: Warnings, age_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._warnings = warnings
        self._age_s = age_s
        self._senders: dict[str, _PhasesOfRun] = {}
        self.dropped_totals: int = 0
        self.places: SharedPlaces = SharedPlaces(limits.all_phases)
        self._file = SideFile(folder, FILE, _SCHEMA, "phases", self._load, warnings)

    def _load(self, connection: sqlite3.Connection) -> None:
        now_s = self._age_s()
        self._senders = {
            str(run): _PhasesOfRun(str(tenant), min(received_s, now_s) if type(received_s) is float else now_s)
            for run, tenant, received_s in connection.execute("SELECT run, tenant, received FROM senders")
        }
        self.places = SharedPlaces(self._limits.all_phases)
        for run, count in connection.execute("SELECT run, count(*) FROM phases GROUP BY run"):
            sender = self._senders.setdefault(str(run), _PhasesOfRun("", now_s))
            sender.count = count
            self.places.restore(sender.tenant, count)

    def adding(self, phases: Sequence[ReceivedPhase], tenant: str = "") -> Generator[None, None, int]:
        """Stores phases, in parts; one that is stored already is completed, not repeated.

        Returns:
            For how many there was no room.

        Raises:
            StoreFull: not all of them were stored; those that were do no harm when they come again.
        """
        refused = 0
        for start in range(0, len(phases), _AT_ONCE):
            some = phases[start : start + _AT_ONCE]
            refused += self._add(some, tenant)
            yield
            for run_id in {each.run_id for each in some}:
                sender = self._senders.get(run_id)
                if sender is not None and sender.count > max(sender.shrink_at, _MOST_PHASES):
                    self._shrink(run_id, sender)
                    yield
        return refused

    def _add(self, some: Sequence[ReceivedPhase], tenant: str) -> int:
        opened, refused = self._file.connection, 0
        taken: list[_PhasesOfRun] = []
        noted_s: list[tuple[_PhasesOfRun, float]] = []
        now_s = self._age_s()
        try:
            with self._file.transaction() as connection:
                for run_id, of_run in groupby(some, itemgetter(0)):
                    sender = self._senders.get(run_id) or _PhasesOfRun(tenant, -math.inf)
                    for _, writer, phase in of_run:
                        row = (run_id, *writer, *phase)
                        if not connection.execute(_INSERT, row).rowcount:
                            connection.execute(_COMPLETE, row)
                        elif self.places.take(sender.tenant):
                            self._senders[run_id] = sender
                            sender.count += 1
                            taken.append(sender)
                        else:
                            connection.execute(_REMOVE, row[:5])
                            refused += 1
                    if run_id in self._senders and now_s - sender.received_s > _NOTED_EVERY_S:
                        noted_s.append((sender, sender.received_s))
                        sender.received_s = now_s
                        connection.execute(
                            "INSERT OR REPLACE INTO senders VALUES (?, ?, ?)", (run_id, sender.tenant, now_s)
                        )
        except BaseException:
            for sender in taken if self._file.connection is opened else ():  # otherwise another file was begun
                sender.count -= 1
                self.places.give_back(sender.tenant, 1)
            for sender, before_s in noted_s:
                sender.received_s = before_s
            raise
        return refused

    def _shrink(self, run_id: str, sender: _PhasesOfRun) -> None:
        with self._file.transaction() as connection:
            count = connection.execute(_DELETE, (run_id, sender.count - _FEWER)).rowcount
        self._note_dropped(sender, count)
        if sender.count > _MOST_NEWEST:
            with self._file.transaction() as connection:
                count = connection.execute(_DELETE_NEWEST, (run_id, sender.count - _MOST_NEWEST)).rowcount
            self._note_dropped(sender, count)
            self.dropped_totals += count
            self._warnings.say(
                "totals",
                "run %s has more than %d ranks, attempts and names of phases: dropped those of the oldest attempts, %d",
                run_id,
                _MOST_NEWEST,
                count,
            )
        sender.shrink_at = sender.count + max(_MOST_PHASES - _FEWER, sender.count // 8)

    def _note_dropped(self, sender: _PhasesOfRun, count: int) -> None:
        sender.count -= count
        self.places.give_back(sender.tenant, count)

    def phases(self, run_id: str) -> Generator[None, None, list[tuple[AttemptRank, PhaseTimes]]]:
        """Returns the phases of a run, by rank and attempt, in parts; rows that no gateway has written are left out."""
        found: list[tuple[AttemptRank, PhaseTimes]] = []
        last: tuple[Any, ...] = (-1, -1, "", -1)
        while rows := self._file.rows(_AFTER, (run_id, *last, _AT_ONCE)):
            found += [(AttemptRank(*row[1:3]), PhaseTimes(*row[3:])) for row in rows if _is_phase(row[1:])]
            last = rows[-1][1:5]
            yield
        return found

    def runs_with_phases(self) -> set[str]:
        """Returns the runs of which phases are stored, without reading the file."""
        return {run_id for run_id, sender in self._senders.items() if sender.count}

    def processes(self, run_id: str) -> tuple[float, list[AttemptRank]]:
        """Returns for how long no phase of a run has arrived, in seconds, to about a minute, and whose they are."""
        sender = self._senders.get(run_id)
        if sender is None:
            return 0.0, []
        rows = self._file.rows(_PROCESSES, (run_id, _MOST_PROCESSES))
        silent_s = min(max(self._age_s() - sender.received_s, 0.0), _LONGEST_SILENCE_S)
        return silent_s, [AttemptRank(*row) for row in rows if set(map(type, row)) == {int}]

    def accounts(self, run_id: str) -> Generator[None, None, StoredAccounts | None]:
        """Returns the sums over the steps of a run, as they were when they were stored last, in parts."""
        found: dict[AttemptRank, Account] = {}
        last: tuple[Any, ...] = (-1, -1)
        while rows := self._file.rows(_ACCOUNTS_AFTER, (run_id, *last, _AT_ONCE)):
            for rank, attempt, text in rows:
                try:
                    if not type(rank) is type(attempt) is int or not 0 <= rank < _MOST_RANK or attempt < 0:
                        raise ValueError("not a rank")  # noqa: TRY301 - ends as any other damage
                    found[AttemptRank(rank, attempt)] = Account.from_json(json.loads(text))
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                    message = "the sums over the steps of run %s cannot be used: %s"
                    self._warnings.say("damaged hours", message, run_id, error)
                    return None
                yield
            last = rows[-1][:2]
        cursors = self._file.rows("SELECT cursor FROM cursors WHERE run = ?", (run_id,))
        return StoredAccounts(str(cursors[0][0]), found) if cursors else None

    def put_accounts(self, run_id: str, cursor: str, accounts: Iterable[tuple[AttemptRank, str]]) -> None:
        """Stores sums over the steps of a run up to a cursor: of the processes whose sums have changed, as JSON.

        Raises:
            StoreFull: they were not stored.
        """
        rows = [(run_id, *writer, text) for writer, text in accounts]
        with self._file.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?)", rows)
            connection.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?)", (run_id, cursor))

    def account_counts(self) -> Mapping[str, int]:
        """Returns of how many processes of each run there are sums."""
        return {str(run): count for run, count in self._file.rows("SELECT run, count(*) FROM accounts GROUP BY run")}

    def abandoned(self, is_known: Callable[[str], bool], idle_s: float) -> list[str]:
        """Returns the runs that are not known, and of which no phase has arrived for so long."""
        before_s = self._age_s() - idle_s
        return [run for run, of in self._senders.items() if of.received_s < before_s and not is_known(run)]

    def forget(self, run_id: str) -> Generator[None, None, None]:
        """Deletes everything about a run, in parts.

        Raises:
            StoreFull: not all was deleted.
        """
        sender = self._senders.get(run_id)
        while sender is not None and sender.count > 0 and self._senders.get(run_id) is sender:
            with self._file.transaction() as connection:
                count = connection.execute(_DELETE_SOME, (run_id, 10 * _AT_ONCE)).rowcount
            if not count:
                break
            self._note_dropped(sender, count)
            yield
        with self._file.transaction() as connection:
            for table in _TABLES:
                connection.execute(f"DELETE FROM {table} WHERE run = ?", (run_id,))  # noqa: S608
        sender = self._senders.pop(run_id, None)
        if sender is not None:
            self.places.give_back(sender.tenant, sender.count)

    @property
    def damaged(self) -> int:
        """How many damaged files were put aside."""
        return self._file.damaged

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_phase(row: tuple[Any, ...]) -> bool:
    rank, attempt, name, ended, *numbers, number, step = row
    whole = (rank, attempt, ended, *(each for each in (number, step) if each is not None))
    are_numbers = all(each is None or (type(each) is float and 0.0 <= each < 1e15) for each in numbers)
    are_whole = all(type(each) is int and 0 <= each < 2**63 for each in whole)
    return type(name) is str and are_numbers and are_whole and rank < _MOST_RANK
