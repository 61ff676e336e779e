"""Ranks: compares a run's ranks over its newest steps, to find the one that slows down the others."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from math import fsum
from statistics import fmean

from esper_otel.frames.frame import GUESSED_STEP, Frame
from esper_otel.gateway.items import Item
from esper_otel.gateway.turns import finished
from esper_otel.pull.messages import Rank, RanksResponse

STEPS = 256
_MOST_RUNS = 1_000
_MOST_RANKS = 4_096
_MOST_STEPS = 500_000  # over all ranks and runs; the run that has been silent for longest is dropped first
# Work that a rank certainly does by itself; the rest of a step may be spent waiting for other ranks.
_OWN = ("input_wait_ms", "hook_latency_ms", "kasmina.finalize_ms")
_STEP = "step_latency_ms"
# Differences below this share of a cycle, or below this many milliseconds, are noise.
_NOISE_SHARE = 0.05
_NOISE_MS = 1.0

Times = Mapping[str, float]


class Ranks:
    """Keeps the durations of each rank's newest steps. Not thread-safe: use it from one thread at a time."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _RunSteps] = OrderedDict()
        self._steps = 0

    def note(self, items: Iterable[Item]) -> None:
        """Adds released frames."""
        for item in items:
            run_id = item.origin.run_id
            run = self._runs.get(run_id)
            if run is None:
                run = self._runs[run_id] = _RunSteps()
            before = run.steps
            if run.note(item):
                self._runs.move_to_end(run_id)
            self._steps += run.steps - before
            while len(self._runs) > 1 and (len(self._runs) > _MOST_RUNS or self._steps > _MOST_STEPS):
                self._steps -= self._runs.popitem(last=False)[1].steps

    def view(self, run_id: str, steps: int) -> RanksResponse | None:
        """Compares the newest attempt's ranks over its newest steps; returns None if no step of the run is known."""
        return finished(self.viewing(run_id, steps))

    def viewing(self, run_id: str, steps: int) -> Generator[None, None, RanksResponse | None]:
        """Does the same as ``view``, in parts, between which further frames may be added."""
        run = self._runs.get(run_id)
        return None if run is None else (yield from run.viewing(min(steps or STEPS, STEPS)))


