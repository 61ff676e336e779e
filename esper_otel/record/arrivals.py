"""Arrivals: steps whose device values come after the training thread has gone on to something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sized
from typing import Any

from esper_otel.native import Bell, threads

# In a loop that goes on each step publishes those before it; this is for the last one before a validation or a pause.
_LOOK_EVERY_S = 0.02


class Arrivals:
    """A thread that publishes what waits; it starts with the first step that does, and sleeps while none does.

    Args:
        waiting: the steps that wait.
        publish: publishes those whose values have arrived.
    """

    def __init__(self, waiting: Sized, publish: Callable[[], None]) -> None:
        self._waiting = waiting
        self._publish = publish
        self._is_over = False
        self._thread: Any = None
        self._bell = Bell()

    def note(self) -> None:
        """A step waits. Called by the thread that records."""
        if self._is_over:
            return
        if self._thread is None:
            self._thread = threads().Thread(target=self._run, name="esper-otel-device", daemon=True)
            self._thread.start()
        self._bell.set()

    def stop(self) -> None:
        """Ends the thread, soon."""
        self._is_over = True
        self._bell.set()

    def _run(self) -> None:
        while not self._is_over:
            self._bell.wait()
            while self._waiting and not self._is_over:
                time.sleep(_LOOK_EVERY_S)
                self._publish()
