"""The SQLite file of a store: its tables, its lock, and the meaning of SQLite's errors."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.gateway.store.base import StoreFull

FILE = "steps.sqlite3"
_LOCK = "lock"
SUFFIXES = ("", "-wal", "-shm", "-journal")  # of the file itself, and of the files that SQLite makes next to it
_VERSION = 9
_MOST_VERSION = 1_000  # a larger number is damage, not a later version
# ``blocks.last`` is the highest position of its frames; ``runs.added_s`` is in seconds of the store's own age.
_SCHEMA = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, run_id TEXT UNIQUE, life TEXT, last INTEGER, added_s REAL, tenant TEXT NOT NULL DEFAULT ''
);
CREATE TABLE ranks (run INTEGER, rank INTEGER, last INTEGER, PRIMARY KEY (run, rank)) WITHOUT ROWID;
CREATE TABLE blocks (id INTEGER PRIMARY KEY, run INTEGER, last INTEGER, count INTEGER, frames BLOB);
CREATE INDEX blocks_by_last ON blocks (run, last);
CREATE TABLE items (
    run INTEGER, position INTEGER, rank INTEGER, number INTEGER, attempt INTEGER, writer TEXT, revision INTEGER,
    complete INTEGER, received INTEGER, loss_before REAL, time INTEGER, block INTEGER, place INTEGER,
    missed INTEGER
);
CREATE UNIQUE INDEX items_by_position ON items (run, position);
CREATE UNIQUE INDEX items_by_number ON items (run, rank, number);
CREATE INDEX items_by_time ON items (run, rank, attempt, writer, time, position, complete);
CREATE TABLE ends (
    run INTEGER, rank INTEGER, attempt INTEGER, writer TEXT, outcome TEXT, PRIMARY KEY (run, rank, attempt, writer)
) WITHOUT ROWID;
CREATE TABLE bodies (
    number INTEGER PRIMARY KEY, is_json INTEGER, received INTEGER, body BLOB, tenant TEXT NOT NULL DEFAULT '',
    tries INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE places (
    run INTEGER, rank INTEGER, attempt INTEGER, writer TEXT, next INTEGER, lowest INTEGER, missing INTEGER,
    says_step INTEGER, says_epoch INTEGER, holes TEXT, ends TEXT NOT NULL DEFAULT '[]',
    host TEXT NOT NULL DEFAULT '', revision TEXT NOT NULL DEFAULT '', settings TEXT NOT NULL DEFAULT '',
    validation_loss REAL, location TEXT NOT NULL DEFAULT '', device TEXT NOT NULL DEFAULT '',
    units TEXT NOT NULL DEFAULT '[]',
    PRIMARY KEY (run, rank, attempt, writer)
) WITHOUT ROWID;
CREATE TABLE age (seconds REAL);
INSERT INTO age VALUES (0.0);
"""
_TABLES = {
    "runs": {"id", "run_id", "life", "last", "added_s", "tenant"},
    "ranks": {"run", "rank", "last"},
    "blocks": {"id", "run", "last", "count", "frames"},
    "items": {
        *("run", "position", "rank", "number", "attempt", "writer", "revision", "complete"),
        *("received", "loss_before", "time", "block", "place", "missed"),
    },
    "ends": {"run", "rank", "attempt", "writer", "outcome"},
    "bodies": {"number", "is_json", "received", "body", "tenant", "tries"},
    "places": {
        *("run", "rank", "attempt", "writer", "next", "lowest", "missing", "says_step", "says_epoch", "holes", "ends"),
        *("host", "revision", "settings", "validation_loss", "location", "device", "units"),
    },
    "age": {"seconds"},
}
_INDEXES = {"blocks_by_last", "items_by_position", "items_by_number", "items_by_time"}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_TOOBIG}


class DamagedStore(Exception):
    """Raised when SQLite cannot read the file, or when its tables are not those of a store."""


@contextmanager
def reading() -> Iterator[None]:
    """Turns SQLite's errors about a damaged file into ``DamagedStore``; other errors are raised unchanged."""
    try:
        yield
    except UnicodeDecodeError as error:  # from a name in SQLite's error message
        raise DamagedStore("a name in it is not UTF-8") from error
    except sqlite3.Error as error:
        if is_damage(error):
            raise DamagedStore(str(error)) from error
        raise


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error means that the file is damaged, and not only that it cannot be read or written at present."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Runs the block as one transaction: either everything in it is written, or nothing.

    Raises:
        StoreFull: the transaction could not be written.
        DamagedStore: the file is damaged.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    except BaseException as error:
        with suppress(sqlite3.Error):  # in a damaged file the rollback may fail, too
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            if is_damage(error):
                raise DamagedStore(str(error)) from error
            raise StoreFull(f"the store cannot be written: {error}") from error
        raise


