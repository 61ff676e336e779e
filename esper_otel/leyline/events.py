"""What went wrong in a step, as TelemetryEvents."""

from __future__ import annotations

from collections.abc import Mapping

from esper_otel.frame import FLOAT32_BOUND, Frame
from esper_otel.leyline.messages import TelemetryLevel, TelemetryPacket
from esper_otel.leyline.numbers import UINT32_LIMIT, UINT64_LIMIT, finite, whole

SOURCE = "tolaria"


def add_event(packet: TelemetryPacket, name: str, level: TelemetryLevel, **attributes: str) -> None:
    """Adds an event whose id is the packet's and its number in it; the packet has its id already."""
    event_id = f"{packet.packet_id}-event-{len(packet.events) + 1}"
    packet.events.add(event_id=event_id, description=name, level=level, attributes=attributes)


def step_events(frame: Frame, values: Mapping[str, float], packet_id: str) -> TelemetryPacket | None:
    """The packet of the step's own events; None when there are none.

    - ``loss_missing``, ``loss_nonfinite`` (CRITICAL): the packet's losses repeat the last finite one.
    - ``step_failed`` (ERROR): the step raised.
    - ``value_nonfinite`` (WARNING): a value that the state packet leaves out.
    - ``value_invalid`` (WARNING): a number that its integer field cannot hold.

    Args:
        frame: the step.
        values: ``frame.values()``.
        packet_id: the id of the step's state packet.
    """
    packet = TelemetryPacket(packet_id=f"{packet_id}-events", source_subsystem=SOURCE)
    if "loss" not in values:
        add_event(packet, "loss_missing", TelemetryLevel.TELEMETRY_LEVEL_CRITICAL, metric="loss")
    elif finite(values["loss"]) is None:
        add_event(
            packet,
            "loss_nonfinite",
            TelemetryLevel.TELEMETRY_LEVEL_CRITICAL,
            metric="loss",
            value=str(values["loss"]),
        )
    if values.get("esper.step.failed"):
        add_event(packet, "step_failed", TelemetryLevel.TELEMETRY_LEVEL_ERROR)
    outside = [name for name, value in values.items() if not -FLOAT32_BOUND < value < FLOAT32_BOUND and name != "loss"]
    for name in sorted(outside):  # not in the order of recording, which does not travel
        _warn(packet, "value_nonfinite", name, values[name])
    if whole(frame.epoch, UINT32_LIMIT) is None:
        _warn(packet, "value_invalid", "esper.epoch", frame.epoch)
    if whole(frame.global_step, UINT64_LIMIT) is None:
        _warn(packet, "value_invalid", "esper.global_step", frame.global_step)
    if not packet.events:
        return None
    packet.timestamp.FromNanoseconds(frame.time_unix_ns)
    packet.level = max(event.level for event in packet.events)
    return packet


def _warn(packet: TelemetryPacket, event: str, metric: str, value: float) -> None:
    add_event(packet, event, TelemetryLevel.TELEMETRY_LEVEL_WARNING, metric=metric, value=str(value))
