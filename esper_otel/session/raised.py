"""The exit status of a main program that ends by ``raise SystemExit(...)`` and not by ``sys.exit``."""

from __future__ import annotations

import builtins
import dis
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from types import FrameType, TracebackType
from typing import Any

# Instructions that neither load a value nor call anything.
_NOISE = frozenset({"CACHE", "PRECALL", "PUSH_NULL", "RESUME", "NOP", "NOT_TAKEN"})
_LOADS = frozenset({"LOAD_NAME", "LOAD_GLOBAL"})
_RAISE = "RAISE_VARARGS"
_BITS = 64
_MOST = 32  # instructions between the call of the main function and the raise


def main_module(innermost: FrameType) -> tuple[FrameType, FrameType | None] | None:
    """Returns the frame of the main module and the one that it has called; None if it is not on this stack."""
    found = None
    called: FrameType | None = None
    frame: FrameType | None = innermost
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            found = frame, called
        called, frame = frame, frame.f_back
    return found


def status_raised(module: FrameType) -> int | None:
    """Returns the status of the ``raise SystemExit``, with nothing, a constant or a name, at which a module stopped."""
    before = itertools.takewhile(lambda each: each.offset <= module.f_lasti, _instructions(module))
    last = [(each.opname, each.argval) for each in before][-4:]
    if last[-1:] != [(_RAISE, 1)]:
        return None
    if _is_exit(module, last[-2:-1]):
        return 0
    if last[-2:-1] != [("CALL", 1)] or not _is_exit(module, last[-4:-3]):
        return None
    name, value = last[-3]
    if name in _LOADS:
        return status_of(module.f_globals[value]) if value in module.f_globals else None
    return status_of(value) if name in {"LOAD_CONST", "LOAD_SMALL_INT"} else None


def status_of(given: object) -> int:
    """Returns the exit status of the process for the argument of ``sys.exit`` or ``SystemExit``.

    Of a whole number, the system keeps the last byte; Python exits with -1 in place of one of more than 64 bits.
    """
    if given is None:
        return 0
    if not isinstance(given, int):
        return 1
    number = int.__add__(given, 0)  # a class of the user's may compare otherwise
    return (number if -(2 ** (_BITS - 1)) <= number < 2 ** (_BITS - 1) else -1) & 0xFF


def _is_exit(module: FrameType, loaded: list[tuple[str, Any]]) -> bool:
    """Whether an instruction has loaded the ``SystemExit`` of Python itself."""
    is_named = bool(loaded) and loaded[0][0] in _LOADS and loaded[0][1] == "SystemExit"
    return is_named and module.f_globals.get("SystemExit", builtins.SystemExit) is builtins.SystemExit


def _instructions(module: FrameType) -> Iterator[dis.Instruction]:
    return (each for each in dis.get_instructions(module.f_code) if each.opname not in _NOISE)


class MainExitStatus:
    """Learns the status of ``raise SystemExit(main())``, of which nothing is left when Python ends.

    Python releases what a frame's ``f_trace`` refers to when its function returns. This object is all that refers to
    itself there: it is deleted when the main function has returned, and then traces the few instructions up to the
    raise. Until then nothing is traced and nothing is slower.

    Threads: any may create it; the rest happens in the main thread.

    Args:
        module: the frame of the main module.
        called: called with the status at the raise.
    """

    def __init__(self, module: FrameType, called: Callable[[int], None]) -> None:
        self._module = module
        self._called = called
        self._from = module.f_lasti
        self._to = _next_raise(module)

    def follow(self, function: FrameType) -> None:
        """Waits for the return of the function that the main module has called, if a raise follows it."""
        if self._to is not None and function.f_trace is None and sys.gettrace() is None:
            function.f_trace = self

    def __call__(self, _frame: FrameType, _event: str, _argument: object) -> None:
        """Traces nothing of the main function, should somebody else begin to trace it."""

    def __del__(self) -> None:
        """Begins to trace if the main module's call has just returned, and nobody else traces."""
        if sys._getframe().f_back is not self._module:  # noqa: SLF001 - a documented function
            return
        if self._module.f_lasti == self._from and sys.gettrace() is None:
            trace = _Trace(self._module, self._to or 0, self._called)
            self._module.f_trace = trace
            sys.settrace(trace)


class _Trace:
    """Traces the main module up to its raise, and no other function."""

    def __init__(self, module: FrameType, to: int, called: Callable[[int], None]) -> None:
        self._module = module
        self._from = module.f_lasti
        self._to = to
        self._called = called

    def __call__(self, frame: FrameType, event: str, argument: Any) -> _Trace | None:
        if frame is self._module and event == "line" and self._from <= frame.f_lasti <= self._to:
            return self
        if sys.gettrace() is self:
            sys.settrace(None)
        self._module.f_trace = None
        if frame is self._module and event == "exception" and isinstance(argument[1], SystemExit):
            self._called(status_of(argument[1].code))
        return None


def _next_raise(module: FrameType) -> int | None:
    """Returns the position of the raise that follows the current instruction closely."""
    after = (each for each in _instructions(module) if each.offset > module.f_lasti)
    for each in itertools.islice(after, _MOST):
        if each.opname == _RAISE:
            return each.offset
        if "BACKWARD" in each.opname or "RETURN" in each.opname:
            break
    return None


class FunctionExitStatus:
    """Learns the status of a ``SystemExit`` that was raised in a function of a script.

    Nothing is left of it when Python calls what is registered with atexit. Before that, Python flushes its two output
    streams while the exception is still in flight. Nothing of Python runs then, so the exception is looked for among
    the objects that refer to the main module's frame.

    Threads: any may call ``follow`` and ``forget``; the rest happens in the main thread.

    Args:
        called: called when the streams are flushed by the interpreter itself.
    """

    def __init__(self, called: Callable[[], None]) -> None:
        self._called = called
        self._streams: list[tuple[Any, Any]] = []

    def follow(self) -> None:
        """Wraps ``flush`` of the output streams."""
        if self._streams:
            return
        for stream in (sys.stderr, sys.stdout):
            if type(stream) is TextIOWrapper and "flush" not in vars(stream):  # else it is not Python's own
                self._wrap(stream)

    def _wrap(self, stream: Any) -> None:
        original, called = stream.flush, self._called

        def flush() -> None:
            if sys._getframe().f_back is None:  # noqa: SLF001 - a documented function
                called()
            original()

        stream.flush = flush
        self._streams.append((stream, flush))

    def forget(self) -> None:
        """Restores the streams, except one that other code has changed since."""
        for stream, flush in self._streams:
            if vars(stream).get("flush") is flush:
                del stream.flush
        self._streams = []


def status_in_flight(module: FrameType) -> int | None:
    """Returns the status of the ``SystemExit`` that is leaving the main module; None if that is not certain.

    Until somebody catches it, Python 3.11 keeps an exception and its traceback apart.
    """
    traces = [each for each in gc.get_referrers(module) if isinstance(each, TracebackType)]
    if not traces:
        return None
    errors = [each for each in gc.get_objects() if issubclass(type(each), SystemExit)]
    leaving = [each for each in errors if each.__traceback__ is None or each.__traceback__ in traces]
    found = {status_of(each.code) for each in leaving}
    return found.pop() if len(found) == 1 else None
