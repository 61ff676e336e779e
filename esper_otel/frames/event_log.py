"""Events: what happens in a run, such as its start or a checkpoint, and the journal that keeps those of a session."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from esper_otel.frames.journal import Journal
from esper_otel.schema.events import (
    RUN_ENDED,
    RUN_RESUMED,
    SEED_ID,
    SEED_STAGE,
    SIGNAL_ENTERED,
    SIGNAL_LEFT,
    SIGNAL_NAME,
    Severity,
)

Attribute: TypeAlias = str | int | float
_FIELDS = 10
_MOST_CHARACTERS = 500  # of a body
MOST_NEWEST = 100
_NONE: Mapping[str, Attribute] = MappingProxyType({})


class Happening(NamedTuple):
    """An event without its number.

    Attributes:
        name: that of its kind, see ``schema/events.py``.
        severity: how serious it is.
        time_unix_ns: when it happened.
        body: one sentence for people.
        step: the step that it belongs to; None before the first.
        epoch: that step's epoch; None if it is not known.
        attributes: those of its kind.
        sequence: the frame that it was read from; 0 if it was not.
    """

    name: str
    severity: Severity
    time_unix_ns: int
    body: str
    step: int | None = None
    epoch: int | None = None
    attributes: Mapping[str, Attribute] = _NONE
    sequence: int = 0


class Event(NamedTuple):
    """One event: what has happened, numbered 1, 2, ... within (attempt, rank), and when it was noticed."""

    number: int
    observed_unix_ns: int
    name: str
    severity: int
    time_unix_ns: int
    body: str
    step: int | None
    epoch: int | None
    attributes: Mapping[str, Attribute]
    sequence: int

    @property
    def due_unix_ns(self) -> int:
        """See ``Numbered``. Before the first step, there is nothing to wait for."""
        return 0 if self.step is None else self.time_unix_ns


class EventLog(Journal[Event, Happening]):
    """The events of a session, until they are delivered: see ``Journal``.

    Args:
        start_unix_ns: when the session began.
        most: how many events may wait.
        now_ns: returns Unix time in nanoseconds.
        before: events of the same session that were read back from a file, in the order of their numbers.
        delivered: the number up to which these are no longer needed.

    Attributes:
        now_ns: returns Unix time in nanoseconds, by the clock of the session.
        sequence: the frames up to this one have been read.
        is_over: whether the end of the run is among the events.
        has_resumed: whether a resume is.
    """

    last: int

    def __init__(
        self,
        start_unix_ns: int = 0,
        most: int = 10_000,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        before: Iterable[Event] = (),
        delivered: int = 0,
    ) -> None:
        past = list(before)
        super().__init__(start_unix_ns, most, past[-1].number if past else 0)
        self.now_ns: Callable[[], int] = now_ns
        self.sequence: int = 0
        self.is_over: bool = False
        self._resumed: Event | None = None
        self._stages: dict[str, Event] = {}
        self._signals: dict[str, Event] = {}
        self._newest: deque[Event] = deque(maxlen=MOST_NEWEST)
        for event in past:
            self._note(event)
            if event.number > delivered:
                self._waiting.append(event)

    def add(self, happening: Happening) -> None:
        """Adds an event."""
        self.add_all([happening])

    def _entry(self, number: int, given: Happening) -> Event:
        name, severity, time_unix_ns, body, step, epoch, attributes, sequence = given
        event = Event(
            *(number, self.now_ns(), name, int(severity), time_unix_ns, body[:_MOST_CHARACTERS], step, epoch),
            dict(attributes),
            sequence,
        )
        self._note(event)
        return event

    def _note(self, event: Event) -> None:
        """Remembers what is needed to go on with the frames after it, in a later session if this one is killed."""
        self.sequence = max(self.sequence, event.sequence)
        self._newest.append(event)
        if event.name == SEED_STAGE:
            self._stages[str(event.attributes.get(SEED_ID.name))] = event
        elif event.name == SIGNAL_ENTERED:
            self._signals[str(event.attributes.get(SIGNAL_NAME.name))] = event
        elif event.name == SIGNAL_LEFT:
            self._signals.pop(str(event.attributes.get(SIGNAL_NAME.name)), None)
        elif event.name == RUN_RESUMED:
            self._resumed = event
        elif event.name == RUN_ENDED:
            self.is_over = True

    def newest(self) -> list[Event]:
        """Returns the newest events, delivered or not, oldest first."""
        with self._lock:
            return list(self._newest)

    @property
    def has_resumed(self) -> bool:
        """Whether a resume is among the events."""
        return self._resumed is not None

    def stages(self) -> dict[str, Event]:
        """Returns the newest stage of each seed that is alive, by the seed."""
        with self._lock:
            return self._stages.copy()

    def signals(self) -> dict[str, Event]:
        """Returns the signals that have been entered and not left, by name."""
        with self._lock:
            return self._signals.copy()

    def retire(self, seed_id: str) -> None:
        """Forgets the stage of a seed, whose life has ended."""
        with self._lock:
            self._stages.pop(seed_id, None)

    def to_store(self) -> list[Event]:
        """See ``Journal``: in addition, the events from which stages of seeds and active signals follow."""
        with self._lock:
            resumed = [] if self._resumed is None else [self._resumed]
            needed = [*self._waiting, *self._stages.values(), *self._signals.values(), *resumed]
            return [event for _, event in sorted({event.number: event for event in needed}.items())]


def checked_event(fields: object) -> Event:
    """Returns the event that a line of a file describes.

    Raises:
        ValueError: it describes none.
        TypeError: as above.
    """
    if not isinstance(fields, list) or len(fields) != _FIELDS:
        raise ValueError("not an event")
    event = Event(*fields)
    numbers = (event.number, event.observed_unix_ns, event.severity, event.time_unix_ns, event.sequence)
    is_good = all(type(each) is int and 0 <= each < 2**63 for each in numbers)
    is_good = is_good and type(event.name) is str and type(event.body) is str
    further = [each for each in (event.step, event.epoch) if each is not None]
    is_good = is_good and all(type(each) is int and 0 <= each < 2**64 for each in further)
    if not is_good or not isinstance(event.attributes, dict):
        raise ValueError("not an event")
    values = event.attributes.values()
    if not all(type(value) in {str, int, float} and (type(value) is not int or abs(value) < 2**63) for value in values):
        raise ValueError("not an event")
    return event
