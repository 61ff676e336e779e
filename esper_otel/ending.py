"""The end of the process: sessions that are still live are closed at interpreter exit, and flushed on signals."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Protocol

_TIMEOUT_S = 5.0
_AGAIN_S = 0.002
# They run the user's code; what they call of ours has a module of its own.
_RUNNERS = ("esper_otel.integrations.", "esper_otel.demo.", "esper_otel.cli", "esper_otel.__main__")


class Closing(Protocol):
    """A live session."""

    def interrupted(self) -> None:
        """The process has been told to end: send what is there, do not wait for the next period."""

    def close(self, timeout_s: float, outcome: str) -> None:
        """Flushes and ends the session, within about ``timeout_s``."""


_live: weakref.WeakSet[Closing] = weakref.WeakSet()
os.register_at_fork(after_in_child=_live.clear)  # a DataLoader worker inherits the handlers, not the sessions


def watch(session: Closing, names: Iterable[str] = ()) -> list[str]:
    """Closes the session when the process ends, unless ``forget`` comes first.

    SIGTERM and the signals of these names flush it. A handler that was there is called as well; one that was not set
    from Python is left alone.

    Returns:
        The signals that will not flush it: Python lets only the main thread set a handler.
    """
    _live.add(session)
    # Last registered is first called: before those of gRPC and whatever else the session has imported.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    return [name for name in dict.fromkeys(("SIGTERM", *names)) if not _is_followed(signal.Signals[name])]


def forget(session: Closing) -> None:
    """The session has been closed."""
    _live.discard(session)


def _is_followed(number: int) -> bool:
    """Whether our handler is there, or could be put there."""
    there = signal.getsignal(number)
    if isinstance(there, _Handler):
        return True
    if there is None:
        return False
    try:
        signal.signal(number, _Handler(there))
    except ValueError:  # this is not the main thread
        return False
    return True


class _Handler:
    """Wakes the exporters and does what would have happened without us; before the process dies of it, flushes.

    Args:
        before: the handler whose place it takes.
    """

    def __init__(self, before: Callable[[int, FrameType | None], object] | int) -> None:
        self._before = before
        self._until_s: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if callable(self._before) or self._before is signal.SIG_IGN:
            for session in list(_live):
                session.interrupted()
            if callable(self._before):
                self._before(number, frame)
        elif self._is_too_early(frame):
            _thread.start_new_thread(_send_again, (number,))
        else:
            _close_all(signal.Signals(number).name)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_too_early(self, frame: FrameType | None) -> bool:
        """Whether the signal has interrupted code of ours, which may hold a lock that closing needs."""
        if not _live or not _is_ours(frame):
            return False
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + _TIMEOUT_S
        return now_s < self._until_s


def _is_ours(frame: FrameType | None) -> bool:
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name.startswith("esper_otel.") and not name.startswith(_RUNNERS):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(_AGAIN_S)
    os.kill(os.getpid(), number)


def _close_all(outcome: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    for session in list(_live):
        session.close(max(deadline_s - time.monotonic(), 0.0), outcome)


def _at_exit() -> None:
    # Set by the interpreter when it has printed the traceback of an exception that nobody caught.
    uncaught = getattr(sys, "last_type", None)
    _close_all("exit" if uncaught is None else uncaught.__name__)
