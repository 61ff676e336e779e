"""Log messages about the telemetry itself."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

from esper_otel.text import printable
from esper_otel.untraced import is_untraced

logger: logging.Logger = logging.getLogger("esper_otel")

_QUIET_S = 60.0
_MOST_OF_AN_ARGUMENT = 2_000
_TEXTS = (str, BaseException)  # these may contain text from other machines


def announce(event: str, message: str, level: int = logging.INFO) -> None:
    """Shows a message that the user must see: by logging if that shows the level, otherwise on standard error.

    ``logging.basicConfig()`` alone shows nothing below WARNING, and ``logging.config`` disables loggers that it does
    not name. Neither means that the user wants to hide this message. A level or a NullHandler set on the logger
    ``esper_otel`` itself does, and is respected.
    """
    if _is_shown(level):
        with suppress(Exception):  # a handler of the user may raise
            logger.log(level, "%s: %s", event, message)
    elif not _is_silenced(level):
        # Standard error may be missing, or its reader may be gone.
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.write(f"esper_otel {event}: {message}\n")
            sys.stderr.flush()


def _is_shown(level: int) -> bool:
    """Whether any handler shows records of this level from our logger."""
    if not logger.isEnabledFor(level):
        return False
    return any(each.level <= level and not isinstance(each, logging.NullHandler) for each in _handlers())


def _handlers() -> Iterator[logging.Handler]:
    """Yields the handlers that records of our logger reach."""
    source: logging.Logger | None = logger
    while source is not None:
        yield from source.handlers
        source = source.parent if source.propagate else None


class _NotIntoOtlp(logging.Filter):
    """Keeps messages about sending away from handlers that send logs over OTLP, where each would cause more sending.

    Only messages of threads whose requests are not traced; see ``esper_otel/untraced.py``. All other handlers get them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """See ``logging.Filter``."""
        if not is_untraced():
            return True
        handlers = list(_handlers())
        others = [each for each in handlers if not type(each).__module__.startswith("opentelemetry.")]
        if len(others) == len(handlers):
            return True
        for each in others or filter(None, [logging.lastResort]):
            if record.levelno >= each.level:
                each.handle(record)
        return False


logger.addFilter(_NotIntoOtlp())


def _is_silenced(level: int) -> bool:
    """Whether the user has silenced this logger by its name."""
    return logger.level > level or any(isinstance(each, logging.NullHandler) for each in logger.handlers)


class Warnings:
    """Logs each kind of warning at most once a minute, with the number of warnings suppressed since.

    Never raises: an exception in a user's log handler must not stop training or export.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    def say(self, kind: str, message: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        """Logs a warning unless one of the same kind was logged less than a minute ago."""
        now = self._clock()
        if now < self._next.get(kind, float("-inf")):
            self._held[kind] += 1
            return
        self._next[kind] = now + _QUIET_S
        held = self._held.pop(kind, 0)
        if held:
            message = f"{message} ({held} more since the last such message)"
        with suppress(Exception):
            shown = [printable(each, _MOST_OF_AN_ARGUMENT) if isinstance(each, _TEXTS) else each for each in arguments]
            logger.warning(message, *shown, exc_info=exc_info)

    def hold(self, kind: str, seconds: float) -> None:
        """Suppresses warnings of a kind for some seconds, because something else has just told the user about it."""
        self._next[kind] = max(self._next.get(kind, 0.0), self._clock() + seconds)
