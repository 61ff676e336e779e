"""Stores: what was released comes out in order, within bounds; the file store outlives its process."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from frame_examples import RUN, TIME_UNIX_NS, frames, make_frame
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.errors import ConfigurationError, StaleCursor, UnknownRun
from esper_otel.frames.frame import Frame
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.store.base import KeptRequest, Store, StoredFrame, StoreFull, StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore

pytestmark = pytest.mark.lengthy

Maker = Callable[..., Store]


def item(step: int, run_id: str = "run", rank: int = 0, attempt: int = 1) -> Item:
    run = replace(RUN, run_id=run_id, attempt=attempt, rank=rank)
    frame = make_frame(
        run=run,
        sequence=step,
        global_step=step,
        time_unix_ns=TIME_UNIX_NS + step * 10**6,
        recorded={"loss": float(step)},
    )
    return Item(Origin(run_id, attempt, rank), frame, 1, True, 5)


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    """Makes stores of one kind."""
    made: list[Store] = []

    def maker(limits: StoreLimits | None = None, clock: Callable[[], float] = lambda: 0.0) -> Store:
        made.append(
            MemoryStore(limits, clock)
            if request.param == "memory"
            else FileStore(tmp_path / str(len(made)), limits, clock)
        )
        return made[-1]

    yield maker
    for store in made:
        store.close()


def steps_of(
    store: Store, run_id: str = "run", cursor: str = "", rank: int | None = None, most: int = 100
) -> list[int]:
    return [entry.item.frame.global_step for entry in store.after(run_id, cursor, rank, most).entries]


def test_a_cursor_goes_on_where_a_pull_ended(make: Maker) -> None:
    store = make()
    store.add([item(step, rank=step % 2) for step in range(1, 11)])
    found = store.after("run", "", None, 4)
    assert ([entry.item.frame.global_step for entry in found.entries], found.gap) == ([1, 2, 3, 4], 0)
    assert steps_of(store, cursor=found.cursor) == [5, 6, 7, 8, 9, 10]
    of_rank = store.after("run", "", 1, 2)
    assert [entry.item.frame.global_step for entry in of_rank.entries] == [1, 3]
    assert steps_of(store, cursor=of_rank.cursor, rank=1) == [5, 7, 9]
    assert steps_of(store, rank=7) == []
    end = store.after("run", "", None, 100).cursor
    assert store.after("run", end, None, 100) == ([], end, 0)
    store.add([item(11)])
    assert steps_of(store, cursor=end) == [11]


@pytest.mark.parametrize("cursor", ["x", "::", "a:b:c", "0:0:0", "\0", "9" * 5000])
def test_a_cursor_of_nobody_is_stale(make: Maker, cursor: str) -> None:
    store = make()
    store.add([item(1)])
    with pytest.raises(StaleCursor):
        store.after("run", cursor, None, 1)


def test_a_cursor_of_other_ranks_another_run_or_the_future_is_stale(make: Maker) -> None:
    store = make()
    store.add([item(1), item(1, "other")])
    cursor = store.after("run", "", None, 10).cursor
    with pytest.raises(StaleCursor, match="all ranks"):
        store.after("run", cursor, 0, 1)
    with pytest.raises(StaleCursor):
        store.after("other", cursor, None, 1)
    with pytest.raises(StaleCursor):
        store.after("run", cursor[:-1] + "2", None, 1)
    with pytest.raises(UnknownRun):
        store.after("nobody", "", None, 1)


def test_the_oldest_fall_out_and_pullers_are_told(make: Maker) -> None:
    store = make(StoreLimits(steps=10))
    store.add([item(step) for step in range(1, 6)])
    cursor = store.after("run", "", None, 2).cursor
    store.add([item(step) for step in range(6, 16)])
    found = store.after("run", cursor, None, 100)
    assert [entry.item.frame.global_step for entry in found.entries] == list(range(6, 16))
    assert (found.gap, store.dropped) == (3, 5)
    assert store.after("run", "", None, 1).gap == 5
    assert sum(store.counts().values()) == 10


def test_bytes_are_bounded_per_run_and_in_all(make: Maker) -> None:
    probe = make()
    probe.add([item(1)])
    first = probe.size
    probe.add([item(2)])
    one = probe.size - first
    run = first - one  # what a run takes besides its steps
    all_bytes = 3 * run + 30 * one
    store = make(StoreLimits(run_bytes=run + 20 * one, all_bytes=all_bytes))
    for step in range(1, 200):
        store.add([item(step, run_id) for run_id in ("a", "b", "c") if step < 100 or run_id == "a"])
        assert store.size <= all_bytes
    counts = {origin.run_id: count for origin, count in store.counts().items()}
    assert 10 <= counts["a"] <= 20  # the largest gives up steps first, within a factor of two
    assert 28 <= sum(counts.values()) <= 31
    assert steps_of(store, "a")[-1] == 199


def test_a_run_without_news_expires_and_is_unknown_then(make: Maker) -> None:
    now = [0.0]
    store = make(StoreLimits(idle_s=10), clock=lambda: now[0])
    store.add([item(1, "old"), item(1, "new")], ended={Origin("old", 1, 0): "completed"})
    now[0] = 8.0
    store.add([item(2, "new")])
    now[0] = 11.0
    assert store.expire() == ["old"]
    with pytest.raises(UnknownRun):
        store.after("old", "", None, 1)
    assert steps_of(store, "new") == [1, 2]
    assert (store.dropped, store.outcomes(), len(store.counts())) == (1, {}, 1)
    store.add([item(1, "old")])
    assert store.after("old", "", None, 1).gap == 0


def test_the_loss_before_is_that_of_the_same_writer(make: Maker) -> None:
    store = make()
    store.add([item(1), item(7, rank=1), item(2), item(8, rank=1), item(9, attempt=2)])
    found = {
        (entry.item.origin[1:3], entry.item.frame.global_step): entry.loss_before
        for entry in store.after("run", "", None, 10).entries
    }
    assert found == {((1, 0), 1): None, ((1, 1), 7): None, ((1, 0), 2): 1.0, ((1, 1), 8): 7.0, ((2, 0), 9): None}


@given(st.lists(st.tuples(st.integers(0, 2), frames()), max_size=12), st.integers(1, 8), st.integers(1, 5))
def test_both_stores_give_the_same(
    tmp_path_factory: pytest.TempPathFactory, added: list[tuple[int, Frame]], steps: int, most: int
) -> None:
    """Every frame that a sender may have sent, bit for bit; pulled page by page by pullers of one rank and of all."""
    limits = StoreLimits(steps=steps)
    file = FileStore(tmp_path_factory.mktemp("store"), limits)
    stores: list[Store] = [MemoryStore(limits), file]
    seen: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    for number, store in enumerate(stores):
        cursors = {None: "", 0: "", 1: ""}
        for rank, frame in added:
            run = replace(frame.run, rank=rank)
            store.add([Item(Origin("run", 1, rank), frame._replace(run=run), 1, True, 5)])
            for of, cursor in cursors.items():
                found = store.after("run", cursor, of, most)
                cursors[of] = found.cursor
                seen[number].append((of, found.gap, cursor_place(found.cursor), *map(shown, found.entries)))
        seen[number].append((store.dropped, *store.counts().items()))
    file.close()
    assert seen[0] == seen[1]


def cursor_place(cursor: str) -> str:
    return cursor.split(":", 1)[1]


def shown(entry: StoredFrame) -> str:
    """All of an entry; NaN is equal to NaN here."""
    frame = entry.item.frame
    tables = (frame.seeds.ids, frame.seeds.cells.tobytes(), frame.live.ids, frame.live.cells.tobytes())
    said = (entry.item.origin, sorted(frame.values().items()), tables, frame.retired)
    loss_before = None if entry.loss_before is None else entry.loss_before + 0.0  # SQLite knows one zero
    return repr((entry.position, entry.number, loss_before, said))


# -- the file store --------------------------------------------------------------------------------------


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    store = FileStore(tmp_path, StoreLimits(steps=8))
    store.add([item(step, rank=step % 2) for step in range(1, 11)], ended={Origin("run", 1, 0): "SIGTERM"})
    store.add([], kept=KeptRequest(1, b"one", False, 7), first_kept=1)
    store.add([], kept=KeptRequest(2, b"two", True, 8), first_kept=1)
    cursor = store.after("run", "", None, 3).cursor
    before = (store.after("run", cursor, None, 100), store.counts(), store.size, store.outcomes())
    store.close()
    store = FileStore(tmp_path)
    after = (store.after("run", cursor, None, 100), store.counts(), store.size, store.outcomes())
    assert [shown(entry) for entry in after[0].entries] == [shown(entry) for entry in before[0].entries]
    assert after[1:] == before[1:]
    assert [*store.bodies()] == [KeptRequest(1, b"one", False, 7), KeptRequest(2, b"two", True, 8)]
    assert [each.frame.global_step for each, _ in store.newest()] == [4, 6, 8, 10, 3, 5, 7, 9]
    assert not any(is_first for _, is_first in store.newest())
    store.add([], first_kept=2)
    assert [kept.number for kept in store.bodies()] == [2]
    store.add([], first_kept=None)
    assert [*store.bodies()] == []
    store.add([item(11)])
    assert store.after("run", "", None, 100).entries[-1].position == 11
    store.close()


@pytest.mark.parametrize("jump_s", [30 * 3600, -30 * 3600, 10 * 365 * 86_400])
def test_no_jump_of_a_clock_ages_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """Neither the wall clock, at the start or on the way, nor the steady clock, which begins anew after a reboot."""
    store = FileStore(tmp_path)
    store.add([item(1)])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    assert store.expire() == []
    store.close()
    for clock in (time.monotonic, lambda: 5.0, lambda: 1e9):
        store = FileStore(tmp_path, clock=clock)
        assert store.expire() == []
        store.close()


def test_a_runs_age_adds_up_over_the_lives_of_a_gateway(tmp_path: Path) -> None:
    """What is dropped was idle for that long while a gateway ran, however often it was started."""
    limits = StoreLimits(idle_s=1_000)
    store = FileStore(tmp_path, limits, clock=lambda: 0.0)
    store.add([item(1, "old"), item(1, "new")])
    store.close()
    gone = []
    for life in range(5):
        now = [7e6 * life]
        store = FileStore(tmp_path, limits, clock=lambda: now[0])  # noqa: B023
        for _ in range(3):
            now[0] += 100.0
            store.add([item(2 + life, "new")])
            gone += store.expire()
        store.close()
    assert gone == ["old"]


def test_a_store_of_another_version_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.add([item(step) for step in range(1, 6)])
    store.close()
    path = tmp_path / "steps.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(ConfigurationError, match=r"steps.sqlite3 has version 7, not 9: .* give another folder"):
            FileStore(tmp_path, read_only=read_only)
    assert path.read_bytes() == before


def test_frames_of_a_writer_that_come_together_are_one_block(tmp_path: Path) -> None:
    """And are pulled, dropped and restored one by one."""
    store = FileStore(tmp_path, StoreLimits(steps=15))
    store.add([item(step, rank=step % 2) for step in range(1, 11)])
    store.add([item(step) for step in range(11, 21)])
    count = "SELECT count(*), sum(count) FROM blocks"
    assert store._connection.execute(count).fetchone() == (3, 20)
    assert (steps_of(store), store.dropped) == ([*range(6, 21)], 5)
    assert steps_of(store, rank=1) == [7, 9]
    size, counts = store.size, store.counts()
    store.close()
    store = FileStore(tmp_path, StoreLimits(steps=15))
    assert (steps_of(store), store.size, store.counts()) == ([*range(6, 21)], size, counts)
    assert {origin.rank: frame.global_step for origin, frame in store.first_frames().items()} == {0: 6, 1: 7}
    store.add([item(step) for step in range(21, 27)])
    assert steps_of(store) == [*range(12, 27)]
    assert store._connection.execute(count).fetchone() == (2, 16)
    store.close()


def test_one_gateway_at_a_time_has_a_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(ConfigurationError, match="another gateway is using it"):
        FileStore(tmp_path)
    store.add([item(1)])
    reader = FileStore(tmp_path, read_only=True)
    assert reader.run_ids() == ["run"]
    reader.close()
    store.close()
    FileStore(tmp_path).close()


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    (tmp_path / "steps.sqlite3").write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(ConfigurationError, match="not a store"):
        FileStore(tmp_path, read_only=True)
    with pytest.raises(ConfigurationError, match="not found"):
        FileStore(tmp_path / "nowhere", read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--store"):
        FileStore(tmp_path / "file")
    other = tmp_path / "other"
    FileStore(other).close()
    with sqlite3.connect(other / "steps.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigurationError, match="version 99"):
        FileStore(other)


FULL = """
import resource, sys
from test_stores import item
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.store.base import StoreFull
store = FileStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
stored = 0
try:
    for step in range(1, 10_000):
        store.add([item(step)])
        stored = step
