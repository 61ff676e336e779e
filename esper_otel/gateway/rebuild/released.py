"""Released: a frame that pullers may have had, and what it is made of, so that it can be made anew."""

from __future__ import annotations

from dataclasses import dataclass

from esper_otel.frames.frame import Frame, SeedTable
from esper_otel.gateway.rebuild.parts import Part
from esper_otel.gateway.receive.request import PointSender

# What a kept frame takes beside its values and cells, about.
_BYTES, _BYTES_PER_VALUE = 2_000, 100


@dataclass(slots=True, eq=False)
class ReleasedFrame:
    """A released frame, and what it is made of.

    Attributes:
        part: its values.
        sequence: its number; 0 when its sender does not say it.
        sender: who sent it.
        step: its global step, if its sender does not say it.
        complete: whether every point is in it.
        received_unix_ns: when its last point came.
        before: the live seeds before it.
        loss_before: the last finite loss before it.
        ends: seeds and columns whose streams end before it; the column is -1 when the seed's life does.
        frame: the frame.
        revision: how often it was made.
    """

    part: Part
    sequence: int
    sender: PointSender
    step: int
    complete: bool
    received_unix_ns: int
    before: SeedTable
    loss_before: float | None
    ends: set[tuple[str, int]]
    frame: Frame | None = None
    revision: int = 0

    def size(self) -> int:
        """The memory it takes, about."""
        cells = 0 if self.frame is None else self.frame.seeds.cells.nbytes + self.frame.live.cells.nbytes
        return _BYTES + _BYTES_PER_VALUE * len(self.part.shape.names) + self.part.numbers.nbytes + cells
