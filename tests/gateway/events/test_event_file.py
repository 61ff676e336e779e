"""Events as they are stored: once each, in order of arrival, bounded, by sender, and again after a restart."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from log_requests import body, request

from esper_otel.errors import ConfigurationError, StaleCursor
from esper_otel.gateway.events import run_events
from esper_otel.gateway.events.event_file import FILE, EventFile, StoredEventPage
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.log_records import NO_ROOM_FOR_EVENTS, TOO_MANY_EVENTS, EventRecord, decode_logs
from esper_otel.gateway.store.base import StoreFull
from esper_otel.gateway.turns import finished
from esper_otel.log import Warnings

pytestmark = pytest.mark.own_code

LIMITS = Limits()


def events(run_id: str, *numbers: int, **about: Any) -> list[EventRecord]:
    return list(decode_logs(body(run_id, *numbers, **about), LIMITS).events)


def opened(folder: Path | None = None, limits: Limits = LIMITS, **options: Any) -> EventFile:
    return EventFile(folder, limits, Warnings(), **options)


def page(file: EventFile, cursor: str = "", rank: int | None = None, most: int = 100) -> StoredEventPage:
    found = file.after("run", cursor, rank, most)
    assert found is not None
    return found


def numbers(found: StoredEventPage) -> list[int]:
    return [event.number for event in found.events]


def test_each_event_is_stored_once_and_what_is_missing_is_counted() -> None:
    """A late one is delivered to a puller that has the later ones, too."""
    file = opened()
    assert file.add(events("run", 1, 2, 5), "")[0] == 3
    first = page(file)
    assert (numbers(first), first.gap, file.missing()) == ([1, 2, 5], 2, 2)
    assert file.add(events("run", 2, 5, 3), "")[0] == 1
    second = page(file, first.cursor)
    assert (numbers(second), second.gap, file.missing()) == ([3], 0, 1)
    assert numbers(page(file, second.cursor)) == []


def test_what_a_later_process_sends_again_is_known_and_what_a_second_one_sends_is_not_taken_for_it() -> None:
    """A repeat has the number and the time of the event; another time is another process that claims the rank."""
    file = opened()
    assert file.add(events("run", 1, 2, **{"process.pid": 1}), "")[0] == 2
    assert file.add(events("run", 1, 2, 3, **{"process.pid": 2}), "")[0] == 1
    [second] = events("run", 3, **{"process.pid": 3})
    assert file.add([second._replace(time_unix_ns=second.time_unix_ns + 1)], "")[0] == 1
    assert [event.number for event in page(file).events if not event.process] == [1, 2, 3]
    assert [event.number for event in page(file).events if event.process] == [3]
    assert file.missing() == 0
    for about in ({"attempt": 2}, {"rank": 1}):
        assert file.add(events("run", 1, **about), "")[0] == 1
        assert file.add(events("run", 1, **about), "")[0] == 0
    assert [(event.rank, event.attempt) for event in page(file, rank=1).events] == [(1, 1)]


def test_a_cursor_goes_on_page_by_page_and_after_a_restart(tmp_path: Path) -> None:
    """Of a rank, a page may end before the newest event of another."""
    file = opened(tmp_path)
    for number in range(1, 11):
        file.add(events("run", number, rank=number % 2), "")
    found, cursor = [], ""
    while len((each := page(file, cursor, rank=1, most=2)).events):
        found += numbers(each)
        cursor = each.cursor
        file.close()
        file = opened(tmp_path)
    assert found == [1, 3, 5, 7, 9]
    assert file.add(events("run", 9, rank=1), "")[0] == 0  # known from before
    assert file.missing() == 4 + 5  # each rank has every second number
    file.close()


def test_a_cursor_of_another_store_or_rank_is_stale(tmp_path: Path) -> None:
    file, other = opened(tmp_path), opened()
    for each in (file, other):
        each.add(events("run", 1, 2), "")
    for cursor, rank in ((page(other).cursor, None), (page(file).cursor, 0), ("x", None)):
        with pytest.raises(StaleCursor):
            file.after("run", cursor, rank, 10)
    assert file.after("another", "", None, 10) is None
    file.close()


def test_a_run_and_a_sender_have_bounded_room_also_after_a_restart(tmp_path: Path) -> None:
    """A sender has no more room than is left: the second half is for others."""
    limits = Limits(events=3, all_events=8)
    file = opened(tmp_path, limits)
    assert file.add(events("run", *range(1, 6)), "a") == (3, {TOO_MANY_EVENTS: 2})
    assert file.add(events("other", *range(1, 4)), "a") == (1, {NO_ROOM_FOR_EVENTS: 2})
    file.close()
    file = opened(tmp_path, limits)
    assert file.add(events("other", 3), "a") == (0, {NO_ROOM_FOR_EVENTS: 1})
    assert file.add(events("another", 1, 2), "b") == (2, {})
    file.forget(["run", "never there"])
    assert file.add(events("other", 2, 3), "a") == (2, {})
    assert file.after("run", "", None, 10) is None
    file.close()


def test_of_a_topic_the_newest_events_have_room() -> None:
    """Events that nobody sends again: a server that starts reads the oldest first, and has room for some of all."""
    kept = run_events.RunEvents(None, Limits(all_events=40), Counter(), Warnings(), life="life")
    got, cursor = [], ""
    for place in range(100):
        some = events(f"run-{place}", 1, 2) + (events("goes on", place // 10 + 1) if place % 10 == 0 else [])
        kept.make_room(some, "goes on".__eq__)
        assert not finished(kept.taking(some, "", 1_000 * place + 1))
        found = kept.after("goes on", cursor, None, 10)
        assert found is not None
        assert found.gap == 0
        got += numbers(found)
        cursor = found.cursor
    assert got == list(range(1, 11))
    assert {"run-99", "run-98", "goes on"} < kept.run_ids()
    assert "run-0" not in kept.run_ids()


def test_runs_without_steps_are_abandoned_when_they_are_silent() -> None:
    clock = [1_000.0]
    file = opened(age_s=lambda: clock[0])
    file.add(events("run", 1), "")
    assert file.abandoned(lambda _: False, 60.0) == []
    clock[0] += 61.0
    assert file.abandoned("run".__eq__, 60.0) == []
    assert file.abandoned(lambda _: False, 60.0) == ["run"]


def test_what_cannot_be_written_is_not_acknowledged_and_taken_when_it_comes_again(tmp_path: Path) -> None:
    file = opened(tmp_path)
    file.add(events("run", 1), "")
    with sqlite3.connect(tmp_path / FILE, isolation_level=None) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        file._file.connection.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(StoreFull, match="events cannot be written: database is locked"):
            file.add(events("run", 2), "")
        blocker.execute("ROLLBACK")
    blocker.close()
    assert file.add(events("run", 2), "")[0] == 1
    assert numbers(page(file)) == [1, 2]
    file.close()


def test_a_cursor_is_not_past_events_that_could_not_be_stored_and_come_again(tmp_path: Path) -> None:
    """A puller that waits is woken by the failure, and its time may be over just then."""
    file = opened(tmp_path)
    file.add(events("run", 1), "")
    pages = file._file.connection.execute("PRAGMA page_count").fetchone()[0]
    file._file.connection.execute(f"PRAGMA max_page_count = {pages}")  # as when the disk is full
    with pytest.raises(StoreFull):
        file.add([*events("run", *range(2, 100)), *events("new", *range(1, 100))], "")
    cursor = page(file).cursor
    assert (file.after("new", "", None, 10), file.places.used, file.missing()) == (None, 1, 0)
    file._file.connection.execute("PRAGMA max_page_count = 1000000")
    assert file.add(events("run", 2, 3), "")[0] == 2
    assert numbers(page(file, cursor)) == [2, 3]
    file.close()


@pytest.mark.parametrize("content", [b"not a database" * 1_000, b"SQLite format 3\0" + b"x" * 5_000])
def test_a_damaged_file_is_put_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    file = opened(tmp_path)
    assert file.add(events("run", 1), "")[0] == 1
    file.close()
    assert len([*tmp_path.glob(f"{FILE}.damaged-*")]) == 1


@pytest.mark.parametrize(
    "change",
    [
        *("UPDATE runs SET last = 'x'", "UPDATE runs SET life = NULL", "UPDATE events SET number = 'x'"),
        *("UPDATE runs SET last = 1", "UPDATE runs SET last = 9223372036854775807", "UPDATE runs SET life = 'a:b'"),
        "DROP TABLE events; CREATE TABLE events (run, position, rank, attempt, number, time)",
        "CREATE TRIGGER no BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'no'); END",
        "ALTER TABLE events ADD COLUMN further",
    ],
)
def test_a_file_with_rows_that_a_gateway_cannot_have_written_is_put_aside(tmp_path: Path, change: str) -> None:
    """Otherwise each further event of the run would be a fault."""
    file = opened(tmp_path)
    file.add(events("run", 1, 2), "")
    file.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.executescript(change)
    connection.close()
    file = opened(tmp_path)
    assert file.add(events("run", 2, 3), "")[0] == 2
    file.close()
    assert len([*tmp_path.glob(f"{FILE}.damaged-*")]) == 1


@pytest.mark.parametrize(
    "content",
    [
        "CAST(x'5b22ff222c302c22222c302c302c7b7d5d' AS TEXT)",  # not UTF-8
        """'["a",0,"\\ud800",0,0,{}]'""",
        """'["a",0,"",0,0,{"b":"\\udfff"}]'""",
        """'["a",0,"",0,0,{"b":1e400,"c":99999999999999999999}]'""",
        """'["a",0,"",0,0,{"b":[1]}]'""",
        """'["a",0,"",0,0,[]]'""",
        f"""'{"[" * 100_000}'""",
        "x'00'",
        "NULL",
    ],
)
def test_a_row_that_cannot_be_read_stops_no_puller(tmp_path: Path, content: str) -> None:
    """It is left out, or read as well as it can be; the others come."""
    file = opened(tmp_path)
    file.add(events("run", 1, 2, 3), "")
    file.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(f"UPDATE events SET content = {content} WHERE number = 2")
    connection.close()
    file = opened(tmp_path)
    found = page(file)
    assert {1, 3} <= {*numbers(found)}
    made = finished(run_events.events_message(found))
    assert type(made).FromString(made.SerializeToString()).cursor == found.cursor
    assert [event.number for event in file.newest("run", 0, 10)] == numbers(found)
    assert numbers(page(file, found.cursor)) == []
    file.close()


def test_no_jump_of_a_clock_ages_the_events_of_a_run_without_steps(tmp_path: Path) -> None:
    """Their age is that of the store, which passes only while a gateway runs; a file of Unix times is of an earlier
    version.
    """
    clock = [100.0]
    file = opened(tmp_path, age_s=lambda: clock[0])
    file.add(events("run", 1), "")
    file._file.connection.execute("UPDATE runs SET received = 1.8e9")
    file.close()
    file = opened(tmp_path, age_s=lambda: clock[0])
    clock[0] = 159.0
    assert file.abandoned(lambda _: False, 60.0) == []
    clock[0] = 161.0
    assert file.abandoned(lambda _: False, 60.0) == ["run"]
    file.close()


@pytest.mark.parametrize(
    "changed",
    [
        lambda content: content.replace(b"tenant", b"\xd3\xd3nant"),
        lambda content: content[: 4096 * 3] + b"\xff" * 4096 + content[4096 * 4 :],
        lambda content: content[:-4096],
    ],
)
def test_damage_anywhere_in_the_file_is_found_at_the_start(tmp_path: Path, changed: Any) -> None:
    """Not when an event that was acknowledged is read: it would be put aside with the file."""
    file = opened(tmp_path)
    file.add([*decode_logs(request("run", range(1, 200)).SerializeToString(), LIMITS).events], "")
    file.close()
    (tmp_path / FILE).write_bytes(changed((tmp_path / FILE).read_bytes()))
    file = opened(tmp_path)
    assert file.damaged == 1
    assert file.add(events("run", 500), "")[0] == 1
    assert numbers(page(file)) == [500]
    file.close()


def test_a_file_that_cannot_be_opened_at_present_stays(tmp_path: Path) -> None:
    """Such as one that another program has locked: it is not damaged."""
    file = opened(tmp_path)
    file.add(events("run", 1), "")
    file.close()
    with sqlite3.connect(tmp_path / FILE, timeout=0) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigurationError, match="cannot be opened: database is locked"):
            opened(tmp_path)
        other.execute("ROLLBACK")
    other.close()
    file = opened(tmp_path)
    assert numbers(page(file)) == [1]
    file.close()


def test_damage_that_is_found_later_is_put_aside_too(tmp_path: Path) -> None:
    """As when a disk returns something else than was written."""
    file = opened(tmp_path)
    file.add([*decode_logs(request("run", range(1, 500)).SerializeToString(), LIMITS).events], "")
    file.close()
    content = bytearray((tmp_path / FILE).read_bytes())
    file = opened(tmp_path)
    content[4096 * 6 :] = b"\xff" * (len(content) - 4096 * 6)
    (tmp_path / FILE).write_bytes(content)
    file._file.connection.execute("PRAGMA shrink_memory")
    found = file.after("run", "", None, 1_000)
    assert found is not None
    assert not found.events
    assert file.add(events("run", 1), "")[0] == 1
    file.close()


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    """As for the file of the steps: nothing is written where a link leads."""
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is a link"):
        opened(tmp_path)


def test_very_many_events_are_forgotten_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting all at once would block the event loop; a run that has steps again keeps its events."""
    monkeypatch.setattr(run_events, "_FORGOTTEN_AT_ONCE", 5)
    kept = run_events.RunEvents(None, LIMITS, Counter(), Warnings())
    for run_id in ("a", "b", "c", "d"):
        finished(kept.taking(events(run_id, 1, 2, 3), ""))
    for gone, known, left in ((["a", "b", "c", "d", "never there"], "", 6.0), ([], "c", 3.0), ([], "c", 3.0)):
        kept.drop(gone, known.__eq__)
        assert kept.use()["events"][0] == left
    assert kept.mark("c")
    kept.close()


