"""The ring: rows in order, bounded by bytes, with a cursor for each reader."""

from __future__ import annotations

import gc
import struct
import threading
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from weakref import ReferenceType, ref

import numpy as np
import pytest
from frame_examples import append, frames, lives, make_frame, rows_of, said_by, seed_table
from hypothesis import given
from hypothesis import strategies as st
from interrupts import interrupted

from esper_otel.frames import block as block_module
from esper_otel.frames import ring as ring_module
from esper_otel.frames import row_memory
from esper_otel.frames.block import Chunk
from esper_otel.frames.frame import NO_SEEDS, Frame, Run, SeedTable
from esper_otel.frames.layout import Layout
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.ring import Ring, blocks_of

pytestmark = pytest.mark.own_code

RUN = Run("run", 1)
LOSS = Layout((), (), (), ("loss",))
ROW = LOSS.size + 4  # and its place


def fill(ring: Ring, count: int, values: int = 1) -> None:
    layout = Layout((), (), (), tuple(map(str, range(values))))
    for _ in range(count):
        number = ring.last + 1
        ring.append(RUN, number, 0, number, layout, (1.0,) * values)


@given(st.integers(1, 2_000), st.integers(0, 2_100), st.integers(1, 500))
def test_a_reader_gets_what_follows_its_cursor_and_the_size_of_the_gap(appended: int, cursor: int, limit: int) -> None:
    """What the ring had to drop is counted by whoever missed it."""
    ring = Ring(32 * 1024)
    fill(ring, appended)
    assert ring.last == appended
    assert ring.size <= 32 * 1024
    assert (ring.first == 1) == (appended * ROW < 25 * 1024) or appended * ROW < 33 * 1024
    found, gap = ring.after(cursor, limit)
    start = max(cursor + 1, ring.first)
    assert [f.sequence for f in found] == list(range(start, appended + 1))[:limit]
    assert gap == start - cursor - 1
    block, gap = ring.block(cursor, limit)
    assert gap == start - cursor - 1
    assert (block is None) == (not found)
    if block is not None:
        assert block.first == start
        assert 0 < block.rows <= len(found)


def test_a_buffer_of_any_size_can_be_read() -> None:
    """Such as 100 million bytes: a 256th part of them is not a whole number of doubles."""
    ring = Ring(100_000_000)
    fill(ring, 3)
    block, _ = ring.block(0, 10)
    assert block is not None
    assert block.rows == 3


def test_a_row_larger_than_the_ring_replaces_everything() -> None:
    """The newest row is always there, however large it is."""
    ring = Ring(8 * 1024)
    fill(ring, 2)
    table = SeedTable(tuple(f"s{i}" for i in range(1_000)), np.zeros((1_000, 10)))
    ring.append(RUN, 3, 0, 3, LOSS, (1.0,), table, table)
    newest = ring.newest()
    assert newest is not None
    assert (newest.sequence, len(newest.live.ids), ring.first) == (3, 1_000, 3)


def identity(frame: Frame) -> tuple[object, ...]:
    """All of a frame, to the bit."""
    values = {name: struct.pack("<d", value) for name, value in frame.values().items()}
    tables = (frame.seeds.ids, frame.seeds.cells.tobytes(), frame.live.ids, frame.live.wide().cells.tobytes())
    head = (frame.run, frame.sequence, frame.global_step, frame.epoch, frame.time_unix_ns)
    return (*head, values, tables, frame.retired, frame.recorded.keys(), frame.context.keys())


