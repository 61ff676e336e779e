"""Envelope: a request whose large parts stay serialized, so that protobuf checks the rest without unpacking them.

``Envelope`` is ExportMetricsServiceRequest with three fields declared as ``bytes``: a ResourceMetrics' resource, a
Metric's gauge and its sum. These fields are decoded later. They are then wrapped at their original nesting depth, so
that protobuf applies the same checks, including its limit on nesting, as it would to the whole request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.resource.v1 import resource_pb2

from esper_otel.gateway.receive.bounds import check_parts
from esper_otel.gateway.receive.plain import read_request
from esper_otel.varint import field_head

_OPAQUE = {("ResourceMetrics", "resource"), ("Metric", "gauge"), ("Metric", "sum")}

# Field numbers on the path from the request to the fields that stay serialized.
_RESOURCE_METRICS = _RESOURCE = 1
_SCOPE_METRICS = _METRICS = 2
_DATA = {"gauge": 5, "sum": 7}
POINTS = 1


def _file(descriptor: Any) -> FileDescriptorProto:
    file = FileDescriptorProto()
    descriptor.CopyToProto(file)
    for message in file.message_type:
        for field in message.field:
            if (message.name, field.name) in _OPAQUE:
                field.type = FieldDescriptorProto.TYPE_BYTES
                field.ClearField("type_name")
    return file


def _envelope() -> Any:
    pool = DescriptorPool()
    for module in (common_pb2, resource_pb2, metrics_pb2, metrics_service_pb2):
        pool.Add(_file(module.DESCRIPTOR))
    name = metrics_service_pb2.ExportMetricsServiceRequest.DESCRIPTOR.full_name
    return GetMessageClass(pool.FindMessageTypeByName(name))


Envelope: Any = _envelope()


def read_resource(resource: bytes) -> resource_pb2.Resource:
    """Decodes a resource that an envelope kept as bytes.

    Raises:
        Malformed: the bytes are not a resource.
        TooLarge: decoding them would cost too much.
    """
    check_parts(resource, resource_pb2.Resource)
    request = read_request(field(_RESOURCE_METRICS, field(_RESOURCE, resource)))
    return request.resource_metrics[0].resource


def read_data(kind: str, payload: bytes) -> metrics_pb2.Gauge | metrics_pb2.Sum:
    """Decodes a gauge or sum that an envelope kept as bytes.

    Raises:
        Malformed: the bytes are not a gauge or sum.
        TooLarge: decoding them would cost too much.
    """
    check_parts(payload, metrics_pb2.Gauge if kind == "gauge" else metrics_pb2.Sum)
    content = payload
    for number in (_DATA[kind], _METRICS, _SCOPE_METRICS, _RESOURCE_METRICS):
        content = field(number, content)
    (metric,) = read_request(content).resource_metrics[0].scope_metrics[0].metrics
    return metric.gauge if kind == "gauge" else metric.sum


def read_points(records: Iterable[bytes]) -> list[metrics_pb2.NumberDataPoint]:
    """Decodes points that are given with their tags and lengths.

    Raises:
        Malformed: one of them is not a point.
        TooLarge: decoding them would cost too much.
    """
    return list(read_data("gauge", b"".join(records)).data_points)


def field(number: int, content: bytes) -> bytes:
    """Serializes a field that holds bytes or a message: its tag, length and content."""
    return field_head(number, len(content)) + content
