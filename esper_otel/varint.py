"""Varints, protobuf's encoding of integers, and the heads of fields."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """Encodes a non-negative number with seven bits per byte, lowest bits first."""
    if number <= 0x7F:
        return bytes((number,))
    if number <= 0x3FFF:
        return bytes((number & 0x7F | 0x80, number >> 7))
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    content.append(number)
    return bytes(content)


def read_varint(content: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position and the position after it.

    Raises:
        IndexError: the content ends within the number, or the number has more than ten bytes.
    """
    number = content[position] & 0x7F
    for shift in range(7, 71, 7):
        if content[position] < 0x80:
            return number, position + 1
        position += 1
        number |= (content[position] & 0x7F) << shift
    raise IndexError("a varint has at most ten bytes")


def field_head(number: int, length: int) -> bytes:
    """Returns the tag and the length that precede the content of a field of type bytes or message."""
    return varint(number << 3 | 2) + varint(length)