class _RankSteps:
    """The newest attempt of one rank."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.world_size = 1
        self.first_unix_ns = self.last_unix_ns = 0
        self.steps: OrderedDict[int, Times] = OrderedDict()

    def note(self, frame: Frame) -> None:
        self.world_size = frame.run.world_size
        self.first_unix_ns = min(self.first_unix_ns or frame.time_unix_ns, frame.time_unix_ns)
        self.last_unix_ns = max(self.last_unix_ns, frame.time_unix_ns)
        if frame.global_step >= GUESSED_STEP:
            return  # the number is guessed, so it matches no step of another rank
        values = dict(zip(frame.names, frame.numbers, strict=True))
        self.steps[frame.global_step] = {
            name: values[name] for name in (*_OWN, _STEP) if name in values and math.isfinite(values[name])
        }
        self.steps.move_to_end(frame.global_step)
        if len(self.steps) > STEPS:
            self.steps.popitem(last=False)


class _RunSteps:
    """The ranks of one run.

    Attributes:
        steps: number of steps kept, over all ranks.
    """

    def __init__(self) -> None:
        self._newest: dict[int, _RankSteps] = {}
        self.steps = 0

    def note(self, item: Item) -> bool:
        """Adds a frame; returns whether it belongs to the newest attempt of its rank."""
        attempt, rank = item.origin.attempt, item.origin.rank
        of_rank = self._newest.get(rank)
        if of_rank is None and len(self._newest) >= _MOST_RANKS:
            return False
        if of_rank is None or of_rank.attempt < attempt:
            self.steps -= 0 if of_rank is None else len(of_rank.steps)
            of_rank = self._newest[rank] = _RankSteps(attempt)
        if of_rank.attempt == attempt:
            before = len(of_rank.steps)
            of_rank.note(item.frame)
            self.steps += len(of_rank.steps) - before
        return of_rank.attempt == attempt

    def viewing(self, most: int) -> Generator[None, None, RanksResponse]:
        """Compares the ranks of the newest attempt, and ranks that still made steps after it had begun.

        The latter belong to the same launch, but did not agree with the others on an attempt number; see ``launches``.
        """
        attempt = max(of_rank.attempt for of_rank in self._newest.values())
        begun_ns = min(of_rank.first_unix_ns for of_rank in self._newest.values() if of_rank.attempt == attempt)
        running = {
            rank: of_rank
            for rank, of_rank in self._newest.items()
            if of_rank.attempt == attempt or of_rank.last_unix_ns >= begun_ns
        }
        world_size = max(of_rank.world_size for of_rank in running.values())
        compared: dict[int, Mapping[int, Times]] = {}
        for rank, of_rank in sorted(running.items()):
            if of_rank.steps:
                compared[rank] = dict(of_rank.steps)  # a copy of the current state
                yield
        return (yield from _viewing(compared, attempt, world_size, most))


def _viewing(
    ranks: Mapping[int, Mapping[int, Times]], attempt: int, world_size: int, most: int
) -> Generator[None, None, RanksResponse]:
    common = set(next(iter(ranks.values()))) if ranks else set()
    for of_rank in ranks.values():
        common &= of_rank.keys()
        yield
    steps = sorted(common)[-most:]
    answer = RanksResponse(attempt=attempt, world_size=world_size, steps=len(steps))
    if not steps:
        return answer
    answer.first_step, answer.last_step = steps[0], steps[-1]
    sums: dict[int, dict[str, float]] = {}
    for rank, of_rank in ranks.items():
        times = [of_rank[step] for step in steps]
        _add_row(answer, rank, times)
        sums[rank] = {name: fsum(each.get(name, 0.0) for each in times) for name in (*_OWN, _STEP)}
        yield
    spreads: dict[str, list[float]] = {_STEP: [], "input_wait_ms": []}
    for step in steps:
        at_step = [of_rank[step] for of_rank in ranks.values()]
        for name, of_name in spreads.items():
            of_name.append(_spread(at_step, name))
        yield
    answer.step_latency_spread_ms = fmean(spreads[_STEP])
    answer.input_wait_spread_ms = fmean(spreads["input_wait_ms"])
    _judge(answer, sums)
    return answer


def _add_row(answer: RanksResponse, rank: int, times: list[Times]) -> None:
    row = answer.ranks.add(rank=rank)
    for name, field in ((_STEP, "step_latency_ms"), ("input_wait_ms", "input_wait_ms")):
        values = [each[name] for each in times if name in each]
        if values:
            setattr(row, field, fmean(values))
    row.own_ms = fmean(sum(each.get(name, 0.0) for name in _OWN) for each in times)
    row.cycle_ms = fmean(each.get(_STEP, 0.0) + each.get("input_wait_ms", 0.0) for each in times)


def _judge(answer: RanksResponse, sums: Mapping[int, Mapping[str, float]]) -> None:
    """Names the rank that stands out: by its cycle if ranks run independently, by its own time in lock-step.

    Args:
        answer: the answer, with all of its rows.
        sums: for each rank, the sum of each duration over its steps.
    """
    if len(answer.ranks) < 2:
        return
    noise_ms = max(_NOISE_MS, _NOISE_SHARE * fmean(row.cycle_ms for row in answer.ranks))
    found = _first(answer.ranks, "cycle_ms", noise_ms)
    if found is None:
        found = _first(answer.ranks, "own_ms", noise_ms)
    if found is None:
        return
    answer.slowest_rank = found.rank
    excess = {}
    for name in (*_OWN, _STEP):
        theirs = fsum(of_rank[name] for rank, of_rank in sums.items() if rank != found.rank)
        excess[name] = (sums[found.rank][name] - theirs / (len(sums) - 1)) / answer.steps
    answer.slowest_by = max(_OWN, key=lambda name: excess[name])
    if excess[answer.slowest_by] < excess[_STEP] / 2:  # the extra time is not in any of the parts that are measured
        answer.slowest_by = _STEP


def _spread(times: list[Times], name: str) -> float:
    values = [each[name] for each in times if name in each]
    return max(values) - min(values) if values else 0.0


def _first(ranks: Iterable[Rank], field: str, noise_ms: float) -> Rank | None:
    """Returns the rank with the largest value, if it exceeds the second largest by more than the noise."""
    first, second, *_ = sorted(ranks, key=lambda row: -getattr(row, field))
    return first if getattr(first, field) - getattr(second, field) > noise_ms else None
