"""Problems in a step, reported as TelemetryEvents."""

from __future__ import annotations

from collections.abc import Mapping

from esper_otel.frames.frame import Frame
from esper_otel.frames.numbers import UINT32_LIMIT, UINT64_LIMIT, are_finite, finite, whole
from esper_otel.leyline import messages

SOURCE = "tolaria"
# The name of the event of a step whose loss is not finite.
LOSS_NONFINITE = "loss_nonfinite"


def add_event(packet: messages.TelemetryPacket, name: str, level: messages.TelemetryLevel, **attributes: str) -> None:
    """Adds an event. Its id consists of the packet's id, which must be set before, and the event's number."""
    event_id = f"{packet.packet_id}-event-{len(packet.events) + 1}"
    packet.events.add(event_id=event_id, description=name, level=level, attributes=attributes)


def step_events(frame: Frame, values: Mapping[str, float], packet_id: str) -> messages.TelemetryPacket | None:
    """Returns the packet of the step's own events; None if there are no events.

    - ``loss_missing``, ``loss_nonfinite`` (CRITICAL): the packet's losses repeat the last finite one.
    - ``step_failed`` (ERROR): the step raised an exception.
    - ``value_nonfinite`` (WARNING): the state packet leaves out a value that is not finite.
    - ``value_invalid`` (WARNING): an integer field cannot hold the recorded number.

    Args:
        frame: the step.
        values: ``frame.values()``.
        packet_id: the id of the step's state packet.
    """
    outside = [] if are_finite(values.values()) else [name for name, value in values.items() if finite(value) is None]
    are_whole = None not in (whole(frame.epoch, UINT32_LIMIT), whole(frame.global_step, UINT64_LIMIT))
    if not outside and are_whole and "loss" in values and not values.get("esper.step.failed"):
        return None
    packet = messages.TelemetryPacket(packet_id=f"{packet_id}-events", source_subsystem=SOURCE)
    if "loss" not in values:
        add_event(packet, "loss_missing", messages.TelemetryLevel.TELEMETRY_LEVEL_CRITICAL, metric="loss")
    elif finite(values["loss"]) is None:
        add_event(
            packet,
            LOSS_NONFINITE,
            messages.TelemetryLevel.TELEMETRY_LEVEL_CRITICAL,
            metric="loss",
            value=str(values["loss"]),
        )
    if values.get("esper.step.failed"):
        add_event(packet, "step_failed", messages.TelemetryLevel.TELEMETRY_LEVEL_ERROR)
    for name in sorted({*outside} - {"loss"}):  # sorted, because the order of recording is not transmitted
        _warn(packet, "value_nonfinite", name, values[name])
    if whole(frame.epoch, UINT32_LIMIT) is None:
        _warn(packet, "value_invalid", "esper.epoch", frame.epoch)
    if whole(frame.global_step, UINT64_LIMIT) is None:
        _warn(packet, "value_invalid", "esper.global_step", frame.global_step)
    if not packet.events:
        return None
    packet.timestamp.FromNanoseconds(frame.time_unix_ns)
    conclude(packet, frame.global_step)
    return packet


def conclude(packet: messages.TelemetryPacket, step: int) -> None:
    """Sets level, health and priority of a packet of events to those of its most urgent event; see ``priority_of``.

    Args:
        packet: a packet with at least one event.
        step: the step's number.
    """
    priorities, statuses = messages.MessagePriority, messages.HealthStatus
    status_of: dict[int, messages.HealthStatus] = {
        priorities.MESSAGE_PRIORITY_CRITICAL: statuses.HEALTH_STATUS_CRITICAL,
        priorities.MESSAGE_PRIORITY_HIGH: statuses.HEALTH_STATUS_UNHEALTHY,
        priorities.MESSAGE_PRIORITY_NORMAL: statuses.HEALTH_STATUS_DEGRADED,
    }
    urgent = max(packet.events, key=priority_of)
    priority = priority_of(urgent)
    health = packet.system_health
    health.status = status_of[priority]
    health.summary = urgent.description
    health.indicators["priority"] = priorities.Name(priority)
    health.indicators["step_index"] = str(step)
    packet.level = max(event.level for event in packet.events)


def priority_of(event: messages.TelemetryEvent) -> int:
    """Returns an event's urgency, a number of ``MessagePriority``.

    It is the attribute ``priority``. Without one, it is CRITICAL for the level CRITICAL, HIGH for ERROR, and NORMAL for
    lower levels.
    """
    priorities = messages.MessagePriority
    named = event.attributes.get("priority")
    if named is not None:
        return priorities.Value(named)
    if event.level == messages.TelemetryLevel.TELEMETRY_LEVEL_CRITICAL:
        return priorities.MESSAGE_PRIORITY_CRITICAL
    if event.level == messages.TelemetryLevel.TELEMETRY_LEVEL_ERROR:
        return priorities.MESSAGE_PRIORITY_HIGH
    return priorities.MESSAGE_PRIORITY_NORMAL


def _warn(packet: messages.TelemetryPacket, event: str, metric: str, value: float) -> None:
    add_event(packet, event, messages.TelemetryLevel.TELEMETRY_LEVEL_WARNING, metric=metric, value=str(value))
