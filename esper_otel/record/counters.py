"""Counters: what happened in the recording of one session."""

from __future__ import annotations


class Counters:
    """Counts of one session by metric name; each is written by one thread and read by any."""

    def __init__(self) -> None:
        self.failed: int = 0
        self.backwards: int = 0
        self.nonfinite: int = 0
        self.out_of_range: int = 0
        self.faults: int = 0
