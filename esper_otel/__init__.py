"""OpenTelemetry for training runs, built so that a controller can act on it.

``start()`` begins a session. The ``Telemetry`` object that it returns records steps, sends each of them over OTLP and
provides Leyline packets. The README shows a training loop of twelve lines.

Names are imported when they are first used: a controller that only reads packets loads neither torch nor the
OpenTelemetry SDK.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from esper_otel._version import __version__
from esper_otel.errors import (
    AdapterError,
    ConfigurationError,
    EsperOtelError,
    GatewayError,
    GatewayUnavailable,
    InvalidCatalogue,
    InvalidName,
    InvalidValue,
    MistakeError,
    StaleCursor,
    UnknownMetric,
    UnknownRun,
    WrongState,
)

if TYPE_CHECKING:
    from esper_otel import aio as aio
    from esper_otel import errors as errors
    from esper_otel import leyline as leyline
    from esper_otel import oona as oona
    from esper_otel import schema as schema
    from esper_otel import testing as testing
    from esper_otel.derive.flops import flops
    from esper_otel.derive.gradients import gradient_conflict_rate
    from esper_otel.derive.processor import Processor
    from esper_otel.hours.bar import Bar, PhaseInfo, RunHours
    from esper_otel.integrations.watch import watch
    from esper_otel.leyline.packets import Packets, Page
    from esper_otel.leyline.reader import LeylineMetricReader
    from esper_otel.pull.client import TamiyoClient
    from esper_otel.pull.event_infos import EventInfo, EventPage
    from esper_otel.pull.infos import RunInfo
    from esper_otel.pull.views import RankInfo, RunRanks
    from esper_otel.record.step import Step
    from esper_otel.schema import Metric, Stage
    from esper_otel.session.start import start
    from esper_otel.session.telemetry import Telemetry
    from esper_otel.settings import EsperSettings

__all__ = [
    "AdapterError",
    "Bar",
    "ConfigurationError",
    "EsperOtelError",
    "EsperSettings",
    "EventInfo",
    "EventPage",
    "GatewayError",
    "GatewayUnavailable",
    "InvalidCatalogue",
    "InvalidName",
    "InvalidValue",
    "LeylineMetricReader",
    "Metric",
    "MistakeError",
    "Packets",
    "Page",
    "PhaseInfo",
    "Processor",
    "RankInfo",
    "RunHours",
    "RunInfo",
    "RunRanks",
    "Stage",
    "StaleCursor",
    "Step",
    "TamiyoClient",
    "Telemetry",
    "UnknownMetric",
    "UnknownRun",
    "WrongState",
    "__version__",
    "flops",
    "gradient_conflict_rate",
    "start",
    "watch",
]

_HOMES = {
    "esper_otel.pull.client": ("TamiyoClient",),
    "esper_otel.pull.event_infos": ("EventInfo", "EventPage"),
    "esper_otel.pull.infos": ("RunInfo",),
    "esper_otel.pull.views": ("RankInfo", "RunRanks"),
    "esper_otel.derive.flops": ("flops",),
    "esper_otel.derive.gradients": ("gradient_conflict_rate",),
    "esper_otel.derive.processor": ("Processor",),
    "esper_otel.hours.bar": ("Bar", "PhaseInfo", "RunHours"),
    "esper_otel.integrations.watch": ("watch",),
    "esper_otel.leyline.packets": ("Packets", "Page"),
    "esper_otel.leyline.reader": ("LeylineMetricReader",),
    "esper_otel.record.step": ("Step",),
    "esper_otel.schema": ("Metric", "Stage"),
    "esper_otel.session.start": ("start",),
    "esper_otel.settings": ("EsperSettings",),
    "esper_otel.session.telemetry": ("Telemetry",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = frozenset({"aio", "errors", "leyline", "oona", "schema", "testing"})


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name in _HOME_OF:
            found: object = getattr(import_module(_HOME_OF[name]), name)
            globals()[name] = found
            return found
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
