"""Leyline: the messages of ``esper.leyline.v1`` and the conversion of frames to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper_otel.leyline import messages
from esper_otel.leyline.packets import Packets, Page, packets, state

if TYPE_CHECKING:
    from esper_otel.leyline.messages import (
        BusEnvelope,
        BusMessageType,
        HardwareContext,
        HealthStatus,
        MessagePriority,
        MetricPoint,
        SeedLifecycleStage,
        SeedState,
        SystemHealth,
        SystemStatePacket,
        TelemetryEvent,
        TelemetryLevel,
        TelemetryPacket,
        TraceSpan,
    )
    from esper_otel.leyline.reader import LeylineMetricReader

__all__ = [
    "BusEnvelope",
    "BusMessageType",
    "HardwareContext",
    "HealthStatus",
    "LeylineMetricReader",
    "MessagePriority",
    "MetricPoint",
    "Packets",
    "Page",
    "SeedLifecycleStage",
    "SeedState",
    "SystemHealth",
    "SystemStatePacket",
    "TelemetryEvent",
    "TelemetryLevel",
    "TelemetryPacket",
    "TraceSpan",
    "packets",
    "state",
]


if not TYPE_CHECKING:  # otherwise type checkers would accept any name as a message

    def __getattr__(name: str) -> object:
        if name == "LeylineMetricReader":  # imported on demand: only this needs the OpenTelemetry SDK
            from esper_otel.leyline.reader import LeylineMetricReader

            return LeylineMetricReader
        if name in __all__:  # also on demand: see messages.py
            return getattr(messages, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
