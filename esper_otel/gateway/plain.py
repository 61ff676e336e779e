"""The plain decoder: protobuf and a loop. What the fast one does not understand, and what tests compare it with."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_DELTA,
    DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
    NumberDataPoint,
    Sum,
)

from esper_otel.gateway.decoded import Malformed
from esper_otel.gateway.labels import label_of, sender_of
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.raw import A_VALUE, AN_END, NOTHING, Columns, Raw, Row, scope_of


def read_request(body: bytes) -> ExportMetricsServiceRequest:
    """The request.

    Raises:
        Malformed: the bytes are none.
    """
    try:
        request: ExportMetricsServiceRequest = ExportMetricsServiceRequest.FromString(body)
    except DecodeError as error:
        raise Malformed(f"no ExportMetricsServiceRequest: {error}") from None
    return request


def plain_columns(body: bytes, limits: Limits) -> tuple[Raw, Columns]:
    """The points of a request, in columns, and what the columns' numbers stand for.

    Raises:
        Malformed: the bytes are no request.
    """
    raw = Raw(limits)
    rows: list[Row] = []
    for of_resource in read_request(body).resource_metrics:
        sender = sender_of(of_resource.resource.attributes, limits)
        for of_scope in of_resource.scope_metrics:
            scope = scope_of(of_scope.scope.name)
            for metric in of_scope.metrics:
                kind = metric.WhichOneof("data")
                if kind is None:
                    continue
                data = getattr(metric, kind)
                place = raw.metric(
                    sender,
                    scope,
                    metric.name,
                    len(data.data_points),
                    is_number=kind in ("gauge", "sum"),
                    is_delta=is_delta(data),
                )
                if place is not None:
                    rows += [plain_row(place, point, raw) for point in data.data_points]
    columns = Columns.empty(len(rows))
    for position, row in enumerate(rows):
        columns.set(position, row)
    return raw, columns


def is_delta(data: object) -> bool:
    """Whether a metric's points say what was added since the one before."""
    return isinstance(data, Sum) and data.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA


def plain_row(metric: int, point: NumberDataPoint, raw: Raw) -> Row:
    """What goes into the columns for one point."""
    label = raw.label(label_of(point.attributes, raw.limits))
    if point.flags & DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK:
        return metric, label, point.time_unix_nano, 0.0, AN_END
    match point.WhichOneof("value"):
        case "as_double":
            return metric, label, point.time_unix_nano, point.as_double, A_VALUE
        case "as_int":
            return metric, label, point.time_unix_nano, float(point.as_int), A_VALUE
        case _:
            return metric, label, point.time_unix_nano, 0.0, NOTHING
