"""What a store's folder holds may be anything: the gateway starts, touches only its own, and keeps what is damaged."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import warm
from frame_examples import RUN, TIME_UNIX_NS, block_of, make_frame, sealed, seed_table, taken_apart
from gateways import RunningGateway
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from test_stores import item, steps_of
from wire import bodies

from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frames.layout import HEAD
from esper_otel.frames.quarantine import Quarantine
from esper_otel.frames.records import _FIELDS, DamagedRecord, frames_in
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Origin, Place
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.request import DecodedRequest
from esper_otel.gateway.serve.metrics import prometheus_text
from esper_otel.gateway.store.base import KeptRequest
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.pull.messages import PullRequest

pytestmark = pytest.mark.lengthy

FILE = "steps.sqlite3"


def body_of(step: int, run_id: str = RUN.run_id) -> bytes:
    frame = make_frame(sequence=step, global_step=step, time_unix_ns=TIME_UNIX_NS + step * 10**6)
    [body] = bodies([frame._replace(run=RUN.__class__(run_id, RUN.attempt))])
    return body


def change(folder: Path, script: str, *values: Any) -> None:
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute(script, values)
    connection.close()


def live(folder: Path, *, new_step: int = 50) -> list[int]:
    """A whole life of a gateway on this folder, in which a step comes: the steps that can be pulled."""

    async def of() -> list[int]:
        with closing(Core(FileStore(folder), hold_s=0.0)) as core:
            core.start()
            core.receive(body_of(new_step))
            await asyncio.sleep(0)
            found = []
            cursor = ""
            for _ in range(10):
                response = await core.pull(PullRequest(run_id=RUN.run_id, cursor=cursor))
                cursor = response.cursor
                found += [step.step for step in response.steps]
            core.runs()
            prometheus_text(core)
            core._tidy()
        return found

    return asyncio.run(of())


def filled(folder: Path, count: int = 6) -> None:
    async def of() -> None:
        core = Core(FileStore(folder), hold_s=0.0)
        core.start()
        for step in range(1, count + 1):
            core.receive(body_of(step))
        core.close()

    asyncio.run(of())


SEEN = seed_table({"seed-1": {"alpha": 0.5}})
HONEST = block_of([make_frame(seeds=SEEN, live=seed_table({"seed-1": {"alpha": 0.5}, "seed-2": {"alpha": 0.1}}))])


def block(kind: bytes, old: bytes = b"", new: bytes | None = None, **fields: int) -> bytes:
    """A block in which the first record of a kind is left out, or has other content; a row may have other numbers."""
    contents = taken_apart(HONEST)
    place = next(place for place, content in enumerate(contents) if content[:1] == kind)
    if fields:
        contents[place] = row_with(contents[place], **fields)
    elif new is None:
        del contents[place]
    else:
        assert old in contents[place]
        contents[place] = contents[place].replace(old, new)
    return sealed(contents)


def row_with(content: bytes, **fields: int) -> bytes:
    """The row with other numbers in its record, or in its head."""
    of_record = ("sequence", "run", "layout", "seeds", "retired")
    of_head = ("step", "epoch", "time", "digest", "lives", "of_layout", "of_seeds", "flags")
    start = 1 + _FIELDS.size
    record = dict(zip(of_record, _FIELDS.unpack_from(content, 1), strict=True))
    head = dict(zip(of_head, HEAD.unpack_from(content, start), strict=True))
    (record if {*fields} <= {*of_record} else head).update(fields)
    packed = _FIELDS.pack(*record.values()) + HEAD.pack(*head.values())
    return content[:1] + packed + content[start + HEAD.size :]


BLOCKS: dict[str, Any] = {
    "nothing": b"",
    "short": b"\x01",
    "another checksum": HONEST[:-1] + bytes([HONEST[-1] ^ 1]),
    "another version": HONEST.replace(HONEST[:4], HONEST[:3] + b"2"),
    "cut short": HONEST[:-9],
    "text": "a text",
    "number": 7,
    "null": None,
    "no frames": sealed(taken_apart(HONEST)[:-1]),
    "bytes after the last frame": HONEST + b"\0",
    "bytes before the first frame": b"\0" + HONEST,
    "the same numbers twice": HONEST + HONEST,
    "no JSON": block(b"L", b"[[", b"{{"),
    "no list": block(b"L", b'["loss"]', b"{}"),
    "deep": block(b"L", b'["loss"]', b"[" * 200_000),
    "values without names": block(b"L", b'["loss"]', b"[]"),
    "half a character": block(b"L", b'"loss"', b'"\\ud800"'),
    "a name that is there twice": block(b"L", b'["loss"]', b'["loss", "loss"]'),
    "seeds that are numbers": block(b"S", b'"seed-1"', b"1"),
    "columns of nothing": block(b"S", b"10]", b"0]"),
    "more columns than cells": block(b"S", b"10]", b"19]"),
    "a run that is a list": block(b"R", b"{}", b"[]"),
    "a run of numbers": block(b"R", b'"digits-7"', b"1"),
    "no run": block(b"R"),
    "no live seeds' ids": block(b"S"),
    "live cells that are too few": block(b"A", b"\x9a\x99\x99\x99", b""),
    "a kind that is not known": block(b"A", b"A", b"Z"),
    "a number that no step has": block(b"F", sequence=2**63),
    "a run that is not there": block(b"F", run=77),
    "retired seeds without an end": block(b"F", retired=2**32 - 1),
    "a flag that is not known": block(b"F", flags=7),
    "a digest that no step has": block(b"F", digest=2**48),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_one_damaged_frame_is_put_aside_and_all_others_are_served(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    change(tmp_path, "UPDATE blocks SET frames = ? WHERE id = 3", BLOCKS[name])
    assert live(tmp_path) == [1, 2, 4, 5, 6, 50]
    assert live(tmp_path, new_step=51) == [1, 2, 4, 5, 6, 50, 51]
    [aside] = (tmp_path / "damaged").iterdir()
    assert "-frame-" in aside.name
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert "damage in the store was taken out" in caplog.text
    assert str(aside) in caplog.text


@pytest.mark.parametrize("position", [1, 6])
def test_the_first_and_the_last_frame_may_be_damaged_too(tmp_path: Path, position: int) -> None:
    """The first says where the run began, the last what the next step's loss is compared with."""
    filled(tmp_path)
    change(tmp_path, "UPDATE blocks SET frames = x'00' WHERE id = ?", position)
    assert live(tmp_path) == [step for step in (1, 2, 3, 4, 5, 6, 50) if step != position]


