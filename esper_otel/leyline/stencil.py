"""Stencils: serialized messages with holes for numbers, into which a table of seeds is copied with a few array copies.

This avoids setting the fields of a protobuf message for each seed. The bytes come from protobuf itself: a message is
serialized twice, with two different numbers for each hole, whose encodings differ in every byte. The holes are where
the two results differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from esper_otel.frames.frame import Cells

_Bytes = npt.NDArray[np.uint8]
_Places = npt.NDArray[np.intp]

# The marker of column c is the number whose bits are this value plus c; the second marker has the complementary bits.
# Both are ordinary numbers (about 2.0 and -2.0), so conversions between float and double keep their bits.
_MARKER_BITS = {4: 0x4000_0000, 8: 0x4000_0000_0000_0000}
_UNSIGNED = {4: "<u4", 8: "<u8"}
_FLOAT = {4: "<f4", 8: "<f8"}


@dataclass(frozen=True, slots=True)
class Stencil:
    """Serialized messages, one per row of a table, with holes to be filled with cells of the table.

    Attributes:
        wire: the bytes, with arbitrary bytes in the holes.
        holes: positions in ``wire`` of the bytes of each hole; shape (holes, 4) for float, (holes, 8) for double.
        cells: for each hole, the position of its cell in the flattened table.
        ends: the end position of each row's bytes.
    """

    wire: _Bytes
    holes: _Places
    cells: _Places
    ends: tuple[int, ...]

    @classmethod
    def of(cls, build: Callable[[Callable[[int], float]], Message], width: int) -> Stencil:
        """Creates the stencil of one row.

        Args:
            build: builds the message; called twice. It calls its argument with a column to get the number for that
                column's hole.
            width: bytes per number: 4 if the message has float, 8 if it has double.
        """
        first = _serialized(build, width, mask=0)
        second = _serialized(build, width, mask=2 ** (8 * width) - 1)
        holes = (first != second).nonzero()[0].reshape(-1, width)
        bits = first[holes].view(_UNSIGNED[width])[:, 0]
        return cls(first, holes, (bits - _MARKER_BITS[width]).astype(np.intp), (len(first),))

    @classmethod
    def joined(cls, rows: Sequence[Stencil], width: int, columns: int) -> Stencil:
        """Creates the stencil of a table with ``columns`` columns from the stencils of its rows."""
        if not rows:
            return cls(np.empty(0, np.uint8), np.empty((0, width), np.intp), np.empty(0, np.intp), ())
        ends = tuple(itertools.accumulate(len(row.wire) for row in rows))
        starts = (0, *ends[:-1])
        return cls(
            np.concatenate([row.wire for row in rows]),
            np.concatenate([row.holes + start for row, start in zip(rows, starts, strict=True)]),
            np.concatenate([row.cells + number * columns for number, row in enumerate(rows)]),
            ends,
        )

    def filled(self, table: Cells) -> bytes:
        """Returns the bytes with the table's numbers in the holes. The numbers must fit the type of the holes."""
        width = self.holes.shape[1]
        wire = self.wire.copy()
        numbers = table.reshape(-1)[self.cells].astype(_FLOAT[width])
        wire[self.holes] = numbers.view(np.uint8).reshape(-1, width)
        return wire.tobytes()

    def slices(self) -> Iterable[slice]:
        """Returns the slice of each row's bytes."""
        return itertools.starmap(slice, itertools.pairwise((0, *self.ends)))


def _serialized(build: Callable[[Callable[[int], float]], Message], width: int, mask: int) -> _Bytes:
    def marker(column: int) -> float:
        bits = np.array((_MARKER_BITS[width] + column) ^ mask, _UNSIGNED[width])
        return float(bits.view(_FLOAT[width]))

    # Deterministic, so that map entries are in the same order both times.
    return np.frombuffer(build(marker).SerializeToString(deterministic=True), np.uint8)
