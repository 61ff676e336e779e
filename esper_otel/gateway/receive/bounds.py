"""Bounds: limits the cost of decoding a request, estimated from its bytes before any objects are built.

Protobuf and JSON can build an object of a hundred bytes or more from two bytes on the wire. A large request is
therefore decoded in small pieces. A piece that cannot be made small is scanned field by field before it is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.descriptor_pb2 import DescriptorProto

from esper_otel.gateway.receive.request import Malformed, TooLarge
from esper_otel.varint import read_varint

# Protobuf needs at most 30 MB for a message of this many bytes, whatever its content.
_SMALL = 256 * 1024
# A field counts as one and a message as four, in proportion to their memory. This many take about 250 MB.
_MOST, _MESSAGE = 4_000_000, 4
# An element of a packed field takes at least one byte on the wire, and eight once decoded.
_PACKED_BYTES = 8

# Per request: points (at most a fifth is accepted, the rest is rejected by metric), and resources, scopes and metrics.
_MOST_POINTS, _MOST_METRICS = 1_000_000, 400_000

# JSON values, keys and brackets: this many take about 210 MB, and 7 s of one core (November 2026).
_MOST_WORDS = 1_000_000
_DEEPEST = 200
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_PIECE = 1024 * 1024
# Setting this bit turns a square bracket into a curly one.
_SQUARE, _OPENS, _CLOSES = 0x20, ord("{"), ord("}")

_RESOURCE_METRICS = 0x0A
_NUMBER, _BYTES, _GROUPS, _FIXED = 0, 2, (3, 4), {1: 8, 5: 4}

_SMALLER = "send smaller requests (a collector: send_batch_max_size; a gRPC or HTTP exporter: its batch size)"

# The fields of a message that need a closer look, by tag: a nested message, or None for packed numbers.
_Fields: TypeAlias = Mapping[int, "_Fields | None"]


def pieces(body: bytes, message: type[Any]) -> Iterator[bytes]:
    """Splits a request into smaller requests that are each cheap to decode.

    Args:
        body: the request.
        message: the class that decodes it; its field 1 holds the ResourceMetrics or ResourceLogs.

    Raises:
        TooLarge: decoding it would cost too much.
    """
    if len(body) <= _SMALL:
        yield body
        return
    start = position = resources = 0
    end = len(body)
    while position < end:
        try:
            length, inside = read_varint(body, position + 1)
        except IndexError:
            break
        after = inside + length
        if body[position] != _RESOURCE_METRICS or after > end:
            break
        if after - start > _SMALL and position > start:
            yield _checked(body[start:position], message)
            start = position
        resources += 1
        if resources > _MOST_METRICS:
            check_counts(metrics=resources)
        position = after
    yield _checked(body[start:], message)  # malformed bytes and unknown fields too: protobuf judges them


def _checked(body: bytes, message: type[Any]) -> bytes:
    check_parts(body, message)
    return body


def check_counts(*, points: int = 0, metrics: int = 0) -> None:
    """Checks the counts of a request so far.

    Args:
        points: data points, or log records.
        metrics: resources, scopes and metrics.

    Raises:
        TooLarge: a count is over its limit.
    """
    if points > _MOST_POINTS:
        raise TooLarge(f"more than {_MOST_POINTS} points or log records in one request: {_SMALLER}")
    if metrics > _MOST_METRICS:
        raise TooLarge(f"more than {_MOST_METRICS} resources, scopes and metrics in one request: {_SMALLER}")


def check_parts(body: bytes, message: type[Any]) -> None:
    """Checks how much memory protobuf needs for a serialized message; malformed parts are left for protobuf to report.

    Args:
        body: the message.
        message: its class.

    Raises:
        TooLarge: it has too many fields.
    """
    if len(body) <= _SMALL:
        return
    left = _MOST
    inside: list[tuple[int, int, _Fields]] = [(0, len(body), _fields(message.DESCRIPTOR))]
    while inside and left >= 0:
        start, end, fields = inside.pop()
        try:
            left = _walk(body, start, end, fields, inside, left)
        except IndexError:  # protobuf stops here too; the fields before this point are counted
            continue
    if left < 0:
        raise TooLarge(f"more than {_MOST} fields in one request: {_SMALLER}")


def _walk(
    body: bytes, position: int, end: int, fields: _Fields, inside: list[tuple[int, int, _Fields]], left: int
) -> int:
    """Counts the fields of a message and queues its nested messages; returns the remaining allowance."""
    while position < end and left >= 0:
        tag, position = body[position], position + 1
        if tag >= 0x80:
            tag, position = read_varint(body, position - 1)
        kind = tag & 7
        left -= 1
        if kind == _BYTES:
            length, position = body[position], position + 1
            if length >= 0x80:
                length, position = read_varint(body, position - 1)
            if tag in fields:
                field = fields[tag]
                if field is None:
                    left -= length // _PACKED_BYTES
                else:
                    left -= _MESSAGE
                    inside.append((position, min(position + length, end), field))
            position += length
        elif kind in _FIXED:
            position += _FIXED[kind]
        elif kind == _NUMBER:
            _, position = read_varint(body, position)
        elif kind not in _GROUPS:  # fields in an unknown group count like known ones
            break
    return left


@cache
def _fields(descriptor: Any) -> _Fields:
    """Returns the fields, also of nested messages, that take more memory decoded than on the wire."""
    every: dict[str, dict[int, Any]] = {}

    def of(each: Any) -> dict[int, Any]:
        found = every.get(each.full_name)
        if found is None:
            found = every[each.full_name] = {}
            said = DescriptorProto()
            each.CopyToProto(said)
            for field in said.field:
                tag = field.number << 3 | _BYTES
                if field.type == field.TYPE_MESSAGE:
                    found[tag] = of(each.fields_by_name[field.name].message_type)
                elif field.label == field.LABEL_REPEATED and field.type not in (field.TYPE_STRING, field.TYPE_BYTES):
                    found[tag] = None
        return found

    return of(descriptor)


def check_json(body: bytes) -> None:
    """Checks how much memory decoding a JSON request needs.

    Raises:
        TooLarge: it has too many values.
        Malformed: it is nested too deeply.
    """
    words = sum(map(body.count, (b"{", b"[", b",", b":")))
    if words > _MOST_WORDS:
        raise TooLarge(f"more than {_MOST_WORDS} values in one request in JSON: {_SMALLER}")
    if words > _DEEPEST and _depth(body) > _DEEPEST and _depth(_TEXT.sub(b"", body)) > _DEEPEST:
        raise Malformed(f"JSON nested deeper than {_DEEPEST} levels is not OTLP")


def _depth(body: bytes) -> int:
    """Returns the maximum nesting depth of brackets, including brackets inside strings."""
    deepest = depth = 0
    for start in range(0, len(body), _PIECE):
        letters = np.frombuffer(body, np.uint8, min(_PIECE, len(body) - start), start) | _SQUARE
        depths = np.cumsum((letters == _OPENS).astype(np.int8) - (letters == _CLOSES).astype(np.int8), dtype=np.int32)
        deepest = max(deepest, depth + int(depths.max()))
        depth += int(depths[-1])
    return deepest
