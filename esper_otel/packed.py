"""Packed: frames that wait for long, in a fifth to a tenth of the memory."""

from __future__ import annotations

import io
import pickle
import zlib
from array import array
from collections.abc import Sequence

from esper_otel.frame import Frame

# Pickling holds the interpreter's lock: a few hundred microseconds at a time.
_AT_ONCE = 16

# What a frame takes beside its part of the content: its place in the ring, and its size.
_BESIDE = 120


class Packed:
    """Frames in their order. Immutable; any thread may unpack it.

    What processors derived is kept as their readings; everything else is as it was, to the bit.

    Args:
        frames: they follow each other.
        sizes: how many bytes each of them took before.

    Attributes:
        first: sequence number of the first one.
        share: bytes that one takes now.

    Raises:
        Exception: what a user's processor raises that is asked for its readings.
    """

    __slots__ = ("_content", "_sizes", "first", "share")

    def __init__(self, frames: Sequence[Frame], sizes: Sequence[int]) -> None:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
        for start in range(0, len(frames), _AT_ONCE):
            pickler.dump([_read(frame) for frame in frames[start : start + _AT_ONCE]])
        self._content = zlib.compress(buffer.getbuffer(), 1)
        self._sizes = array("Q", sizes)
        self.first = frames[0].sequence
        self.share = len(self._content) // len(frames) + _BESIDE

    def size_before(self, number: int) -> int:
        """How many bytes the frame of this number took before it was packed."""
        return self._sizes[number - self.first]

    def frames(self) -> list[Frame]:
        """The frames."""
        unpickler = pickle.Unpickler(io.BytesIO(zlib.decompress(self._content)))  # noqa: S301 - pickled here
        found: list[Frame] = []
        while len(found) < len(self._sizes):
            found += unpickler.load()
        return found


def _read(frame: Frame) -> Frame:
    """The frame with the readings of its processors in place of their states."""
    if not frame.derived:
        return frame
    readings: dict[str, float] = {}
    for processor, state in frame.derived:
        readings.update(processor.readings(state))
    return frame._replace(derived=(), context={**readings, **frame.context})
