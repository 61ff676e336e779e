"""Whole accounts, as gateways send them to a client, and what several gateways know of one process, joined."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from esper_otel.hours.account import Account, StepTimes, Times

_MOST_NAMES, _OTHER = 256, "other"
_FEWEST_TOLD = 8
_MOST_TOLD = 128  # knots, and groups of phases inside steps: about 14 kB


def account_text(account: Account, most: int = _MOST_TOLD) -> str:
    """Returns an account as JSON. What it says of single steps is thinned: their sums stay as they are.

    Args:
        account: the account.
        most: about how many knots, and groups of phases inside steps, are told; 128 at most.
    """
    most = min(max(most, _FEWEST_TOLD), _MOST_TOLD)
    every = max(len(account.knots) // most, 1)
    return json.dumps(
        {
            **account.as_json(),
            "knots": account.knots[every - 1 :: every],
            "phases": _most_of(account.phases),
            "inside": _grouped(account, most),
            "starts": account.starts,
            "ends": account.ends,
        },
        separators=(",", ":"),
    )


def account_of(text: str) -> Account:
    """Does the reverse.

    Raises:
        ValueError, TypeError, KeyError: it is not such a text.
    """
    said = json.loads(text)
    account = Account.from_json(said)
    account.phases = {str(name): (float(total), float(inside)) for name, (total, inside) in said["phases"].items()}
    account.inside = {(str(name), int(end)): (int(step), float(own)) for name, end, step, own in said["inside"]}
    account.starts = int(said["starts"][0]), int(said["starts"][1])
    account.ends = int(said["ends"])
    return account


def _most_of(phases: Mapping[str, tuple[float, float]]) -> Mapping[str, tuple[float, float]]:
    """Returns the totals of phases by name; if they are very many, the shortest become one."""
    if len(phases) <= _MOST_NAMES:
        return phases
    longest = sorted(phases, key=lambda name: -phases[name][0])
    rest = [phases[name] for name in longest[_MOST_NAMES:]]
    told = {name: phases[name] for name in longest[:_MOST_NAMES]}
    total_ms, inside_ms = told.get(_OTHER, (0.0, 0.0))
    return {**told, _OTHER: (total_ms + sum(each for each, _ in rest), inside_ms + sum(each for _, each in rest))}


def _grouped(account: Account, most: int) -> list[tuple[str, int, int, float]]:
    """Returns the phases inside steps by name, end, step and own time; if they are many, neighbours are joined."""
    found = sorted((name, end, step, own_ms) for (name, end), (step, own_ms) in account.inside.items())
    every = -(-len(found) // most) or 1
    if every == 1:
        return found
    groups: dict[tuple[str, int], list[tuple[str, int, int, float]]] = defaultdict(list)
    for place, each in enumerate(found):
        groups[each[0], place // every].append(each)
    return [(name, some[-1][1], some[-1][2], sum(own_ms for *_, own_ms in some)) for (name, _), some in groups.items()]


def joined_account(accounts: Iterable[Account]) -> Account:
    """Returns what several gateways know of one process, which moved from one to the other, or sent to both.

    Steps that both may have count once, as far as their numbers say. The totals of phases are those of the process, of
    which the largest is the newest.
    """
    found, *others = sorted(accounts, key=lambda each: (each.first is None, each.first.step if each.first else 0))
    for other in others:
        found = _joined(found, other)
    return found


def _joined(one: Account, other: Account) -> Account:
    merged = _steps_of_both(one, other)
    merged.phases = dict(one.phases)
    for name, (total_ms, inside_ms) in other.phases.items():
        mine = merged.phases.get(name, (0.0, 0.0))
        merged.phases[name] = max(mine[0], total_ms), max(mine[1], inside_ms)
    merged.inside = {**one.inside, **other.inside}
    starts = [each.starts[0] for each in (one, other) if each.starts[0]]
    merged.starts = min(starts, default=0), max(one.starts[1], other.starts[1])
    merged.ends = max(one.ends, other.ends)
    return merged


def _steps_of_both(one: Account, other: Account) -> Account:
    """Returns an account with the steps of both; the first one begins first."""
    if one.first is None or other.first is None:
        return (one if other.first is None else other).copied()
    count = max(one.highest, other.highest) - min(one.first.step, other.first.step) + 1
    if one.steps + other.steps <= count:  # none can be in both
        return _summed(one, other, other.up_to, one.steps + other.steps)
    if other.highest <= one.highest:
        return (one if one.steps >= other.steps else other).copied()
    before = other.up_to(one.highest)

    def beyond(step: int) -> Times:
        return other.up_to(step).plus(before, -1.0) if step > one.highest else Times()

    return _summed(one, other, beyond, one.steps + min(other.steps, other.highest - one.highest))


def _summed(one: Account, other: Account, more: Callable[[int], Times], steps: int) -> Account:
    """Adds up steps: those of one account, and ``more`` of the other, given up to a number."""
    highest = max(one.highest, other.highest)
    numbers = sorted({step for step, _ in (*one.knots, *other.knots)})
    lasts: list[StepTimes] = [each.last for each in (one, other) if each.last is not None]
    return Account(
        steps,
        one.first,
        max(lasts, key=lambda each: (each.time_unix_ns, each.step)),
        highest,
        one.up_to(highest).plus(more(highest)),
        one.again.plus(other.again),
        [(step, one.up_to(step).plus(more(step))) for step in numbers],
    )
