"""Parts of OTLP messages that several encoders write."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    Gauge,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.metrics.export import ResourceMetrics as SdkResourceMetrics
from opentelemetry.sdk.resources import Resource

from esper_otel._version import __version__
from esper_otel.schema import Metric

SCHEMA_VERSION = "1"

# The version of the semantic conventions whose names our attributes, and the metrics hw.*, follow. Names of our own are
# in no published schema, and this one changes none of them; their version is the attribute ``esper.schema.version``.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"


def set_scope(scope: ScopeMetrics | ScopeLogs, name: str) -> None:
    """Writes the scope's name, version and schema URL."""
    scope.schema_url = SCHEMA_URL
    scope.scope.name = name
    scope.scope.version = __version__
    scope.scope.attributes.append(attribute("esper.schema.version", SCHEMA_VERSION))


def origin_of(resource: Resource) -> ResourceMetrics:
    """Returns a message that has only the Resource and its schema URL."""
    return encode_metrics(MetricsData([SdkResourceMetrics(resource, [], "")])).resource_metrics[0]


def stream(scope: ScopeMetrics, metric: Metric) -> Gauge | Sum:
    """Adds a metric to a scope; returns what its points are added to."""
    added = scope.metrics.add(name=metric.name, unit=metric.unit, description=metric.description)
    if metric.kind == "gauge":
        return added.gauge
    added.sum.is_monotonic = metric.kind == "counter"
    added.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
    return added.sum


def attribute(key: str, value: str | int) -> KeyValue:
    """Returns an attribute that is a text or a whole number."""
    if isinstance(value, int):
        return KeyValue(key=key, value=AnyValue(int_value=value))
    return KeyValue(key=key, value=AnyValue(string_value=value))
