"""Every event of a run, declared once: OTLP log records that the trainer sends and the gateway stores.

A record has the scope ``EVENT_SCOPE`` and the Resource of the session's metrics. Its ``event_name`` is that of an
``EventKind``, its time is when the event happened, and its body is one sentence for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

EVENT_SCOPE = "esper_otel.events"

RUN_STARTED = "esper.run.started"
RUN_RESUMED = "esper.run.resumed"
RUN_ENDED = "esper.run.ended"
CHECKPOINT = "esper.checkpoint"
SEED_STAGE = "esper.seed.stage"
SIGNAL_ENTERED = "esper.signal.entered"
SIGNAL_LEFT = "esper.signal.left"
MISTAKE = "esper.mistake"


class Severity(IntEnum):
    """How serious an event is: a severity number of OTLP."""

    INFO = 9
    WARN = 13
    ERROR = 17


@dataclass(frozen=True, slots=True)
class EventAttribute:
    """An attribute of events.

    Attributes:
        name: its key.
        type: the type of its value in OTLP.
        meaning: one line on the value.
        is_optional: whether some events of a kind that has it lack it.
    """

    name: str
    type: Literal["string", "int", "double"]
    meaning: str
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class EventKind:
    """A declared event.

    Attributes:
        name: the record's ``event_name``.
        meaning: when it happens.
        severity: how serious it is, in words where that varies.
        attributes: its attributes, in addition to ``COMMON_ATTRIBUTES``.
    """

    name: str
    meaning: str
    severity: str
    attributes: tuple[EventAttribute, ...] = ()


EVENT_NUMBER = EventAttribute(
    "esper.event.number",
    "int",
    "1, 2, 3, ... for each rank and attempt, without holes; a record that is sent again has the same number.",
)
GLOBAL_STEP = EventAttribute(
    "esper.global_step",
    "int",
    "The step that it belongs to, or the newest one before it; absent before the first step.",
    is_optional=True,
)
EPOCH = EventAttribute("esper.epoch", "int", "The epoch of that step; absent where it is not known.", is_optional=True)
OUTCOME = EventAttribute(
    "esper.outcome", "string", "How the run ended: `completed`, an exception's type, `SIGTERM`, `exit` or `killed`."
)
EXCEPTION_TYPE = EventAttribute(
    "exception.type",
    "string",
    "The type of the exception that ended the run, or of the mistake, such as `UnknownMetric`.",
    is_optional=True,
)
EXIT_STATUS = EventAttribute(
    "process.exit.code",
    "int",
    "The exit status of the process, where it is known before the process ends.",
    is_optional=True,
)
DURATION_MS = EventAttribute("esper.phase.duration_ms", "double", "Length of the phase in milliseconds.")
SEED_ID = EventAttribute("seed_id", "string", "The seed.")
STAGE = EventAttribute("esper.seed.stage", "string", "The stage that the seed is in now, by name, such as `BLENDING`.")
STAGE_BEFORE = EventAttribute(
    "esper.seed.stage.previous",
    "string",
    "The stage before it, by name; absent for a seed that had none.",
    is_optional=True,
)
SIGNAL_NAME = EventAttribute(
    "esper.signal.name", "string", "The risk signal, or `loss_nonfinite`: the loss is NaN or infinite."
)
SIGNAL_SEVERITY = EventAttribute(
    "esper.signal.severity", "string", "`NOTE`, `WARN`, `HIGH` or `CRITICAL`: the highest of the episode so far."
)
SIGNAL_VALUE = EventAttribute(
    "esper.signal.value", "double", "The largest value of the episode so far; absent without one.", is_optional=True
)
SIGNAL_FIRST = EventAttribute("esper.signal.first_step", "int", "The first step of the episode.")

COMMON_ATTRIBUTES = (EVENT_NUMBER, GLOBAL_STEP, EPOCH)

EVENTS: tuple[EventKind, ...] = (
    EventKind(RUN_STARTED, "A session of the run has started: a first start or a further attempt.", "INFO"),
    EventKind(
        RUN_RESUMED,
        "The run goes on where an earlier attempt was: the session's first step has a number above 1.",
        "INFO",
    ),
    EventKind(
        RUN_ENDED,
        "The session has ended; after a `kill -9`, the next start reports it.",
        "INFO if it completed, WARN after a signal, ERROR after an exception or if it was killed",
        (OUTCOME, EXCEPTION_TYPE, EXIT_STATUS),
    ),
    EventKind(CHECKPOINT, "A phase named `checkpoint` has ended.", "INFO", (DURATION_MS,)),
    EventKind(
        SEED_STAGE,
        "A seed is recorded in another stage than before, or for the first time.",
        "INFO",
        (SEED_ID, STAGE, STAGE_BEFORE),
    ),
    EventKind(
        SIGNAL_ENTERED,
        "An episode of a risk signal, or of losses that are not finite, has begun with this step.",
        "INFO for NOTE, WARN for WARN and HIGH, ERROR for CRITICAL",
        (SIGNAL_NAME, SIGNAL_SEVERITY, SIGNAL_VALUE, SIGNAL_FIRST),
    ),
    EventKind(
        SIGNAL_LEFT,
        "The episode has ended: the signal has been absent for a while, or the run has ended.",
        "INFO",
        (SIGNAL_NAME, SIGNAL_SEVERITY, SIGNAL_VALUE, SIGNAL_FIRST),
    ),
    EventKind(
        MISTAKE,
        "A mistake of the training program in recording was left out, with `ESPER_ON_MISTAKE=warn`: each kind once.",
        "WARN",
        (EXCEPTION_TYPE,),
    ),
)
