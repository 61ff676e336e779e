"""Database: the SQLite file of a store: its tables, who may write it, and what its failures mean."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.stored import StoreFull

FILE = "steps.sqlite3"
_LOCK = "lock"
_VERSION = 2
_SCHEMA = """
CREATE TABLE runs (id INTEGER PRIMARY KEY, run_id TEXT UNIQUE, life TEXT, last INTEGER, added_s REAL);
CREATE TABLE ranks (run INTEGER, rank INTEGER, last INTEGER, PRIMARY KEY (run, rank)) WITHOUT ROWID;
CREATE TABLE items (
    run INTEGER, position INTEGER, rank INTEGER, number INTEGER, attempt INTEGER, writer TEXT, revision INTEGER,
    complete INTEGER, received INTEGER, loss_before REAL, size INTEGER, frame BLOB
);
CREATE UNIQUE INDEX items_by_position ON items (run, position);
CREATE UNIQUE INDEX items_by_number ON items (run, rank, number);
CREATE TABLE ends (
    run INTEGER, rank INTEGER, attempt INTEGER, writer TEXT, outcome TEXT, PRIMARY KEY (run, rank, attempt, writer)
) WITHOUT ROWID;
CREATE TABLE bodies (number INTEGER PRIMARY KEY, is_json INTEGER, received INTEGER, body BLOB);
"""
# What version 2 added. When a run got its last step is told in seconds of the store's own age from then on.
_ADDED = """
CREATE TABLE places (
    run INTEGER, rank INTEGER, attempt INTEGER, writer TEXT, next INTEGER, lowest INTEGER, missing INTEGER,
    says_step INTEGER, says_epoch INTEGER, holes TEXT, PRIMARY KEY (run, rank, attempt, writer)
) WITHOUT ROWID;
CREATE TABLE age (seconds REAL);
INSERT INTO age VALUES (0.0);
UPDATE runs SET added_s = 0.0;
"""


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """What is written in the block is there as a whole or not at all.

    Raises:
        StoreFull: it could not be written.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise StoreFull(f"the store cannot be written: {error}") from error
        raise


def locked(folder: Path) -> IO[str]:
    """Takes a folder for this process; what is returned holds it until it is closed.

    Raises:
        ConfigurationError: another gateway has it, or it cannot be made.
    """
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


def opened(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Opens a store's file; makes it when it may be written.

    Raises:
        ConfigurationError: it is not there, or another version's.
        sqlite3.Error: it is damaged, or no such file.
    """
    if read_only and not path.is_file():
        raise ConfigurationError(f"{path} is not there: give a folder that a gateway has stored to")
    where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(where, uri=True, isolation_level=None, timeout=1.0)
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version in (0, 1) and not read_only:
        new = _ADDED if version else _SCHEMA + _ADDED
        connection.executescript(f"BEGIN;{new}PRAGMA user_version = {_VERSION};COMMIT;")
    elif version != _VERSION and not (version == 1 and read_only):  # frames are the same in both
        connection.close()
        raise ConfigurationError(f"{path} has version {version}, not {_VERSION}: it was written by another esper_otel")
    return connection
