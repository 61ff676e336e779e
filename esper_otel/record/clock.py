"""The session's clock: reads wall time once, at the start, and adds the time elapsed on a monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

_MS = 1_000_000
_JUMP_NS = 1_000_000_000
_STAMPING_NS = 1_000_000_000
_AHEAD_NS = 300 * 1_000_000_000


# Nanoseconds of a monotonic clock. It includes time spent in suspend if the system has such a clock.
steady_ns: Callable[[], int] = (
    partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic_ns
)


class Clock:
    """Stamps steps with Unix nanoseconds that strictly increase in whole milliseconds.

    Backends store times in milliseconds: of two steps in one millisecond, they would lose one. So a step in the same
    millisecond as the previous step is moved to the next millisecond. Jumps of the wall clock are counted, not
    followed.

    Args:
        wall_ns: returns Unix time in nanoseconds; called once here and by ``check``.
        steady_ns: returns the time of a clock that never goes back, in nanoseconds.
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
        """Returns the time of a step that begins now. Call it from one thread at a time."""
        now = self._steady_ns() + self._offset_ns
        if now < self._next_ns:
            now = self._next_ns
            self._next_ns = now + _MS
        else:
            self._next_ns = now - now % _MS + _MS
        return now

    def now_ns(self) -> int:
        """Returns the current time by the same clock, without stamping a step."""
        return self._steady_ns() + self._offset_ns

    def idle_ns(self, last_unix_ns: int) -> int | None:
        """Returns a time that all later steps will follow, or None if a step was stamped after ``last_unix_ns``.

        The time lies one second in the past, because another thread may be in the middle of stamping a step.
        """
        before_ns = self.now_ns() - _STAMPING_NS
        return before_ns if self._next_ns <= last_unix_ns - last_unix_ns % _MS + _MS else None

    def check(self) -> None:
        """Compares with the wall clock: counts jumps of more than a second and notes whether steps are far ahead."""
        wall = self._wall_ns()
        drift = wall - self.now_ns()
        if abs(drift - self._drift_ns) > _JUMP_NS:
            self.jumps += 1
        self._drift_ns = drift
        self.is_ahead = self._next_ns > wall + _AHEAD_NS
