"""Skipped: numbers of frames that did not come in time, and still may."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TypeAlias

_MOST_RANGES = 1_000

# From the first number to before the second.
Hole: TypeAlias = tuple[int, int]


class SkippedNumbers:
    """The numbers that have not come: those before the lowest that has, and holes after it.

    A gateway that joins a run late never gets the numbers before the lowest one: they are taken when they come, and
    are not counted as missing. Of very many holes the oldest are forgotten: they stay counted, and what comes of them
    is not taken any more.

    Attributes:
        lowest: the lowest number that has come; None before the first.
        count: how many numbers are missing: those that were skipped after the lowest one and have not come.
    """

    def __init__(self) -> None:
        self.lowest: int | None = None
        self.count = 0
        self._holes: list[Hole] = []

    @property
    def holes(self) -> tuple[Hole, ...]:
        """The holes that are known, in order."""
        return tuple(self._holes)

    @property
    def unseen(self) -> int:
        """How many numbers are before the lowest one."""
        return 0 if self.lowest is None else max(self.lowest - 1, 0)

    def __contains__(self, number: int) -> bool:
        return self._hole(number) is not None

    def _hole(self, number: int) -> Hole | None:
        """The hole that a number is in."""
        if self.lowest is None:
            return None
        if number < self.lowest:
            return (1, self.lowest)
        place = bisect_right(self._holes, number, key=lambda hole: hole[0]) - 1
        return self._holes[place] if place >= 0 and number < self._holes[place][1] else None

    def around(self, number: int) -> tuple[int, int]:
        """The numbers next to the hole that this one is in, both of which have come; 0 when there is none before."""
        hole = self._hole(number)
        assert hole is not None
        return hole[0] - 1, hole[1]

    def add(self, first: int, behind: int) -> None:
        """Notes the numbers from ``first``, which is higher than those noted before, to before ``behind``."""
        self._holes.append((first, behind))
        self.count += behind - first
        del self._holes[:-_MOST_RANGES]

    def remove(self, number: int) -> None:
        """The frame of this number has come after all."""
        hole = self._hole(number)
        if hole is None:
            return
        first, behind = hole
        after = [(number + 1, behind)] if number + 1 < behind else []
        if behind == self.lowest:
            self.lowest = number
            self._holes[:0] = after
            self.count += behind - number - 1
        else:
            place = bisect_right(self._holes, number, key=lambda hole: hole[0]) - 1
            before = [(first, number)] if first < number else []
            self._holes[place : place + 1] = before + after
            self.count -= 1
        del self._holes[:-_MOST_RANGES]

    def restore(self, lowest: int | None, holes: Iterable[Hole], count: int) -> None:
        """Goes on from what was known in an earlier life."""
        self.lowest, self._holes, self.count = lowest, list(holes), count
