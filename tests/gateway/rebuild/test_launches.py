"""What attempts say of each other: which one resumed the run, and whether the whole of it has ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.rebuild.launches import outcomes, with_resumed

pytestmark = pytest.mark.lengthy

S = 1_000_000_000


def state(
    attempt: int, rank: int = 0, *, steps: tuple[int, int] = (0, 0), ended: str | None = None, silent: bool = False
) -> RunState:
    """One writer, with the seconds of its first and last step."""
    first_s, last_s = steps
    return RunState(
        Origin("run", attempt, rank),
        2,
        "",
        1,
        10,
        last_s * S,
        last_s * S,
        ended=ended,
        first_time_unix_ns=first_s * S,
        is_silent=silent,
    )


KILLED = state(1, steps=(10, 20))
CASES: dict[str, tuple[list[RunState], str | None]] = {
    "one that lives": ([KILLED], None),
    "one that is silent may go on": ([replace(KILLED, is_silent=True)], None),
    "one that has ended": ([state(1, steps=(10, 20), ended="completed")], "completed"),
    "killed and resumed": ([KILLED, state(2, steps=(30, 40))], None),
    "killed, resumed and completed": ([KILLED, state(2, steps=(30, 40), ended="completed")], "completed"),
    "killed twice": ([KILLED, state(2, steps=(30, 35)), state(3, steps=(40, 50), ended="SIGTERM")], "SIGTERM"),
    "an end that was resumed does not count": (
        [state(1, steps=(10, 20), ended="SIGTERM"), state(2, steps=(30, 40), ended="completed")],
        "completed",
    ),
    "one rank lives": ([state(1, 0, steps=(10, 20), ended="completed"), state(1, 1, steps=(10, 20))], None),
    "one rank fell silent": (
        [state(1, 0, steps=(10, 20), ended="completed"), state(1, 1, steps=(10, 20), silent=True)],
        "lost",
    ),
    "one rank went wrong": (
        [state(1, 0, steps=(10, 20), ended="completed"), state(1, 1, steps=(10, 20), ended="ValueError")],
        "ValueError",
    ),
    "a silent rank hides no exception": (
        [state(1, 0, steps=(10, 20), silent=True), state(1, 1, steps=(10, 20), ended="ValueError")],
        "ValueError",
    ),
    "fewer ranks after the resume": (
        [state(1, 0, steps=(10, 20)), state(1, 1, steps=(10, 21)), state(2, 0, steps=(30, 40), ended="completed")],
        "completed",
    ),
    "ranks with attempts of their own": (
        [state(1, 0, steps=(10, 20), ended="completed"), state(2, 1, steps=(11, 21))],
        None,
    ),
    "and both have ended, one badly": (
        [state(1, 0, steps=(10, 20), ended="KeyError"), state(2, 1, steps=(11, 21), ended="completed")],
        "KeyError",
    ),
    "two programs with one name": ([state(1, steps=(10, 50)), state(2, steps=(30, 40), ended="completed")], None),
    "of which one fell silent": (
        [state(1, steps=(10, 50), silent=True), state(2, steps=(30, 40), ended="completed")],
        "lost",
    ),
    "known from an earlier life only": (
        [state(1, silent=True), state(2, ended="completed", silent=True)],
        "completed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_ended_when_nothing_of_it_can_go_on(name: str) -> None:
    states, outcome = CASES[name]
    assert outcomes(states).get("run") == outcome
    assert outcomes(reversed(states)).get("run") == outcome


def test_a_rank_that_has_made_no_step_yet_is_resumed_by_nobody() -> None:
    found = with_resumed([state(1, 0), state(2, 1, steps=(11, 21))])
    assert [each.resumed for each in found] == [False, False]


def test_an_attempt_is_resumed_when_another_was_over_before_it() -> None:
    """Ranks that could not agree on a number, and step at the same time, are one launch."""
    first = [state(1, 0, steps=(10, 20)), state(2, 1, steps=(11, 21))]
    then = [state(3, 0, steps=(30, 40)), state(4, 1, steps=(31, 41)), state(4, 2, steps=(31, 41))]
    found = {each.origin: each.resumed for each in with_resumed([*then, *first])}
    assert found == {each.origin: False for each in first} | {each.origin: True for each in then}


writers = st.builds(
    lambda attempt, rank, first, length, ended, silent: state(
        attempt, rank, steps=(first, first + length), ended=ended, silent=silent
    ),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 30),
    st.integers(0, 20),
    st.sampled_from([None, None, "completed", "ValueError"]),
    st.booleans(),
)


def slowly(states: list[RunState]) -> str | None:
    """Every writer against every other one."""
    said = []
    for mine in states:
        later = [other for other in states if other.origin.attempt > mine.origin.attempt]
        mates = [other for other in states if other.origin.attempt == mine.origin.attempt]
        if any(other.first_time_unix_ns > mine.last_time_unix_ns for other in later):
            continue
        can_go_on = mine.ended is None and not (mine.is_silent and (later or any(mate.ended for mate in mates)))
        if can_go_on:
            return None
        said.append(mine.ended or "lost")
    bad = [outcome for outcome in said if outcome not in {"completed", "lost"}]
    return bad[0] if bad else "lost" if "lost" in said else "completed"


@given(st.lists(writers, min_size=1, max_size=8, unique_by=lambda each: each.origin))
def test_it_is_what_comparing_every_pair_gives(states: list[RunState]) -> None:
    states.sort(key=lambda each: each.origin)
    assert outcomes(states).get("run") == slowly(states)
    for mine in with_resumed(states):
        assert mine.resumed == any(
            other.origin.attempt < mine.origin.attempt
            and (other.origin.rank == mine.origin.rank or other.last_time_unix_ns < mine.first_time_unix_ns)
            for other in states
        )