@given(lives(), st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_rows_are_read_as_they_were_written(some: list[Frame], limit: int, cursor: int, is_small: bool) -> None:
    """Every value, seed and bit, with the seeds that were alive then, from any place on, in any portion."""
    ring = Ring(2**20 if is_small else 2**28)  # rows of one run in one chunk, or in several
    for each in some:
        append(ring, each)
        newest = ring.newest()
        assert newest is not None
        assert identity(newest) == identity(each)
    expected = list(map(identity, some))
    found = []
    while page := ring.after(cursor, limit)[0]:
        found += page
        cursor = page[-1].sequence
    assert list(map(identity, found)) == expected[len(expected) - len(found) :]
    assert list(map(identity, ring.after(0, 1_000)[0])) == expected
    assert [identity(ring.after(number, 1)[0][0]) for number in range(len(some))] == expected


def test_a_step_may_retire_any_number_of_seeds() -> None:
    ring = Ring(2**20)
    table = seed_table({each: {"alpha": 0.5} for each in "abcdef"})
    some = [
        make_frame(seeds=table, live=table),
        make_frame(sequence=2, seeds=NO_SEEDS, live=NO_SEEDS, retired=table.ids),
    ]
    for each in some:
        append(ring, each)
    assert [frame.retired for frame in ring.after(0, 2)[0]] == [(), tuple("abcdef")]


@given(lives(), st.integers(1, 12), st.data())
def test_a_block_has_the_rows_of_its_frames(some: list[Frame], limit: int, data: st.DataObject) -> None:
    """Names and seeds may differ from row to row: what a row lacks is absent, and NaN is not."""
    ring = Ring(2**20)
    for each in some:
        append(ring, each)
    said: list[object] = []
    while (block := ring.block(len(said), limit)[0]) is not None:
        start = data.draw(st.integers(0, block.rows))
        said += rows_of(block.part(0, start)) + rows_of(block.part(start, block.rows))
    assert said == list(map(said_by, some))
    assert [row for block in blocks_of(some) for row in rows_of(block)] == said


@given(lives(), st.integers(1, 12))
def test_what_was_recorded_is_read_by_names(some: list[Frame], limit: int) -> None:
    """Each value once, and none that was derived, probed or kept."""
    ring, cursor = Ring(2**20), 0
    for each in some:
        append(ring, each)
    found = Counter[tuple[str, bytes]]()
    while (read := ring.recorded(cursor, limit))[0]:
        cursor = read[0]
        found.update(
            (name, one.tobytes())
            for names, rows in read[1]
            for name, row in zip(names, rows, strict=True)
            for one in row
        )
    expected = Counter((name, struct.pack("d", one)) for each in some for name, one in each.recorded.items())
    assert (cursor, found) == (len(some), expected)


@given(st.lists(frames(), min_size=1, max_size=6))
def test_frames_from_elsewhere_become_blocks(some: list[Frame]) -> None:
    """Of any runs and numbers, as the files of others may have them."""
    assert [row for block in blocks_of(some) for row in rows_of(block)] == list(map(said_by, some))


def test_a_block_ends_where_the_seeds_of_its_steps_differ_too_much() -> None:
    """An array of every seed by every step would be a hundred times as large as what was recorded."""
    ring = Ring(2**28)
    for number in range(1, 2_001):
        table = seed_table({f"s{number}": {"alpha": number}})
        ring.append(RUN, number, 0, number, LOSS, (1.0,), table, NO_SEEDS)
    cursor = largest = count = 0
    while (block := ring.block(cursor, 1_000)[0]) is not None:
        cursor, count, largest = block.last, count + 1, max(largest, block.cells.nbytes)
        assert [float(block.cells[row, row, 1]) for row in range(block.rows)] == list(
            range(block.first, block.first + block.rows)
        )
    assert cursor == 2_000
    assert count < 100
    assert largest < 8 * 50_000


def test_a_reader_beside_a_fast_writer_misses_nothing_it_is_not_told_of() -> None:
    """Readers of each kind in their own places while the trainer writes and the ring drops."""
    ring = Ring(64 * 1024)
    total = 20_000
    faults: list[BaseException] = []

    def by_frames(cursor: int) -> tuple[list[int], int]:
        found, gap = ring.after(cursor, 7)
        return [f.global_step for f in found], gap

    def by_blocks(cursor: int) -> tuple[list[int], int]:
        block, gap = ring.block(cursor, 7)
        return [] if block is None else block.steps.tolist(), gap

    def read(kind: int) -> None:
        try:
            cursor = seen = missed = 0
            while cursor < total:
                steps, gap = (by_blocks if kind else by_frames)(cursor)
                assert steps == list(range(cursor + gap + 1, cursor + gap + 1 + len(steps)))
                newest = ring.newest()
                assert newest is None or newest.global_step == newest.sequence >= cursor
                missed, seen, cursor = missed + gap, seen + len(steps), cursor + gap + len(steps)
            assert seen + missed == total
        except BaseException as error:
            faults.append(error)
            raise

    readers = [threading.Thread(target=read, args=(kind,)) for kind in (0, 1, 0)]
    for reader in readers:
        reader.start()
    fill(ring, total)
    for reader in readers:
        reader.join()
    assert not faults


_FILES = (ring_module.__file__, block_module.__file__)


def step_after(some: list[Frame], run: Run, rows: Mapping[str, Mapping[str, float]], *retired: str) -> Frame:
    """The step after these, with these rows of seeds; the names of its values differ from those of the last."""
    live = LiveSeeds()
    live.begin(some[-1].live if some else NO_SEEDS)
    ended = live.retire(retired)
    step = live.step(seed_table(rows) if rows else NO_SEEDS)
    live.commit(step)
    number = len(some) + 1
    fixed = {"sequence": number, "global_step": number, "recorded": {"loss": 1.0, f"name-{number % 3}": float(number)}}
    return make_frame(run=run, seeds=step.recorded, live=live.table, retired=ended, **fixed)


def check(ring: Ring, expected: list[Frame], newest: int) -> None:
    """Every reader returns these steps, of which it is asked for so many of the newest, and nothing else."""
    assert (ring.first, ring.last) == (1, len(expected))
    frame, cursor = ring.newest(), max(len(expected) - newest, 0)
    assert list(map(identity, [frame] if frame else [])) == list(map(identity, expected[-1:]))
    frames, gap = ring.after(cursor, 100)
    assert (list(map(identity, frames)), gap) == (list(map(identity, expected[cursor:])), 0)
    rows = [ring.row(each.sequence, each.live) for each in expected[cursor:]]
    assert [identity(row) for row in rows if row is not None] == list(map(identity, expected[cursor:]))
    assert ring.row(len(expected) + 1) is None
    said: list[object] = []
    while (block := ring.block(cursor + len(said), 100)[0]) is not None:
        said += rows_of(block)
    assert said == list(map(said_by, expected[cursor:]))


@pytest.mark.parametrize("number", [1, 10, 31])
def test_an_append_that_is_interrupted_anywhere_adds_its_row_or_nothing(number: int) -> None:
    """Ctrl-C before each bytecode: of a first row, of one in a chunk, and of one that begins another chunk."""
    other = Run("run", 2)
    seeds = {f"s{row}": {"alpha": 0.5, "stage": 3.0} for row in range(4)}
    until: list[Frame] = []
    for past in range(1, number):
        until.append(step_after(until, RUN, seeds if past % 4 else {}, *(["s1"] if past % 5 == 0 else [])))
    step = step_after(
        until, RUN if number < 31 else other, {"s0": {"alpha": 0.75}, f"own-{number}": {"stage": 1.0}}, "s2"
    )
    at, is_interrupted = 0, True
    while is_interrupted:
        at += 1
        ring, expected = Ring(2**20), until.copy()
        for each in until:
            append(ring, each)
        is_interrupted = interrupted(lambda ring=ring: append(ring, step), at, _FILES)  # type: ignore[misc]
        if ring.last == number:
            expected.append(step)
        check(ring, expected, 2)
        nexts = [(RUN, {}, ()), (other, seeds, ("s0",)), (RUN, {"s0": {"alpha": 0.25}}, ("s3",)), (RUN, {}, ())]
        for run, rows, retired in nexts[at % 3 :]:
            expected.append(step_after(expected, run, rows, *retired))
            append(ring, expected[-1])
        check(ring, expected, 100 if at % 20 == 1 else 6)
    assert at > 200


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_recorded_values_in_bulk_are_those_of_the_rows(steps: list[tuple[int, int]], limits: list[int]) -> None:
    """Rows that are alike are read in another way than rows that differ."""
    ring = Ring(2**16)
    layouts = [
        LOSS,
        Layout(("loss_ewma",), ("esper.validation.loss",), ("gpu_mem_used_gb",), ("loss", "accuracy")),
        Layout(("loss_ewma",), (), (), ()),
    ]
    tables = [NO_SEEDS, SeedTable(("a",), np.full((1, 10), 7.0)), SeedTable(("a", "b"), np.full((2, 10), 8.0))]
    for number, (of_layout, of_seeds) in enumerate(steps, 1):
        layout = layouts[of_layout]
        numbers = tuple(number + place / 8 for place in range(layout.width))
        ring.append(RUN, number, 0, number, layout, numbers, tables[of_seeds])
    found, cursor = list[tuple[tuple[str, ...], tuple[float, ...]]](), 0
    for limit in limits * len(steps):
        last, values = ring.recorded(cursor, limit)
        for names, of_names in values:
            found += [(names, tuple(of_row)) for of_row in of_names.T.tolist()]
        cursor = max(cursor, last)
    frames, _ = ring.after(0, len(steps))
    assert sorted(found) == sorted((frame.names, frame.numbers) for frame in frames if frame.names)


@pytest.mark.parametrize("kind", ["C", "F"])
def test_memory_is_used_again_but_not_while_a_reader_has_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory costs more than what is written to it; a frame that somebody keeps must stay as it is."""
    taken, new = list[int](), row_memory._memory

    def counted(size: int, *, is_used: bool = True) -> object:
        taken.append(size)
        return new(size, is_used=is_used)

    monkeypatch.setattr(row_memory, "_memory", counted)
    ring, kept = Ring(2**24), list[tuple[Frame, bytes]]()
    ids = tuple(f"s{row}" for row in range(50))
    for number in range(1, 8_001):
        cells = np.full((50, 10), float(number)) if kind == "C" else np.full((10, 50), float(number)).T
        seeds = SeedTable(ids, cells)
        ring.append(RUN, number, 0, number, LOSS, (float(number),), seeds, seeds)
        if number % 200 == 1:
            frame = ring.row(number, seeds)
            assert frame is not None
            kept = [*kept[-30:], (frame, frame.seeds.cells.tobytes())]
    assert ring.first > 3_000
    for frame, before in kept:
        assert frame.seeds.cells.tobytes() == before
        assert frame.numbers == (float(frame.global_step),)
    frames, _ = ring.after(ring.first - 1, 8_000)
    assert [frame.seeds.cells[0, 0] for frame in frames] == [float(frame.sequence) for frame in frames]
    assert len(taken) < 2 * (256 + 60)  # of 533 chunks, two for each


def test_names_that_come_seldom_keep_no_chunk_that_was_dropped() -> None:
    """Their layouts are kept for the steps to come: of a name for each epoch, each kept up to 1 MiB of old rows."""
    ring, usual = Ring(2**16), Layout((), (), (), tuple(map(str, range(40))))
    layouts, chunks = list[Layout](), list[ReferenceType[Chunk]]()
    for epoch in range(40):
        layouts.append(Layout((), (), (), (f"epoch{epoch}",)))
        ring.append(RUN, ring.last + 1, 0, 1, layouts[-1], (1.0,))
        chunks.append(ref(ring._chunks[-1]))
        for _ in range(100):
            ring.append(RUN, ring.last + 1, 0, 1, usual, (1.0,) * 40)
    gc.collect()
    assert sum(chunk() is not None for chunk in chunks) < 5
    ring.append(RUN, ring.last + 1, 0, 1, layouts[0], (0.5,))
    newest = ring.newest()
    assert newest is not None
    assert newest.recorded == {"epoch0": 0.5}


def test_its_size_is_the_memory_that_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 %: steps of 1, 16 and 40 values, with seeds, and with other names in each step."""
    monkeypatch.setattr(row_memory, "_LEAST_BYTES", 2**28)  # tracemalloc does not see pages of their own
    made = make_frame(seeds=seed_table({f"s{i}": {"alpha": 0.5, "stage": 3.0} for i in range(8)}))
    ten = [Layout((), (), (), (*map(str, range(20)), f"own{i}")) for i in range(10)]

    def with_seeds(ring: Ring) -> None:
        for _ in range(2_000):
            append(ring, made._replace(live=made.seeds))

    def with_other_names(ring: Ring) -> None:
        for number in range(5_000):
            ring.append(RUN, number, 0, number, ten[number % 10], (0.5,) * 21)

    def with_other_seeds(ring: Ring) -> None:
        for number in range(8_000):
            table = SeedTable((f"s{number}",), np.zeros((1, 10)))
            ring.append(RUN, number, 0, number, LOSS, (0.5,), table, NO_SEEDS)

    for write in (
        lambda ring: fill(ring, 20_000, 1),
        lambda ring: fill(ring, 10_000, 16),
        lambda ring: fill(ring, 5_000, 40),
        with_seeds,
        with_other_names,
        with_other_seeds,
    ):
        gc.collect()
        tracemalloc.start()
        ring = Ring(2**28)
        write(ring)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        chunk = ring._chunks[-1]
        untouched = chunk.capacity - chunk.end + 4 * (chunk.capacity // 48 - chunk.rows)
        assert abs(ring.size - (held - untouched)) < 0.1 * ring.size + 4_096, write.__name__
        rows = sum(each.end for each in ring._chunks)
        assert ring.size < 2 * rows


def test_no_object_outlives_a_step() -> None:
    """What the collector has to look through does not grow with the steps."""
    ring = Ring(2**28)
    fill(ring, 100, 21)
    gc.collect()
    before = len(gc.get_objects())
    fill(ring, 20_000, 21)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
