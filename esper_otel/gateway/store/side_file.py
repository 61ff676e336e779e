"""Side files: small SQLite files next to that of the steps, for what belongs to no step."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.gateway.store.base import StoreFull
from esper_otel.gateway.store.database import SUFFIXES, as_text, check_ours, is_damage, moved_aside
from esper_otel.log import Warnings

# The file may be whole, but cannot be opened at present.
_FOR_NOW = frozenset(
    {
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    }
)
# Raised for what a gateway cannot have written: a number beyond all others, a name in an error message.
_STRANGE = (OverflowError, UnicodeDecodeError)
_PARTS = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"


class SideFile:
    """An SQLite file, or the same in memory. Threads: one at a time.

    A file that cannot be read is renamed and a new one begun, since the steps are more important.

    Args:
        folder: the folder of the store; None keeps everything in memory.
        name: the file's name.
        schema: statements that make the tables that are missing.
        what: what it has, for messages, such as "phases".
        begun: called with the connection whenever the file was opened, or begun anew.
        warnings: where damage is reported.

    Raises:
        ConfigurationError: the file is a link, a pipe, or another user's; or it cannot be opened at present, such as on
            a full disk.

    Attributes:
        connection: the connection to the file; another one after damage.
        damaged: how many files were put aside.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        schema: str,
        what: str,
        begun: Callable[[sqlite3.Connection], None],
        warnings: Warnings,
    ) -> None:
        self._path = None if folder is None else folder / name
        self._schema, self._what, self._begun = schema, what, begun
        self._warnings = warnings
        self.damaged: int = 0
        if self._path is not None:
            for suffix in SUFFIXES:
                check_ours(self._path.with_name(name + suffix))
        try:
            self.connection: sqlite3.Connection = self._opened()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _FOR_NOW:
                raise ConfigurationError(f"{self._path} cannot be opened: {error}") from error
            self.connection = self._anew(error)

    def _opened(self) -> sqlite3.Connection:
        if self._path is not None:
            with suppress(FileExistsError):  # SQLite would create it readable by others
                os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | unix.FILE, 0o600))
        connection = sqlite3.connect(":memory:" if self._path is None else self._path, isolation_level=None)
        connection.text_factory = as_text
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            if self._path is not None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(self._schema)
            self._check_tables(connection)
            self._begun(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_tables(self, connection: sqlite3.Connection) -> None:
        """Checks that the file is whole and has our tables only: a trigger, for one, would refuse each row.

        Raises:
            sqlite3.DatabaseError: it is damaged, or has others.
        """
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        with closing(sqlite3.connect(":memory:")) as ours:
            ours.executescript(self._schema)
            if sorted(ours.execute(_PARTS), key=str) != sorted(connection.execute(_PARTS), key=str):
                raise sqlite3.DatabaseError("it has other tables than a gateway makes")

    def _anew(self, error: Exception) -> sqlite3.Connection:
        """Begins a new file; the old one is kept under a name with the time."""
        if self._path is not None and self._path.exists():
            aside = moved_aside(self._path)
            self.damaged += 1
            self._warnings.say(
                f"damaged {self._what}", "the file of %s was damaged (%s): it is now %s", self._what, error, aside
            )
        return self._opened()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as one transaction: either everything in it is written, or nothing.

        Raises:
            StoreFull: nothing was written.
        """
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
            if isinstance(error, (sqlite3.Error, *_STRANGE)):
                self._mend(error)
                raise StoreFull(f"{self._what} cannot be written: {error}") from error
            raise

    def rows(self, query: str, arguments: Sequence[object] = ()) -> list[Any]:
        """Returns the rows of a query; none if the file turns out to be damaged.

        Raises:
            StoreFull: the file cannot be read at present.
        """
        try:
            return self.connection.execute(query, arguments).fetchall()
        except (sqlite3.Error, *_STRANGE) as error:
            if self._mend(error):
                return []
            raise StoreFull(f"{self._what} cannot be read: {error}") from error

    def _mend(self, error: Exception) -> bool:
        """Begins a new file if the old one is damaged; returns whether it was."""
        if isinstance(error, (sqlite3.IntegrityError, *_STRANGE)) or (
            isinstance(error, sqlite3.Error) and is_damage(error)
        ):
            self.connection.close()
            self.connection = self._anew(error)
            return True
        return False

    def close(self) -> None:
        """Closes the file."""
        self.connection.close()
