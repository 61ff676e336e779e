"""The end of the process: sessions that are still live are closed at interpreter exit, and flushed on signals."""

from __future__ import annotations

import _thread
import atexit
import builtins
import functools
import opcode
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple, Protocol

_TIMEOUT_S = 5.0
_AGAIN_S = 0.002
# They run the user's code; what they call of ours has a module of its own.
_RUNNERS = ("esper_otel.integrations.", "esper_otel.demo.", "esper_otel.cli", "esper_otel.__main__")


class LiveSession(Protocol):
    """A live session."""

    def interrupted(self) -> None:
        """The process has been told to end: send what is there, do not wait for the next period."""

    def close(self, timeout_s: float, outcome: str) -> None:
        """Flushes and ends the session, within about ``timeout_s``."""


_live: weakref.WeakSet[LiveSession] = weakref.WeakSet()
os.register_at_fork(after_in_child=_live.clear)  # a DataLoader worker inherits the handlers, not the sessions


def watch(session: LiveSession, names: Iterable[str] = ()) -> list[str]:
    """Closes the session when the process ends, unless ``forget`` comes first.

    SIGTERM and the signals of these names flush it. A handler that was there is called as well; one that was not set
    from Python is left alone.

    Returns:
        The signals that will not flush it: Python lets only the main thread set a handler.
    """
    _live.add(session)
    _exits.watch()
    # Last registered is first called: before those of gRPC and whatever else the session has imported.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    return [name for name in dict.fromkeys(("SIGTERM", *names)) if not _is_followed(signal.Signals[name])]


def follow_exits() -> None:
    """Notes calls of ``sys.exit`` from now on: in ``sys.exit(main())`` it is looked up before a session starts."""
    _exits.watch()


def forget(session: LiveSession) -> None:
    """The session has been closed."""
    _live.discard(session)
    if not _live:
        _exits.forget()


def _is_followed(number: int) -> bool:
    """Whether our handler is there, or could be put there."""
    there = signal.getsignal(number)
    if isinstance(there, _SignalHandler):
        return True
    if there is None:
        return False
    try:
        signal.signal(number, _SignalHandler(there))
    except ValueError:  # this is not the main thread
        return False
    return True


