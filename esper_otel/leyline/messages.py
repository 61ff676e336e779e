"""The messages and enums of Leyline, package ``esper.leyline.v1``.

When Esper's own generated module is imported first, these are its classes. An enum's numbers are its
attributes: ``SeedLifecycleStage.SEED_STAGE_BLENDING``.
"""

from esper_otel.leyline.pool import leyline_types

_types = leyline_types(__name__)

BusEnvelope = _types["BusEnvelope"]
BusMessageType = _types["BusMessageType"]
HardwareContext = _types["HardwareContext"]
HealthStatus = _types["HealthStatus"]
MessagePriority = _types["MessagePriority"]
MetricPoint = _types["MetricPoint"]
SeedLifecycleStage = _types["SeedLifecycleStage"]
SeedState = _types["SeedState"]
SystemHealth = _types["SystemHealth"]
SystemStatePacket = _types["SystemStatePacket"]
TelemetryEvent = _types["TelemetryEvent"]
TelemetryLevel = _types["TelemetryLevel"]
TelemetryPacket = _types["TelemetryPacket"]
TraceSpan = _types["TraceSpan"]
