"""The GPU's metrics under the names of OpenTelemetry's semantic conventions, in addition, where they are wanted."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.schema.metric import Metric

_PRESENT = "With the setting hw_metrics, once the GPU is known, every 10 s and at the end of the run."
_GIB = 1024.0**3


class Twin(NamedTuple):
    """A metric of the conventions with the values of one of ours.

    Attributes:
        metric: name, unit and kind as in the conventions.
        of: our metric.
        factor: what our values are multiplied by.
    """

    metric: Metric
    of: str
    factor: float


# Semantic conventions 1.44, "hardware". A test compares them with the package of the conventions.
TWINS: tuple[Twin, ...] = (
    Twin(
        Metric(
            "hw.gpu.utilization",
            "1",
            "Fraction of time in which the training GPU ran a kernel.",
            gated=True,
            level="session",
            source="gpu_util_percent / 100.",
            present=_PRESENT,
        ),
        "gpu_util_percent",
        0.01,
    ),
    Twin(
        Metric(
            "hw.gpu.memory.usage",
            "By",
            "Memory of the training GPU that is used, by all processes.",
            gated=True,
            kind="updowncounter",
            level="session",
            source="gpu_mem_used_gb, in bytes.",
            present=_PRESENT,
        ),
        "gpu_mem_used_gb",
        _GIB,
    ),
    Twin(
        Metric(
            "hw.gpu.memory.limit",
            "By",
            "Size of the training GPU's memory.",
            gated=True,
            kind="updowncounter",
            level="session",
            source="esper.device.memory_total_gb, in bytes.",
            present=_PRESENT,
        ),
        "esper.device.memory_total_gb",
        _GIB,
    ),
    Twin(
        Metric(
            "hw.temperature",
            "Cel",
            "Temperature of the training GPU.",
            gated=True,
            level="session",
            source="esper.device.temperature_celsius.",
            present=_PRESENT,
        ),
        "esper.device.temperature_celsius",
        1.0,
    ),
)
