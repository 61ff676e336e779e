"""Log records: the events of runs in a request with log records; records of other programs are only counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.attributes import sender_of
from esper_otel.gateway.receive.bounds import check_counts, pieces
from esper_otel.gateway.receive.otlp_json import protobuf_of_json
from esper_otel.gateway.receive.request import (
    EARLIEST_UNIX_NS,
    INVALID_TEXT,
    LATEST_UNIX_NS,
    NO_TIME,
    TOO_MANY_ATTRIBUTES,
    WRONG_TIME,
    Malformed,
    PointSender,
)
from esper_otel.parts.senders import is_valid
from esper_otel.schema.events import EPOCH, EVENT_NUMBER, EVENT_SCOPE, GLOBAL_STEP
from esper_otel.text import printable

_COMMON = (EVENT_NUMBER.name, GLOBAL_STEP.name, EPOCH.name)
_NAME = "event.name"  # where the name was before OTLP had a field for it

# Reasons for refusing an event. These texts appear in answers and counters.
NO_EVENT_NAME = "no event name"
NO_EVENT_NUMBER = "no event number"
TOO_LARGE_EVENT = "event too large"
TOO_MANY_AT_ONCE = "too many events in the request"
TOO_MANY_EVENTS = "too many events of the run"
NO_ROOM_FOR_EVENTS = "no room for further events of this sender"
EVENT_REASONS = (
    *(NO_EVENT_NAME, NO_EVENT_NUMBER, NO_TIME, WRONG_TIME, INVALID_TEXT),
    *(TOO_MANY_ATTRIBUTES, TOO_LARGE_EVENT, TOO_MANY_AT_ONCE, TOO_MANY_EVENTS, NO_ROOM_FOR_EVENTS),
)

_MOST_AT_ONCE = 50_000
_MOST_ATTRIBUTES = 500_000  # of all events of a request: about 70 MB
_MOST_TEXT = 500  # characters of a sentence
_MOST_BYTES = 2_048  # of an event's sentence and attributes
_LARGEST = 2**53  # of a whole number that every reader can represent
_MOST_SEVERITY = 24

Value: TypeAlias = str | int | float | bool


class EventRecord(NamedTuple):
    """Something that happened in a run.

    Attributes:
        sender: the process that reported it.
        number: 1, 2, 3, ... within the process.
        name: which kind of event it is, such as ``esper.checkpoint``.
        time_unix_ns: when it happened.
        severity: severity number of OTLP, 1 to 24; 0 if it is not given.
        text: the event as a sentence.
        step: the step in or after which it happened; None before the first step.
        epoch: the epoch of that step; None if it is not given.
        attributes: what else is said of it.
    """

    sender: PointSender
    number: int
    name: str
    time_unix_ns: int
    severity: int
    text: str
    step: int | None
    epoch: int | None
    attributes: Mapping[str, Value]

    def content(self) -> str:
        """Returns what is stored of it besides its place, as JSON."""
        said = (self.name, self.severity, self.text, self.step, self.epoch, dict(self.attributes))
        return json.dumps(said, separators=(",", ":"), allow_nan=False)


class DecodedLogs(NamedTuple):
    """The content of a request with log records.

    Attributes:
        events: the events, in the order of the request.
        ignored: records of other programs.
        refused: events that cannot be taken, by reason.
    """

    events: Sequence[EventRecord]
    ignored: int
    refused: Mapping[str, int]


def decode_logs(body: bytes, limits: Limits, *, is_json: bool = False) -> DecodedLogs:
    """Decodes an ExportLogsServiceRequest.

    Raises:
        Malformed: the bytes are not such a request.
        TooLarge: decoding it would cost too much.
    """
    if is_json:
        body = protobuf_of_json(body, ExportLogsServiceRequest)
    events: list[EventRecord] = []
    refused: Counter[str] = Counter()
    ignored = parts = ours = attributes = 0
    for piece in pieces(body, ExportLogsServiceRequest):
        try:
            request = ExportLogsServiceRequest.FromString(piece)
        except DecodeError as error:
            raise Malformed(f"not an ExportLogsServiceRequest: {error}") from None
        parts += len(request.resource_logs)
        check_counts(metrics=parts)
        for of_resource in request.resource_logs:
            parts += len(of_resource.scope_logs)
            others, mine, further = _counted(of_resource)
            ignored, ours, attributes = ignored + others, ours + mine, attributes + further
            check_counts(points=ignored + ours, metrics=parts)
            if ours > _MOST_AT_ONCE or attributes > _MOST_ATTRIBUTES:
                refused[TOO_MANY_AT_ONCE] += mine
            elif mine:
                _add(of_resource, limits, events, refused)
    return DecodedLogs(events, ignored, refused)


def _counted(of_resource: ResourceLogs) -> tuple[int, int, int]:
    """Returns how many records are others', how many ours, and how many attributes ours have."""
    others = mine = attributes = 0
    for of_scope in of_resource.scope_logs:
        if of_scope.scope.name == EVENT_SCOPE:
            mine += len(of_scope.log_records)
            attributes += sum(len(record.attributes) for record in of_scope.log_records)
        else:
            others += len(of_scope.log_records)
    return others, mine, attributes


