"""The ring: bounded, in order, with a cursor for each reader."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.frame import WIDTH, Frame, Run, SeedTable
from esper_otel.ring import Ring, frame_bytes

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
