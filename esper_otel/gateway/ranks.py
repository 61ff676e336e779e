"""Ranks: compares a run's ranks over its newest steps, to find the one that slows down the others.

The durations of each rank's newest steps are kept in arrays, a row for each rank, as the steps are released.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import GUESSED_STEP, Frame
from esper_otel.gateway.items import Item, Origin, RunState
from esper_otel.gateway.turns import finished
from esper_otel.pull.messages import Rank, RanksResponse

STEPS = 256
_MOST_RUNS = 1_000
# Steps of a run, and of all runs: 40 bytes each. A run with very many ranks keeps fewer steps of each, at least eight;
# beyond that, the rank that has been silent for longest is dropped first. Of the runs, too.
_MOST_OF_A_RUN, _MOST_STEPS, _FEWEST = 2**19, 2**20, 8
# Work that a rank certainly does by itself; the rest of a step may be spent waiting for other ranks.
_OWN = ("input_wait_ms", "hook_latency_ms", "kasmina.finalize_ms")
_STEP = "step_latency_ms"
_NAMES = (*_OWN, _STEP)
_WAIT, _LATENCY = 0, len(_OWN)
# Differences below this share of a cycle, or below this many milliseconds, are noise.
_NOISE_SHARE = 0.05
_NOISE_MS = 1.0
NO_STEP = 2**64 - 1
_AT_ONCE = 32  # ranks
_WIDEST = 2**16

Steps = npt.NDArray[np.uint64]
Times = npt.NDArray[np.float64]


class Ranks:
    """Keeps the durations of each rank's newest steps. Not thread-safe: use it from one thread at a time."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _RunSteps] = OrderedDict()
        self._steps = 0

    def note(self, items: Iterable[Item]) -> None:
        """Adds released frames."""
        for run_id, some in itertools.groupby(items, lambda item: item.origin.run_id):
            run = self._runs.get(run_id)
            before = 0 if run is None else run.size
            if run is None:
                run = self._runs[run_id] = _RunSteps()
            is_new = [run.note(item) for item in some]
            if any(is_new):
                self._runs.move_to_end(run_id)
            self._shrink(run.size - before)

    def note_durations(self, state: RunState, steps: Steps, times: Times) -> None:
        """Adds the durations of a writer's newest steps, as ``durations_of`` returns them, but for those it has.

        Args:
            state: the writer.
            steps: numbers of the steps, shape (steps,).
            times: their durations, shape (steps, kinds).
        """
        run_id = state.origin.run_id
        before = self._runs[run_id].size if run_id in self._runs else 0
        run = self._runs.setdefault(run_id, _RunSteps())
        for step, of_step in zip(steps.tolist(), times.tolist(), strict=True):
            if step > run.last_of(state.origin):
                head = _StepHead(state.world_size, state.first_time_unix_ns, state.last_time_unix_ns, step)
                run.put(state.origin, head, of_step)
        self._runs.move_to_end(run_id)
        self._shrink(run.size - before)

    def forget(self, run_id: str) -> None:
        """Forgets a run."""
        run = self._runs.pop(run_id, None)
        self._steps -= 0 if run is None else run.size

    def _shrink(self, added: int) -> None:
        """Counts memory that was added, and forgets the runs that were added to longest ago if there is too much."""
        self._steps += added
        while len(self._runs) > 1 and (len(self._runs) > _MOST_RUNS or self._steps > _MOST_STEPS):
            self._steps -= self._runs.popitem(last=False)[1].size

    def view(self, run_id: str, steps: int) -> RanksResponse | None:
        """Compares the newest attempt's ranks over its newest steps; returns None if no step of the run is known."""
        return finished(self.viewing(run_id, steps))

    def viewing(self, run_id: str, steps: int) -> Generator[None, None, RanksResponse | None]:
        """Does the same as ``view``, in parts, between which further frames may be added."""
        run = self._runs.get(run_id)
        return None if run is None else (yield from run.viewing(min(steps or STEPS, STEPS)))

    def recent(self, run_id: str) -> RecentSteps | None:
        """Returns the newest steps of the run's ranks; None if no step of the run is known."""
        run = self._runs.get(run_id)
        return None if run is None else run.recent()


