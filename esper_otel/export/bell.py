"""Bell: wakes a thread that waits; may be rung from a signal handler."""

from __future__ import annotations

import contextlib
from _queue import Empty, SimpleQueue


class Bell:
    """An event for one waiting thread, without a lock of its own.

    A handler that sets a ``threading.Event`` waits for ever when the signal has come while its thread was setting it.
    """

    def __init__(self) -> None:
        self._rung: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wakes the waiting thread, or the next one that waits."""
        if self._rung.empty():
            self._rung.put(None)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until the bell has been rung since the last wait."""
        with contextlib.suppress(Empty):
            self._rung.get(timeout=timeout_s)

    def clear(self) -> None:
        """Forgets that it was rung."""
        with contextlib.suppress(Empty):
            while True:
                self._rung.get(block=False)
