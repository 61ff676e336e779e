"""Inflate: gzip bodies are unpacked within bounds, at a cost that follows from their bytes."""

from __future__ import annotations

import zlib

from esper_otel.gateway.receive.request import Malformed, TooLarge

MAX_REQUEST_BYTES = 64 * 1024 * 1024
_GZIP = 16 + zlib.MAX_WBITS
_PIECE, _MOST_MEMBERS = 64 * 1024, 1_000
_ALWAYS_BYTES, _MOST_TIMES = 1024 * 1024, 200


def inflated(body: bytes, most_bytes: int = MAX_REQUEST_BYTES) -> bytes:
    """The content of a gzip body of one or more members, unpacked no further than ``most_bytes``.

    What it unpacks to is bounded by its own length too, so that a few bytes cannot cost much. Steps that are all the
    same become 120 times as long.

    Raises:
        Malformed: it is no gzip, or was cut short.
        TooLarge: there is more in it.
    """
    parts: list[bytes] = []
    left = most_bytes = min(most_bytes, _ALWAYS_BYTES + _MOST_TIMES * len(body))
    rest, unpacking, members = memoryview(body), None, 0
    while rest:
        if unpacking is None:
            unpacking, members = zlib.decompressobj(_GZIP), members + 1
            if members > _MOST_MEMBERS:
                raise TooLarge(f"more than {_MOST_MEMBERS} gzip members: compress each request as one")
        piece, rest = rest[:_PIECE], rest[_PIECE:]  # what is behind a member is copied, so it must be short
        try:
            part = unpacking.decompress(piece, left + 1)
        except zlib.error as error:
            raise Malformed(f"the body is no gzip: {error}") from None
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
