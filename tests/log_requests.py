"""Requests with log records, for tests: events of runs as a trainer sends them, and records of other programs."""

from __future__ import annotations

from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from esper_otel.schema.events import CHECKPOINT, DURATION_MS, EPOCH, EVENT_NUMBER, EVENT_SCOPE, GLOBAL_STEP

TIME_UNIX_NS = 1_800_000_000 * 10**9


def request(run_id: str, numbers: Any, *, attempt: int = 1, rank: int = 0, **resource: Any) -> ExportLogsServiceRequest:
    """Checkpoints with these numbers, ten steps apart, of one process."""
    made = ExportLogsServiceRequest()
    of_run = made.resource_logs.add()
    about = {"esper.run.id": run_id, "esper.run.attempt": attempt, "esper.rank": rank, **resource}
    for name, value in about.items():
        put(of_run.resource.attributes.add(key=name), value)
    of_scope = of_run.scope_logs.add()
    of_scope.scope.name = EVENT_SCOPE
    for number in numbers:
        add_event(of_scope.log_records.add(), number)
    return made


def add_event(record: LogRecord, number: int, **attributes: Any) -> LogRecord:
    """Makes a record the checkpoint with this number."""
    record.event_name = CHECKPOINT
    record.time_unix_nano = TIME_UNIX_NS + number * 10**9
    record.severity_number = 9  # type: ignore[assignment]
    record.body.string_value = f"checkpoint {number}"
    given = {EVENT_NUMBER.name: number, GLOBAL_STEP.name: 10 * number, EPOCH.name: 0, DURATION_MS.name: 1.5}
    for name, value in {**given, **attributes}.items():
        put(record.attributes.add(key=name), value)
    return record


def put(attribute: Any, value: Any) -> None:
    kind = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}[type(value)]
    setattr(attribute.value, kind, value)


def body(run_id: str, *numbers: int, **about: Any) -> bytes:
    """The same, serialized."""
    return request(run_id, numbers, **about).SerializeToString()