_BODY = "INSERT INTO bodies (number, is_json, received, body) VALUES"
ROWS = {
    "a run without a name": "UPDATE runs SET run_id = NULL",
    "a run named by bytes": "UPDATE runs SET run_id = x'FFFE'",
    "a run whose name is no UTF-8": "UPDATE runs SET run_id = CAST(x'61FFFE' AS TEXT)",
    "a run that moves the cursor": "UPDATE runs SET run_id = char(27) || '[2J'",
    "a life that is none": "UPDATE runs SET life = 7",
    "a last step that is none": "UPDATE runs SET last = 'x'",
    "a last step before the last": "UPDATE runs SET last = 1",
    "a last step at the end of all numbers": "UPDATE runs SET last = 9223372036854775807",
    "an age without end": "UPDATE runs SET added_s = 9e999",
    "an age that is a text": "UPDATE runs SET added_s = 'x'",
    "a store's age that is a text": "UPDATE age SET seconds = 'x'",
    "a store's age without end": "UPDATE age SET seconds = 9e999",
    "no age": "DELETE FROM age",
    "two ages": "INSERT INTO age VALUES (5.0)",
    "a rank that is a text": "UPDATE ranks SET rank = 'x'",
    "a rank's last that is a text": "UPDATE ranks SET last = 'x'",
    "a rank's last before the last": "UPDATE ranks SET last = 0",
    "no ranks": "DELETE FROM ranks",
    "frames of no run": "UPDATE items SET run = 77 WHERE position < 3",
    "a position that is a text": "UPDATE items SET position = 'x' WHERE position = 2",
    "a position at the end of all numbers": "UPDATE items SET position = 9223372036854775807 WHERE position = 6",
    "a number at the end of all numbers": "UPDATE items SET number = 9223372036854775807 WHERE number = 6",
    "an attempt that is a text": "UPDATE items SET attempt = 'x' WHERE position = 2",
    "a revision that no answer can carry": "UPDATE items SET revision = 4294967296 WHERE position = 2",
    "a writer that is a number": "UPDATE items SET writer = x'00' WHERE position = 2",
    "a writer that is no UTF-8": "UPDATE items SET writer = CAST(x'FF' AS TEXT) WHERE position = 2",
    "a time that is a text": "UPDATE items SET received = 'x' WHERE position = 2",
    "a time of bytes": "UPDATE items SET received = x'00' WHERE position = 2",
    "a loss that is a text": "UPDATE items SET loss_before = 'x' WHERE position = 2",
    "a block that is a text": "UPDATE items SET block = 'x' WHERE position = 2",
    "a block that is not there": "UPDATE items SET block = 77 WHERE position = 2",
    "a place that its block does not have": "UPDATE items SET place = 1 WHERE position = 2",
    "a place that is negative": "UPDATE items SET place = -1 WHERE position = 2",
    "a block of no run": "UPDATE blocks SET run = 77 WHERE id = 2",
    "a block without frames": "UPDATE blocks SET count = 0 WHERE id = 2",
    "a block of a text": "UPDATE blocks SET count = 'x' WHERE id = 2",
    "a block without end": "UPDATE blocks SET count = 9223372036854775807, last = 9223372036854775807 WHERE id = 6",
    "no blocks": "DELETE FROM blocks",
    "a place whose holes are none": "UPDATE places SET holes = 'x'",
    "a place whose holes are deep": f"UPDATE places SET holes = '{'[' * 50_000}'",
    "a place whose holes are texts": """UPDATE places SET holes = '[["a", "b"]]'""",
    "a place whose holes are in disorder": "UPDATE places SET holes = '[[9, 8]]'",
    "a place whose units are none": "UPDATE places SET units = '[[1, 2]]'",
    "a place that is a text": "UPDATE places SET next = 'x'",
    "a place at the end of all numbers": "UPDATE places SET next = 9223372036854775807, missing = 9223372036854775807",
    "a place of bytes": "UPDATE places SET missing = x'00'",
    "an outcome of bytes": "INSERT INTO ends VALUES (1, 0, 1, '', x'00')",
    "an outcome of a text": "INSERT INTO ends VALUES ('x', 0, 1, '', 'completed')",
    "a body that is a number": f"{_BODY} (1, 0, 0, 7)",
    "a body that is none": f"{_BODY} (1, 0, 0, x'FFFFFFFF')",
    "a body of JSON that is none": f"{_BODY} (1, 1, 0, x'FF')",
    "a body of deep JSON": f"{_BODY} (1, 1, 0, CAST('{'[' * 99_999}' AS BLOB))",
    "a body of another time": f"{_BODY} (1, 0, 'x', x'')",
    "a body at the end of all numbers": f"{_BODY} (9223372036854775807, 0, 0, x'')",
}


