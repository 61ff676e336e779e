"""Turns: long work is done in parts, so that the event loop can run other tasks in between."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")

# Rounds of the event loop between two turns. A round in which nothing else runs takes a few microseconds.
_ROUNDS = 8
_SHORT_S = 0.003
_USUAL_S = 0.01  # how long one task may block the others


class Turn:
    """A share of the event loop's time, measured as CPU time of its thread.

    Args:
        most_s: length of the turn.
    """

    __slots__ = ("_ends_s",)

    def __init__(self, most_s: float = _USUAL_S) -> None:
        self._ends_s = time.thread_time() + most_s

    @property
    def is_over(self) -> bool:
        """Whether other tasks should run now."""
        return time.thread_time() > self._ends_s


def finished(long: Generator[None, None, _T]) -> _T:
    """Runs a generator to its end without a pause, and returns its result."""
    while True:
        try:
            next(long)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


async def pause() -> None:
    """Ends a turn. Short tasks get several rounds of the event loop, since most of them need more than one."""
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)


async def at_half_speed(long: Generator[None, None, _T]) -> _T:
    """Does the same as ``in_turns``, in shorter turns with rests in between that are as long.

    For what a puller may ask for again and again, and nobody waits for as for steps.
    """
    turn = Turn(_SHORT_S)
    while True:
        try:
            next(long)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if turn.is_over:
            await asyncio.sleep(_SHORT_S)
            turn = Turn(_SHORT_S)


async def in_turns(long: Generator[None, None, _T], turn_s: float = _USUAL_S) -> _T:
    """Runs a generator to its end, in turns of ``turn_s`` seconds, and returns its result."""
    turn = Turn(turn_s)
    while True:
        try:
            next(long)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if turn.is_over:
            await pause()
            turn = Turn(turn_s)


# For callers that block nobody.
ENDLESS = Turn(math.inf)
