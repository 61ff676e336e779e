"""An entry of the catalogue: the name of a metric, its unit, its meaning and when it is present."""

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
    """A condition for a metric to have a value."""

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
        name: the name of the instrument, also used in Leyline.
        unit: the unit of the instrument, also used in Leyline.
        description: one line on the meaning of the value.
        gated: whether ``tolaria_step_enrichment_enabled = False`` suppresses it.
        needs: the conditions for it to have a value.
        kind: the kind of the OpenTelemetry instrument; that of step metrics is gauge.
        level: ``step`` and ``seed`` metrics are sent in frames; ``session`` metrics describe the telemetry itself.
        key: its key in ``SystemStatePacket.training_metrics``; empty if it has none.
        split_by: the attribute that distinguishes its series; empty if there is one series.
        source: the clock, window or formula behind the value.
        present: the frames that contain it.
        misleads: how it can be misread.
        window: the time or the steps that the value covers.
        error: the maximum error of the value.
        cost: the cost to the training thread.
        rise: the meaning of a rise.
    """

    name: str
    unit: str = "1"
    description: str = ""
    gated: bool = False
    needs: tuple[Need, ...] = ()
    kind: Literal["gauge", "counter", "updowncounter"] = "gauge"
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
        if self.key is None:  # the key of a step metric is its name
            object.__setattr__(self, "key", self.name if self.level == "step" else "")
        if self.level == "seed":
            object.__setattr__(self, "split_by", "seed_id")
        faults = []
        if not _NAME.fullmatch(str(self.name)):
            faults.append(
                f"metric name {self.name!r} is not valid in OpenTelemetry: it must be a letter, then at most "
                "254 letters, digits and _ . - /"
            )
        if not str(self.unit).isascii() or len(self.unit) > _UNIT_MAX_CHARACTERS:
            faults.append(f"unit {self.unit!r} of {self.name!r} is not ASCII text of at most 63 characters")
        if faults:
            raise InvalidCatalogue(faults)

    @property
    def field(self) -> str:
        """The keyword for it in ``now.seed``: the name without its prefix, with dots replaced by underscores."""
        return self.name.removeprefix("kasmina.seed.").removeprefix("esper.seed.").replace(".", "_")
