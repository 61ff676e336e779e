"""The plain decoder: protobuf and a loop. It decodes what the fast decoder cannot; tests compare the two."""

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
from esper_otel.gateway.receive.point_columns import A_VALUE, AN_END, NOTHING, PointColumns, RawPoints, Row
from esper_otel.gateway.receive.request import Malformed, PointSender
from esper_otel.parts.levels import scope_of


def read_request(body: bytes) -> ExportMetricsServiceRequest:
    """Decodes a request.

    Raises:
        Malformed: the bytes are not a request.
    """
    try:
        request: ExportMetricsServiceRequest = ExportMetricsServiceRequest.FromString(body)
    except DecodeError as error:
        raise Malformed(f"not an ExportMetricsServiceRequest: {error}") from None
    return request


def plain_columns(body: bytes, limits: Limits) -> tuple[RawPoints, PointColumns]:
    """Returns a request's points in columns, and the metrics and labels that the columns refer to.

    Raises:
        Malformed: the bytes are not a request.
        TooLarge: decoding it would cost too much.
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
    unit = metric.unit
    place = raw.metric(sender, scope, metric.name, count, is_number=is_number, is_delta=is_delta(data), unit=unit)
    return [] if place is None else [plain_row(place, point, raw) for point in data.data_points]


def is_delta(data: object) -> bool:
    """Returns whether each point of a metric holds only the change since the previous point."""
    return isinstance(data, Sum) and data.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA


def plain_row(metric: int, point: NumberDataPoint, raw: RawPoints) -> Row:
    """Returns the entries of one point in the columns."""
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
