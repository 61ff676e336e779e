"""In which order tests are dealt to processes that run side by side: each begins with its share of what takes long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby

import pytest


def dealt(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order in which nothing long is left for the end.

    ``--dist worksteal`` gives each process an equal part of the list, and then takes from the ends of longer parts for
    those that have no more: short tests have to stand there. While one process waits, another had better compute:
    every second one begins with the tests that wait for the collector, the others with those that take long themselves.

    Args:
        items: as collected. Those of one file and kind stay together, in their order.
        workers: the number of processes.
    """
    waiting, lengthy, short = (
        [list(group) for _, group in groupby(of_kind, key=lambda item: item.location[0])]
        for of_kind in (
            [item for item in items if _kind(item) == "collector"],
            [item for item in items if _kind(item) == "lengthy"],
            [item for item in items if not _kind(item)],
        )
    )
    hands: list[list[pytest.Item]] = []
    rest = list(chain.from_iterable(short))
    for number in range(workers):
        first, second = (waiting, lengthy) if number % 2 else (lengthy, waiting)
        hands.append([*chain.from_iterable(first[number::workers]), *chain.from_iterable(second[number::workers])])
    for number, hand in enumerate(hands):
        left = len(rest) + sum(map(len, hands[number:]))
        filled = max(left // (workers - number) - len(hand), 0)
        hand.extend(rest[:filled])
        del rest[:filled]
    return [*chain.from_iterable(hands), *rest]


def _kind(item: pytest.Item) -> str:
    return next((kind for kind in ("collector", "lengthy") if item.get_closest_marker(kind) is not None), "")
