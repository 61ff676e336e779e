"""The end of the process: closes live sessions at interpreter exit and flushes them on signals."""

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

from esper_otel import unix
from esper_otel.frames.frame import FINE
from esper_otel.session.raised import (
    FunctionExitStatus,
    MainExitStatus,
    main_module,
    status_in_flight,
    status_of,
    status_raised,
)

_TIMEOUT_S = 5.0
_AGAIN_S = 0.002
# Modules that run the user's code. Code of this package that they call is in other modules.
_RUNNERS = ("esper_otel.integrations.", "esper_otel.demo.", "esper_otel.cli", "esper_otel.__main__")


class LiveSession(Protocol):
    """A live session."""

    def interrupted(self) -> None:
        """Sends pending data at once instead of in the next period, because the process has been told to end."""

    def close(self, timeout_s: float | None, outcome: str) -> None:
        """Flushes and ends the session within about ``timeout_s``; without it, see ``Telemetry.close``."""


_live: weakref.WeakSet[LiveSession] = weakref.WeakSet()
unix.at_fork(after_in_child=_live.clear)  # a DataLoader worker inherits the handlers, not the sessions


def watch(session: LiveSession, names: Iterable[str] = ()) -> list[str]:
    """Closes the session when the process ends, unless ``forget`` is called before.

    SIGTERM and the named signals flush the session. An earlier Python handler is still called; a handler that was not
    set from Python is left in place, and then its signal does not flush.

    Returns:
        The signals that will not flush the session. Outside the main thread, Python does not allow setting handlers.
    """
    _live.add(session)
    _exits.watch()
    # atexit calls the last registered function first: this one before those of gRPC and other imported libraries.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    return [name for name in dict.fromkeys(("SIGTERM", *names)) if not _is_followed(signal.Signals[name])]


def follow_exits() -> None:
    """Notes calls of ``sys.exit`` from now on: in ``sys.exit(main())`` it is looked up before a session starts."""
    _exits.watch()


def forget(session: LiveSession) -> None:
    """Stops watching a session that has been closed."""
    _live.discard(session)
    if not _live:
        _exits.forget()


def _is_followed(number: int) -> bool:
    """Whether our signal handler is installed or could be installed now."""
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
    """Wakes the exporters, then calls the earlier handler. If the signal ends the process, flushes before that.

    Args:
        before: the handler that this one replaces.
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
        """Whether to let the interrupted code of this package finish first, as it may hold a lock. Limited in time."""
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + _TIMEOUT_S
        return now_s < self._until_s

    def _call_again(self, number: int) -> None:
        """Sends the signal again later: by the interval timer if it is unused, otherwise from a thread.

        A thread is the second choice: it mostly runs while our code writes to disk, and then the signal is too early
        again.
        """
        is_free = hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        if is_free and not any(signal.getitimer(signal.ITIMER_REAL)):
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
    """Closes the sessions in another thread, with a time limit: closing may need a lock that this thread holds."""
    done = _thread.allocate_lock()
    done.acquire()

    def close() -> None:
        _close_all(outcome)
        done.release()

    _thread.start_new_thread(close, ())
    done.acquire(timeout=_TIMEOUT_S)


def _close_all(outcome: str) -> None:
    """Closes all sessions within a few seconds: who sends a signal often follows it with one that kills."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    for session in list(_live):
        session.close(max(deadline_s - time.monotonic(), 0.0), outcome)


def _at_exit() -> None:
    _exits.is_over = True
    outcome = outcome_of_process()
    for session in list(_live):
        session.close(None, outcome)
    _exits.forget()


def outcome_of_process() -> str:
    """Returns how the program ended, for callbacks at interpreter exit. Python does not give them the exit status.

    - ``completed``: the main program ran to its end, called ``sys.exit`` (``exit``, ``quit``) with status 0, or raised
      ``SystemExit`` with status 0.
    - The name of the uncaught exception, if there was one.
    - ``SystemExit``: the program ended in one of these ways with another status.
    - ``exit``: the program ended in a way that hides the status: ``raise SystemExit`` inside a function of a module
      that ``python -m`` runs, or a notebook or a prompt, whose exceptions and interrupts end a cell.
    """
    if is_interactive():
        return "exit"
    if _exits.has_run_to_end():
        return "completed"
    # The interpreter sets it when it has printed the traceback of an uncaught exception.
    uncaught = getattr(sys, "last_type", None)
    is_of_ipython = _is_script_of_ipython()
    status = _exits.status()
    if status is not None and not (is_of_ipython and uncaught):  # after an exception IPython itself leaves with 1
        return "SystemExit" if status else "completed"
    if is_of_ipython and uncaught is None:
        return "completed"
    return "exit" if uncaught is None else str(uncaught.__name__)


