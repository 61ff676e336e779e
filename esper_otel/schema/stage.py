"""The stages of a seed's life."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """A stage in the life of a seed. The numbers are those of Leyline's SeedLifecycleStage."""

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
