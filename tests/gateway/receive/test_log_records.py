"""Log records: ours become events, others are counted, and what is wrong is said by reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from log_requests import TIME_UNIX_NS, add_event, put, request
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive import log_records
from esper_otel.gateway.receive import request as reasons
from esper_otel.gateway.receive.log_records import DecodedLogs, EventRecord, decode_logs
from esper_otel.gateway.receive.request import Malformed, TooLarge

LIMITS = Limits()


def decoded(message: ExportLogsServiceRequest) -> DecodedLogs:
    return decode_logs(message.SerializeToString(), LIMITS)


def one(**change: Any) -> tuple[ExportLogsServiceRequest, LogRecord]:
    message = request("run", [1], **change)
    return message, message.resource_logs[0].scope_logs[0].log_records[0]


def test_an_event_has_all_that_its_record_says() -> None:
    message, _ = one(attempt=3, rank=2)
    add_event(message.resource_logs[0].scope_logs[0].log_records.add(), 2, seed_id="säd", ratio=float("inf"), flag=True)
    first, second = decoded(message).events
    assert (first.sender.run.run_id, first.sender.run.attempt, first.sender.run.rank) == ("run", 3, 2)
    assert first[1:] == (
        *(1, "esper.checkpoint", TIME_UNIX_NS + 10**9, 9, "checkpoint 1", 10, 0),
        {"esper.phase.duration_ms": 1.5},
    )
    assert second.attributes == {"esper.phase.duration_ms": 1.5, "seed_id": "säd", "ratio": "inf", "flag": True}


def test_json_is_the_same_as_protobuf_with_ids_of_a_trace_in_it() -> None:
    message, _ = one()
    said = MessageToDict(message)
    said["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0] |= {"traceId": "5b8efff798038103d269b633813fc6", "x": 1}
    body = json.dumps(said).encode()
    assert decode_logs(body, LIMITS, is_json=True) == decoded(message)


def test_records_of_others_are_counted_and_not_looked_at() -> None:
    """Whatever their Resource and their attributes are."""
    message = request("run", [1])
    other = message.resource_logs.add()
    for _ in range(7):
        other.scope_logs.add(log_records=[LogRecord()] * 3)
    put(other.resource.attributes.add(key="esper.run.id"), "x" * 1_000)
    found = decoded(message)
    assert (len(found.events), found.ignored, found.refused) == (1, 21, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"event_name": ""}, log_records.NO_EVENT_NAME),
        ({"event_name": "line\nbreak"}, reasons.INVALID_TEXT),
        ({"time_unix_nano": 0}, reasons.NO_TIME),
        ({"time_unix_nano": 1}, reasons.WRONG_TIME),
        ({"number": None}, log_records.NO_EVENT_NUMBER),
        ({"number": 0}, log_records.NO_EVENT_NUMBER),
        ({"number": 2**60}, log_records.NO_EVENT_NUMBER),
        ({"number": True}, log_records.NO_EVENT_NUMBER),
        ({"attributes": {f"name {number}": 1 for number in range(200)}}, reasons.TOO_MANY_ATTRIBUTES),
        ({"attributes": {f"name {number}": "x" * 200 for number in range(20)}}, log_records.TOO_LARGE_EVENT),
        ({"attributes": {"a\x1bb": 1}}, reasons.INVALID_TEXT),
        ({"run_id": "x" * 300}, reasons.INVALID_TEXT),
    ],
)
def test_what_cannot_be_taken_is_refused_by_reason(change: dict[str, Any], reason: str) -> None:
    message, record = one()
    for name, value in change.items():
        if name == "number":
            del record.attributes[0]
            if value is not None:
                put(record.attributes.add(key="esper.event.number"), value)
        elif name == "attributes":
            for key, each in value.items():
                put(record.attributes.add(key=key), each)
        elif name == "run_id":
            message.resource_logs[0].resource.attributes[0].value.string_value = value
        else:
            setattr(record, name, value)
    assert decoded(message).refused == {reason: 1}


def test_texts_are_made_harmless() -> None:
    message, record = one()
    record.body.string_value = "\x1b[2J\u202e" + "x" * 10_000
    record.severity_number = 99  # type: ignore[assignment]
    put(record.attributes.add(key="seed_id"), "a\nb" + "y" * 1_000)
    [event] = decoded(message).events
    assert event.text.isprintable()
    assert len(event.text) < 600
    assert event.severity == 0
    seed_id = event.attributes["seed_id"]
    assert isinstance(seed_id, str)
    assert seed_id.isprintable()


def test_the_name_may_be_in_an_attribute_and_the_time_the_observed_one() -> None:
    """From before OTLP had a field for the name; a body is then not needed."""
    message, record = one()
    for field in ("event_name", "time_unix_nano", "body"):
        record.ClearField(field)
    record.observed_time_unix_nano = TIME_UNIX_NS
    put(record.attributes.add(key="event.name"), "esper.mistake")
    [event] = decoded(message).events
    assert (event.name, event.text, event.time_unix_ns) == ("esper.mistake", "esper.mistake", TIME_UNIX_NS)


def test_very_many_events_at_once_are_refused_without_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_records, "_MOST_AT_ONCE", 5)
    monkeypatch.setattr(log_records, "_event", lambda *_: pytest.fail("built"))
    assert decoded(request("run", range(1, 7))).refused == {log_records.TOO_MANY_AT_ONCE: 6}
    monkeypatch.setattr(log_records, "_MOST_ATTRIBUTES", 11)  # each has four
    assert decoded(request("run", range(1, 4))).refused == {log_records.TOO_MANY_AT_ONCE: 3}


def test_what_costs_more_than_it_should_is_refused_in_words() -> None:
    """Before it is built: two bytes a resource, a deep value, JSON with a million brackets."""
    with pytest.raises(TooLarge, match="resources, scopes and metrics"):
        decode_logs(b"\x0a\x00" * 1_000_000, LIMITS)
    with pytest.raises(Malformed, match="not an ExportLogsServiceRequest"):
        decode_logs(b"\xff" * 100, LIMITS)
    with pytest.raises(Malformed, match="deeper"):
        decode_logs(b"[" * 100_000 + b"]" * 100_000, LIMITS, is_json=True)
    with pytest.raises(TooLarge, match="values in one request in JSON"):
        decode_logs(b"[" + b"{}," * 2_000_000 + b"{}]", LIMITS, is_json=True)


def test_an_event_is_what_is_stored_of_it() -> None:
    assert json.loads(one_event().content()) == [
        *("esper.checkpoint", 9, "checkpoint 1", 10, 0),
        {"esper.phase.duration_ms": 1.5},
    ]


def one_event() -> EventRecord:
    [event] = decoded(one()[0]).events
    return event
