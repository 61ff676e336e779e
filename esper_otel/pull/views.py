"""Views: a gateway's comparison of a run's ranks, and where its hours went, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from esper_otel.hours.account import Account
from esper_otel.hours.bar import BETWEEN, UNKNOWN, Bar, PhaseInfo, RunHours, bar_of_rank, bar_of_run
from esper_otel.hours.whole import account_of, joined_account
from esper_otel.pull.messages import Bar as BarMessage
from esper_otel.pull.messages import HoursResponse, Rank, RanksResponse

_STRANGE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
MOST_PHASES = 1_000  # of a run, that a gateway returns


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Times of one rank, as means over the steps of a ``RunRanks``.

    Attributes:
        rank: rank of the process within the run.
        step_latency_ms: mean of the metric; None if no step has it.
        input_wait_ms: mean of the metric; None if no step has it.
        cycle_ms: the wait for the batch plus the step, over the steps that have a step latency; None if none has it.
        own_ms: measured work that does not depend on other ranks: the wait for the batch, the hook, and finalizing;
            None if no step has any of these.
    """

    rank: int
    step_latency_ms: float | None
    input_wait_ms: float | None
    cycle_ms: float | None
    own_ms: float | None


@dataclass(frozen=True, slots=True)
class RunRanks:
    """A comparison of the ranks of a run's newest attempt, over the newest steps that all of them have.

    If ranks run independently, the slowest one has the longest cycle. In lock-step, with a collective in each step, all
    cycles are equal. The rank that slows down the others then has the most time of its own (``own_ms``), and the others
    wait for it within their steps. A rank that is slow inside the step, before the collective, cannot be distinguished
    from the ranks that wait for it.

    Attributes:
        attempt: number of the newest start of the run.
        world_size: expected number of ranks.
        steps: number of steps compared.
        first_step: the first of these steps; 0 if there are none.
        last_step: the last of these steps; 0 if there are none.
        ranks: each rank that has sent steps.
        step_latency_spread_ms: largest minus smallest over the ranks, as a mean over the steps in which at least two
            ranks have the metric; None if there is no such step.
        input_wait_spread_ms: the same for ``input_wait_ms``.
        slowest_rank: the rank that stands out; None if none does by more than 5 % of a cycle and one millisecond. A
            rank whose times are missing is not compared.
        slowest_by: the metric in which it stands out; None if no rank does.
    """

    attempt: int
    world_size: int
    steps: int
    first_step: int
    last_step: int
    ranks: tuple[RankInfo, ...]
    step_latency_spread_ms: float | None
    input_wait_spread_ms: float | None
    slowest_rank: int | None
    slowest_by: str | None


def run_ranks(response: RanksResponse) -> RunRanks:
    """Converts the response to a ``Ranks`` call."""
    has_slowest = response.HasField("slowest_rank")
    return RunRanks(
        attempt=response.attempt,
        world_size=response.world_size,
        steps=response.steps,
        first_step=response.first_step,
        last_step=response.last_step,
        ranks=tuple(map(_rank_info, response.ranks)),
        step_latency_spread_ms=_number(response, "step_latency_spread_ms"),
        input_wait_spread_ms=_number(response, "input_wait_spread_ms"),
        slowest_rank=response.slowest_rank if has_slowest else None,
        slowest_by=response.slowest_by if has_slowest else None,
    )


def _rank_info(row: Rank) -> RankInfo:
    return RankInfo(
        row.rank,
        _number(row, "step_latency_ms"),
        _number(row, "input_wait_ms"),
        _number(row, "cycle_ms"),
        _number(row, "own_ms"),
    )


def _number(message: Rank | RanksResponse, name: str) -> float | None:
    number: float | None = getattr(message, name) if message.HasField(name) else None
    return number


def run_hours(response: HoursResponse) -> RunHours:
    """Converts the response to an ``Hours`` call."""
    phases = [
        PhaseInfo(
            phase.name,
            phase.rank,
            phase.attempt,
            phase.start_unix_ns,
            phase.end_unix_ns,
            phase.own_ms,
            phase.number,
            phase.step if phase.HasField("step") else None,
        )
        for phase in response.phases
    ]
    return RunHours(_bar(response.run), {each.rank: _bar(each.bar) for each in response.ranks}, tuple(phases))


def merged_hours(answers: Sequence[HoursResponse]) -> RunHours:
    """Returns the hours of a run of which several gateways have parts: each attempt's of all that know it.

    A gateway of an older version returns only a bar; it is used for a rank of which it knows more than others.
    """
    found = [run_hours(answer) for answer in answers]
    if len(found) == 1:
        return found[0]
    bars: dict[int, list[Bar]] = {}
    for hours in (RunHours(Bar(0, 0, {}, 0), _bars_of_all(answers), ()), *found):
        for rank, bar in hours.ranks.items():
            bars.setdefault(rank, []).append(bar)
    ranks = {rank: max(bars[rank], key=_known_ms) for rank in sorted(bars)}
    phases = {(each.rank, each.attempt, each.name, each.end_unix_ns): each for hours in found for each in hours.phases}
    newest = sorted(phases.values(), key=lambda each: each.end_unix_ns)[-MOST_PHASES:]
    return RunHours(bar_of_run(ranks.values()), ranks, tuple(newest))


def _bars_of_all(answers: Iterable[HoursResponse]) -> dict[int, Bar]:
    """Returns the bar of each rank, made of the accounts of all gateways."""
    known: dict[tuple[int, int], list[Account]] = {}
    for each in (account for answer in answers for account in answer.accounts):
        with suppress(*_STRANGE):  # of a newer version, or of anybody
            account = account_of(each.account)
            known.setdefault((each.rank, each.attempt), []).append(account)
    accounts: dict[int, list[Account]] = {}
    for rank, attempt in sorted(known):
        accounts.setdefault(rank, []).append(joined_account(known[rank, attempt]))
    return {rank: bar_of_rank(attempts) for rank, attempts in accounts.items()}


def _known_ms(bar: Bar) -> float:
    return bar.wall_ms - bar.parts.get(UNKNOWN, 0.0) - bar.parts.get(BETWEEN, 0.0)


def _bar(message: BarMessage) -> Bar:
    parts = {part.name: part.spent_ms for part in message.parts}
    return Bar(message.start_unix_ns, message.end_unix_ns, parts, message.attempts)