@pytest.mark.parametrize("name", ROWS)
def test_no_row_keeps_a_gateway_from_starting_and_taking_steps(tmp_path: Path, name: str) -> None:
    filled(tmp_path)
    change(tmp_path, ROWS[name])
    assert live(tmp_path)[-1] == 50
    assert live(tmp_path, new_step=51)[-2:] == [50, 51]


@pytest.mark.parametrize("kind", ["TEXT", "BLOB"])
def test_who_only_reads_skips_rows_that_are_none(tmp_path: Path, kind: str) -> None:
    filled(tmp_path)
    change(tmp_path, f"UPDATE items SET position = CAST('x' || position AS {kind}) WHERE position > 2")
    with closing(FileStore(tmp_path, read_only=True)) as store:
        cursor = store.after(RUN.run_id, "", None, 2).cursor
        assert steps_of(store, RUN.run_id) == [1, 2]
        assert steps_of(store, RUN.run_id, cursor) == []


FILES: dict[str, Callable[[bytes], bytes]] = {
    "not SQLite": lambda content: b"nothing of the kind" * 1000,
    "cut short": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "a header only": lambda content: content[:100],
    "pages of noise": lambda content: content[:4096] + random.Random(1).randbytes(len(content) - 4096),
    "a version that nobody has": lambda content: content[:60] + b"\x7f\xff\xff\xff" + content[64:],
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_kept_under_another_name_and_a_new_one_begun(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    content = FILES[name]((tmp_path / FILE).read_bytes())
    (tmp_path / FILE).write_bytes(content)
    assert live(tmp_path) == [50]
    assert live(tmp_path, new_step=51) == [50, 51]
    [aside] = [path for path in tmp_path.iterdir() if ".damaged-" in path.name]
    assert aside.read_bytes() == content
    assert aside.name in caplog.text


@pytest.mark.parametrize(
    "script",
    [
        *("DROP TABLE places", "DROP TABLE runs", "ALTER TABLE items DROP COLUMN received"),
        *("ALTER TABLE places ADD COLUMN more TEXT", "ALTER TABLE items ADD COLUMN more TEXT"),
    ],
)
def test_a_store_with_other_tables_is_kept_under_another_name(tmp_path: Path, script: str) -> None:
    filled(tmp_path)
    change(tmp_path, script)
    assert live(tmp_path) == [50]
    assert any(".damaged-" in path.name for path in tmp_path.iterdir())


def test_a_trigger_in_the_file_does_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    change(tmp_path, "CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM items; END")
    assert live(tmp_path) == [50]
    assert live(tmp_path, new_step=51) == [50, 51]


def test_damage_that_shows_while_it_runs_ends_no_gateway(tmp_path: Path) -> None:
    """The next request is stored, in a new file; its age does not jump, by which other files know what is old."""
    clock = [1_000.0]
    FileStore(tmp_path, clock=lambda: clock[0]).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("UPDATE age SET seconds = 5e6")
        connection.commit()
    store = FileStore(tmp_path, clock=lambda: clock[0])
    clock[0] += 60.0
    store.add([item(step) for step in range(1, 2_000)])
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / FILE).open("r+b") as file:
        file.seek(8192)
        file.write(random.Random(2).randbytes((tmp_path / FILE).stat().st_size - 8192))
    store._connection.execute("PRAGMA cache_size = 1")
    for step in range(2_000, 2_100):
        store.add([item(step)])
    assert store.damaged["store"] == 1
    assert steps_of(store)[-1] == 2_099
    assert store.age_s() == 5e6 + 60.0
    store.close()


def test_long_ids_and_escaped_units_are_not_damage(tmp_path: Path) -> None:
    """Ids may be as long as --limit text_bytes allows, and a unit is escaped after it was cut."""
    store = FileStore(tmp_path)
    origin = Origin("r" * 500, 1, 0)
    place = Place(origin, 2, 1, 0, says_step=True, says_epoch=False, holes=(), units=(("m" * 500, "\\u202e" * 63),))
    store.add([item(1, "r" * 500)], places=[place])
    store.close()
    store = FileStore(tmp_path)
    assert [*store.places()] == [place]
    assert not +store.damaged
    store.close()


def test_a_damaged_index_hides_no_step(tmp_path: Path) -> None:
    """SQLite does not notice by itself: what it looks for in the index is not there, and is taken not to exist."""
    filled(tmp_path, 12)
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        kept = "SELECT rootpage FROM sqlite_master WHERE name = 'items_by_number'"
        other = "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = ?) WHERE name = ?"
        (root,) = connection.execute(kept).fetchone()
        connection.execute(other, ("items_by_position", "items_by_number"))
        connection.execute("UPDATE sqlite_master SET rootpage = ? WHERE name = 'items_by_position'", (root,))
    connection.close()
    assert live(tmp_path) == [*range(1, 13), 50]


def test_bytes_changed_anywhere_keep_no_gateway_from_starting(tmp_path: Path) -> None:
    filled(tmp_path / "whole", 12)
    whole = (tmp_path / "whole" / FILE).read_bytes()
    luck = random.Random(7)
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        content = bytearray(whole)
        for _ in range(luck.choice([1, 3, 30])):
            # not the version: that of a later esper_otel is refused in words
            place = luck.choice([luck.randrange(60), luck.randrange(64, len(content))])
            content[place] = luck.randrange(256)
        (folder / FILE).write_bytes(content)
        with suppress(UnknownRun):  # the damage was found by the pull
            assert 50 in live(folder)  # not the last, if the time of another one was changed
        assert 51 in live(folder, new_step=51)


@examples(100)
@given(st.integers(0, 10), st.binary(max_size=60), st.integers(0, 300))
def test_any_bytes_are_a_frame_or_damaged(number: int, changed: bytes, place: int) -> None:
    """Also if the checksum is right."""
    contents = taken_apart(block_of([make_frame(), make_frame(live=SEEN)]))
    content = bytearray(contents[number % len(contents)])
    content[place : place + len(changed)] = changed
    contents[number % len(contents)] = bytes(content)
    try:
        frames = frames_in(sealed(contents))
    except DamagedRecord:
        return
    block_of(frames)
    for frame in frames:
        frame.values()


# -- requests that are kept ------------------------------------------------------------------------------


def test_a_request_that_fails_when_it_is_processed_again_is_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises. The others are processed."""
    filled(tmp_path, 3)
    store = FileStore(tmp_path)
    for number, step in enumerate((4, 5, 6), 1):
        store.add([], kept=KeptRequest(number, body_of(step), False, 5), first_kept=1)
    store.close()

    decode = Decoder.decode

    def failing(self: Decoder, body: bytes) -> DecodedRequest:
        if body == body_of(5):
            raise MemoryError("of this one")
        return decode(self, body)

    monkeypatch.setattr(Decoder, "decode", failing)
    assert live(tmp_path) == [1, 2, 3, 4, 6, 50]
    [aside] = (tmp_path / "damaged").iterdir()
    assert aside.read_bytes() == body_of(5)


CRASH = """
import os, sys
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Origin, Place
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.store.sqlite import FileStore
Decoder.decode = lambda self, body: os._exit(9)
Core(FileStore(sys.argv[1]))
"""


def test_a_request_that_ends_the_process_does_not_end_it_for_ever(tmp_path: Path) -> None:
    """As one that takes more memory than there is. A gateway that was killed once or twice tries again."""
    store = FileStore(tmp_path)
    for number, step in enumerate((1, 2, 3), 1):
        store.add([], kept=KeptRequest(number, body_of(step), False, 5), first_kept=1)
    store.close()
    for _ in range(3):
        assert warm.run("-c", CRASH, str(tmp_path), imported=warm.PACKAGE).returncode == 9
    store = FileStore(tmp_path)
    assert store._bodies == [1, 2, 3]
    store.close()
    assert live(tmp_path) == [2, 3, 50]
    [aside] = (tmp_path / "damaged").iterdir()
    assert aside.read_bytes() == body_of(1)


def test_what_is_put_aside_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper_otel.frames.quarantine.MOST_FILES", 3)
    aside = Quarantine(tmp_path)
    assert [bool(aside.put("frame", b"x")) for _ in range(5)] == [True] * 3 + [False] * 2
    assert not Quarantine(tmp_path).put("frame", b"x")
    monkeypatch.setattr("esper_otel.frames.quarantine.MOST_BYTES", 10)
    assert not Quarantine(tmp_path / "other").put("frame", bytes(11))


# -- only what we made -----------------------------------------------------------------------------------


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "lock").symlink_to(precious)
    with pytest.raises(ConfigurationError, match="lock is a link"):
        FileStore(folder)
    (folder / "lock").unlink()
    os.link(precious, folder / "lock")
    with pytest.raises(ConfigurationError, match="not a file of a store"):
        FileStore(folder)
    (folder / "lock").unlink()
    (folder / "lock").write_text("somebody's notes")
    FileStore(folder).close()
    assert (folder / "lock").read_text() == "somebody's notes"
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_no_file_of_somebody_else_is_opened(tmp_path: Path, suffix: str, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    folder = tmp_path / "store"
    folder.mkdir()
    path = folder / f"{FILE}{suffix}"
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "hard link":
        os.link(precious, path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(ConfigurationError, match="not a file of a store"):
        FileStore(folder)
    assert precious.read_text() == "years of work"


def test_another_programs_database_is_left_as_it_is(tmp_path: Path) -> None:
    change(tmp_path, "CREATE TABLE theirs (a)")
    before = (tmp_path / FILE).read_bytes()
    for read_only in (False, True):
        with pytest.raises(ConfigurationError, match="another program"):
            FileStore(tmp_path, read_only=read_only)
    assert (tmp_path / FILE).read_bytes() == before


def test_nobody_else_can_read_what_we_make(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = FileStore(tmp_path / "store")
        store.add([item(1)])
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert {*modes} == {FILE, f"{FILE}-wal", f"{FILE}-shm", "lock"}
    assert {*modes.values()} == {0o600}
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


def test_a_gateway_of_its_own_process_says_and_counts_what_was_damaged(tmp_path: Path) -> None:
    filled(tmp_path)
    change(tmp_path, "UPDATE blocks SET frames = x'00' WHERE id = 3")
    with RunningGateway("--store", str(tmp_path)) as gateway:
        metrics = requests.get(f"http://{gateway.http}/metrics", timeout=10).text
    assert 'esper_gateway_damaged_total{kind="frame"} 1' in metrics
    assert str(tmp_path / "damaged") in gateway.said
