"""Inflate: unpacks compressed bodies, with limits on the size of the content."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from esper_otel.gateway.receive.request import Malformed, TooLarge, Unsupported

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd  # the same, for earlier Pythons

MAX_REQUEST_BYTES = 64 * 1024 * 1024
IDENTITY, GZIP = "identity", "gzip"
_PIECE, _MOST_MEMBERS = 64 * 1024, 1_000
_ALWAYS_BYTES, _MOST_TIMES = 1024 * 1024, 200
# The memory of a decompressor: what the RFC wants to be supported, and the most that the Collector asks for.
_ZSTD_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): 23}


class _Form(NamedTuple):
    """A compression: what makes a decompressor, what that raises, and the bytes that every body begins with."""

    decompressor: Callable[[], Any]
    error: type[Exception]
    magic: tuple[bytes, ...]


_FORMS = {
    GZIP: _Form(lambda: zlib.decompressobj(16 + zlib.MAX_WBITS), zlib.error, (b"\x1f\x8b",)),
    "deflate": _Form(zlib.decompressobj, zlib.error, (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")),
    "zstd": _Form(lambda: zstd.ZstdDecompressor(options=_ZSTD_OPTIONS), zstd.ZstdError, (b"\x28\xb5\x2f\xfd",)),
}
ENCODINGS = (*_FORMS, IDENTITY)
# Other compressions that a Collector can be set to, by the beginning of a body; the last one has no magic number.
_OTHERS = {b"\xff\x06\x00\x00sNaPpY": "snappy", b"\x04\x22\x4d\x18": "lz4"}


def encoding_of(body: bytes) -> str:
    """Returns the compression of a gRPC message, by its first bytes: no protobuf request begins with any of these."""
    found = next((name for name, form in _FORMS.items() if body.startswith(form.magic)), None)
    return found or next((name for magic, name in _OTHERS.items() if body.startswith(magic)), IDENTITY)


def check_encoding(encoding: str) -> None:
    """Checks that bodies of a compression can be unpacked.

    Raises:
        Unsupported: they cannot; the message is what the sender's log shows.
    """
    if encoding not in ENCODINGS:
        raise Unsupported(
            f"compression {encoding:.20} is not supported: set it to zstd, gzip, deflate or none in the exporter"
        )


def inflated(body: bytes, *, encoding: str = GZIP) -> bytes:
    """Unpacks a body of one or more members (zstd calls them frames), up to ``MAX_REQUEST_BYTES``.

    The limit also depends on the length of the body, so that a small body cannot expand to a huge one. (Identical
    steps, which compress best, expand by a factor of 120.)

    Args:
        body: the body.
        encoding: one of ``ENCODINGS``; with "identity" the body is returned.

    Raises:
        Malformed: the body is not of that compression, or was cut short.
        TooLarge: its content is larger than the limit.
    """
    if encoding == IDENTITY:
        return body
    form = _FORMS[encoding]
    parts: list[bytes] = []
    left = most_bytes = min(MAX_REQUEST_BYTES, _ALWAYS_BYTES + _MOST_TIMES * len(body))
    rest, unpacking, members = memoryview(body), None, 0
    while rest:
        if unpacking is None:
            unpacking, members = form.decompressor(), members + 1
            if members > _MOST_MEMBERS:
                raise TooLarge(f"more than {_MOST_MEMBERS} {encoding} members: compress each request as one member")
        piece, rest = rest[:_PIECE], rest[_PIECE:]  # zlib copies the bytes after a member, so keep the pieces short
        try:
            part = unpacking.decompress(piece, left + 1)
        except form.error as error:
            raise Malformed(f"the body is not {encoding}: {error}") from None
        if len(part) > left:
            raise TooLarge(f"more than {most_bytes} bytes when unpacked, from {len(body)}: send smaller requests")
        parts.append(part)
        left -= len(part)
        if unpacking.eof:
            behind = len(unpacking.unused_data)
            rest, unpacking = memoryview(body)[len(body) - len(rest) - behind :], None
    if unpacking is not None:
        raise Malformed(f"the {encoding} body was cut short")
    return b"".join(parts)
