"""OTLP as JSON: what protobuf itself reads from it is the request that went in."""

from __future__ import annotations

import json
import math

import pytest
from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE

import esper_otel
from esper_otel import EsperSettings, Stage
from esper_otel.export.otlp_json import answer_of_json, json_of, message_of_json
from esper_otel.testing import MemoryCollector


def request_of_everything() -> ExportMetricsServiceRequest:
    request = ExportMetricsServiceRequest()
    of_resource = request.resource_metrics.add(schema_url="https://example.invalid/1")
    for key, value in (("text", "ü\n"), ("whole", 3), ("flag", True), ("number", 0.5)):
        of_resource.resource.attributes.add(key=key).value.__setattr__(
            {"text": "string_value", "whole": "int_value", "flag": "bool_value", "number": "double_value"}[key], value
        )
    of_scope = of_resource.scope_metrics.add(schema_url="https://example.invalid/2")
    of_scope.scope.name = "scope"
    gauge = of_scope.metrics.add(name="loss", unit="1", description="the loss").gauge
    for number in (0.0, -0.0, 1e-300, math.nan, math.inf, -math.inf):
        gauge.data_points.add(time_unix_nano=2**63, as_double=number)
    gauge.data_points.add(time_unix_nano=5, flags=1).attributes.add(key="seed_id").value.string_value = "a"
    gauge.data_points.add(time_unix_nano=5, as_int=-(2**62)).attributes.add(key="n").value.int_value = 7
    gauge.data_points.add(time_unix_nano=6, as_double=1).exemplars.add(as_double=1, trace_id=b"12")
    total = of_scope.metrics.add(name="steps").sum
    total.aggregation_temporality, total.is_monotonic = AGGREGATION_TEMPORALITY_CUMULATIVE, True
    total.data_points.add(time_unix_nano=5, start_time_unix_nano=1, as_double=3)
    of_scope.metrics.add(name="times").histogram.data_points.add(time_unix_nano=5, count=1, bucket_counts=[1])
    return request


def test_protobuf_reads_back_what_was_written() -> None:
    request = request_of_everything()
    line = json_of(request.SerializeToString())
    assert b"\n" not in line
    assert Parse(line, ExportMetricsServiceRequest()).SerializeToString() == request.SerializeToString()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_answers_are_read_and_nonsense_is_harmless() -> None:
    partial = b'{"partialSuccess": {"rejectedDataPoints": "3", "errorMessage": "no"}, "unknown": 1}'
    assert b"no" in answer_of_json(partial)
    assert answer_of_json(b"<html>") == answer_of_json(b"\xff") == b""
    assert message_of_json(b'{"code": 3, "message": "wrong"}') == "wrong"
    assert message_of_json(b"[1]") == "[1]"


def test_steps_arrive_as_json_with_all_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed, too."""
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
        with esper_otel.start(run_id="json", settings=EsperSettings(export_every_s=0)) as telemetry:
            for step in range(3):
                with telemetry.step(epoch=0) as now:
                    now.put(loss=math.nan if step == 1 else float(step))
                    now.seed("a", stage=Stage.TRAINING, alpha=0.5)
        assert telemetry.health()["exported"] == 3
        losses = [point.value for point in collector.points() if point.name == "loss" and not point.flags]
        assert [str(each) for each in losses] == ["0.0", "nan", "2.0"]
        assert [p.value for p in collector.points() if p.name == "kasmina.seed.alpha" and not p.flags] == [0.5] * 3
