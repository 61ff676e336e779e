"""The durations of the parts of a seed's life."""

from __future__ import annotations

from dataclasses import dataclass

# The improvement required of a seed after long training, as a share of the loss, and what counts as long, in steps.
_BENEFIT = 0.06
_LONG_TRAINING = 50


@dataclass(frozen=True, slots=True)
class Pace:
    """Numbers of steps that a seed spends in its stages. They depend on the run, so short runs show whole lives too.

    Attributes:
        between: steps from the germination of one seed to that of the next.
        training: steps in TRAINING.
        blending: steps in BLENDING, while alpha rises from 0 to 1.
        shadowing: steps in SHADOWING.
        probation: steps in PROBATIONARY.
        embargo: steps in EMBARGOED, before a culled seed may start over.
        risk_tolerance: highest allowed ratio of the loss with a seed to the loss without it. It is higher the shorter a
            seed trains.
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
        """Returns the pace for a run with that many steps, in which three seeds can reach their verdicts."""
        between, training, blending, shadowing, probation, embargo = (
            max(1, steps * percent // 100) for percent in (8, 14, 14, 3, 7, 12)
        )
        tolerance = 1.0 - _BENEFIT * min(1.0, training / _LONG_TRAINING) ** 2
        return cls(between, training, blending, shadowing, probation, embargo, tolerance)
