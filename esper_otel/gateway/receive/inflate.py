"""Inflate: unpacks gzip bodies, with limits on the size of the content."""

from __future__ import annotations

import zlib

from esper_otel.gateway.receive.request import Malformed, TooLarge

MAX_REQUEST_BYTES = 64 * 1024 * 1024
_GZIP = 16 + zlib.MAX_WBITS
_PIECE, _MOST_MEMBERS = 64 * 1024, 1_000
_ALWAYS_BYTES, _MOST_TIMES = 1024 * 1024, 200


def inflated(body: bytes, most_bytes: int = MAX_REQUEST_BYTES) -> bytes:
    """Unpacks a gzip body of one or more members, up to ``most_bytes``.

    The limit also depends on the length of the body, so that a small body cannot expand to a huge one. (Identical
    steps, which compress best, expand by a factor of 120.)

    Raises:
        Malformed: the body is not gzip, or was cut short.
        TooLarge: its content is larger than the limit.
    """
    parts: list[bytes] = []
    left = most_bytes = min(most_bytes, _ALWAYS_BYTES + _MOST_TIMES * len(body))
    rest, unpacking, members = memoryview(body), None, 0
    while rest:
        if unpacking is None:
            unpacking, members = zlib.decompressobj(_GZIP), members + 1
            if members > _MOST_MEMBERS:
                raise TooLarge(f"more than {_MOST_MEMBERS} gzip members: compress each request as one member")
        piece, rest = rest[:_PIECE], rest[_PIECE:]  # zlib copies the bytes after a member, so keep the pieces short
        try:
            part = unpacking.decompress(piece, left + 1)
        except zlib.error as error:
            raise Malformed(f"the body is not gzip: {error}") from None
        if len(part) > left:
            raise TooLarge(f"more than {most_bytes} bytes when unpacked, from {len(body)}: send smaller requests")
        parts.append(part)
        left -= len(part)
        if unpacking.eof:
            behind = len(unpacking.unused_data)
            rest, unpacking = memoryview(body)[len(body) - len(rest) - behind :], None
    if unpacking is not None:
        raise Malformed("the gzip body was cut short")
    return b"".join(parts)