class RecentSteps(NamedTuple):
    """The durations of the newest steps of a run's ranks.

    Attributes:
        attempt: the newest attempt.
        world_size: number of processes of the run.
        ranks: the ranks, in order.
        steps: numbers of the steps, in order of arrival and with ``NO_STEP`` in empty places, shape (ranks, steps).
        step_ms: how long each took, NaN if that is not known. Same shape.
        wait_ms: how long each waited for its input, likewise.
    """

    attempt: int
    world_size: int
    ranks: list[int]
    steps: Steps
    step_ms: Times
    wait_ms: Times


class _RankSteps:
    """The newest attempt of one rank.

    Attributes:
        row: its row in the arrays.
        attempt: the attempt.
        world_size: number of processes of the run.
        first_unix_ns: the earliest time of a step.
        last_unix_ns: the latest time of a step.
        count: how many steps were written to the row.
        last: the largest number among them.
    """

    __slots__ = ("attempt", "count", "first_unix_ns", "last", "last_unix_ns", "row", "world_size")

    def __init__(self, row: int, attempt: int) -> None:
        self.row = row
        self.attempt = attempt
        self.world_size = 1
        self.first_unix_ns = self.last_unix_ns = 0
        self.count, self.last = 0, -1


class _StepHead(NamedTuple):
    """A step of a rank, without its durations.

    Attributes:
        world_size: number of processes of the run.
        first_unix_ns: a time that a step of the rank has, this one or an earlier one.
        last_unix_ns: likewise, this one or a later one.
        step: its number.
    """

    world_size: int
    first_unix_ns: int
    last_unix_ns: int
    step: int


def durations_of(frame: Frame) -> list[float]:
    """Returns the durations of a step that are compared, in milliseconds; NaN where there is none."""
    numbers = frame.numbers
    return [np.nan if place is None else numbers[place] for place in _places(frame.names)]


