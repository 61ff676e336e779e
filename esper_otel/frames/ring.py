"""Ring: keeps frames for all readers, bounded by bytes; the oldest are dropped first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from esper_otel.frames.frame import Frame
from esper_otel.frames.packed import PackedFrames
from esper_otel.native import threads

# Measured with tracemalloc on Python 3.11: 770 bytes and 32 a value, with what is derived, its place in the dict and
# its size; 300 more and the cells themselves where there are seeds.
_FRAME_BYTES = 770
_VALUE_BYTES = 32
_TABLE_BYTES = 300

_AT_ONCE = 256  # frames that are packed together
_FEW = 16  # frames that are dropped together at most, beyond what the bytes ask for


def frame_bytes(frame: Frame) -> int:
    """About how much memory a frame holds on to, in bytes. Seed tables shared between fields count once."""
    return _FRAME_BYTES + _VALUE_BYTES * len(frame.numbers) + (_tables_bytes(frame) if frame.live.ids else 0)


def _tables_bytes(frame: Frame) -> int:
    live, seeds = frame.live.cells, frame.seeds.cells
    size = _TABLE_BYTES + live.nbytes
    return size if seeds is live else size + _TABLE_BYTES + seeds.nbytes


class Ring:
    """Frames by sequence number. One writer; any number of readers, each with a cursor of its own.

    Threads: ``append`` belongs to the publisher, ``pack`` to one other thread. Every other method may be called from
    any thread at any time; a dict is read and written in single operations, which the interpreter keeps whole.

    Attributes:
        first: sequence number of the oldest frame kept; ``last + 1`` when there is none.
        last: sequence number of the newest frame; 0 before the first.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._frames: dict[int, Frame | PackedFrames] = {}
        self._sizes: deque[int] = deque()  # of the frames, before any was packed
        self._size = 0
        self.first: int = 1
        self.last: int = 0
        self._saved = 0  # bytes by which packed frames are smaller; guarded, as is what becomes of them
        self._guard = threads().Lock()
        self._packed_to = 0
        self._unpacked: tuple[PackedFrames | None, list[Frame]] = (None, [])

    @property
    def size(self) -> int:
        """About how many bytes the frames hold on to."""
        return self._size - self._saved

    def append(self, frame: Frame) -> None:
        """Adds the frame whose sequence number is ``last + 1``; drops the oldest until the bytes fit."""
        number = self.last + 1
        self._frames[number] = frame  # first: any reader that sees the number then finds the frame
        self.last = number
        size = _FRAME_BYTES + _VALUE_BYTES * len(frame.numbers)  # as frame_bytes(), without a call in every step
        if frame.live.ids:
            size += _tables_bytes(frame)
        self._sizes.append(size)
        self._size += size
        if self._size - self._saved > self._capacity_bytes:
            self._drop()

    def _drop(self) -> None:
        """Drops the oldest until the bytes fit, and up to 1/128 of the frames: then it is not to do in every step."""
        with self._guard:
            enough = self.first + min((self.last - self.first) // 128, _FEW)
            while self.first < enough or (self._size - self._saved > self._capacity_bytes and self.first < self.last):
                number = self.first
                frame = self._frames.pop(number)
                self.first += 1
                size = self._sizes.popleft()
                self._size -= size
                if isinstance(frame, PackedFrames):
                    self._saved -= size - frame.share

    def pack(self, newest: int, is_over: Callable[[], bool]) -> None:
        """Packs what is older than the newest so many frames: it waits for long. In bursts, until ``is_over``."""
        while self.last - newest - self._packed_to >= _AT_ONCE and not is_over():
            first = max(self._packed_to + 1, self.first)
            self._packed_to = first + _AT_ONCE - 1
            kept = [self._frames.get(number) for number in range(first, first + _AT_ONCE)]
            frames = [frame for frame in kept if isinstance(frame, Frame)]
            if len(frames) < _AT_ONCE:  # some were dropped meanwhile
                continue
            sizes = list(map(frame_bytes, frames))
            packed = PackedFrames(frames)
            with self._guard:
                for frame, size in zip(frames, sizes, strict=True):
                    if frame.sequence >= self.first:
                        self._frames[frame.sequence] = packed
                        self._saved += size - packed.share

    def newest(self) -> Frame | None:
        """The newest frame."""
        frame = self._frames.get(self.last)
        return frame if isinstance(frame, Frame) else None

    def after(self, sequence: int, limit: int) -> tuple[list[Frame], int]:
        """Up to ``limit`` frames that follow ``sequence``, and how many between them and it are gone."""
        frames: list[Frame] = []
        last = self.last  # before any look-up: what is not there then was dropped, and does not come just now
        number = start = max(sequence + 1, self.first)
        while len(frames) < limit and number <= last:
            frame = self._frames.get(number)
            if isinstance(frame, PackedFrames):
                frame = self._frame_of(frame, number)
            if frame is not None:
                frames.append(frame)
            elif frames:
                break
            else:  # dropped since the first number was looked up
                start = number + 1
            number += 1
        return frames, start - (sequence + 1)

    def _frame_of(self, packed: PackedFrames, number: int) -> Frame:
        """A packed frame; the others that were packed with it are likely to be asked for next."""
        known, frames = self._unpacked
        if known is not packed:
            frames = packed.frames()
            self._unpacked = (packed, frames)
        return frames[number - packed.first]
