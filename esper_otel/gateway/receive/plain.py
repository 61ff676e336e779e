"""The plain decoder: protobuf and a loop. What the fast one does not understand, and what tests compare it with."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_DELTA,
    DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK,
    Metric,
    NumberDataPoint,
    Sum,
)

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.attributes import label_of, sender_of
from esper_otel.gateway.receive.bounds import pieces
from esper_otel.gateway.receive.columns import A_VALUE, AN_END, NOTHING, PointColumns, RawPoints, Row, scope_of
from esper_otel.gateway.receive.request import Malformed, PointSender


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


def plain_columns(body: bytes, limits: Limits) -> tuple[RawPoints, PointColumns]:
    """The points of a request, in columns, and what the columns' numbers stand for.

    Raises:
        Malformed: the bytes are no request.
        TooLarge: it would cost too much.
    """
    raw = RawPoints(limits)
    rows: list[Row] = []
    for piece in pieces(body, ExportMetricsServiceRequest):
        request = read_request(piece)
        raw.note_parts(len(request.resource_metrics))
        for of_resource in request.resource_metrics:
            sender = sender_of(of_resource.resource.attributes, limits)
            raw.note_parts(len(of_resource.scope_metrics))
            for of_scope in of_resource.scope_metrics:
                scope = scope_of(of_scope.scope.name)
                raw.note_parts(len(of_scope.metrics))
                for metric in of_scope.metrics:
                    rows += _rows(raw, sender, scope, metric)
    columns = PointColumns.empty(len(rows))
    for position, row in enumerate(rows):
        columns.set(position, row)
    return raw, columns


def _rows(raw: RawPoints, sender: PointSender | str, scope: int, metric: Metric) -> list[Row]:
    kind = metric.WhichOneof("data")
    if kind is None:
        return []
    data = getattr(metric, kind)
    is_number = kind in ("gauge", "sum")
    count = len(data.data_points)
    place = raw.metric(sender, scope, metric.name, count, is_number=is_number, is_delta=is_delta(data))
    return [] if place is None else [plain_row(place, point, raw) for point in data.data_points]


def is_delta(data: object) -> bool:
    """Whether a metric's points say what was added since the one before."""
    return isinstance(data, Sum) and data.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA


def plain_row(metric: int, point: NumberDataPoint, raw: RawPoints) -> Row:
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