def locked(folder: Path) -> IO[bytes]:
    """Locks a folder for this process, until the returned file is closed.

    Nothing is written to the lock file, and a link in its place is not followed.

    Raises:
        ConfigurationError: another gateway uses the folder, it cannot be made, or a file in it is not a store's.
    """
    unix.demand(f"--store {folder}", "without --store, the gateway keeps steps in memory")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | unix.FILE, 0o600)
    except OSError as error:
        what = "its file lock is a link" if (folder / _LOCK).is_symlink() else error
        raise ConfigurationError(f"--store {folder}: {what}") from error
    lock = os.fdopen(descriptor, "rb", buffering=0)
    try:
        for name in (_LOCK, *(FILE + suffix for suffix in SUFFIXES)):
            check_ours(folder / name)
        unix.lock_for_descriptor(lock.fileno())
    except BlockingIOError:
        lock.close()
        raise ConfigurationError(f"--store {folder}: another gateway is using it") from None
    except BaseException:
        lock.close()
        raise
    return lock


def check_ours(path: Path) -> None:
    """Checks that a path is absent or a plain file of this user without further hard links.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise ConfigurationError(f"{path} is a link, a pipe or a folder, not a file of a store: move it away")
    if found.st_uid != unix.user_id():
        raise ConfigurationError(f"{path} belongs to user {found.st_uid}, not to the user that runs this gateway")


def opened(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Opens a store's file; creates it unless ``read_only`` is set.

    Raises:
        ConfigurationError: the file does not exist, or was written by another version or another program.
        DamagedStore: it cannot be read as a store.
        sqlite3.Error: it cannot be opened.
    """
    if read_only and not path.is_file():
        raise ConfigurationError(f"{path} not found: give the --store directory of a gateway")
    if not read_only:  # created here, since SQLite would create it readable by others
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | unix.FILE, 0o600))
    where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
    connection = sqlite3.connect(where, uri=True, isolation_level=None, timeout=1.0)
    try:
        with reading():
            _check_header(path)
            _prepare(connection, path, read_only=read_only)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_header(path: Path) -> None:
    """Raises ``DamagedStore`` for invalid numbers in the header that SQLite reports with errors other than damage."""
    with path.open("rb") as file:
        header = file.read(100)
    if header and (
        len(header) < 100 or not {*header[18:20]} <= {1, 2} or not 0 <= header[47] <= 4 or any(header[44:47])
    ):
        raise DamagedStore("its header is not one that SQLite writes")


def _prepare(connection: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    connection.text_factory = as_text
    connection.execute("PRAGMA trusted_schema = OFF")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    parts = {(kind, name) for kind, name in connection.execute("SELECT type, name FROM sqlite_master")}
    tables = {name for kind, name in parts if kind == "table"}
    if tables and (version == 0 or not tables & {*_TABLES}):
        raise ConfigurationError(f"{path} is another program's file, not a store: give a folder of its own")
    if not 0 <= version <= _MOST_VERSION:
        raise DamagedStore(f"it has version {version}")
    if version not in (0, _VERSION) or (version == 0 and read_only):
        raise ConfigurationError(
            f"{path} has version {version}, not {_VERSION}: it was written by another esper_otel, which can still read "
            "it; give another folder, or move the file away"
        )
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_VERSION};COMMIT;")
    _check_tables(connection)


def _check_tables(connection: sqlite3.Connection) -> None:
    """Raises ``DamagedStore`` unless the file has exactly the tables and indexes of a store."""
    found = [*connection.execute("SELECT type, name FROM sqlite_master")]
    strange = [name for kind, name in found if kind not in {"table", "index"}]
    indexes = {name for kind, name in found if kind == "index"}
    if strange or not indexes >= _INDEXES:
        raise DamagedStore("it has other tables or indexes than a store")
    for table, columns in _TABLES.items():
        known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if columns - known:
            raise DamagedStore(f"its table {table} lacks {', '.join(sorted(columns - known))}")
        if known - columns:  # writing a row would fail
            raise DamagedStore(f"its table {table} has more columns than that of a store")


def moved_aside(path: Path) -> Path:
    """Renames a damaged file, and those that SQLite made next to it, to a name that contains the time.

    Raises:
        OSError: a file cannot be renamed.
    """
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.damaged-{now}-{secrets.token_hex(2)}")
    for suffix in SUFFIXES:
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def as_text(raw: bytes) -> str:
    """Reads a text of a file."""
    return raw.decode(errors="replace")  # a text that is not UTF-8 must not make other rows unreadable
