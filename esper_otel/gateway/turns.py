"""Turns: what takes long is done in parts, so that the event loop sees to others in between."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")


class Turn:
    """A share of the event loop's time, counted in what its thread really computes.

    Args:
        most_s: how long it is; by default what one thing may take while others wait.
    """

    __slots__ = ("_ends_s",)

    def __init__(self, most_s: float = 0.01) -> None:
        self._ends_s = time.thread_time() + most_s

    @property
    def is_over(self) -> bool:
        """Whether others should have their turns now."""
        return time.thread_time() > self._ends_s


def finished(long: Generator[None, None, _T]) -> _T:
    """What something long returns that is done in one turn."""
    while True:
        try:
            next(long)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


async def in_turns(long: Generator[None, None, _T]) -> _T:
    """What something long returns that is done in turns."""
    turn = Turn()
    while True:
        try:
            next(long)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if turn.is_over:
            await asyncio.sleep(0)
            turn = Turn()


# For those that have nobody to wait for them.
ENDLESS = Turn(math.inf)
