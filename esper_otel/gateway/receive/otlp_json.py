"""OTLP's JSON: as protobuf's, but that ids are hexadecimal and enums are numbers. Unknown fields are ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from reprlib import repr as short
from typing import Any, NoReturn

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from esper_otel.gateway.receive.bounds import check_json
from esper_otel.gateway.receive.request import Malformed

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_OTHER_KINDS = {
    "histogram": "histogram",
    "exponentialHistogram": "exponential_histogram",
    "summary": "summary",
}
_LONGEST_ERROR = 200
_CAPITAL = re.compile("[A-Z]")


def protobuf_of_json(body: bytes) -> bytes:
    """The request in protobuf; of what has no number only how many points there are.

    Raises:
        Malformed: no JSON, or a field of the wrong type.
        TooLarge: it would cost too much.
    """
    check_json(body)
    try:
        content = json.loads(body, parse_constant=_no_constant)
        request = ExportMetricsServiceRequest()
        for of_resource in _objects(content, "resourceMetrics"):
            block = request.resource_metrics.add()
            block.resource.attributes.extend(_attributes(_object(of_resource, "resource")))
            for of_scope in _objects(of_resource, "scopeMetrics"):
                scope = block.scope_metrics.add()
                scope.scope.name = _text(_object(of_scope, "scope"), "name")
                for metric in _objects(of_scope, "metrics"):
                    _fill_metric(scope.metrics.add(), metric)
        return request.SerializeToString()
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Malformed(f"no OTLP request in JSON: {str(error)[:_LONGEST_ERROR]}") from None


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON; as a string it is")


def _fill_metric(metric: Metric, content: Any) -> None:
    metric.name = _text(content, "name")
    if "gauge" in content and content["gauge"] is not None:
        metric.gauge.SetInParent()
        for point in _objects(content["gauge"], "dataPoints"):
            _fill_point(metric.gauge.data_points.add(), point)
    elif "sum" in content and content["sum"] is not None:
        metric.sum.aggregation_temporality = _whole(_field(content["sum"], "aggregationTemporality") or 0)  # type: ignore[assignment] # an enum is an int
        for point in _objects(content["sum"], "dataPoints"):
            _fill_point(metric.sum.data_points.add(), point)
    else:
        for name, field in _OTHER_KINDS.items():
            for _ in _objects(_object(content, name), "dataPoints"):
                getattr(metric, field).data_points.add()


def _fill_point(point: NumberDataPoint, content: Any) -> None:
    point.attributes.extend(_attributes(content))
    point.time_unix_nano = _whole(_field(content, "timeUnixNano") or 0)
    point.flags = _whole(_field(content, "flags") or 0)
    as_double, as_int = _field(content, "asDouble"), _field(content, "asInt")
    if as_double is not None:
        point.as_double = _number(as_double)
    elif as_int is not None:
        point.as_int = _whole(as_int)


def _attributes(content: Any) -> Iterator[KeyValue]:
    for attribute in _objects(content, "attributes"):
        yield KeyValue(key=_text(attribute, "key"), value=_value(_object(attribute, "value")))


def _value(content: Any) -> AnyValue:
    """Text and plain numbers; anything else has no meaning here, and is empty."""
    text, number, real = (_field(content, name) for name in ("stringValue", "intValue", "doubleValue"))
    if text is not None:
        return AnyValue(string_value=_text(content, "stringValue"))
    if number is not None:
        return AnyValue(int_value=_whole(number))
    if real is not None:
        return AnyValue(double_value=_number(real))
    return AnyValue()


def _field(content: Any, name: str) -> Any:
    """A field's value; None when it is null or not there. Its protobuf name is understood too."""
    if not isinstance(content, dict):
        raise TypeError(f"{name} is looked for in a {type(content).__name__}, not in an object")
    value = content.get(name)
    if value is None and name not in content:
        value = content.get(_protobuf_name(name))
    return value


@cache
def _protobuf_name(name: str) -> str:
    return _CAPITAL.sub(lambda letter: f"_{letter[0].lower()}", name)


def _object(content: Any, name: str) -> Any:
    value = _field(content, name)
    return {} if value is None else value


def _objects(content: Any, name: str) -> Sequence[Any]:
    value = _field(content, name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TypeError(f"{name} is a {type(value).__name__}, not an array")
    return value


def _text(content: Any, name: str) -> str:
    value = _field(content, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}, not a string")
    return value


def _whole(value: Any) -> int:
    """An integer, given as a number or in a string."""
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        raise TypeError(f"{short(value)} is no integer")
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{short(value)} is no integer")
    return int(value)


def _number(value: Any) -> float:
    """A number, given as one or in a string."""
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        raise TypeError(f"{short(value)} is no number")
    number = float(value)
    if not math.isfinite(number):  # 1e999 is none either
        raise ValueError(f"{short(value)} is no number")
    return number
