"""Bounds: what a request may cost, counted in its bytes before anything is built of them.

Of two bytes on the wire protobuf and JSON build an object of a hundred bytes or more. A large request is therefore
read in pieces that are small; a piece that cannot be small is walked, field by field, before it is read.
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

# Whatever is in so many bytes, protobuf needs 30 MB for it at most.
_SMALL = 256 * 1024
# A field counts as one, a message as four: with all that protobuf needs for one, this many take about 250 MB.
_MOST, _MESSAGE = 4_000_000, 4
# An element of a packed field takes a byte on the wire, and eight when it is built.
_PACKED_BYTES = 8

# Of one request: points, of which a fifth is taken and the rest refused by metric; resources, scopes and metrics.
_MOST_POINTS, _MOST_METRICS = 1_000_000, 400_000

# Values, keys and brackets of JSON: so many take about 210 MB, and 7 s of one core (November 2026).
_MOST_WORDS = 1_000_000
_DEEPEST = 200
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_PIECE = 1024 * 1024
# With this bit a square bracket is a curly one.
_SQUARE, _OPENS, _CLOSES = 0x20, ord("{"), ord("}")

_RESOURCE_METRICS = 0x0A
_NUMBER, _BYTES, _GROUPS, _FIXED = 0, 2, (3, 4), {1: 8, 5: 4}

_SMALLER = "send smaller requests (a collector: send_batch_max_size; a gRPC or HTTP exporter: its batch size)"

# What a message's fields hold, by tag: a message, or None for packed numbers.
_Fields: TypeAlias = Mapping[int, "_Fields | None"]


def pieces(body: bytes, message: type[Any]) -> Iterator[bytes]:
    """A request in pieces that are requests too; none of them costs much to read.

    Args:
        body: the request.
        message: what it is read as; its field 1 is the ResourceMetrics.

    Raises:
        TooLarge: it would cost too much.
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
    yield _checked(body[start:], message)  # also what is malformed, or of another version: protobuf decides


def _checked(body: bytes, message: type[Any]) -> bytes:
    check_parts(body, message)
    return body


def check_counts(*, points: int = 0, metrics: int = 0) -> None:
    """Checks what was found in a request so far.

    Args:
        points: data points.
        metrics: resources, scopes and metrics.

    Raises:
        TooLarge: there is too much.
    """
    if points > _MOST_POINTS:
        raise TooLarge(f"more than {_MOST_POINTS} points in one request: {_SMALLER}")
    if metrics > _MOST_METRICS:
        raise TooLarge(f"more than {_MOST_METRICS} resources, scopes and metrics in one request: {_SMALLER}")


def check_parts(body: bytes, message: type[Any]) -> None:
    """Checks how much protobuf will build of a serialized message; what is malformed is left to it.

    Args:
        body: the message.
        message: its class.

    Raises:
        TooLarge: too much.
    """
    if len(body) <= _SMALL:
        return
    left = _MOST
    inside: list[tuple[int, int, _Fields]] = [(0, len(body), _fields(message.DESCRIPTOR))]
    while inside and left >= 0:
        start, end, fields = inside.pop()
        try:
            left = _walk(body, start, end, fields, inside, left)
        except IndexError:  # protobuf stops there too; what came before it was built
            continue
    if left < 0:
        raise TooLarge(f"more than {_MOST} fields in one request: {_SMALLER}")


def _walk(
    body: bytes, position: int, end: int, fields: _Fields, inside: list[tuple[int, int, _Fields]], left: int
) -> int:
    """Counts the fields of a message, and notes the messages in it; returns how much is left of what is allowed."""
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
        elif kind not in _GROUPS:  # what is in a group of others counts as if it were ours
            break
    return left


@cache
def _fields(descriptor: Any) -> _Fields:
    """The fields of a message, and of the messages in it, of which more is built than their bytes."""
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
    """Checks how much will be built of JSON.

    Raises:
        TooLarge: too much.
        Malformed: it is nested too deep.
    """
    words = sum(map(body.count, (b"{", b"[", b",", b":")))
    if words > _MOST_WORDS:
        raise TooLarge(f"more than {_MOST_WORDS} values in one request in JSON: {_SMALLER}")
    if words > _DEEPEST and _depth(body) > _DEEPEST and _depth(_TEXT.sub(b"", body)) > _DEEPEST:
        raise Malformed(f"JSON nested deeper than {_DEEPEST}: OTLP is not")


def _depth(body: bytes) -> int:
    """How deep brackets are nested, those in texts too."""
    deepest = depth = 0
    for start in range(0, len(body), _PIECE):
        letters = np.frombuffer(body, np.uint8, min(_PIECE, len(body) - start), start) | _SQUARE
        depths = np.cumsum((letters == _OPENS).astype(np.int8) - (letters == _CLOSES).astype(np.int8), dtype=np.int32)
        deepest = max(deepest, depth + int(depths.max()))
        depth += int(depths[-1])
    return deepest
