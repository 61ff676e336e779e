"""Launches: compares a run's attempts, to find which of them resumed the run, and whether the whole run has ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from esper_otel.gateway.items import RunState

# The outcome of a run if one rank fell silent without reporting its end, and all others completed.
LOST = "lost"


def with_resumed(states: Iterable[RunState]) -> list[RunState]:
    """Returns the states with ``resumed`` set: whether an earlier attempt had this rank, or was over when it began.

    Attempts of different ranks whose steps overlap in time are one launch whose ranks could not agree on an attempt
    number.
    """
    made: list[RunState] = []
    for of_run in _by_run(states):
        over_ns = _over_before(of_run)
        oldest: dict[int, int] = {}
        for state in of_run:
            oldest[state.origin.rank] = min(state.origin.attempt, oldest.get(state.origin.rank, state.origin.attempt))
        for state in of_run:
            origin = state.origin
            resumed = oldest[origin.rank] < origin.attempt or over_ns[origin.attempt] < state.first_time_unix_ns
            made.append(replace(state, resumed=resumed))
    return made


def outcomes(states: Iterable[RunState]) -> dict[str, str]:
    """Returns the outcome of each run that has ended, over all of its attempts and ranks.

    A run has ended when each of its writers is over. A writer is over

    - when it has reported its end;
    - when a later attempt began after its last step;
    - when it has been silent for a minute, and there is a later attempt, or another rank of its attempt has reported
      its end. A silent writer without either may still continue.

    Writers that were followed by a later attempt do not affect the outcome. It is ``completed`` if all others
    completed. Otherwise it is the first reported outcome that is not ``completed``, or ``lost`` if there is no such
    outcome but a writer fell silent.
    """
    return {of_run[0].origin.run_id: outcome for of_run in _by_run(states) if (outcome := _outcome(of_run)) is not None}


def _outcome(states: list[RunState]) -> str | None:
    newest = max(state.origin.attempt for state in states)
    has_end = {state.origin.attempt for state in states if state.ended is not None}
    begun_ns = _begun_after(states)
    said: list[str | None] = []
    for state in states:
        attempt = state.origin.attempt
        is_older = attempt < newest
        is_followed = is_older and (not state.last_time_unix_ns or state.last_time_unix_ns < begun_ns[attempt])
        if not is_followed:
            said.append(state.ended)
            if state.ended is None and not (state.is_silent and (is_older or attempt in has_end)):
                return None
    worse = [outcome for outcome in said if outcome not in {None, "completed"}]
    return worse[0] if worse else LOST if None in said else "completed"


def _by_run(states: Iterable[RunState]) -> Iterator[list[RunState]]:
    in_order = sorted(states, key=lambda state: state.origin)
    return (list(of_run) for _, of_run in groupby(in_order, key=lambda state: state.origin.run_id))


def _over_before(states: list[RunState]) -> dict[int, float]:
    """Returns, by attempt, when the first writer of earlier attempts was over; infinity if there is none."""
    over: dict[int, float] = {}
    for state in states:
        last_ns = state.last_time_unix_ns or math.inf  # without a step yet, it may be about to make its first
        over[state.origin.attempt] = min(last_ns, over.get(state.origin.attempt, math.inf))
    earliest, before = math.inf, {}
    for attempt in sorted(over):
        before[attempt] = earliest
        earliest = min(earliest, over[attempt])
    return before


def _begun_after(states: list[RunState]) -> dict[int, float]:
    """Returns, by attempt, when the last writer of later attempts began; 0 if there is none."""
    begun: dict[int, float] = {}
    for state in states:
        begun[state.origin.attempt] = max(state.first_time_unix_ns, begun.get(state.origin.attempt, 0))
    latest, after = 0.0, {}
    for attempt in sorted(begun, reverse=True):
        after[attempt] = latest
        latest = max(latest, begun[attempt])
    return after