class _RunSteps:
    """The ranks of one run."""

    def __init__(self) -> None:
        self._ranks: OrderedDict[int, _RankSteps] = OrderedDict()  # the longest silent first
        self._steps: Steps = np.full((1, STEPS), NO_STEP, np.uint64)
        self._times: Times = np.full((1, STEPS, len(_NAMES)), np.nan)

    @property
    def size(self) -> int:
        """For how many steps there is memory."""
        return self._steps.size

    def note(self, item: Item) -> bool:
        """Adds a frame; returns whether it belongs to the newest attempt of its rank."""
        frame = item.frame
        head = _StepHead(frame.run.world_size, frame.time_unix_ns, frame.time_unix_ns, frame.global_step)
        return self.put(item.origin, head, durations_of(frame))

    def last_of(self, origin: Origin) -> int:
        """Returns the largest number of a step that is known of a rank in an attempt; -1 if there is none."""
        of_rank = self._ranks.get(origin.rank)
        return -1 if of_rank is None or of_rank.attempt != origin.attempt else of_rank.last

    def put(self, origin: Origin, head: _StepHead, durations: Sequence[float]) -> bool:
        """Adds a step; returns whether it belongs to the newest attempt of its rank."""
        attempt, rank = origin.attempt, origin.rank
        of_rank = self._ranks.get(rank)
        if of_rank is None:
            of_rank = self._ranks[rank] = _RankSteps(self._new_row(), attempt)
        elif of_rank.attempt < attempt:
            of_rank = self._ranks[rank] = _RankSteps(of_rank.row, attempt)
            self._clear(of_rank.row)
        elif of_rank.attempt > attempt:
            return False
        self._ranks.move_to_end(rank)
        step = head.step
        of_rank.world_size = head.world_size
        of_rank.first_unix_ns = min(of_rank.first_unix_ns or head.first_unix_ns, head.first_unix_ns)
        of_rank.last_unix_ns = max(of_rank.last_unix_ns, head.last_unix_ns)
        if step >= GUESSED_STEP:
            return True  # the number is guessed, so it matches no step of another rank
        row, width = of_rank.row, self._steps.shape[1]
        slot = of_rank.count % width
        known = np.flatnonzero(self._steps[row] == step).tolist() if step <= of_rank.last else []
        if known:
            slot = known[0]
        else:
            of_rank.count += 1
            of_rank.last = max(of_rank.last, step)
            self._steps[row, slot] = step
        self._times[row, slot] = durations
        return True

    def _clear(self, row: int) -> None:
        self._steps[row] = NO_STEP
        self._times[row] = np.nan

    def _new_row(self) -> int:
        """Returns a row for another rank: a free one, or that of the rank that has been silent for longest."""
        row, rows, width = len(self._ranks), len(self._steps), len(self._steps[0])
        if row < rows:
            return row
        if 2 * rows * _FEWEST > _MOST_OF_A_RUN:
            _, dropped = self._ranks.popitem(last=False)
            self._clear(dropped.row)
            return dropped.row
        fewer = min(width, _MOST_OF_A_RUN // (2 * rows))
        steps: Steps = np.full((2 * rows, fewer), NO_STEP, np.uint64)
        times: Times = np.full((2 * rows, fewer, len(_NAMES)), np.nan)
        for of_rank in self._ranks.values():
            kept = min(of_rank.count, fewer)
            slots = np.arange(of_rank.count - kept, of_rank.count) % width  # the newest, in order of arrival
            steps[of_rank.row, :kept] = self._steps[of_rank.row, slots]
            times[of_rank.row, :kept] = self._times[of_rank.row, slots]
            of_rank.count = kept
        self._steps, self._times = steps, times
        return row

    def _running(self) -> tuple[int, dict[int, _RankSteps]]:
        """Returns the newest attempt, and its ranks with those that still made steps after it had begun.

        The latter belong to the same launch, but did not agree with the others on an attempt number; see ``launches``.
        """
        attempt = max(of_rank.attempt for of_rank in self._ranks.values())
        begun_ns = min(of_rank.first_unix_ns for of_rank in self._ranks.values() if of_rank.attempt == attempt)
        return attempt, {
            rank: of_rank
            for rank, of_rank in sorted(self._ranks.items())
            if of_rank.attempt == attempt or of_rank.last_unix_ns >= begun_ns
        }

    def recent(self) -> RecentSteps:
        """Returns the newest steps of the ranks that run together."""
        attempt, running = self._running()
        rows = [of_rank.row for of_rank in running.values()]
        world_size = max(of_rank.world_size for of_rank in running.values())
        steps, times = self._steps[rows], self._times[rows]
        return RecentSteps(attempt, world_size, list(running), steps, times[:, :, _LATENCY], times[:, :, _WAIT])

    def viewing(self, most: int) -> Generator[None, None, RanksResponse]:
        """Compares the ranks that run together."""
        attempt, running = self._running()
        world_size = max(of_rank.world_size for of_rank in running.values())
        ranks = [rank for rank, of_rank in running.items() if of_rank.count]
        rows = [running[rank].row for rank in ranks]
        # Copies, because frames may be added while the comparison is under way.
        steps, times = self._steps[rows], self._times[rows]
        yield
        common = _common(steps)[-most:] if ranks else steps.reshape(-1)[:0]
        answer = RanksResponse(attempt=attempt, world_size=world_size, steps=len(common))
        if not len(common):
            return answer
        answer.first_step, answer.last_step = int(common[0]), int(common[-1])
        yield
        compared = yield from _comparing(steps, times, common)
        for place, rank in enumerate(ranks):
            if not place % _AT_ONCE:
                yield
            row = answer.ranks.add(rank=rank)
            _state(row, "step_latency_ms", compared.means[place, _LATENCY])
            _state(row, "input_wait_ms", compared.means[place, _WAIT])
            _state(row, "cycle_ms", compared.cycle_ms[place])
            _state(row, "own_ms", compared.own_ms[place])
        _state(answer, "step_latency_spread_ms", compared.spreads[_LATENCY])
        _state(answer, "input_wait_spread_ms", compared.spreads[_WAIT])
        _judge(answer, compared)
        return answer


def _state(message: Rank | RanksResponse, name: str, number: np.float64) -> None:
    """Sets a field, unless its number is missing."""
    if np.isfinite(number):
        setattr(message, name, float(number))


@lru_cache(maxsize=64)
def _places(names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Returns where the durations are among a frame's values; None for those that it does not have."""
    return tuple(names.index(name) if name in names else None for name in _NAMES)


def _common(steps: Steps) -> Steps:
    """Returns the steps that all ranks have, in order."""
    there = steps != NO_STEP
    low = np.where(there, steps, NO_STEP).min(axis=1).max()
    high = np.where(there, steps, 0).max(axis=1).min()
    inside: Steps = steps[(steps >= low) & (steps <= high)]  # an empty place is above every step
    if not len(inside):
        return inside
    if int(high - low) < _WIDEST:
        counts = np.bincount((inside - low).astype(np.int64))
        found: Steps = low + np.flatnonzero(counts == len(steps)).astype(np.uint64)
        return found
    distinct, counts = np.unique(inside, return_counts=True)
    return np.asarray(distinct[counts == len(steps)])


class _RankComparison(NamedTuple):
    """What the ranks took over the common steps. A number is NaN where nothing was recorded that it can be made from.

    Attributes:
        sums: for each rank, the sum of each duration.
        means: for each rank, the mean of each duration over the steps that have it.
        own_ms: for each rank, the mean of its own work over the steps that have any duration.
        cycle_ms: for each rank, the mean of its cycle over the steps that have a step latency.
        spreads: the mean of the largest minus the smallest of each duration over the steps that two ranks have it in.
    """

    sums: Times
    means: Times
    own_ms: Times
    cycle_ms: Times
    spreads: Times


def _comparing(steps: Steps, times: Times, common: Steps) -> Generator[None, None, _RankComparison]:
    sums, means = (np.zeros((len(steps), len(_NAMES))) for _ in range(2))
    own_ms, cycle_ms = (np.zeros(len(steps)) for _ in range(2))
    having = np.zeros((len(common), len(_NAMES)), np.int64)  # ranks
    largest, smallest = (np.full((len(common), len(_NAMES)), bound) for bound in (-np.inf, np.inf))
    for start in range(0, len(steps), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        place = np.searchsorted(common, steps[some])
        is_common = common[np.minimum(place, len(common) - 1)] == steps[some]
        rank, _ = is_common.nonzero()
        values = np.empty((len(steps[some]), len(common), len(_NAMES)))
        values[rank, place[is_common]] = times[some][is_common]
        there = np.isfinite(values)
        known = np.where(there, values, 0.0)
        sums[some] = known.sum(axis=1)
        means[some] = _mean(known, there, axis=1)
        own, has_own = known[:, :, : len(_OWN)].sum(axis=2), there[:, :, : len(_OWN)].sum(axis=(1, 2)) > 0
        own_ms[some] = _mean(own, (there.sum(axis=2) > 0) & has_own[:, None], axis=1)
        cycle_ms[some] = _mean(known[:, :, _WAIT] + known[:, :, _LATENCY], there[:, :, _LATENCY], axis=1)
        having += there.sum(axis=0)
        largest = np.maximum(largest, np.where(there, values, -np.inf).max(axis=0))
        smallest = np.minimum(smallest, np.where(there, values, np.inf).min(axis=0))
        yield
    return _RankComparison(sums, means, own_ms, cycle_ms, _mean(largest - smallest, having >= 2, axis=0))


def _mean(values: Times, counted: npt.NDArray[np.bool_], axis: int) -> Times:
    """Returns the mean of the values that are counted; NaN where there is none."""
    counts = counted.sum(axis=axis)
    mean: Times = np.full(counts.shape, np.nan)
    np.divide(np.where(counted, values, 0.0).sum(axis=axis), counts, out=mean, where=counts > 0)
    return mean


def _judge(answer: RanksResponse, compared: _RankComparison) -> None:
    """Names the rank that stands out: by its cycle if ranks run independently, by its own time in lock-step.

    A rank for which that time is missing is compared with no other.
    """
    cycles = compared.cycle_ms[np.isfinite(compared.cycle_ms)]
    noise_ms = max(_NOISE_MS, _NOISE_SHARE * float(cycles.mean())) if len(cycles) else _NOISE_MS
    times = compared.cycle_ms
    found = _first(times, noise_ms)
    if found is None:
        times = compared.own_ms
        found = _first(times, noise_ms)
    if found is None:
        return
    answer.slowest_rank = answer.ranks[found].rank
    mine = compared.sums[found]
    is_other = np.isfinite(times)
    is_other[found] = False
    others = compared.sums[is_other].mean(axis=0)
    excess = dict(zip(_NAMES, ((mine - others) / answer.steps).tolist(), strict=True))
    answer.slowest_by = max(_OWN, key=lambda name: excess[name])
    if excess[answer.slowest_by] < excess[_STEP] / 2:  # the extra time is not in any of the parts that are measured
        answer.slowest_by = _STEP


def _first(values: Times, noise_ms: float) -> int | None:
    """Returns the place of the largest value, if there is a second largest that it exceeds by more than the noise."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known) < 2:
        return None
    first, second, *_ = known[np.argsort(-values[known], kind="stable")].tolist()
    return first if values[first] - values[second] > noise_ms else None
