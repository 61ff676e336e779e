"""Takes damage out of a store's file: what a gateway cannot have written is kept in the folder ``damaged``."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper_otel.frames.quarantine import Quarantine
from esper_otel.gateway.store.base import StoreFull
from esper_otel.gateway.store.database import DamagedStore, transaction
from esper_otel.gateway.store.validity import DAMAGED, is_run
from esper_otel.log import Warnings

_MOST_ASIDE = 1_000  # rows of one table that are kept in the folder ``damaged``


class Repair:
    """Mends a file, and reports what was taken out.

    Args:
        folder: the store's folder.
        warnings: where damage is reported.
        damaged: counts damaged things by kind.
    """

    def __init__(self, folder: Path, warnings: Warnings, damaged: Counter[str]) -> None:
        self._aside = Quarantine(folder)
        self._warnings = warnings
        self._damaged = damaged

    def mend_indexes(self, connection: sqlite3.Connection) -> None:
        """Rebuilds the indexes if the file is damaged, since a row missing from an index could not be pulled."""
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            try:
                with transaction(connection):
                    connection.execute("REINDEX")
            except StoreFull as error:
                if isinstance(error.__cause__, sqlite3.IntegrityError):  # two rows have the same number
                    raise DamagedStore(f"{found}; {error}") from error
                self._warnings.say("damaged index", "the store's file is damaged (%s), and %s", found, error)
            else:
                self._damaged["index"] += 1
                self._warnings.say("damaged index", "the store's file is damaged (%s): its indexes are new", found)

    def clean(self, connection: sqlite3.Connection) -> None:
        """Removes rows that a gateway cannot have written, and rows that do not belong to a run."""
        for table, damaged in DAMAGED.items():
            blob = {"blocks": "frames", "bodies": "body"}.get(table)
            columns = "*" if blob is None else f"*, CASE WHEN length({blob}) <= 1000000 THEN {blob} END"
            kind = {"items": "frame", "blocks": "frame", "bodies": "body"}.get(table, "row")
            rows = connection.execute(f"SELECT {columns} FROM {table} WHERE {damaged} LIMIT {_MOST_ASIDE}").fetchall()  # noqa: S608
            if rows:
                connection.execute(f"DELETE FROM {table} WHERE {damaged}")  # noqa: S608
                self.put_aside(kind, rows, f"{len(rows)} rows of {table}")
        runs = connection.execute("SELECT id, run_id, life, last, tenant, * FROM runs").fetchall()
        bad = [row for row in runs if not is_run(row[:5])]
        if bad:
            self.put_aside("row", bad, f"{len(bad)} rows of runs")
            connection.executemany("DELETE FROM runs WHERE id = ?", [row[:1] for row in bad])
        for table in ("items", "ranks", "ends", "places", "blocks"):
            connection.execute(f"DELETE FROM {table} WHERE run NOT IN (SELECT id FROM runs)")  # noqa: S608
        lost = connection.execute("DELETE FROM items WHERE block NOT IN (SELECT id FROM blocks) RETURNING *").fetchall()
        if lost and not self._damaged["frame"]:  # otherwise the reason is known
            self.put_aside("frame", lost[:_MOST_ASIDE], f"{len(lost)} steps without their block", len(lost))
        connection.execute("DELETE FROM blocks WHERE id NOT IN (SELECT block FROM items)")
        if connection.execute("SELECT count(*) FROM age WHERE typeof(seconds) = 'real'").fetchone()[0] != 1:
            connection.execute("DELETE FROM age")
            connection.execute("INSERT INTO age VALUES (0.0)")

    def put_aside(self, kind: str, rows: Sequence[Any], what: str, count: int | None = None) -> None:
        """Writes damaged rows to files in the folder ``damaged`` up to its limit, counts them, and logs a warning."""
        names = [self._aside.put(kind, row if isinstance(row, bytes) else repr(row).encode()) for row in rows]
        self._damaged[kind] += len(rows) if count is None else count
        where = f"kept in {self._aside.path / names[0]}" if names and names[0] else "there is no room to keep it"
        self._warnings.say(f"damaged {kind}", "damage in the store was taken out, %s; %s", what, where)
