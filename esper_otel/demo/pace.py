"""Pace: how long the parts of a seed's life take."""

from __future__ import annotations

from dataclasses import dataclass

# What is asked of a seed after so many steps of training: this share of the loss.
_BENEFIT = 0.06
_LONG_TRAINING = 50


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a seed stays in its stages, in steps: shares of the run, so that a short one shows whole lives too.

    Attributes:
        between: from the germination of one seed to that of the next.
        training: in TRAINING.
        blending: in BLENDING, while alpha rises from 0 to 1.
        shadowing: in SHADOWING.
        probation: in PROBATIONARY.
        embargo: in EMBARGOED, before a culled seed may start over.
        risk_tolerance: the most that the loss with a seed may be of the loss without it; the shorter a seed has
            trained, the less is asked of it.
    """

    between: int
    training: int
    blending: int
    shadowing: int
    probation: int
    embargo: int
    risk_tolerance: float

    @classmethod
    def of(cls, steps: int) -> Pace:
        """The pace of a run of so many steps: three seeds come to their verdicts well within it."""
        between, training, blending, shadowing, probation, embargo = (
            max(1, steps * percent // 100) for percent in (8, 14, 14, 3, 7, 12)
        )
        tolerance = 1.0 - _BENEFIT * min(1.0, training / _LONG_TRAINING) ** 2
        return cls(between, training, blending, shadowing, probation, embargo, tolerance)