except StoreFull as error:
    print(error, file=sys.stderr)
found = store.after("run", "", None, 10_000).entries
assert [entry.item.frame.global_step for entry in found] == [*range(1, stored + 1)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.add([item(stored + 1)])
print(stored + 1)
"""


def test_a_full_disk_takes_nothing_loses_nothing_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A file that may not grow stands for the disk: the write fails as it does there."""
    script = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{FULL}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"},
    )
    assert done.returncode == 0, done.stderr
    assert "the store cannot be written" in done.stderr
    stored = int(done.stdout)
    assert stored > 10
    store = FileStore(tmp_path)
    assert steps_of(store, most=10_000) == [*range(1, stored + 1)]
    store.close()


def test_a_failed_write_leaves_nothing_half_done(tmp_path: Path) -> None:
    """All or nothing, in the file and in memory."""
    store = FileStore(tmp_path)
    store.add([item(1)])
    store._connection.execute("PRAGMA query_only = ON")
    state = (store.counts(), store.size, store.dropped)
    with pytest.raises(StoreFull):
        store.add([item(2), item(1, "other")], kept=KeptRequest(1, b"", False, 0), first_kept=1)
    assert (store.counts(), store.size, store.dropped) == state
    assert steps_of(store) == [1]
    store._connection.execute("PRAGMA query_only = OFF")
    store.add([item(2), item(1, "other")])
    assert steps_of(store) == [1, 2]
    assert [*store.bodies()] == []
    store.close()