def exit_status() -> int | None:
    """Returns the exit status of the process while it exits; None if it is not known, or the process goes on."""
    if not _exits.is_over or is_interactive():
        return None
    if _exits.has_run_to_end():
        return 0
    status = _exits.status()
    return 1 if status is None and getattr(sys, "last_type", None) is not None else status


def is_interactive() -> bool:
    """Whether this is a notebook or a prompt, where exceptions end a cell and not the process."""
    return hasattr(sys, "ps1") and not _is_script_of_ipython()


def live_sessions() -> list[LiveSession]:
    """Returns the sessions that are watched and not closed."""
    return list(_live)


def _is_script_of_ipython() -> bool:
    """Whether this process is ``ipython SCRIPT``, without a prompt after it."""
    application = getattr(sys.modules.get("IPython.terminal.ipapp"), "TerminalIPythonApp", None)
    running = getattr(application, "_instance", None)
    return bool(getattr(running, "file_to_run", "")) and not getattr(running, "interact", True)


class _ExitCall(NamedTuple):
    """How a frame of the main program was left: its position, the status, and the latest uncaught exception."""

    frame: FrameType
    place: int
    status: int
    uncaught: object


class _Exits:
    """Finds out where the main program stopped: at its end, in a call of ``sys.exit``, or raising ``SystemExit``."""

    def __init__(self) -> None:
        self.is_over = False  # whether Python calls what is registered with atexit
        self._root: FrameType | None = None
        self._module: FrameType | None = None
        self._last: _ExitCall | None = None
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._in_function = FunctionExitStatus(self._left_by_exception)

    def watch(self) -> None:
        """Finds the main program and wraps ``sys.exit`` so that calls of it are recorded."""
        if self._root is None:
            self._root = _main_program()
        if self._module is None:
            self._follow_main()
        self._in_function.follow()
        if not self._replaced:
            self._replace(sys, "exit", 0)
            quitter = type(getattr(builtins, "exit", None))  # set by the site module; absent with python -S
            if quitter.__module__ == "_sitebuiltins":
                self._replace(quitter, "__call__", 1)

    def forget(self) -> None:
        """Restores the original functions, except those that other code has replaced since."""
        for owner, name, original, ours in self._replaced:
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        self._replaced = []
        self._in_function.forget()
        self._root = self._module = self._last = None

    def _follow_main(self) -> None:
        """Finds the main module, and waits for the return of the function that it has called."""
        # See ``_main_program`` for why the dict of frames is not bound to a variable.
        for module, function in filter(None, map(main_module, sys._current_frames().values())):  # noqa: SLF001
            self._module = module
            if function is not None:
                MainExitStatus(module, self._raised).follow(function)

    def _raised(self, status: int) -> None:
        if self._module is not None:
            self._note(self._module, status)

    def _left_by_exception(self) -> None:
        """The main program is over. Unless it has run to its end, an exception that left it is still in flight."""
        is_printed = getattr(sys, "last_value", None) is not None  # it is no ``SystemExit``
        if self._module is not None and not (is_printed or self.has_run_to_end()) and self.status() is None:
            status = status_in_flight(self._module)
            if status is not None:
                self._note(self._module, status)

    def _note(self, frame: FrameType, status: int) -> None:
        self._last = _ExitCall(frame, frame.f_lasti, status, getattr(sys, "last_value", None))

    def _replace(self, owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def leave(*arguments: Any, **named: Any) -> Any:
            given = (*arguments[place:], *named.values(), None)
            root = self._root
            if root is not None and _outermost(sys._getframe()) is root:  # noqa: SLF001 - else only a thread ends
                self._note(root, status_of(given[0]))
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
        """The exit status if the main program stopped where it last called ``sys.exit`` or raised; else None."""
        last, uncaught = self._last, getattr(sys, "last_value", None)
        if last is not None and last.place == last.frame.f_lasti and last.uncaught is uncaught:
            return last.status
        return None if self._module is None or uncaught is not None else status_raised(self._module)


def _main_program() -> FrameType | None:
    """Returns the outermost frame of the main thread, if it runs a script or ``python -m``."""
    # The dict of frames includes this function's own. Bound to a variable, it would form a cycle that keeps them alive.
    for outermost in map(_outermost, sys._current_frames().values()):  # noqa: SLF001 - a documented function
        where = outermost.f_globals.get("__name__"), outermost.f_code.co_name
        if where in {("__main__", "<module>"), ("runpy", "_run_module_as_main")}:
            return outermost
    return None


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


_RETURNS = {opcode.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in opcode.opmap}
_exits = _Exits()


def ended_well(outcome: str | None) -> bool:
    """Whether the last step of a run with this outcome counts as complete."""
    return outcome is None or outcome in FINE | {"SystemExit"}


def has_died() -> bool:
    """Whether an uncaught exception ended the program. For callbacks at interpreter exit."""
    return not ended_well(outcome_of_process())
