"""Blocks of the store, taken apart and sealed again: what another program could write into a store's file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence


def taken_apart(content: bytes) -> tuple[list[bytes], bytes]:
    """The texts of a block, and its frames."""
    count, _ = struct.unpack_from("<II", content, 4)
    position, texts = 12, []
    for _ in range(count):
        (length,) = struct.unpack_from("<I", content, position)
        texts.append(content[position + 4 : position + 4 + length])
        position += 4 + length
    return texts, content[position:]


def sealed(texts: Sequence[bytes], frames: bytes, count: int = 1) -> bytes:
    """A block with its checksum."""
    parts = [struct.pack("<I", len(text)) + text for text in texts]
    content = struct.pack("<II", len(texts), count) + b"".join(parts) + frames
    return struct.pack("<I", zlib.crc32(content)) + content
