"""Quiet: limits how often libraries log what strangers send, and keeps secrets out of the log."""

from __future__ import annotations

import logging

from aiohttp.http import HttpProcessingError

from esper_otel.log import Warnings

_MOST_CHARACTERS = 200


class SeldomLog(logging.Handler):
    """Logs the messages of a library, each kind at most once a minute.

    For an unreadable request only that fact is logged: aiohttp's own message would contain headers, and so a token.

    Args:
        warnings: writes the messages.
        library: name of the library, for users.
    """

    def __init__(self, warnings: Warnings, library: str) -> None:
        super().__init__(logging.WARNING)
        self._warnings = warnings
        self._library = library

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        error = record.exc_info[1] if record.exc_info else None
        name = type(error).__name__
        if isinstance(error, HttpProcessingError):
            self._warnings.say(f"{self._library} request", "a request over %s could not be read", self._library)
        elif isinstance(error, Exception):
            self._warnings.say(f"{self._library} {name}", "%s failed (%s)", self._library, name, exc_info=error)
        else:
            last = (record.getMessage().strip().splitlines() or [""])[-1]
            self._warnings.say(f"{self._library} {record.lineno}", "%s: %.*s", self._library, _MOST_CHARACTERS, last)


def quiet_grpc() -> None:
    """Limits what gRPC logs; only for a process that does nothing but run a gateway."""
    log = logging.getLogger("grpc")
    log.propagate = False
    log.addHandler(SeldomLog(Warnings(), "gRPC"))
