"""OTLP's JSON encoding, parsed by protobuf. Unknown fields are ignored; enums may be names or numbers."""

from __future__ import annotations

import json
from reprlib import repr as short
from typing import Any, NoReturn

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from esper_otel.gateway.receive.bounds import check_json
from esper_otel.gateway.receive.request import Malformed

# These fields are not used here. Ids, those of exemplars too, would fail to parse: they are hexadecimal, not base64.
_UNREAD = frozenset(
    {
        *("traceId", "spanId", "trace_id", "span_id"),
        *("exemplars", "bucketCounts", "explicitBounds", "quantileValues"),
        *("bucket_counts", "explicit_bounds", "quantile_values"),
    }
)
_LONG = 100
_LONGEST_ERROR = 250


class _Text(str):
    """A long text, shortened in error messages, which repeat a wrong value once for each level of nesting."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return short(str(self))


class _Object(dict[str, Any]):
    """A JSON object, shortened in error messages like long texts."""

    def __format__(self, spec: str) -> str:
        return short(dict(self))


def protobuf_of_json(body: bytes, request: type[Message] = ExportMetricsServiceRequest) -> bytes:
    """Converts a JSON request to protobuf.

    Args:
        body: the request.
        request: the class of the request.

    Raises:
        Malformed: it is not JSON, or a field has a wrong value; the message names the field.
        TooLarge: decoding it would cost too much.
    """
    check_json(body)
    try:
        content = json.loads(body, object_hook=_object, parse_constant=_no_constant)
        return ParseDict(content, request(), ignore_unknown_fields=True).SerializeToString()
    except (ParseError, ValueError, TypeError, OverflowError) as error:
        text = str(error)
        text = text[max(0, text.rfind("Failed to parse ")) :]  # the innermost field
        raise Malformed(f"not an OTLP request in JSON: {text[:_LONGEST_ERROR].rstrip('.')}") from None


def _object(found: dict[str, Any]) -> _Object:
    return _Object(
        (name, _Text(value) if isinstance(value, str) and len(value) > _LONG else value)
        for name, value in found.items()
        if name not in _UNREAD
    )


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f'{word} is not valid JSON; send it as a string: "{word}"')
