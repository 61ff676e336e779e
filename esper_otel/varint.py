"""Varint: how protobuf writes numbers, and the head of a field."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """A number from 0, seven bits a byte, the lowest first."""
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    content.append(number)
    return bytes(content)


def read_varint(content: bytes, position: int) -> tuple[int, int]:
    """The number at a position, and where it ends.

    Raises:
        IndexError: the content ends before it does, or it has more than ten bytes.
    """
    number = content[position] & 0x7F
    for shift in range(7, 71, 7):
        if content[position] < 0x80:
            return number, position + 1
        position += 1
        number |= (content[position] & 0x7F) << shift
    raise IndexError("no number is so long")


def field_head(number: int, length: int) -> bytes:
    """What stands before the content of a field that is bytes or a message: its tag and its length."""
    return varint(number << 3 | 2) + varint(length)
