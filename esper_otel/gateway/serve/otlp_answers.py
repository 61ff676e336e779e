"""OTLP's answers to requests that were accepted, with what was refused of them."""

from __future__ import annotations

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from esper_otel.gateway.core import Answer


def metrics_answer(answer: Answer) -> ExportMetricsServiceResponse:
    """Returns the answer to a request with metrics; empty if all of its points were accepted."""
    response = ExportMetricsServiceResponse()
    if answer.rejected or answer.reason:
        response.partial_success.rejected_data_points = answer.rejected
        response.partial_success.error_message = answer.reason
    return response


def logs_answer(answer: Answer) -> ExportLogsServiceResponse:
    """Returns the answer to a request with log records; empty if none of them was refused."""
    response = ExportLogsServiceResponse()
    if answer.rejected or answer.reason:
        response.partial_success.rejected_log_records = answer.rejected
        response.partial_success.error_message = answer.reason
    return response
