"""Stage: where a seed is in its life."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """Life of a seed; the numbers are those of Leyline's SeedLifecycleStage."""

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    SHADOWING = 5
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10
    TERMINATED = 11
