"""Habits: what the frames of one writer usually contain, to find out whether a frame lacks something."""

from __future__ import annotations

from dataclasses import dataclass

from esper_otel.frames.numbers import UINT64_LIMIT, whole
from esper_otel.parts.part import Part, PartShape


@dataclass(slots=True)
class Habits:
    """What a writer states in its frames.

    Attributes:
        counts: whether it numbers its frames or states their number of points, so that a complete frame is recognized.
        says_step: whether it states global steps.
        says_epoch: whether it states epochs.
        is_known: whether a frame has been released. A metric that this frame lacked is not part of every frame.
    """

    counts: bool = False
    says_step: bool = False
    says_epoch: bool = False
    is_known: bool = False

    def note(self, shape: PartShape, *, is_ours: bool) -> None:
        """Learns from a part of a frame.

        Args:
            shape: shape of the part.
            is_ours: whether it comes from our instrumentation scope, where each frame has a global step and an epoch.
        """
        self.counts = self.counts or shape.sequence is not None or shape.points is not None
        says_both = is_ours or self.counts
        self.says_step = self.says_step or says_both or shape.step is not None
        self.says_epoch = self.says_epoch or says_both or shape.epoch is not None

    def lacks(self, *, has_step: bool, has_epoch: bool) -> bool:
        """Returns whether a frame lacks a step or an epoch that the writer states in its other frames."""
        return (self.says_step and not has_step) or (self.says_epoch and not has_epoch)

    def is_complete(self, part: Part) -> bool:
        """Returns whether this part seems to contain the whole frame."""
        shape = part.shape
        if self.counts:
            expected = whole(part.number(shape.points), UINT64_LIMIT)
            return expected is not None and len(part.numbers) >= expected
        return not self.lacks(has_step=shape.step is not None, has_epoch=shape.epoch is not None)
