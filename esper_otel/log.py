"""Log lines about the telemetry itself."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger("esper_otel")

_QUIET_S = 60.0


def announce(event: str, message: str) -> None:
    """Says what a user should see once: through logging where that is set up, else on standard error."""
    if logger.hasHandlers():
        logger.info("%s: %s", event, message)
    else:
        sys.stderr.write(f"esper_otel {event}: {message}\n")


class Warnings:
    """Logs each kind of warning at most once a minute, with the number of those kept back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    def say(self, kind: str, message: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        """Logs a warning unless one of its kind was logged less than a minute ago."""
        now = self._clock()
        if now < self._next.get(kind, float("-inf")):
            self._held[kind] += 1
            return
        self._next[kind] = now + _QUIET_S
        held = self._held.pop(kind, 0)
        if held:
            message = f"{message} ({held} more like it since the last such line)"
        logger.warning(message, *arguments, exc_info=exc_info)
