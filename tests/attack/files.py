"""The gateway's files, changed while it is down; and a token file that a template made."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time

from attack.otlp import Point, body, step, unfinished
from attack.target import Attack, Target

_VICTIM = b"not the gateway's\n"
_DAMAGES = (b"", b"\0" * 40, b"\xff" * 200, b"[" * 100_000, b"{}", b"null")


def _fill(target: Target) -> None:
    """Runs with released steps, and one whose body is still kept."""
    for number in range(len(_DAMAGES)):
        target.post(body(f"rogue-{number}", [Point("loss", 1.0, time.time_ns())]))
        target.post(step(f"rogue-{number}", 1))
    time.sleep(min(0.5, target.left_s()))
    for number in range(len(_DAMAGES)):
        target.post(unfinished(f"rogue-kept-{number}", 5))


def _damage(target: Target) -> None:
    """Each row of a rogue's run becomes something else."""
    for file in target.gateway.store.rglob("*.sqlite3"):
        with sqlite3.connect(file) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[2] == "BLOB"]
                for column in columns:
                    rows = f"SELECT rowid, {column} FROM {table}"
                    for number, (row, content) in enumerate(connection.execute(rows).fetchall()):
                        is_rogue = b"honest" not in (content or b"") if table == "bodies" else False
                        if table == "items":
                            is_rogue = _run_of(connection, row).startswith("rogue-")
                        if is_rogue:
                            damage = _DAMAGES[number % len(_DAMAGES)]
                            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (damage, row))
        connection.close()


def _run_of(connection: sqlite3.Connection, row: int) -> str:
    found = connection.execute(
        "SELECT run_id FROM runs JOIN items ON runs.id = items.run WHERE items.rowid = ?", (row,)
    ).fetchone()
    return str(found[0]) if found else ""


def _pull_damaged(target: Target) -> None:
    """What is damaged is not an error of the server that tells nothing."""
    with target.channel() as channel:
        for number in range(len(_DAMAGES)):
            code, words = target.pull(channel, f"rogue-{number}")
            target.hold(holds=code.name not in {"UNKNOWN", "INTERNAL"}, otherwise=f"a damaged run: {code.name} {words}")


def _link(target: Target) -> None:
    """Every file of the store but its database is a link to somebody's file."""
    (target.gateway.folder / "victim").write_bytes(_VICTIM)
    for file in [*target.gateway.store.iterdir(), target.gateway.store / "lock"]:
        if "sqlite3" not in file.name and not file.is_dir():
            file.unlink(missing_ok=True)
            file.symlink_to(target.gateway.folder / "victim")
    command = [sys.executable, "-m", "esper_otel", "gateway", "--grpc", "127.0.0.1:0", "--http", "none", "--store"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([*command, str(target.gateway.store)], capture_output=True, timeout=3, check=False)
    content = (target.gateway.folder / "victim").read_bytes()
    target.hold(holds=content == _VICTIM, otherwise="a file behind a link in the store was changed")
    for file in list(target.gateway.store.iterdir()):
        if file.is_symlink():
            file.unlink()


def _prefix(target: Target) -> None:
    """``run=`` with nothing after it, as an empty variable leaves it."""
    file = target.gateway.folder / "empty-prefix"
    file.write_text("some-token run=\n", encoding="utf-8")
    command = [sys.executable, "-m", "esper_otel", "gateway", "--grpc", "127.0.0.1:0", "--http", "none"]
    try:
        done = subprocess.run([*command, "--send-tokens", str(file)], capture_output=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        target.fault("an empty prefix is taken for all runs")
    else:
        target.hold(holds=done.returncode != 0, otherwise="an empty prefix is taken for all runs")


ATTACKS = (
    Attack("damaged-store", "damaged rows in the store", _fill, between=_damage, after=_pull_damaged),
    Attack("linked-lock", "links in the store to somebody's file", _fill, between=_link),
    Attack("empty-prefix", "a token file with an empty prefix", _prefix),
)
