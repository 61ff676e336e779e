"""What a queue knows of its frames without looking at each."""

from __future__ import annotations

import numpy as np
from frame_examples import RUN
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.gateway.rebuild.queue import Queue, WaitingFrame
from esper_otel.gateway.receive.request import PointSender
from esper_otel.parts.habits import Habits
from esper_otel.parts.part import Part, PartShape

SENDER = PointSender(RUN)


def part_of(number: int) -> Part:
    """A value of a stream of its own, or of the same as before."""
    return Part(PartShape.of([(f"metric-{number}", "")]), np.array([1.0]))


@given(st.lists(st.tuples(st.sampled_from(["put", "add", "pop"]), st.integers(0, 5), st.integers(0, 3))))
def test_points_and_age_are_those_of_the_frames(done: list[tuple[str, int, int]]) -> None:
    queue = Queue(Habits(), hold_s=1.0, linger_s=1.0, most=10)
    frames: dict[int, WaitingFrame] = {}
    for what, time_unix_ns, number in done:
        if what == "put" and time_unix_ns not in frames:
            frames[time_unix_ns] = WaitingFrame(SENDER, float(number), 0.0, 0)
        if what == "pop":
            assert queue.pop(time_unix_ns) is frames.pop(time_unix_ns, None)
        elif time_unix_ns in frames:
            frames[time_unix_ns].add(part_of(number))
            queue.put(time_unix_ns, frames[time_unix_ns])
        assert queue.points == sum(waiting.points for waiting in frames.values())
        assert queue.since_s == min((waiting.first_s for waiting in frames.values()), default=None)
