"""The series that end: the same however the steps are divided into blocks."""

from __future__ import annotations

from frame_examples import make_frame, seed_table
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.export.streams import Streams, before_a_return
from esper_otel.frames.block import Block
from esper_otel.frames.frame import Frame
from esper_otel.frames.ring import blocks_of

IDS = ("a", "b", "c")
some_seeds = st.lists(st.sampled_from(IDS), unique=True, max_size=3)


@st.composite
def frames(draw: st.DrawFn) -> list[Frame]:
    made: list[Frame] = []
    known: set[str] = set()
    for number in range(1, draw(st.integers(2, 12)) + 1):
        retired = tuple(seed_id for seed_id in draw(some_seeds) if seed_id in known)
        seeds = seed_table({seed_id: {"alpha": 0.5} for seed_id in draw(some_seeds)})
        known = known.difference(retired).union(seeds.ids)
        time = {"sequence": number, "global_step": number, "time_unix_ns": number * 10**6}
        made.append(make_frame(seeds=seeds, retired=retired, **time))
    return made


def returns(made: list[Frame]) -> int:
    """How many of the frames come before the first in which a seed is recorded that an earlier one retired."""
    retired: set[str] = set()
    for count, frame in enumerate(made):
        if retired.intersection(frame.seeds.ids):
            return count
        retired.update(frame.retired)
    return len(made)


@given(frames(), st.lists(st.integers(1, 5), min_size=12, max_size=12))
def test_blocks_are_cut_before_a_seed_returns_and_end_the_same_series(made: list[Frame], sizes: list[int]) -> None:
    [whole] = blocks_of(made)
    blocks: list[Block] = []
    start = 0
    for size in sizes:
        if start < whole.rows:
            blocks.append(whole.part(start, min(start + size, whole.rows)))
            start += size
    kept = before_a_return(blocks)
    assert sum(block.rows for block in kept) == returns(made)
    assert [step for block in kept for step in block.steps] == list(range(1, returns(made) + 1))
    [together] = before_a_return([whole])
    assert Streams().note(kept) == Streams().note([together])
