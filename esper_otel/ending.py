"""The end of the process: sessions that are still live are closed at interpreter exit and on SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Protocol

_TIMEOUT_S = 5.0


class Closing(Protocol):
    """A live session."""

    def interrupted(self) -> None:
        """The process has been told to end: send what is there, do not wait for the next period."""

    def close(self, timeout_s: float, outcome: str) -> None:
        """Flushes and ends the session, within about ``timeout_s``."""


_live: weakref.WeakSet[Closing] = weakref.WeakSet()
_before: Callable[[int, FrameType | None], object] | int | None = None
_process_id = 0


def watch(session: Closing) -> None:
    """Closes the session when the process ends, unless ``forget`` comes first.

    The handler of SIGTERM is installed by the first session of the process that starts in the main thread (Python
    allows no other); one that was not set from Python is left alone.
    """
    global _before, _process_id
    _live.add(session)
    # Last registered is first called: before those of gRPC and whatever else the session has imported.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    if threading.current_thread() is threading.main_thread():
        there = signal.getsignal(signal.SIGTERM)
        if there is not None and there is not _on_sigterm:
            _before, _process_id = there, os.getpid()
            signal.signal(signal.SIGTERM, _on_sigterm)


def forget(session: Closing) -> None:
    """The session has been closed."""
    _live.discard(session)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Wakes the exporters and does what would have happened without us; before the process dies of it, flushes."""
    is_ours = os.getpid() == _process_id  # a DataLoader worker inherits the handler, not the sessions
    if is_ours:
        for session in list(_live):
            session.interrupted()
    if callable(_before):
        _before(number, frame)
    elif _before is not signal.SIG_IGN:
        if is_ours:
            _close_all("SIGTERM")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _close_all(outcome: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    for session in list(_live):
        session.close(max(deadline_s - time.monotonic(), 0.0), outcome)


def _at_exit() -> None:
    # Set by the interpreter when it has printed the traceback of an exception that nobody caught.
    uncaught = getattr(sys, "last_type", None)
    _close_all("exit" if uncaught is None else uncaught.__name__)
