"""Keeps phases, and sums over steps, in an SQLite file next to that of the steps, or in memory."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esper_otel.gateway.store.side_file import SideFile
from esper_otel.hours.account import Account, PhaseTimes
from esper_otel.log import Warnings

FILE = "hours.sqlite3"
_MOST_PHASES = 20_000  # of a run; the oldest are dropped first, but never the newest of a name, which has the totals
_FEWER = 15_000
_MOST_NEWEST = 100_000  # of a run, with those that have the totals: then the oldest attempts' are dropped as well
_SCHEMA = """
CREATE TABLE IF NOT EXISTS phases (
    run TEXT, rank INTEGER, attempt INTEGER, name TEXT, ended INTEGER,
    total REAL, inside REAL, length REAL, own REAL, number INTEGER, step INTEGER,
    PRIMARY KEY (run, rank, attempt, name, ended)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (
    run TEXT PRIMARY KEY, cursor TEXT, accounts TEXT
) WITHOUT ROWID;
"""
_INSERT = """
INSERT INTO phases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
    total = coalesce(excluded.total, total), inside = coalesce(excluded.inside, inside),
    length = coalesce(excluded.length, length), own = coalesce(excluded.own, own),
    number = coalesce(excluded.number, number), step = coalesce(excluded.step, step)
"""
# The oldest phases of a run, without the newest of each rank, attempt and name.
_DELETE = """
DELETE FROM phases WHERE run = ?1 AND ended IN (SELECT ended FROM phases WHERE run = ?1 ORDER BY ended LIMIT ?2)
AND EXISTS (
    SELECT 1 FROM phases AS later WHERE later.run = phases.run AND later.rank = phases.rank
    AND later.attempt = phases.attempt AND later.name = phases.name AND later.ended > phases.ended
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


class HoursFile:
    """Phases and sums by run. Threads: one at a time.

    A file that cannot be read is renamed and a new one begun, since steps are more important than their sums.

    Args:
        folder: the folder of the store; None keeps everything in memory.
        warnings: where damage, and what is dropped, are reported.

    Attributes:
        dropped_totals: phases dropped although they had the totals of a rank, attempt and name.
    """

    def __init__(self, folder: Path | None, warnings: Warnings) -> None:
        self._warnings = warnings
        self._counts: dict[str, int] = {}
        self._shrink_at: dict[str, int] = {}  # above _MOST_PHASES where those with totals are more than that
        self.dropped_totals: int = 0
        self._file = SideFile(folder, FILE, _SCHEMA, "phases", self._count, warnings)

    def _count(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("SELECT run, count(*) FROM phases GROUP BY run")
        self._counts, self._shrink_at = {str(run): count for run, count in found}, {}

    def add(self, phases: Iterable[ReceivedPhase]) -> None:
        """Stores phases; one that is stored already is completed, not repeated.

        Raises:
            StoreFull: nothing was stored.
        """
        rows = [(run_id, *writer, *phase) for run_id, writer, phase in phases]
        if not rows:
            return
        with self._file.transaction() as connection:
            connection.executemany(_INSERT, rows)
        for run_id in {row[0] for row in rows}:
            self._counts[run_id] = self._counts.get(run_id, 0) + len(rows)
            if self._counts[run_id] > self._shrink_at.get(run_id, _MOST_PHASES):
                self._shrink(run_id)

    def _shrink(self, run_id: str) -> None:
        stored = self._stored(run_id)
        if stored > _MOST_PHASES:
            with self._file.transaction() as connection:
                connection.execute(_DELETE, (run_id, stored - _FEWER))
            stored = self._stored(run_id)
        if stored > _MOST_NEWEST:
            with self._file.transaction() as connection:
                dropped = connection.execute(_DELETE_NEWEST, (run_id, stored - _MOST_NEWEST)).rowcount
            self.dropped_totals += dropped
            self._warnings.say(
                f"totals {run_id}",
                "run %s has more than %d ranks, attempts and names of phases: dropped those of the oldest attempts, %d",
                run_id,
                _MOST_NEWEST,
                dropped,
            )
            stored = self._stored(run_id)
        self._counts[run_id] = stored
        self._shrink_at[run_id] = max(_MOST_PHASES, stored + _MOST_PHASES - _FEWER)

    def _stored(self, run_id: str) -> int:
        found = self._file.rows("SELECT count(*) FROM phases WHERE run = ?", (run_id,))
        return int(found[0][0]) if found else 0

    def phases(self, run_id: str) -> list[tuple[AttemptRank, PhaseTimes]]:
        """Returns the phases of a run, by rank and attempt; rows that a gateway cannot have written are left out."""
        rows = self._file.rows("SELECT * FROM phases WHERE run = ?", (run_id,))
        return [(AttemptRank(*row[1:3]), PhaseTimes(*row[3:])) for row in rows if _is_phase(row[1:])]

    def runs_with_phases(self) -> set[str]:
        """Returns the runs of which phases are stored, without reading the file."""
        return {run_id for run_id, count in self._counts.items() if count}

    def accounts(self, run_id: str) -> StoredAccounts | None:
        """Returns the sums over the steps of a run, as they were when they were stored last."""
        rows = self._file.rows("SELECT cursor, accounts FROM accounts WHERE run = ?", (run_id,))
        if not rows:
            return None
        [row] = rows
        try:
            said = json.loads(row[1])
            found = {AttemptRank(int(rank), int(attempt)): Account.from_json(each) for rank, attempt, each in said}
            return StoredAccounts(str(row[0]), found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._warnings.say("damaged hours", "the sums over the steps of run %s cannot be used: %s", run_id, error)
            return None

    def put_accounts(self, run_id: str, stored: StoredAccounts) -> None:
        """Stores the sums over the steps of a run.

        Raises:
            StoreFull: they were not stored.
        """
        said = [(*writer, account.as_json()) for writer, account in stored.accounts.items()]
        with self._file.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO accounts VALUES (?, ?, ?)", (run_id, stored.cursor, json.dumps(said))
            )

    def run_ids(self) -> set[str]:
        """Returns the runs of which something is stored."""
        found = self._file.rows("SELECT run FROM accounts UNION SELECT run FROM phases")
        return {str(run) for (run,) in found}

    def forget(self, run_ids: Sequence[str]) -> None:
        """Deletes everything about these runs.

        Raises:
            StoreFull: nothing was deleted.
        """
        with self._file.transaction() as connection:
            for table in ("phases", "accounts"):
                connection.executemany(f"DELETE FROM {table} WHERE run = ?", [(run_id,) for run_id in run_ids])  # noqa: S608
        for run_id in run_ids:
            self._counts.pop(run_id, None)
            self._shrink_at.pop(run_id, None)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_phase(row: tuple[Any, ...]) -> bool:
    rank, attempt, name, ended, *numbers, number, step = row
    whole = (rank, attempt, ended, *(each for each in (number, step) if each is not None))
    are_numbers = all(each is None or (type(each) is float and 0.0 <= each < 1e15) for each in numbers)
    return type(name) is str and are_numbers and all(type(each) is int and 0 <= each < 2**63 for each in whole)
