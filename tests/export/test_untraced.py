"""Our own requests are not traced, and messages about them are not sent over OTLP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import requests
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

import esper_otel
from esper_otel import EsperSettings
from esper_otel.log import Warnings, announce, logger
from esper_otel.testing import MemoryCollector
from esper_otel.untraced import is_untraced, untraced

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def record(collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """A session of three steps."""
    endpoint = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    with esper_otel.start(run_id="untraced", settings=EsperSettings(export_every_s=0)) as telemetry:
        for _ in range(3):
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
    assert telemetry.health()["exported"] == 3


def test_an_instrumentation_of_requests_is_told_to_leave_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched where instrumentations patch it, and asked what they ask."""
    traced: list[bool] = []
    original: Callable[..., Any] = requests.Session.send

    def send(*arguments: Any, **named: Any) -> Any:
        traced.append(is_instrumentation_enabled())
        return original(*arguments, **named)

    monkeypatch.setattr(requests.Session, "send", send)
    with MemoryCollector() as collector:
        record(collector, monkeypatch, "http/protobuf")
        assert set(traced) == {False}
        requests.get(collector.http_endpoint, timeout=10)
        assert traced[-1]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_instrumentations_make_no_span_of_our_requests(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """The real ones, where they are installed: with the oldest versions that we allow."""
    grpc_of = pytest.importorskip("opentelemetry.instrumentation.grpc")
    requests_of = pytest.importorskip("opentelemetry.instrumentation.requests")
    urllib3_of = pytest.importorskip("opentelemetry.instrumentation.urllib3")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)  # that of gRPC takes no other
    instrumentors = [
        grpc_of.GrpcInstrumentorClient(),
        requests_of.RequestsInstrumentor(),
        urllib3_of.URLLib3Instrumentor(),
    ]
    for instrumentor in instrumentors:
        instrumentor.instrument(tracer_provider=provider)
    try:
        with MemoryCollector() as collector:
            record(collector, monkeypatch, protocol)
            assert spans.get_finished_spans() == ()
            if protocol == "grpc":  # of somebody else
                with grpc.insecure_channel(collector.grpc_endpoint.removeprefix("http://")) as channel:
                    channel.unary_unary(EXPORT, bytes, bytes)(b"", timeout=10)
            else:
                requests.get(collector.http_endpoint, timeout=10)
            assert spans.get_finished_spans() != ()
    finally:
        for instrumentor in instrumentors:
            instrumentor.uninstrument()


@pytest.fixture
def over_otlp() -> Iterator[InMemoryLogRecordExporter]:
    """What a log handler of OpenTelemetry would send."""
    sent = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]
    provider = LoggerProvider()
    provider.add_log_record_processor(SimpleLogRecordProcessor(sent))
    with pytest.warns(DeprecationWarning, match="LoggingHandler"):
        handler = LoggingHandler(logger_provider=provider)
    logging.getLogger().addHandler(handler)
    yield sent
    logging.getLogger().removeHandler(handler)
    provider.shutdown()


def bodies(sent: InMemoryLogRecordExporter) -> list[Any]:
    return [each.log_record.body for each in sent.get_finished_logs()]


def test_a_warning_about_sending_is_logged_and_not_sent(
    over_otlp: InMemoryLogRecordExporter, caplog: pytest.LogCaptureFixture
) -> None:
    with untraced():
        assert is_untraced()
        Warnings().say("export", "steps do not reach the endpoint")
    assert not is_untraced()
    assert [record.getMessage() for record in caplog.records] == ["steps do not reach the endpoint"]
    assert bodies(over_otlp) == []
    logger.warning("a mistake")
    announce("closed", "with losses", logging.WARNING)
    assert bodies(over_otlp) == ["a mistake", "closed: with losses"]


def test_an_endpoint_that_is_not_there_leaves_nothing_in_the_logs_that_are_sent(
    over_otlp: InMemoryLogRecordExporter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    telemetry = esper_otel.start(run_id="nobody", settings=EsperSettings(export_every_s=0))
    with telemetry.step(epoch=0) as now:
        now.put(loss=1.0)
    telemetry.close(timeout_s=0.3)
    assert "steps do not reach the endpoint" in caplog.text
    assert not any("do not reach" in str(body) for body in bodies(over_otlp))
