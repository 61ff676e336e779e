"""Keeps frames of this package out of the tracebacks of exceptions that other code raises through it."""

from __future__ import annotations


def leave_out_caller(error: BaseException) -> None:
    """Removes the frame that has caught the exception from its traceback. Call it first, then ``raise`` without more.

    The traceback that a script prints is then the same as without telemetry.
    """
    trace = error.__traceback__
    if trace is not None:
        error.__traceback__ = trace.tb_next
