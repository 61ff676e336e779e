"""The session's clock: every step has a millisecond of its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.record.clock import Clock

pytestmark = pytest.mark.own_code

MS = 1_000_000
S = 1_000 * MS


class FakeTime:
    """A wall clock that may jump and a steady one that does not."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000 * S
        self.steady = 5 * S

    def pass_ns(self, nanoseconds: int) -> None:
        self.wall += nanoseconds
        self.steady += nanoseconds

    def clock(self) -> Clock:
        return Clock(wall_ns=lambda: self.wall, steady_ns=lambda: self.steady)


@given(st.lists(st.integers(0, 3 * MS), max_size=100))
def test_stamps_strictly_increase_in_whole_milliseconds(pauses: list[int]) -> None:
    """Prometheus keeps milliseconds: a second point in one of them is lost."""
    time = FakeTime()
    clock = time.clock()
    stamps = []
    for pause in pauses:
        time.pass_ns(pause)
        stamps.append(clock.stamp() // MS)
    assert stamps == sorted(set(stamps))


@pytest.mark.parametrize("jump_s", [-3600, 86_400])
def test_a_jump_of_the_wall_clock_is_counted_and_not_followed(jump_s: int) -> None:
    """An hour back would be refused by every backend; a day ahead would hide what follows."""
    time = FakeTime()
    clock = time.clock()
    before = clock.stamp()
    time.pass_ns(S)
    time.wall += jump_s * S
    clock.check()
    assert clock.stamp() == before + S
    assert clock.jumps == 1
    clock.check()
    assert clock.jumps == 1


def test_a_fast_loop_runs_ahead_of_the_wall_clock_and_says_so() -> None:
    """Above 1,000 steps a second each step still has its own millisecond; 5 minutes ahead is too far."""
    time = FakeTime()
    clock = time.clock()
    for _ in range(300_000):
        clock.stamp()
    clock.check()
    assert clock.jumps == 0
    before = clock.is_ahead
    for _ in range(2):
        clock.stamp()
    clock.check()
    assert (before, clock.is_ahead, clock.jumps) == (False, True, 0)


def test_real_clocks_agree_with_the_wall_clock() -> None:
    """The stamp is Unix time."""
    import time

    clock = Clock()
    assert abs(clock.stamp() - time.time_ns()) < S


def test_no_step_can_come_before_the_idle_time() -> None:
    """The exporter's counts are sent at it; a step that is stamped and not sent yet must not be older."""
    time = FakeTime()
    clock = time.clock()
    first = clock.stamp()
    time.pass_ns(10 * S)
    assert clock.idle_ns(first) == first + 9 * S
    second = clock.stamp()
    assert clock.idle_ns(first) is None
    assert clock.idle_ns(second) == second - S  # earlier than the step: of no use yet
    raised = clock.stamp()
    assert (clock.idle_ns(second), clock.idle_ns(raised)) == (None, second - S)
