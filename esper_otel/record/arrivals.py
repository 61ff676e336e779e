"""A thread that publishes steps whose device values arrive while the training thread is doing something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sized
from typing import Any

from esper_otel.native import Bell, threads

# While the training loop runs, each step publishes the waiting steps before it. The thread is needed for the last step
# before a validation or a pause.
_LOOK_EVERY_S = 0.02


class Arrivals:
    """A thread that publishes steps when their device values arrive.

    It starts when the first step waits for device values, and sleeps while no step waits.

    Args:
        waiting: the steps that wait for device values.
        publish: publishes the steps whose values have arrived.
    """

    def __init__(self, waiting: Sized, publish: Callable[[], None]) -> None:
        self._waiting = waiting
        self._publish = publish
        self._is_over = False
        self._thread: Any = None
        self._bell = Bell()

    def note(self) -> None:
        """Wakes the thread because a step waits. Called by the recording thread."""
        if self._is_over:
            return
        if self._thread is None:
            self._thread = threads().Thread(target=self._run, name="esper-otel-device", daemon=True)
            self._thread.start()
        self._bell.set()

    def stop(self) -> None:
        """Asks the thread to end; does not wait for it."""
        self._is_over = True
        self._bell.set()

    def _run(self) -> None:
        while not self._is_over:
            self._bell.wait()
            while self._waiting and not self._is_over:
                time.sleep(_LOOK_EVERY_S)
                self._publish()
