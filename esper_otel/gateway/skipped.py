"""Skipped: numbers of frames that did not come in time."""

from __future__ import annotations

_MOST_RANGES = 1_000


class Skipped:
    """Ranges of numbers that were skipped, and how many they are; of very many ranges the oldest are forgotten."""

    def __init__(self) -> None:
        self._ranges: list[range] = []
        self.count = 0

    def __contains__(self, number: int) -> bool:
        return any(number in numbers for numbers in self._ranges)

    def add(self, first: int, behind: int) -> None:
        """Notes the numbers from ``first`` to before ``behind``."""
        self._ranges = [*self._ranges, range(first, behind)][-_MOST_RANGES:]
        self.count += behind - first

    def remove(self, number: int) -> None:
        """The frame of this number came after all."""
        for place, numbers in enumerate(self._ranges):
            if number in numbers:
                around = range(numbers.start, number), range(number + 1, numbers.stop)
                self._ranges[place : place + 1] = [part for part in around if part]
                self.count -= 1
                return
