"""The bar: which part of a run's wall time was what. Its parts add up to the wall time."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

from esper_otel.hours.account import Account, Times

_MS = 1_000_000

PRODUCTIVE, WAITED, HOOKS, AGAIN = "productive", "input_wait", "hooks", "redone"
BETWEEN, UNKNOWN = "between_attempts", "unknown"
START_UP = "start_up"
# The order in which parts are shown; phases with other names stand before the last two.
_OTHER, _MOST_NAMES = "other", 96  # a trainer counts what goes beyond 64 names as "other" itself
ORDER = (PRODUCTIVE, AGAIN, WAITED, HOOKS, START_UP, "checkpoint", "evaluation", "data", "compile", "idle")


class Bar(NamedTuple):
    """Where the wall time of a rank, or of a run, went.

    Attributes:
        start_unix_ns: the first start.
        end_unix_ns: the last time that is known.
        parts: milliseconds by part, each at least 0, in the order in which they are shown. Their sum is the wall time.
        attempts: how many attempts there were.
    """

    start_unix_ns: int
    end_unix_ns: int
    parts: Mapping[str, float]
    attempts: int

    @property
    def wall_ms(self) -> float:
        """The wall time."""
        return (self.end_unix_ns - self.start_unix_ns) / _MS

    def share(self, part: str) -> float:
        """Returns a part's share of the wall time, 0 to 1; 0 if there is no wall time."""
        return self.parts.get(part, 0.0) / self.wall_ms if self.wall_ms > 0.0 else 0.0


class PhaseInfo(NamedTuple):
    """One phase of a run.

    Attributes:
        name: its name.
        rank: the rank that it was in.
        attempt: number of the start of the run.
        start_unix_ns: when it began.
        end_unix_ns: when it ended.
        own_ms: the time for which it alone held up training: without the phases, steps and waits for input inside it.
        number: 1, 2, ... within (attempt, rank), without holes; 0 if it is not known.
        step: the step inside which it lay; None if it was outside steps.
    """

    name: str
    rank: int
    attempt: int
    start_unix_ns: int
    end_unix_ns: int
    own_ms: float
    number: int
    step: int | None


class RunHours(NamedTuple):
    """Where the hours of a run went.

    Attributes:
        run: the bar of the run: the mean over its ranks, from the first start to the last time of any of them.
        ranks: the bar of each rank.
        phases: its newest phases, in the order of their ends.
    """

    run: Bar
    ranks: Mapping[int, Bar]
    phases: Sequence[PhaseInfo]


def bar_of_rank(attempts: Sequence[Account]) -> Bar:
    """Returns the bar of one rank.

    Args:
        attempts: the accounts of its attempts, in their order; those without any time are left out.
    """
    making = making_bar(attempts)
    while True:
        try:
            next(making)
        except StopIteration as end:
            bar: Bar = end.value
            return bar


def making_bar(attempts: Sequence[Account]) -> Generator[None, None, Bar]:
    """Does the same as ``bar_of_rank``, in parts: there may be very many attempts."""
    known = [each for each in attempts if each.start_unix_ns]
    if not known:
        return Bar(0, 0, {}, 0)
    parts: dict[str, float] = {}
    start_unix_ns = end_unix_ns = min(each.start_unix_ns for each in known)
    highest = -1
    for account in known:
        _add(parts, BETWEEN, max(account.start_unix_ns - end_unix_ns, 0) / _MS)
        # If the attempt before was still alive, each moment counts once, for the earlier one.
        length_ms = max(account.end_unix_ns - max(account.start_unix_ns, end_unix_ns), 0) / _MS
        for name, spent_ms in _fitted(_of_attempt(account, highest), length_ms).items():
            _add(parts, name, spent_ms)
        end_unix_ns = max(end_unix_ns, account.end_unix_ns)
        highest = max(highest, account.highest)
        yield
    return Bar(start_unix_ns, end_unix_ns, _in_order(parts), len(known))


def bar_of_run(ranks: Iterable[Bar]) -> Bar:
    """Returns the bar of a run: the mean over its ranks, from the first start to the last time of any of them.

    What a rank does not cover, since it started later or ended earlier than others, is unknown.
    """
    bars = [each for each in ranks if each.attempts]
    if not bars:
        return Bar(0, 0, {}, 0)
    start_unix_ns, end_unix_ns = min(each.start_unix_ns for each in bars), max(each.end_unix_ns for each in bars)
    parts: dict[str, float] = {}
    for each in bars:
        for name, spent_ms in each.parts.items():
            _add(parts, name, spent_ms / len(bars))
    _add(parts, UNKNOWN, max((end_unix_ns - start_unix_ns) / _MS - sum(parts.values()), 0.0))
    return Bar(start_unix_ns, end_unix_ns, _in_order(parts), max(each.attempts for each in bars))


def _of_attempt(account: Account, highest: int) -> dict[str, float]:
    """Returns the parts of one attempt. Steps up to number ``highest`` had been done before."""
    again = account.up_to(highest) if highest >= 0 else Times()
    new = account.sums.plus(again, -1.0)
    again_ms = again.total + account.again.total
    inside_ms = sum(inside for _, inside in account.phases.values())
    of_again_ms = min(account.inside_up_to(highest) if highest >= 0 else 0.0, inside_ms, again_ms)
    parts = {PRODUCTIVE: new.rest, HOOKS: new.hooks, WAITED: new.waited, AGAIN: again_ms - of_again_ms}
    left_ms = inside_ms - of_again_ms  # these phases are also part of the latency of their steps
    for name in (PRODUCTIVE, HOOKS, WAITED, AGAIN):
        taken_ms = min(parts[name], left_ms)
        parts[name] -= taken_ms
        left_ms -= taken_ms
    for name, (total_ms, _) in account.phases.items():
        _add(parts, name, total_ms)
    return parts


def _fitted(parts: dict[str, float], length_ms: float) -> dict[str, float]:
    """Fits the parts into the length of their attempt: the rest of it is unknown, and nothing may be longer.

    If they are longer, the time of steps was estimated, or attempts overlap: the productive part gives way first.
    """
    surplus_ms = sum(parts.values()) - length_ms
    if surplus_ms <= 0.0:
        return {**parts, UNKNOWN: -surplus_ms}
    taken_ms = min(parts[PRODUCTIVE], surplus_ms)
    parts[PRODUCTIVE] -= taken_ms
    total_ms = sum(parts.values())
    share = length_ms / total_ms if total_ms > length_ms else 1.0
    return {name: spent_ms * share for name, spent_ms in parts.items()}


def _add(parts: dict[str, float], name: str, spent_ms: float) -> None:
    parts[name] = parts.get(name, 0.0) + spent_ms


def _in_order(parts: Mapping[str, float]) -> dict[str, float]:
    """Returns the parts that there are, in the order in which they are shown. If they are very many, some are one."""
    others = sorted(parts.keys() - {*ORDER, BETWEEN, UNKNOWN})
    if len(others) > _MOST_NAMES:
        longest = sorted(others, key=lambda name: -parts[name])
        rest = {*longest[_MOST_NAMES:], _OTHER}
        others = sorted({*others} - rest)
        parts = {**parts, _OTHER: sum(parts.get(name, 0.0) for name in sorted(rest))}
        others.append(_OTHER)
    return {name: parts[name] for name in (*ORDER, *others, BETWEEN, UNKNOWN) if parts.get(name, 0.0) > 0.0}
