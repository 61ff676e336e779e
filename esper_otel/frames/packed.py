"""Packed frames: frames that wait for a long time, pickled and compressed to a fifth to a tenth of their memory."""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Sequence

from esper_otel.frames.frame import Frame

# Pickling holds the interpreter's lock: a few hundred microseconds at a time.
_AT_ONCE = 16

# Bytes that a frame needs in addition to its share of the content: its entry in the ring, and its size.
_BESIDE = 150


class PackedFrames:
    """Frames in their order. Immutable; any thread may unpack it.

    Args:
        frames: they follow each other.

    Attributes:
        first: sequence number of the first one.
        share: bytes that one takes now.
    """

    __slots__ = ("_content", "_count", "first", "share")

    def __init__(self, frames: Sequence[Frame]) -> None:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
        for start in range(0, len(frames), _AT_ONCE):
            pickler.dump(frames[start : start + _AT_ONCE])
        self._content = zlib.compress(buffer.getbuffer(), 1)
        self._count = len(frames)
        self.first: int = frames[0].sequence
        self.share: int = len(self._content) // len(frames) + _BESIDE

    def frames(self) -> list[Frame]:
        """The frames."""
        unpickler = pickle.Unpickler(io.BytesIO(zlib.decompress(self._content)))  # noqa: S301 - pickled here
        found: list[Frame] = []
        while len(found) < self._count:
            found += unpickler.load()
        return found
