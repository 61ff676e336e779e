"""Bounds of time that hold on a busy machine too: tests run side by side, and beside whatever else there is."""

from __future__ import annotations

import os
import time

_QUIET_S = 0.015  # what the piece of work takes on a machine of 2024 that does nothing else
_PIECES = 60_000


def patience(seconds: float) -> float:
    """How long something may take by the clock, in seconds, that may take so long on a quiet machine."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def cpu_patience(seconds: float) -> float:
    """How much CPU time something may take, in seconds, that may take so much on a quiet machine.

    Who shares caches and cores with others computes more slowly, by the clock of the thread too: as much as a piece of
    work that is always the same.
    """
    return seconds * max(1.0, max(_work_s() for _ in range(5)) / _QUIET_S)


def _work_s() -> float:
    began_s = time.thread_time()
    made = {str(number): float(number) for number in range(_PIECES)}
    took_s = time.thread_time() - began_s
    assert len(made) == _PIECES
    return took_s
