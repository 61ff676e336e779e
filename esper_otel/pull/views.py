"""Views: what a gateway says of a whole run, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from esper_otel.pull.messages import Rank, RanksResponse


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One rank, means over the steps of a ``RunRanks``.

    Attributes:
        rank: the process within the run.
        step_latency_ms: None when no step has it.
        input_wait_ms: None when no step has it.
        cycle_ms: the wait for the batch and the step.
        own_ms: what it did by itself, as far as that is measured: the wait for the batch, the hook, finalizing.
    """

    rank: int
    step_latency_ms: float | None
    input_wait_ms: float | None
    cycle_ms: float
    own_ms: float


@dataclass(frozen=True, slots=True)
class RunRanks:
    """The ranks of a run's newest attempt side by side, over the newest steps that all of them have.

    Where ranks run free, the slowest has the longest cycle. In lock-step, with a collective in each step, all cycles
    are equal; the one that holds the others up then has the most time of its own, and they wait for it inside their
    steps. A rank whose own work before the collective is slow cannot be told from those that wait for it.

    Attributes:
        attempt: which start of the run.
        world_size: ranks that there should be.
        steps: how many steps are looked at.
        first_step: the first of them; 0 without any.
        last_step: the last of them; 0 without any.
        ranks: each rank that has sent steps.
        step_latency_spread_ms: largest minus smallest over the ranks, mean over the steps.
        input_wait_spread_ms: the same of ``input_wait_ms``.
        slowest_rank: the rank that stands out; None when none does by more than 5 % of a cycle and a millisecond.
        slowest_by: the metric in which it does; None when none does.
    """

    attempt: int
    world_size: int
    steps: int
    first_step: int
    last_step: int
    ranks: tuple[RankInfo, ...]
    step_latency_spread_ms: float
    input_wait_spread_ms: float
    slowest_rank: int | None
    slowest_by: str | None


def run_ranks(response: RanksResponse) -> RunRanks:
    """The answer to a question for ranks."""
    has_slowest = response.HasField("slowest_rank")
    return RunRanks(
        attempt=response.attempt,
        world_size=response.world_size,
        steps=response.steps,
        first_step=response.first_step,
        last_step=response.last_step,
        ranks=tuple(map(_rank_info, response.ranks)),
        step_latency_spread_ms=response.step_latency_spread_ms,
        input_wait_spread_ms=response.input_wait_spread_ms,
        slowest_rank=response.slowest_rank if has_slowest else None,
        slowest_by=response.slowest_by if has_slowest else None,
    )


def _rank_info(row: Rank) -> RankInfo:
    step_ms = row.step_latency_ms if row.HasField("step_latency_ms") else None
    wait_ms = row.input_wait_ms if row.HasField("input_wait_ms") else None
    return RankInfo(row.rank, step_ms, wait_ms, row.cycle_ms, row.own_ms)
