"""Mistakes in the calling program that are logged and counted instead of raised (``ESPER_ON_MISTAKE=warn``)."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec

from esper_otel.errors import InvalidName, WrongState
from esper_otel.log import announce
from esper_otel.text import printable

_P = ParamSpec("_P")
_OURS = "esper_otel."
_MOST_KINDS = 100  # kinds that are logged; a program may make up a new name at every step
_MOST_OF_A_MESSAGE = 1_000


class Mistakes:
    """Logs each kind of mistake once, with its place in the program, and counts all of them. Threads: any.

    A kind is the type of the exception, the name that it is about, and the place of the call.

    Attributes:
        count: number of mistakes so far.
        noted: called with each mistake that is logged: the type of the exception, and a sentence.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.noted: Callable[[str, str], None] | None = None
        self._kinds: set[tuple[object, ...]] = set()

    def note(self, error: Exception) -> None:
        """Counts a mistake, and logs the first of its kind. Never raises."""
        self.count += 1
        with suppress(Exception):  # the name on the exception is the user's object
            place = _place()
            kind = (type(error), str(getattr(error, "name", "")), place)
            if kind in self._kinds or len(self._kinds) >= _MOST_KINDS:
                return
            self._kinds.add(kind)
            text = printable(error, _MOST_OF_A_MESSAGE)
            more = "; further kinds of mistakes are only counted" if len(self._kinds) == _MOST_KINDS else ""
            message = f"{place}: {type(error).__name__}: {text}; left out, as ESPER_ON_MISTAKE is warn{more}"
            announce("mistake", message, logging.WARNING)
            if self.noted is not None:
                self.noted(type(error).__name__, f"A mistake in {Path(place).name} was left out: {text}.")

    def spared(self, record: Callable[_P, object], *arguments: _P.args, **named: _P.kwargs) -> bool:
        """Makes a call that records something; notes what it raises. Returns whether it succeeded."""
        try:
            record(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - whatever the mistake leads to must not end the training
            self.note(error)
            return False
        return True

    def record_parts(
        self, error: Exception, record: Callable[[dict[str, Any]], object], values: Mapping[str, Any]
    ) -> None:
        """After a call with all values has raised: records each value alone, and notes those that raise.

        Args:
            error: what the call with all values raised.
            record: records the values that it is given.
            values: all values.
        """
        before = self.count
        if not isinstance(error, WrongState | InvalidName):
            for name, value in values.items():
                self.spared(record, {name: value})
        if self.count == before:  # it is about the call and not about a value
            self.note(error)


def spares_mistakes(
    mistakes_of: Callable[[Any], Mistakes | None],
) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Decorates a method that records something, so that it notes its exceptions where mistakes are to be spared.

    Args:
        mistakes_of: takes the object; returns None where the method is to raise.
    """

    def decorated(method: Callable[_P, None]) -> Callable[_P, None]:
        @functools.wraps(method)
        def spared(*arguments: _P.args, **named: _P.kwargs) -> None:
            try:
                method(*arguments, **named)
            except Exception as error:
                mistakes = mistakes_of(arguments[0])
                if mistakes is None:
                    raise
                mistakes.note(error)

        return spared

    return decorated


def _place() -> str:
    """Returns file and line of the innermost call from outside this package."""
    frame = sys._getframe(1)  # noqa: SLF001 - a documented function
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
