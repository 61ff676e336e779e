"""Fuzzing of a gateway's store: whatever its file holds, a gateway starts on it and serves what comes then."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

from attack.beside import phases
from frame_examples import RUN, TIME_UNIX_NS, block_of, make_frame, sealed, seed_table, taken_apart
from log_requests import body as log_body
from patience import patience
from wire import bodies

from esper_otel.errors import ConfigurationError, GatewayError, StaleCursor, UnknownRun
from esper_otel.gateway.core import Core
from esper_otel.gateway.serve.metrics import prometheus_text
from esper_otel.gateway.store.base import KeptRequest, StoreFull
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.turns import in_turns
from esper_otel.pull.messages import EventsRequest, HoursRequest, PullRequest

FILE, EVENTS, HOURS = FILES = ("steps.sqlite3", "events.sqlite3", "hours.sqlite3")
_INDEXES = ("blocks_by_last", "items_by_position", "items_by_number", "items_by_time")
_SLOWEST_S = 60.0  # of all lives of one store; a machine that does other things, too, takes some of it
_VALUES = (
    *("NULL", "''", "'x'", "x''", "x'00'", "x'FFFE'", "CAST(x'61FFFE' AS TEXT)", "char(27) || '[2J'", "'nan'"),
    *("-1", "0", "1", "2", "3", "1.5", "9e999", "-9e999", "2147483647", "2147483648", "4294967296"),
    *("9007199254740991", "9007199254740992", "9223372036854775807", "-9223372036854775808"),
    *("'[]'", "'[[1, 2]]'", "'[[2, 1]]'", "'[[0, 9007199254740992]]'", "replace(hex(zeroblob(50000)), '0', '[')"),
    *("zeroblob(100000)", "randomblob(64)", "hex(zeroblob(3000))", "rowid", "'0x10'", "' 1'", "'1e3'"),
)


def _body(step: int, run_id: str = RUN.run_id, attempt: int = RUN.attempt) -> bytes:
    frame = make_frame(sequence=step, global_step=step, time_unix_ns=TIME_UNIX_NS + step * 10**6)
    [body] = bodies([frame._replace(run=RUN.__class__(run_id, attempt))])
    return body


@cache
def honest_store() -> dict[str, bytes]:
    """The files of a store with two runs, some of whose last requests wait to be processed again."""

    async def fill(folder: Path) -> None:
        with closing(Core(FileStore(folder), hold_s=0.0)) as core:
            core.start()
            for step in range(1, 13):
                core.receive(_body(step))
                core.receive(_body(step, "other"))
            core.receive(phases(RUN.run_id, 1, 5))
            await core.take_logs(log_body(RUN.run_id, *range(1, 13)))
            await core.run_hours(RUN.run_id)

    with tempfile.TemporaryDirectory() as made:
        asyncio.run(fill(Path(made)))
        with closing(FileStore(Path(made))) as store:
            for number, step in enumerate((13, 14), 1_000):
                store.add([], kept=KeptRequest(number, _body(step), False, 5), first_kept=1_000)
        return {name: (Path(made) / name).read_bytes() for name in FILES}


def _change_bytes(luck: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(luck.choice([1, 3, 30, 1_000])):
        content[luck.randrange(len(content))] = luck.randrange(256)
    if luck.random() < 0.2:
        start, length = luck.randrange(len(content)), luck.choice([1, 100, 4_096])
        content[start : start + length] = bytes(luck.choice([0, length]))
    path.write_bytes(content)


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    """Those of the table, or a name that none has when it is gone by now."""
    return [row[1] for row in connection.execute(f"PRAGMA table_info({table})")] or ["none"]


def _change_cells(luck: random.Random, connection: sqlite3.Connection, table: str) -> None:
    columns = _columns(connection, table)
    [count] = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    row = luck.randrange(count + 1)
    value = luck.choice([*_VALUES, *columns]).replace("rowid", luck.choice(columns))
    key = ", ".join(columns)
    rows = luck.choice(["1", f"({key}) IN (SELECT {key} FROM {table} LIMIT 1 OFFSET {row})"])
    match luck.randrange(6):
        case 0:
            connection.execute(f"DELETE FROM {table} WHERE {rows}")
        case 1:
            parts = [value if luck.random() < 0.3 else column for column in columns]
            connection.execute(f"INSERT OR REPLACE INTO {table} SELECT {', '.join(parts)} FROM {table} WHERE {rows}")
        case _:
            connection.execute(f"UPDATE OR REPLACE {table} SET {luck.choice(columns)} = {value} WHERE {rows}")


def _change_frame(luck: random.Random, connection: sqlite3.Connection, changed: Callable[..., Any]) -> None:
    """Texts that another program wrote, or bytes that nobody did."""
    contents = taken_apart(block_of([make_frame(live=seed_table({"seed-1": {"alpha": 0.5}}))]))
    place = luck.randrange(len(contents))
    content = contents[place]
    if content[:1] in b"RLS" and luck.random() < 0.8:
        contents[place] = content[:5] + json.dumps(changed(luck, json.loads(content[5:]))).encode()
    else:
        broken = bytearray(content)
        broken[luck.randrange(len(broken))] = luck.randrange(256)
        contents[place] = bytes(broken)
    connection.execute("UPDATE blocks SET frames = ? WHERE id = ?", (sealed(contents), luck.randint(1, 24)))


def _change_schema(luck: random.Random, connection: sqlite3.Connection, table: str) -> None:
    columns = _columns(connection, table)
    connection.execute(
        luck.choice(
            [
                f"DROP TABLE {table}",
                f"ALTER TABLE {table} RENAME TO other_{table}",
                f"ALTER TABLE {table} RENAME COLUMN {luck.choice(columns)} TO other",
                f"ALTER TABLE {table} ADD COLUMN more TEXT",
                f"CREATE TABLE more AS SELECT * FROM {table}",
                f"CREATE VIEW more AS SELECT * FROM {table}",
                f"CREATE TRIGGER more AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END",
                f"DROP INDEX {luck.choice(_INDEXES)}",
                f"PRAGMA user_version = {luck.choice([-1, 0, 1, 2, 5, 7, 1_000, 1_001, 2**31 - 1])}",
            ]
        )
    )


def _changed_store(luck: random.Random, folder: Path, changed: Callable[..., Any]) -> None:
    for name, content in honest_store().items():
        (folder / name).write_bytes(content)
    for name in luck.choice([[FILE], [FILE], [EVENTS], [HOURS], FILES]):
        _change(luck, folder / name, changed)


def _change(luck: random.Random, path: Path, changed: Callable[..., Any]) -> None:
    if luck.random() < 0.25:
        _change_bytes(luck, path)
        return
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for _ in range(luck.randint(1, 4)):
            with suppress(sqlite3.Error):  # SQLite itself does not let it be written
                match luck.randrange(8):
                    case 0:
                        _change_schema(luck, connection, luck.choice(tables))
                    case 1 | 2:
                        _change_frame(luck, connection, changed)
                    case _:
                        _change_cells(luck, connection, luck.choice(tables))
    if luck.random() < 0.1:
        _change_bytes(luck, path)


def _life(folder: Path, step: int, attempt: int) -> bool:
    """A life of a gateway, in which a step comes; returns whether that can be pulled then."""

    async def steps_of(core: Core, run_id: str) -> list[int]:
        found: list[int] = []
        cursor = ""
        for _ in range(5):
            try:
                page = await core.pull(PullRequest(run_id=run_id, cursor=cursor))
            except (UnknownRun, StaleCursor):  # the damage was found by the pull, or the run is named otherwise
                return found
            cursor = page.cursor
            found += [each.step for each in page.steps]
        return found

    async def has_event(core: Core) -> bool:
        for _ in range(2):  # the first may find the damage
            with suppress(StoreFull):
                core.receive(phases(RUN.run_id, step, 1))
                await core.take_logs(log_body(RUN.run_id, step))
        page = await core.events(EventsRequest(run_id=RUN.run_id, max_events=1_000))
        with suppress(UnknownRun):
            await core.hours(HoursRequest(run_id=RUN.run_id, with_accounts=True))
        core.newest_events(RUN.run_id, 0)
        return any(event.number == step for event in page.events)

    async def whole() -> bool:
        with closing(Core(FileStore(folder), hold_s=0.0)) as core:
            core.start()
            core.receive(_body(step, attempt=attempt))
            await asyncio.sleep(0)
            found = await steps_of(core, RUN.run_id)
            await steps_of(core, "other")
            is_noted = await has_event(core)
            await in_turns(core._hours.tidying())
            core.runs()
            prometheus_text(core)
            core._tidy()
        return step in found and is_noted

    return asyncio.run(whole())


def fuzz_store(luck: random.Random, within: Path, changed: Callable[..., Any]) -> None:
    """One store: read by others, and three lives of a gateway, the last of which serves its step at the latest."""
    started_s = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=within))
    _changed_store(luck, folder, changed)
    with (
        suppress(ConfigurationError, GatewayError, UnknownRun, StaleCursor),
        closing(FileStore(folder, read_only=True)) as store,
    ):
        store.after(RUN.run_id, "", None, 100)
    try:
        # Damage may say something likely of an earlier writer, as a later next step: not of a new attempt.
        lives = [_life(folder, 50 + number, RUN.attempt + number) for number in range(3)]
    except ConfigurationError as error:
        if not any(why in str(error) for why in ("was written by another esper_otel", "another program")):
            raise  # those are left as they are
    else:
        assert any(lives[1:]), "no step that comes is served, or no event"
    assert time.monotonic() - started_s < patience(_SLOWEST_S)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
