"""Habits: what the frames of one writer hold, as far as has been seen, so that what one of them lacks is known."""

from __future__ import annotations

from dataclasses import dataclass

from esper_otel.gateway.rebuild.parts import Part, PartShape
from esper_otel.leyline.numbers import UINT64_LIMIT, whole


@dataclass(slots=True)
class Habits:
    """What a writer says in its frames.

    Attributes:
        counts: it numbers its frames, or says how many points each has: whether one is whole is known.
        says_step: it says global steps.
        says_epoch: it says epochs.
        is_known: whether a frame has been released; what was not in it by then is not said with every frame.
    """

    counts: bool = False
    says_step: bool = False
    says_epoch: bool = False
    is_known: bool = False

    def note(self, shape: PartShape, *, is_ours: bool) -> None:
        """Learns from a part of a frame.

        Args:
            shape: of the part.
            is_ours: whether it is of our instrumentation scope: each frame has a global step and an epoch there.
        """
        self.counts = self.counts or shape.sequence is not None or shape.points is not None
        says_both = is_ours or self.counts
        self.says_step = self.says_step or says_both or shape.step is not None
        self.says_epoch = self.says_epoch or says_both or shape.epoch is not None

    def lacks(self, *, has_step: bool, has_epoch: bool) -> bool:
        """Whether a frame lacks what the writer says in its others."""
        return (self.says_step and not has_step) or (self.says_epoch and not has_epoch)

    def is_complete(self, part: Part) -> bool:
        """Whether all of a frame is in this part, as far as can be known."""
        shape = part.shape
        if self.counts:
            expected = whole(part.number(shape.points), UINT64_LIMIT)
            return expected is not None and len(part.numbers) >= expected
        return not self.lacks(has_step=shape.step is not None, has_epoch=shape.epoch is not None)