def test_a_large_run_that_is_dropped_leaves_the_file_a_few_entries_at_a_time(tmp_path: Path) -> None:
    """A run of a million steps took seconds of one turn. Its key is not given to another run meanwhile."""
    limits = StoreLimits(writers=1)
    store = FileStore(tmp_path, limits)
    store.add([item(step, "old") for step in range(1, 2_001)])
    store.add([item(1, "new")])
    assert store.counts() == {Origin("new", 1, 0): 1}
    assert (store.dropped, steps_of(store, "new")) == (2_000, [1])

    def rows() -> list[int]:
        with sqlite3.connect(tmp_path / "steps.sqlite3") as file:
            return [file.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("items", "blocks")]

    assert rows()[0] == 2_001
    store.add([item(2, "new")])
    assert 1_000 < rows()[0] < 2_001
    store.close()
    store = FileStore(tmp_path, limits)  # the next start takes out the rest
    assert rows() == [2, 2]
    store.add([item(step, "old", 1) for step in range(1, 601)])
    for _ in range(3):
        store.expire()
    assert rows()[0] == sum(store.counts().values()) == 600
    store.close()


def test_a_large_run_that_is_dropped_leaves_memory_in_pieces() -> None:
    store = MemoryStore(StoreLimits(writers=1))
    store.add([item(step, "old") for step in range(1, 6_001)])
    store.add([item(1, "new")])
    assert (store.counts(), store.dropped) == ({Origin("new", 1, 0): 1}, 6_000)
    left = len(store._forgotten)
    assert left > 10
    store.add([item(2, "new")])
    assert 0 < len(store._forgotten) < left
    store.expire()
    assert not store._forgotten
