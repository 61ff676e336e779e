"""Outcomes: what an endpoint that takes a request says of it."""

from __future__ import annotations

import pytest
from endpoints import PROTOCOLS, at, sent
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel.export.transport import Outcome, Result
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_points_that_were_not_taken_are_told(protocol: str) -> None:
    """The official exporters say nothing about partial success."""
    answer = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(rejected_data_points=3, error_message="too old")
    )
    with MemoryCollector(answer=lambda _: answer) as collector:
        assert sent(at(collector, protocol)) == Outcome(Result.DELIVERED, "too old", rejected_points=3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("rejected", [0, -5])
def test_a_remark_is_no_rejection(protocol: str, rejected: int) -> None:
    """An endpoint may take everything and say something; a number below zero would undo what was counted before."""
    answer = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(rejected_data_points=rejected, error_message="soon\nno more")
    )
    with MemoryCollector(answer=lambda _: answer) as collector:
        assert sent(at(collector, protocol)) == Outcome(Result.DELIVERED, "soon no more")


def test_each_result_has_a_word_to_count_it_by() -> None:
    """What endpoints say would make a series of its own for each of their wordings."""
    assert {result.value for result in Result} == {
        *("delivered", "failed for now", "credentials refused", "too large", "refused")
    }
