"""Events that are noted where they happen, each with its sentence for people."""

from __future__ import annotations

from signal import Signals

from esper_otel.frames.event_log import Attribute, Happening
from esper_otel.frames.frame import FINE, KILLED
from esper_otel.schema.events import (
    CHECKPOINT,
    DURATION_MS,
    EXCEPTION_TYPE,
    EXIT_STATUS,
    MISTAKE,
    OUTCOME,
    RUN_ENDED,
    RUN_RESUMED,
    RUN_STARTED,
    Severity,
)

# Outcomes that are not the type of an exception, in addition to names of signals.
_NO_EXCEPTIONS = FINE | {KILLED, "SystemExit"}


def run_started(time_unix_ns: int) -> Happening:
    """A session has started. Its rank may be known only at the first step, so the sentence does not name it."""
    return Happening(RUN_STARTED, Severity.INFO, time_unix_ns, "The run has started.")


def run_resumed(time_unix_ns: int, step: int, epoch: int, sequence: int) -> Happening:
    """The session's first step goes on after those of an earlier attempt."""
    body = f"The run goes on with step {step}."
    return Happening(RUN_RESUMED, Severity.INFO, time_unix_ns, body, step, epoch, {}, sequence)


def run_ended(
    outcome: str, time_unix_ns: int, step: int | None, epoch: int | None, exit_status: int | None = None
) -> Happening:
    """A session has ended.

    Args:
        outcome: as in ``esper.run.ended``.
        time_unix_ns: when.
        step: the newest step.
        epoch: its epoch.
        exit_status: of the process, if it is known.
    """
    attributes: dict[str, Attribute] = {OUTCOME.name: outcome}
    severity = Severity.INFO if outcome in FINE else Severity.ERROR
    if outcome in Signals.__members__:
        severity = Severity.WARN
    elif outcome not in _NO_EXCEPTIONS and outcome.isidentifier() and outcome[0].isupper():  # else it is the user's
        attributes[EXCEPTION_TYPE.name] = outcome
    if exit_status is not None:
        attributes[EXIT_STATUS.name] = exit_status
    body = f"The run has ended: {outcome}."
    return Happening(RUN_ENDED, severity, time_unix_ns, body, step, epoch, attributes)


def checkpoint(start_unix_ns: int, end_unix_ns: int, step: int | None, epoch: int | None) -> Happening:
    """A phase named ``checkpoint`` has ended."""
    duration_ms = (end_unix_ns - start_unix_ns) / 1e6
    body = f"A checkpoint took {duration_ms:.0f} ms."
    attributes = {DURATION_MS.name: duration_ms}
    return Happening(CHECKPOINT, Severity.INFO, end_unix_ns, body, step, epoch, attributes)


def mistake(kind: str, text: str, time_unix_ns: int, step: int | None, epoch: int | None) -> Happening:
    """A mistake of the training program was left out."""
    return Happening(MISTAKE, Severity.WARN, time_unix_ns, text, step, epoch, {EXCEPTION_TYPE.name: kind})
