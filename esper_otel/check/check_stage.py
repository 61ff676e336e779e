"""A stage on the way from a trainer to the places where its telemetry should arrive."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckStage:
    """One stage on the way; ``ok`` is None when the stage was not checked."""

    name: str
    ok: bool | None
    message: str
    fix: str = ""
