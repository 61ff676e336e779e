"""Stencil: serialized messages with holes for numbers, so that a table of seeds becomes bytes in a few copies.

Building a message per seed through protobuf's setters costs more than everything else in a packet; parsing one
from bytes costs a tenth of that. The bytes are protobuf's own: a message is serialized twice, with two numbers
in each hole whose encodings differ in every byte, and where the two differ the holes are.
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

# Marker of column c: the number whose bits are these plus c. The other marker is its complement. Both are
# ordinary numbers (about 2.0 and -2.0), so that no conversion between float and double alters their bits.
_MARKER_BITS = {4: 0x4000_0000, 8: 0x4000_0000_0000_0000}
_UNSIGNED = {4: "<u4", 8: "<u8"}
_FLOAT = {4: "<f4", 8: "<f8"}


@dataclass(frozen=True, slots=True)
class Stencil:
    """Serialized messages, one per row of a table, with holes that cells of the table fill.

    Attributes:
        wire: the bytes, anything in the holes.
        holes: places in ``wire`` of the bytes of each hole; shape (holes, 4) for float, (holes, 8) for double.
        cells: for each hole, the place of its cell in the flattened table.
        ends: where each row's bytes end.
    """

    wire: _Bytes
    holes: _Places
    cells: _Places
    ends: tuple[int, ...]

    @classmethod
    def of(cls, build: Callable[[Callable[[int], float]], Message], width: int) -> Stencil:
        """The stencil of one row.

        Args:
            build: makes the message; it calls its argument with a column to get what to put in that column's
                hole. Called twice.
            width: bytes of a number: 4 where the message has float, 8 where it has double.
        """
        first = _serialized(build, width, mask=0)
        second = _serialized(build, width, mask=2 ** (8 * width) - 1)
        holes = (first != second).nonzero()[0].reshape(-1, width)
        bits = first[holes].view(_UNSIGNED[width])[:, 0]
        return cls(first, holes, (bits - _MARKER_BITS[width]).astype(np.intp), (len(first),))

    @classmethod
    def joined(cls, rows: Sequence[Stencil], width: int, columns: int) -> Stencil:
        """The stencil of a table with so many columns, from those of its rows."""
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
        """The bytes with the table's numbers in the holes. Cells that fill a hole fit the hole's type."""
        width = self.holes.shape[1]
        wire = self.wire.copy()
        numbers = table.reshape(-1)[self.cells].astype(_FLOAT[width])
        wire[self.holes] = numbers.view(np.uint8).reshape(-1, width)
        return wire.tobytes()

    def slices(self) -> Iterable[slice]:
        """Where each row's bytes are."""
        return itertools.starmap(slice, itertools.pairwise((0, *self.ends)))


def _serialized(build: Callable[[Callable[[int], float]], Message], width: int, mask: int) -> _Bytes:
    def marker(column: int) -> float:
        bits = np.array((_MARKER_BITS[width] + column) ^ mask, _UNSIGNED[width])
        return float(bits.view(_FLOAT[width]))

    # Deterministic: the entries of maps in one order, both times.
    return np.frombuffer(build(marker).SerializeToString(deterministic=True), np.uint8)
