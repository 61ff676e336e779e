"""Memory of chunks: pages of their own, used again once no reader has them any more."""

from __future__ import annotations

import mmap as pages
import sys
from mmap import mmap

_LEAST_BYTES = 64 * 1024


class RowMemory:
    """Memory of a chunk.

    Where it is large it is taken from the system by one call. For memory that is written to for the first time, page by
    page, a step with 100 seeds paid 5 µs, a quarter of its cost.

    Args:
        capacity: how many bytes of rows there may be.
        rows: how many rows there may be.

    Attributes:
        content: for the rows.
        offsets: for four bytes a row.
    """

    __slots__ = ("content", "offsets")

    def __init__(self, capacity: int, rows: int) -> None:
        self.content: bytearray | mmap = _memory(capacity)
        self.offsets: bytearray | mmap = _memory(4 * rows, is_used=False)  # few are used where rows are long

    @property
    def can_be_used_again(self) -> bool:
        """Whether it can be known that nothing refers to it."""
        return isinstance(self.content, mmap)

    def are_free(self, capacity: int) -> bool:
        """Whether it has this capacity, and no array or memoryview refers to it. The chunk must be gone."""
        for memory in (self.content, self.offsets):
            if isinstance(memory, mmap):
                try:
                    memory.resize(len(memory))  # does nothing, but raises an exception if anything refers to it
                except BufferError:
                    return False
        return self.can_be_used_again and len(self.content) == capacity


def _memory(size: int, *, is_used: bool = True) -> bytearray | mmap:
    """Returns memory. Pages of their own are for Linux: other systems cannot say whether something refers to them."""
    if size < _LEAST_BYTES or sys.platform != "linux":
        return bytearray(size)
    flags = pages.MAP_PRIVATE | pages.MAP_ANONYMOUS  # private, so that forked children do not share it
    return mmap(-1, size, flags=flags | pages.MAP_POPULATE if is_used else flags)