def _add(of_resource: ResourceLogs, limits: Limits, events: list[EventRecord], refused: Counter[str]) -> None:
    sender = sender_of(of_resource.resource.attributes, limits)
    for of_scope in of_resource.scope_logs:
        if of_scope.scope.name != EVENT_SCOPE:
            continue
        if isinstance(sender, str):
            refused[sender] += len(of_scope.log_records)
            continue
        for record in of_scope.log_records:
            made = _event(sender, record, limits)
            if isinstance(made, str):
                refused[made] += 1
            else:
                events.append(made)


def _event(sender: PointSender, record: LogRecord, limits: Limits) -> EventRecord | str:
    """Returns the event that a record reports, or the reason why it cannot be taken."""
    if len(record.attributes) > limits.attributes:
        return TOO_MANY_ATTRIBUTES
    given = _values(record.attributes)
    said_name = given.pop(_NAME, "")
    name = record.event_name or (said_name if isinstance(said_name, str) else "")
    number, step, epoch = (_whole(given.pop(each, None)) for each in _COMMON)
    time_unix_ns = record.time_unix_nano or record.observed_time_unix_nano
    faults = {
        NO_EVENT_NAME: not name,
        NO_EVENT_NUMBER: not number,
        NO_TIME: not time_unix_ns,
        WRONG_TIME: not EARLIEST_UNIX_NS <= time_unix_ns < LATEST_UNIX_NS,
        INVALID_TEXT: not all(is_valid(each, limits.text_bytes) for each in (name, *given)),
    }
    fault = next((reason for reason, is_so in faults.items() if is_so), None)
    if fault is not None:
        return fault
    attributes = {
        printable(each): printable(value, limits.text_bytes) if isinstance(value, str) else value
        for each, value in given.items()
    }
    severity = record.severity_number if 0 <= record.severity_number <= _MOST_SEVERITY else 0
    text = printable(record.body.string_value or name, _MOST_TEXT)
    event = EventRecord(sender, number or 0, printable(name), time_unix_ns, severity, text, step, epoch, attributes)
    return event if len(event.content()) <= _MOST_BYTES else TOO_LARGE_EVENT


def _values(attributes: Sequence[KeyValue]) -> dict[str, Value]:
    """Returns the attributes that are texts or finite numbers. If a key occurs twice, the last value counts."""
    found: dict[str, Value] = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        if kind not in ("string_value", "int_value", "double_value", "bool_value"):
            continue
        value = getattr(each.value, kind)
        # JSON has no number for NaN and infinity.
        is_odd = isinstance(value, float) and not -1e308 <= value <= 1e308
        found[each.key] = f"{value:g}" if is_odd else value
    return found


def _whole(value: Value | None) -> int | None:
    """Returns a whole number of at least 0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST:
        return None
    return value
