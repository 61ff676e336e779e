"""Ctrl-C before any bytecode of some files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any


def interrupted(
    call: Callable[[], object], at: int, files: Collection[str], *, apart_from: Collection[str] = ()
) -> bool:
    """Calls a function, with a Ctrl-C before the bytecode with this number in these files; returns whether it came.

    Functions with the names in ``apart_from`` do not count.
    """
    left = at

    def trace(frame: FrameType, _event: str, _arg: object) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code.co_filename not in files or frame.f_code.co_name in apart_from:
            return None
        frame.f_trace_opcodes = True
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        next(_apart(call))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def _apart(call: Callable[[], object]) -> Iterator[object]:
    """In a generator: an exception that is interrupted while it is caught stays the current one of whoever runs it."""
    yield call()
