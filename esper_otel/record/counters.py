"""Counters: what happened in the recording of one session."""

from __future__ import annotations


class Counters:
    """Counts of one session by metric name; each is written by one thread and read by any."""

    def __init__(self) -> None:
        self.failed = 0
        self.backwards = 0
        self.nonfinite = 0
        self.out_of_range = 0
        self.faults = 0
