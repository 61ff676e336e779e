"""OpenTelemetry for training runs that a controller can steer by.

``start()`` begins a session; the ``Telemetry`` it returns records steps, sends each of them over OTLP and gives
Leyline packets. See the README for a training loop of twelve lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper_otel._version import __version__
from esper_otel.derive.processor import Processor
from esper_otel.errors import (
    AdapterError,
    ConfigurationError,
    EsperOtelError,
    InvalidCatalogue,
    InvalidName,
    InvalidValue,
    MistakeError,
    UnknownMetric,
    WrongState,
)
from esper_otel.leyline import Packets, Page
from esper_otel.record.step import Step
from esper_otel.schema import Metric, Stage
from esper_otel.session import start
from esper_otel.settings import EsperSettings
from esper_otel.telemetry import Telemetry

if TYPE_CHECKING:
    from esper_otel.derive.gradients import gradient_conflict_rate
    from esper_otel.leyline.reader import LeylineMetricReader

__all__ = [
    "AdapterError",
    "ConfigurationError",
    "EsperOtelError",
    "EsperSettings",
    "InvalidCatalogue",
    "InvalidName",
    "InvalidValue",
    "LeylineMetricReader",
    "Metric",
    "MistakeError",
    "Packets",
    "Page",
    "Processor",
    "Stage",
    "Step",
    "Telemetry",
    "UnknownMetric",
    "WrongState",
    "__version__",
    "gradient_conflict_rate",
    "start",
]


def __getattr__(name: str) -> object:
    if name == "gradient_conflict_rate":  # on demand: it needs torch, the rest does not
        from esper_otel.derive.gradients import gradient_conflict_rate

        return gradient_conflict_rate
    if name == "LeylineMetricReader":
        from esper_otel.leyline.reader import LeylineMetricReader

        return LeylineMetricReader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
