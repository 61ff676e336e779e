"""Blocks: consecutive frames of one writer, which are one value in a store's file."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from typing import NamedTuple

from esper_otel.frames.frame import Frame
from esper_otel.frames.records import DamagedRecord, RecordWriter, frames_in

# A block holds at most this many frames and about this many bytes.
_MOST_FRAMES, _MOST_BLOCK_BYTES = 256, 256 * 1024
_MOST_DECODED_BYTES = 16 * 1024 * 1024


class _DecodedBlock(NamedTuple):
    """The frames of a block that was read, and its size in bytes."""

    frames: list[Frame]
    size: int


class Blocks:
    """Reads frames, and keeps the blocks that were read last."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._decoded: OrderedDict[int, _DecodedBlock] = OrderedDict()
        self._bytes = 0

    def is_decoded(self, block: int) -> bool:
        """Whether the block was read, so that it is not damaged."""
        return block in self._decoded

    def frame(self, block: int, place: int) -> Frame:
        """Returns a frame of a block.

        Raises:
            DamagedRecord: the block is damaged, or has no such frame.
        """
        known = self._decoded.get(block)
        if known is None:
            row = self._connection.execute("SELECT frames FROM blocks WHERE id = ?", (block,)).fetchone()
            if row is None or type(row[0]) is not bytes:
                raise DamagedRecord("not bytes")
            known = self._decoded[block] = _DecodedBlock(frames_in(row[0]), len(row[0]))
            self._bytes += known.size
            while self._bytes > _MOST_DECODED_BYTES and len(self._decoded) > 1:
                self._bytes -= self._decoded.popitem(last=False)[1].size
        else:
            self._decoded.move_to_end(block)
        if not 0 <= place < len(known.frames):
            raise DamagedRecord(f"its block has no frame {place}")
        return known.frames[place]


class NewBlock:
    """Consecutive frames of one writer, to be stored as one block. ``last`` is the position of the last of them."""

    def __init__(self, block: int) -> None:
        self.id = block
        self.records: list[bytes] = []
        self.count: int = 0
        self.size: int = 0
        self.last: int = 0
        self._writer = RecordWriter()

    def add(self, frame: Frame, position: int) -> None:
        """Adds a frame."""
        record = self._writer.frame(frame)
        self.records.append(record)
        self.count += 1
        self.size += len(record)
        self.last = position

    @property
    def is_full(self) -> bool:
        """Whether a further frame belongs in another block."""
        return self.count >= _MOST_FRAMES or self.size >= _MOST_BLOCK_BYTES
