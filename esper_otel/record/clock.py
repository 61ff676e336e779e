"""The session's clock: wall time at the start, carried on by a clock that nobody sets."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

_MS = 1_000_000
_JUMP_NS = 1_000_000_000
_STAMPING_NS = 1_000_000_000
_AHEAD_NS = 300 * 1_000_000_000


# Nanoseconds of a clock that never jumps and counts suspend where the system has such a clock.
steady_ns: Callable[[], int] = partial(time.clock_gettime_ns, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Stamps steps with Unix nanoseconds that strictly increase in whole milliseconds.

    Backends keep milliseconds: two steps in one would lose one. So a step in the same millisecond as the last is
    raised to the next one. Jumps of the wall clock are counted, not followed.

    Args:
        wall_ns: Unix time in nanoseconds; read once here and by ``check``.
        steady_ns: a clock that never goes back, in nanoseconds.
    """

    def __init__(self, *, wall_ns: Callable[[], int] = time.time_ns, steady_ns: Callable[[], int] = steady_ns) -> None:
        self._wall_ns = wall_ns
        self._steady_ns = steady_ns
        self._offset_ns = wall_ns() - steady_ns()
        self._drift_ns = 0
        self._next_ns = 0  # the first nanosecond of the millisecond after the last stamp's
        self.jumps: int = 0
        self.is_ahead: bool = False

    def stamp(self) -> int:
        """The time of a step that begins now. One thread at a time."""
        now = self._steady_ns() + self._offset_ns
        if now < self._next_ns:
            now = self._next_ns
            self._next_ns = now + _MS
        else:
            self._next_ns = now - now % _MS + _MS
        return now

    def now_ns(self) -> int:
        """The time now, by the same clock, without stamping a step."""
        return self._steady_ns() + self._offset_ns

    def idle_ns(self, last_unix_ns: int) -> int | None:
        """A time that no later step can be before, if the step of ``last_unix_ns`` is the last one stamped; else None.

        It is a second ago: another thread may be in the middle of stamping a step.
        """
        before_ns = self.now_ns() - _STAMPING_NS
        return before_ns if self._next_ns <= last_unix_ns - last_unix_ns % _MS + _MS else None

    def check(self) -> None:
        """Compares with the wall clock: counts jumps of more than a second, notes when steps run far ahead."""
        wall = self._wall_ns()
        drift = wall - self.now_ns()
        if abs(drift - self._drift_ns) > _JUMP_NS:
            self.jumps += 1
        self._drift_ns = drift
        self.is_ahead = self._next_ns > wall + _AHEAD_NS
