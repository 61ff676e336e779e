"""Context managers that measure how long a part of a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType


class StepTiming:
    """Adds the milliseconds between entering and leaving to one of a step's timings."""

    __slots__ = ("_name", "_started_s", "_timings")

    def __init__(self, timings: dict[str, float], name: str) -> None:
        self._timings = timings
        self._name = name

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spent_ms = (time.perf_counter() - self._started_s) * 1e3
        self._timings[self._name] = self._timings.get(self._name, 0.0) + spent_ms


class CallbackTiming:
    """Passes the milliseconds between entering and leaving to a function."""

    __slots__ = ("_say", "_started_s")

    def __init__(self, say: Callable[[float], None]) -> None:
        self._say = say

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say((time.perf_counter() - self._started_s) * 1e3)
