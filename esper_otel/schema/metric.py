"""One entry of the catalogue: what a metric is called, measured in, and when it is there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from esper_otel.errors import InvalidCatalogue

# OpenTelemetry's rule for instrument names (metrics API specification 1.49, "Instrument name syntax").
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-/]{0,254}")
_UNIT_MAX_CHARACTERS = 63  # same specification, "Instrument unit"


class Need(StrEnum):
    """What must be there before a metric can have a value."""

    CUDA = "CUDA"
    NVML = "NVML"
    PSUTIL = "psutil"
    SEVERAL_SOURCES = "several sources"
    BLENDING = "BLENDING"
    ISOLATION_STATISTICS = "isolation statistics"


@dataclass(frozen=True, slots=True)
class Metric:
    """A declared metric. Users declare their own step metrics with it: ``Metric("tokens_per_s", unit="rate")``.

    Attributes:
        name: the instrument's name, and Leyline's.
        unit: the instrument's unit, and Leyline's.
        description: one line that says what the value means.
        gated: whether ``tolaria_step_enrichment_enabled = False`` suppresses it.
        needs: what must be there before it can have a value.
        kind: the OpenTelemetry instrument that carries it.
        level: ``step`` and ``seed`` metrics travel in frames; ``session`` ones describe the telemetry itself.
        key: its key in ``SystemStatePacket.training_metrics``; empty when it has none.
        split_by: the attribute that tells its series apart; empty when there is one series.
        source: clock, window or formula behind the value.
        present: when a frame has it.
        misleads: how it can be misread.
        window: which stretch of time or which steps the value is about.
        error: how wrong it is at most.
        cost: what it costs the training thread.
        rise: what it means when it rises.
    """

    name: str
    unit: str = "1"
    description: str = ""
    gated: bool = False
    needs: tuple[Need, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"
    level: Literal["step", "seed", "session"] = "step"
    key: str | None = None
    split_by: str = ""
    source: str = ""
    present: str = ""
    misleads: str = ""
    window: str = ""
    error: str = ""
    cost: str = ""
    rise: str = ""

    def __post_init__(self) -> None:
        if self.key is None:  # a step metric stands in the packet under its own name
            object.__setattr__(self, "key", self.name if self.level == "step" else "")
        if self.level == "seed":
            object.__setattr__(self, "split_by", "seed_id")
        faults = []
        if not _NAME.fullmatch(str(self.name)):
            faults.append(
                f"metric name {self.name!r} is not one OpenTelemetry accepts: a letter first, then at most "
                "254 letters, digits and _ . - /"
            )
        if not str(self.unit).isascii() or len(self.unit) > _UNIT_MAX_CHARACTERS:
            faults.append(f"unit {self.unit!r} of {self.name!r} is not ASCII text of at most 63 characters")
        if faults:
            raise InvalidCatalogue(faults)

    @property
    def field(self) -> str:
        """The keyword that records it in ``now.seed``: the name without its prefix, dots as underscores."""
        return self.name.removeprefix("kasmina.seed.").removeprefix("esper.seed.").replace(".", "_")