class _SignalHandler:
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
            return
        name = signal.Signals(number).name
        if not _live or not _is_ours(frame):
            _close_all(name)
        elif self._is_too_early():
            self._call_again(number)
            return
        else:
            _close_beside(name)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _is_too_early(self) -> bool:
        """Whether to wait until the code of ours that the signal has interrupted, and that may hold a lock, is done."""
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + _TIMEOUT_S
        return now_s < self._until_s

    def _call_again(self, number: int) -> None:
        """By the timer where nobody uses it: a thread gets its turn mostly while ours writes to the disk."""
        if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not any(signal.getitimer(signal.ITIMER_REAL)):
            signal.signal(signal.SIGALRM, lambda _alarm, frame: self._alarmed(number, frame))
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            _thread.start_new_thread(_send_again, (number,))

    def _alarmed(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self(number, frame)


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


def _close_beside(outcome: str) -> None:
    """Closes in another thread and waits for a limited time: closing may need a lock that is held here."""
    done = _thread.allocate_lock()
    done.acquire()

    def close() -> None:
        _close_all(outcome)
        done.release()

    _thread.start_new_thread(close, ())
    done.acquire(timeout=_TIMEOUT_S)


def _close_all(outcome: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    for session in list(_live):
        session.close(max(deadline_s - time.monotonic(), 0.0), outcome)


def _at_exit() -> None:
    _close_all(outcome_of_process())
    _exits.forget()


def outcome_of_process() -> str:
    """How the program ended, for callbacks at interpreter exit: Python does not give them the exit status.

    - ``completed``: the main program ran to its end, or left by ``sys.exit`` (``exit``, ``quit``) with status 0.
    - The name of the exception that nobody caught.
    - ``SystemExit``: it left by ``sys.exit`` with another status.
    - ``exit``: it left in a way of which the status cannot be known, such as ``raise SystemExit(status)``.
    """
    if _exits.has_run_to_end():
        return "completed"
    # Set by the interpreter when it has printed the traceback of an exception that nobody caught.
    uncaught = getattr(sys, "last_type", None)
    is_of_ipython = _is_script_of_ipython()
    status = _exits.status()
    if status is not None and not (is_of_ipython and uncaught):  # after an exception IPython itself leaves with 1
        return "SystemExit" if status else "completed"
    if is_of_ipython and uncaught is None:
        return "completed"
    if hasattr(sys, "ps1") and not is_of_ipython:  # a notebook or a prompt: exceptions end a cell, not the process
        return "exit"
    return "exit" if uncaught is None else str(uncaught.__name__)


def _is_script_of_ipython() -> bool:
    """Whether this process is ``ipython SCRIPT``, without a prompt after it."""
    application = getattr(sys.modules.get("IPython.terminal.ipapp"), "TerminalIPythonApp", None)
    running = getattr(application, "_instance", None)
    return bool(getattr(running, "file_to_run", "")) and not getattr(running, "interact", True)


class _ExitCall(NamedTuple):
    """A call of ``sys.exit``: where the main program was, the status, and the newest exception that nobody caught."""

    place: int
    status: int
    uncaught: object


class _Exits:
    """Watches where the main program is: at its end, or in a call of ``sys.exit`` that it did not come back from."""

    def __init__(self) -> None:
        self._root: FrameType | None = None
        self._last: _ExitCall | None = None
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def watch(self) -> None:
        """Finds the main program; from now on calls of ``sys.exit`` are noted, and do what they did."""
        if self._root is None:
            self._root = _main_program()
        if not self._replaced:
            self._replace(sys, "exit", 0)
            quitter = type(getattr(builtins, "exit", None))  # what site puts there; absent with python -S
            if quitter.__module__ == "_sitebuiltins":
                self._replace(quitter, "__call__", 1)

    def forget(self) -> None:
        """Puts back what was there, unless somebody else has replaced it since."""
        for owner, name, original, ours in self._replaced:
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        self._replaced = []
        self._root = self._last = None

    def _replace(self, owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def leave(*arguments: Any, **named: Any) -> Any:
            given = (*arguments[place:], *named.values(), None)
            root = self._root
            if root is not None and _outermost(sys._getframe()) is root:  # noqa: SLF001 - elsewhere it ends a thread only
                self._last = _ExitCall(root.f_lasti, _status(given[0]), getattr(sys, "last_value", None))
            return original(*arguments, **named)

        setattr(owner, name, leave)
        self._replaced.append((owner, name, original, leave))

    def has_run_to_end(self) -> bool:
        """Whether the last instruction of the main program was the return at its end."""
        if self._root is None:
            return False
        code, place = self._root.f_code.co_code, self._root.f_lasti
        return 0 <= place < len(code) and code[place] in _RETURNS

    def status(self) -> int | None:
        """The exit status, if the main program stopped where it last called ``sys.exit``; None when it is not known."""
        last, root = self._last, self._root
        if last is None or root is None or last.place != root.f_lasti:
            return None
        return last.status if last.uncaught is getattr(sys, "last_value", None) else None


def _main_program() -> FrameType | None:
    """The outermost frame of the main thread, if it is a script's or that of ``python -m``."""
    # One of the frames is this function's own: in a variable of its own it would keep those that called it, and theirs.
    for outermost in map(_outermost, sys._current_frames().values()):  # noqa: SLF001 - the documented way to it
        where = outermost.f_globals.get("__name__"), outermost.f_code.co_name
        if where in {("__main__", "<module>"), ("runpy", "_run_module_as_main")}:
            return outermost
    return None


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _status(given: object) -> int:
    """What the process reports for an argument of ``sys.exit``."""
    if given is None:
        return 0
    return given & 0xFF if isinstance(given, int) else 1


_RETURNS = {opcode.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in opcode.opmap}
_exits = _Exits()
