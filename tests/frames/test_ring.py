"""The ring: bounded, in order, with a cursor for each reader."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from frame_examples import frames
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.frames.frame import ABSENT, WIDTH, Frame, Run, SeedTable
from esper_otel.frames.ring import Ring, frame_bytes

RUN = Run("run", 1)


def frame(sequence: int, seeds: int = 0) -> Frame:
    table = SeedTable(tuple(f"s{i}" for i in range(seeds)), np.zeros((seeds, WIDTH)))
    return Frame(RUN, sequence, sequence, 0, sequence, ("loss",), (1.0,), {}, table, table)


SIZE = frame_bytes(frame(1))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 45), st.integers(1, 10))
def test_a_reader_gets_what_follows_its_cursor_and_the_size_of_the_gap(
    kept: int, appended: int, cursor: int, limit: int
) -> None:
    """What the ring had to drop is counted by whoever missed it."""
    ring = Ring(kept * SIZE)
    for sequence in range(1, appended + 1):
        ring.append(frame(sequence))
    first = max(1, appended - kept + 1)
    assert (ring.first, ring.last) == (first, appended)
    frames, gap = ring.after(cursor, limit)
    start = max(cursor + 1, first)
    assert [f.sequence for f in frames] == list(range(start, appended + 1))[:limit]
    assert gap == start - cursor - 1


def test_a_frame_larger_than_the_ring_replaces_everything() -> None:
    """The newest frame is always there, whatever it weighs."""
    ring = Ring(2 * SIZE)
    ring.append(frame(1))
    ring.append(frame(2, seeds=1000))
    newest = ring.newest()
    assert newest is not None
    assert newest.sequence == 2
    assert ring.first == 2


def test_a_seed_table_that_is_shared_counts_once() -> None:
    """Most steps record every live seed: the two tables are one."""
    cells = 100 * WIDTH * 8
    assert cells < frame_bytes(frame(1, seeds=100)) - SIZE < 1.1 * cells


class WhileLookingUp(dict[int, Frame]):
    """Calls something in the middle of a look-up, when the answer is known and not yet given."""

    def __init__(self, content: dict[int, Frame], then: Callable[[], None]) -> None:
        super().__init__(content)
        self.then = then

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        self.then()
        return found


def test_a_frame_that_comes_while_a_reader_looks_for_it_is_not_taken_for_a_dropped_one() -> None:
    """The exporter and every puller would skip it, and count it as lost."""
    ring = Ring(10 * SIZE)
    ring.append(frame(1))
    ring._frames = WhileLookingUp(ring._frames, lambda: ring.append(frame(ring.last + 1)))  # type: ignore[assignment, arg-type]
    cursor = 0
    seen: list[int] = []
    while len(seen) < 5:
        frames, gap = ring.after(cursor, 1)
        assert gap == 0
        seen += [f.sequence for f in frames]
        cursor += len(frames)
    assert seen == [1, 2, 3, 4, 5]
    frames, gap = ring.after(ring.last, 5)
    assert (frames, gap) == ([], 0)


def test_a_reader_beside_a_fast_writer_misses_nothing_it_is_not_told_of() -> None:
    """The exporter reads while the trainer writes and the ring drops."""
    ring = Ring(50 * SIZE)
    total = 20_000

    def write() -> None:
        for sequence in range(1, total + 1):
            ring.append(frame(sequence))

    writer = threading.Thread(target=write)
    writer.start()
    cursor = seen = missed = 0
    while cursor < total:
        frames, gap = ring.after(cursor, 7)
        missed += gap
        seen += len(frames)
        numbers = [f.sequence for f in frames]
        assert numbers == list(range(cursor + gap + 1, cursor + gap + 1 + len(frames)))
        cursor += gap + len(frames)
    writer.join()
    assert seen + missed == total


def identity(frame: Frame) -> tuple[object, ...]:
    """All of a frame, to the bit."""
    values = {name: struct.pack("<d", value) for name, value in frame.values().items()}
    tables = (frame.seeds.ids, frame.seeds.cells.tobytes(), frame.live.ids, frame.live.cells.tobytes())
    return (
        frame.run,
        frame.sequence,
        frame.global_step,
        frame.epoch,
        frame.time_unix_ns,
        values,
        tables,
        frame.retired,
    )


@settings(deadline=None)
@given(st.lists(frames(), min_size=1, max_size=8), st.integers(1, 60))
def test_packed_frames_come_out_as_they_were(some: list[Frame], limit: int) -> None:
    """Every value, seed and bit; also when a reader comes from the middle, and takes a few at a time."""
    made = [some[number % len(some)]._replace(sequence=number + 1) for number in range(600)]
    ring = Ring(2**40)
    for each in made:
        ring.append(each)
    before = ring.size
    ring.pack(50, lambda: False)
    assert ring.size < before
    cursor, found = 200, []
    while page := ring.after(cursor, limit)[0]:
        found += page
        cursor = page[-1].sequence
    assert list(map(identity, found)) == list(map(identity, made[200:]))


def test_packed_frames_take_a_fraction_of_the_memory_and_are_dropped_like_any_other() -> None:
    """Frames of 21 values and 8 seeds, none of which comes twice; nothing is left when they are gone."""
    luck = np.random.default_rng(7)
    plain, packed = Ring(10_000_000), Ring(10_000_000)
    for sequence in range(1, 20_001):
        cells = np.full((8, WIDTH), ABSENT)
        cells[:, :10] = luck.random((8, 10))
        ids = tuple(f"s{i}" for i in range(8))
        names, numbers = tuple(map(str, range(21))), tuple(luck.random(21).tolist())
        each = frame(sequence)._replace(
            seeds=SeedTable(ids, cells), live=SeedTable(ids, cells.copy()), names=names, numbers=numbers
        )
        plain.append(each)
        packed.append(each)
        if sequence % 200 == 0:
            packed.pack(100, lambda: False)
    assert packed.last - packed.first > 3 * (plain.last - plain.first)
    assert 0 < packed.size <= 10_000_000
    for sequence in range(20_001, 50_001):
        packed.append(frame(sequence))
    assert packed.size <= 10_000_000
    assert packed.size == sum(map(frame_bytes, packed.after(packed.first - 1, 100_000)[0]))


def test_readers_a_packer_and_a_writer_at_once() -> None:
    """Two readers, each in its own place, while frames are packed and dropped."""
    ring = Ring(3_000 * SIZE)
    total = 30_000
    over = threading.Event()
    faults: list[BaseException] = []

    def write() -> None:
        for sequence in range(1, total + 1):
            ring.append(frame(sequence))

    def pack() -> None:
        while not over.is_set():
            ring.pack(500, over.is_set)

    def read() -> None:
        try:
            cursor = seen = missed = 0
            while cursor < total:
                found, gap = ring.after(cursor, 100)
                numbers = [each.sequence for each in found]
                assert numbers == list(range(cursor + gap + 1, cursor + gap + 1 + len(found)))
                missed, seen, cursor = missed + gap, seen + len(found), cursor + gap + len(found)
            assert seen + missed == total
        except BaseException as error:
            faults.append(error)
            raise

    readers = [threading.Thread(target=read) for _ in range(2)]
    packer = threading.Thread(target=pack)
    writer = threading.Thread(target=write)
    for thread in (packer, *readers, writer):
        thread.start()
    for thread in (*readers, writer):
        thread.join()
    over.set()
    packer.join()
    assert not faults
    assert 0 < ring.size <= 3_000 * SIZE