def test_a_page_is_made_in_parts() -> None:
    """A thousand events of a sender that gives each as many attributes as it may would block the event loop."""
    file = opened()
    file.add(events("run", *range(1, 9)), "")
    assert sum(1 for _ in run_events.events_message(page(file))) == 8
    file.close()


HOSTILE = (
    *(
        "[" * 100_000,
        '["n",9,"t",1,0,[]]',
        '["n",9,"t",1,0,7]',
        '["n",9,"t",1,0,{"a":[]}]',
        '["n",9,"t",1,0,{"a":{"b":1}}]',
    ),
    *(
        f'["n",9,"t",1,0,{{"a":{2**63}}}]',
        f'["n",9,"t",{2**63},0,{{}}]',
        f'["n",{2**31},"t",1,0,{{}}]',
        '["n",9,"t",-1,0,{}]',
    ),
    *('{"a":1}', "null", "7", '["n",9,null,1,0,{}]', "\udcff"),
)


@pytest.mark.parametrize("content", HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_an_event_that_no_gateway_can_have_written_holds_up_none_of_the_others(tmp_path: Path, content: str) -> None:
    """Neither its page nor those after it, at any reader."""
    file = opened(tmp_path)
    file.add(events("run", 1, 2, 3), "")
    file.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        raw = content.encode(errors="surrogateescape")
        connection.execute("UPDATE events SET content = CAST(? AS TEXT) WHERE number = 2", (raw,))
    connection.close()
    file = opened(tmp_path)
    assert numbers(page(file)) == [1, 3]
    assert len(finished(run_events.events_message(page(file))).events) == 2
    assert file.add(events("run", 4), "")[0] == 1
    file.close()
