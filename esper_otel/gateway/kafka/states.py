"""States: what servers know of runs, from the topic of states."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import NamedTuple

from esper_otel.errors import UnknownRun
from esper_otel.gateway.hours.accounts import summing
from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.kafka.hours import NO_HOURS, WriterHours, joined, merged
from esper_otel.gateway.kafka.topic_records import NO_DURATIONS, WriterState
from esper_otel.gateway.ranks import Ranks
from esper_otel.gateway.rebuild.launches import with_resumed
from esper_otel.hours.account import Account, PhaseTimes
from esper_otel.hours.bar import RunHours

# A writer that has sent nothing for this long may be dead; see ``rebuild.runs``.
_AT_ONCE = 32
_ALIVE_NS = 60 * 10**9


class WriterKey(NamedTuple):
    """A writer in a partition. If its Resource changes in mid-run, it is in two of them."""

    partition: int
    origin: Origin


class KnownStates:
    """The states of all writers. Threads: that of the event loop.

    Args:
        clock_ns: Unix time, in nanoseconds.

    Attributes:
        ranks: durations of the newest steps, for comparisons.
        lows: for each partition, the first offset that the topic of frames still has.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        self._runs: dict[str, dict[WriterKey, WriterState]] = {}
        self._hours: dict[str, dict[WriterKey, WriterHours]] = {}
        self.ranks: Ranks = Ranks()
        self.lows: dict[int, int] = {}

    def note(self, partition: int, known: WriterState) -> None:
        """Adds the newest state of a writer."""
        if len(known.durations.steps):
            self.ranks.note_durations(known.state, known.durations.steps, known.durations.times.astype(float))
        origin = known.state.origin
        kept = known._replace(newest=None, durations=NO_DURATIONS, hours=NO_HOURS)
        self._hours.setdefault(origin.run_id, {})[WriterKey(partition, origin)] = known.hours
        if known.is_of_steps:
            self._runs.setdefault(origin.run_id, {})[WriterKey(partition, origin)] = kept

    def forget(self, partition: int, origin: Origin) -> None:
        """Removes a writer."""
        of_hours = self._hours.get(origin.run_id, {})
        of_hours.pop(WriterKey(partition, origin), None)
        if not of_hours:
            self._hours.pop(origin.run_id, None)
        of_run = self._runs.get(origin.run_id, {})
        of_run.pop(WriterKey(partition, origin), None)
        if not of_run and origin.run_id in self._runs:
            del self._runs[origin.run_id]
            self.ranks.forget(origin.run_id)

    def hours(self, run_id: str) -> Generator[None, None, tuple[RunHours, dict[AttemptRank, Account]]]:
        """Returns where the hours of a run went, and the accounts of its processes, in parts.

        Raises:
            UnknownRun: nothing of the run is known.
        """
        of_run = self._hours.get(run_id)
        if not of_run:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        by_origin: dict[Origin, list[WriterHours]] = {}
        for (_, origin), hours in of_run.items():
            by_origin.setdefault(origin, []).append(hours)
        yield
        phases: list[tuple[AttemptRank, PhaseTimes]] = []
        for origin, some in sorted(by_origin.items(), key=lambda each: (each[0].rank, each[0].attempt)):
            writer = AttemptRank(origin.rank, origin.attempt)
            phases += [(writer, phase) for hours in some for phase in hours.phases]
            yield
        accounts = {}
        for number, (origin, some) in enumerate(by_origin.items()):
            accounts[origin] = merged(each.account() for each in some)
            if number % _AT_ONCE == 0:
                yield
        of_processes = joined(accounts)
        return (yield from summing(of_processes, phases)), of_processes

    def partitions(self, run_id: str, rank: int | None = None) -> dict[int, int]:
        """Returns the partitions in which a run is, or one of its ranks, each with an offset before its first frame."""
        found: dict[int, int] = {}
        for (partition, origin), known in self._runs.get(run_id, {}).items():
            if rank in (None, origin.rank) and known.counts.writer:
                found[partition] = min(known.since, found.get(partition, known.since))
        return found

    # -- as an assembler tells it -------------------------------------------------------------------------

    def runs(self, now_s: float) -> list[RunState]:  # noqa: ARG002 - the states have Unix times
        """Returns the state of each writer."""
        return [state for run_id in list(self._runs) for state in self._states(run_id)]

    def states_of(self, run_id: str, now_s: float) -> list[RunState]:  # noqa: ARG002
        """Returns the state of each writer of a run."""
        return self._states(run_id)

    def run_ids(self) -> set[str]:
        """Returns the ids of the runs."""
        return {*self._runs}

    def has(self, run_id: str) -> bool:
        """Whether the run is known: asked for many runs in a row."""
        return run_id in self._runs

    def _states(self, run_id: str) -> list[RunState]:
        now_ns = self._clock_ns()
        newest: dict[Origin, RunState] = {}
        for (_, origin), known in self._runs.get(run_id, {}).items():
            other = newest.get(origin)
            if other is None or other.last_received_unix_ns <= known.state.last_received_unix_ns:
                newest[origin] = known.state
        alive: dict[tuple[int, int], int] = {}
        silent: dict[Origin, bool] = {}
        for origin, state in newest.items():
            silent[origin] = now_ns - state.last_received_unix_ns > _ALIVE_NS
            alive[origin[1:3]] = alive.get(origin[1:3], 0) + (not silent[origin])
        return with_resumed(
            replace(state, is_silent=silent[origin], writers=max(alive[origin[1:3]], 1))
            for origin, state in newest.items()
        )

    # -- as a store tells it ------------------------------------------------------------------------------

    def counts(self, run_id: str | None = None) -> dict[Origin, int]:
        """Returns about how many steps of each writer can be pulled: exact until the first of them expires."""
        found: dict[Origin, int] = {}
        for (partition, origin), known in self._of(run_id):
            found[origin] = found.get(origin, 0) + _stored(known, self.lows.get(partition, 0))
        return found

    def outcomes(self, run_id: str | None = None) -> dict[Origin, str]:
        """Returns how writers ended."""
        return {origin: known.state.ended for (_, origin), known in self._of(run_id) if known.state.ended is not None}

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns how many frames of a rank there were."""
        last: dict[int, int] = {}
        for (partition, origin), known in self._runs.get(run_id, {}).items():
            if origin.rank == rank:
                last[partition] = max(last.get(partition, 0), known.counts.of_rank)
        return sum(last.values())

    def _of(self, run_id: str | None) -> Iterable[tuple[WriterKey, WriterState]]:
        runs = self._runs.values() if run_id is None else [self._runs.get(run_id, {})]
        return (each for of_run in runs for each in of_run.items())


def _stored(known: WriterState, low: int) -> int:
    """Returns how many frames are left, as if they had come evenly."""
    if low <= known.since or not known.counts.writer:
        return known.counts.writer
    length = known.last - known.since
    return 0 if low >= known.last or not length else known.counts.writer * (known.last - low) // length
