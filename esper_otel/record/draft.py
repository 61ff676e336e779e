"""Draft: a step that is over, before its frame is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from esper_otel.frames.frame import NO_READINGS, NO_SEEDS, SeedTable


class Draft(NamedTuple):
    """What a recorder hands to the publisher.

    Attributes:
        global_step: the step's number.
        epoch: its epoch.
        time_unix_ns: its time.
        values: what was recorded.
        table: the seed rows recorded.
        failed: whether the step raised.
        retired: seeds whose lives end before this step.
        ended: seeds whose lives ended when this step's state was asked for.
        context: values that stay in every frame from this one on.
        probed: readings of probes.
    """

    global_step: int
    epoch: int
    time_unix_ns: int
    values: Mapping[str, float]
    table: SeedTable = NO_SEEDS
    failed: bool = False
    retired: Sequence[str] = ()
    ended: tuple[str, ...] = ()
    context: Mapping[str, float] | None = None
    probed: Mapping[str, float] = NO_READINGS
