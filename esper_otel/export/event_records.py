"""Encodes events as OTLP log records, in a scope of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.sdk.resources import Resource

from esper_otel.export.scopes import origin_of, set_scope
from esper_otel.frames.event_log import Attribute, Event
from esper_otel.schema.events import EPOCH, EVENT_NUMBER, EVENT_SCOPE, GLOBAL_STEP, Severity

MOST_RECORDS = 1_000
_MOST_BYTES = 1_000_000  # of the 4 MiB of a request


def request_of(events: Iterable[Event], resource: Resource) -> bytes:
    """Returns a serialized ExportLogsServiceRequest."""
    request = ExportLogsServiceRequest()
    of_run, origin = request.resource_logs.add(), origin_of(resource)
    of_run.resource.CopyFrom(origin.resource)
    of_run.schema_url = origin.schema_url
    scoped = of_run.scope_logs.add()
    set_scope(scoped, EVENT_SCOPE)
    scoped.log_records.extend(map(_record, events))
    return request.SerializeToString()


def _record(event: Event) -> LogRecord:
    places = {EVENT_NUMBER.name: event.number, GLOBAL_STEP.name: event.step, EPOCH.name: event.epoch}
    attributes = {name: value for name, value in places.items() if value is not None} | dict(event.attributes)
    return LogRecord(
        event_name=event.name,
        time_unix_nano=event.time_unix_ns,
        observed_time_unix_nano=event.observed_unix_ns,
        severity_number=event.severity,  # type: ignore[arg-type] # an enum of protobuf, which takes numbers
        severity_text=Severity(event.severity).name if event.severity in set(Severity) else "",
        body=AnyValue(string_value=_valid(event.body)),
        attributes=[KeyValue(key=key, value=_value(value)) for key, value in attributes.items()],
    )


def _value(value: Attribute) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(string_value=_valid(value))
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(int_value=min(value, 2**63 - 1))


def _valid(text: str) -> str:
    """Returns the text without surrogates, which protobuf refuses."""
    return text.encode(errors="replace").decode()


def in_one_request(events: Sequence[Event], most: int) -> Sequence[Event]:
    """Returns the first events, as many as one request may have: at least one, at most ``most``."""
    size = 0
    for place, event in enumerate(events[:most]):
        size += 300 + 4 * (len(event.body) + sum(len(str(value)) for value in event.attributes.values()))
        if place and size > _MOST_BYTES:
            return events[:place]
    return events[:most]
