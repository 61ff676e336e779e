"""The events of a run, as a gateway gives them, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from esper_otel.pull.messages import Attribute, Event, EventsResponse


@dataclass(frozen=True, slots=True)
class EventInfo:
    """Something that happened in a run, once and at a known time.

    Attributes:
        name: which kind of event it is, such as ``esper.checkpoint``.
        time_unix_ns: when it happened, in Unix nanoseconds.
        attempt: attempt of its process.
        rank: rank of its process.
        process: tells a process from the first one that claimed the same attempt and rank; empty for the first.
        number: the number of this event among all events of its rank and attempt: 1, 2, ... without a hole.
        severity: severity number of OTLP, 1 to 24: 9 is INFO, 13 WARN, 17 ERROR; 0 if it is not known.
        text: the event as a sentence.
        step: the step in or after which it happened; None before the first step.
        epoch: the epoch of that step; None before the first step.
        attributes: what else is said of it, such as ``seed_id``.
    """

    name: str
    time_unix_ns: int
    attempt: int
    rank: int
    process: str
    number: int
    severity: int
    text: str
    step: int | None
    epoch: int | None
    attributes: Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class EventPage(Sequence[EventInfo]):
    """A sequence of events in the order in which they arrived at the gateway, with a cursor for the next call.

    Attributes:
        events: the events.
        cursor: the position at which the next call continues.
        gap: number of events before those here, of the same ranks and attempts, that this puller does not get: they
            have not arrived.
    """

    events: tuple[EventInfo, ...]
    cursor: str
    gap: int = 0

    def __len__(self) -> int:
        return len(self.events)

    @overload
    def __getitem__(self, index: int) -> EventInfo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EventInfo, ...]: ...
    def __getitem__(self, index: int | slice) -> EventInfo | tuple[EventInfo, ...]:
        return self.events[index]


def event_page(response: EventsResponse) -> EventPage:
    """Converts the response to an ``Events`` call."""
    return EventPage(tuple(map(_event, response.events)), response.cursor, response.gap)


def _event(message: Event) -> EventInfo:
    return EventInfo(
        name=message.name,
        time_unix_ns=message.time_unix_ns,
        attempt=message.attempt,
        rank=message.rank,
        process=message.process,
        number=message.number,
        severity=message.severity,
        text=message.text,
        step=message.step if message.HasField("step") else None,
        epoch=message.epoch if message.HasField("epoch") else None,
        attributes={each.name: value for each in message.attributes if (value := _value(each)) is not None},
    )


def _value(attribute: Attribute) -> str | int | float | bool | None:
    kind = attribute.WhichOneof("value")
    value: str | int | float | bool | None = getattr(attribute, kind) if kind else None
    return value
