"""Parts of OTLP messages that several encoders write."""

from __future__ import annotations

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    Gauge,
    ScopeMetrics,
    Sum,
)

from esper_otel._version import __version__
from esper_otel.schema import Metric

SCHEMA_VERSION = "1"


def set_scope(scope: ScopeMetrics, name: str) -> None:
    """Writes the scope's name and version."""
    scope.scope.name = name
    scope.scope.version = __version__
    scope.scope.attributes.append(attribute("esper.schema.version", SCHEMA_VERSION))


def stream(scope: ScopeMetrics, metric: Metric) -> Gauge | Sum:
    """Adds a metric to a scope; returns what its points are added to."""
    added = scope.metrics.add(name=metric.name, unit=metric.unit, description=metric.description)
    if metric.kind == "gauge":
        return added.gauge
    added.sum.is_monotonic = True
    added.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
    return added.sum


def attribute(key: str, text: str) -> KeyValue:
    """Returns an attribute that is a text."""
    return KeyValue(key=key, value=AnyValue(string_value=text))
