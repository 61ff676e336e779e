"""Entries: converts a step's packets to entries of Oona's streams, signed with the secret that its components share."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any, NamedTuple

from esper_otel.leyline import messages
from esper_otel.leyline.packets import Packets

NORMAL, TELEMETRY, EMERGENCY = STREAMS = ("oona.normal", "oona.telemetry", "oona.emergency")


class StreamEntry(NamedTuple):
    """One message: its stream, and the fields of its entry there.

    Attributes:
        stream: name of the stream.
        usual: the stream to use if the message were not urgent.
        fields: ``payload``, a serialized BusEnvelope, and ``signature`` if there is a secret.
    """

    stream: str
    usual: str
    fields: dict[str, bytes]


def entries(packets: Packets, secret: str | None = None) -> list[StreamEntry]:
    """Converts a step's packets to messages: its state for ``oona.normal``, its telemetry for ``oona.telemetry``.

    Messages of priority HIGH or CRITICAL are for ``oona.emergency`` instead: a step with a signal of that priority, an
    UNHEALTHY seed, or an event of level CRITICAL. Whether they go there depends on earlier steps too; see
    ``Emergencies``.

    Args:
        packets: the step.
        secret: the key to sign the payloads (HMAC-SHA256 over the payload's bytes, in base64).
    """
    priorities = [_priority(packet) for packet in packets.telemetry]
    of_events = [
        priority
        for packet, priority in zip(packets.telemetry, priorities, strict=True)
        if packet.packet_id == f"{packets.state.packet_id}-events"
    ]
    of_step = max([messages.MessagePriority.MESSAGE_PRIORITY_NORMAL, *of_events])
    state = messages.BusMessageType.BUS_MESSAGE_TYPE_SYSTEM_STATE
    telemetry = messages.BusMessageType.BUS_MESSAGE_TYPE_TELEMETRY
    found = [_entry(packets, state, NORMAL, packets.state, of_step, secret)]
    for packet, priority in zip(packets.telemetry, priorities, strict=True):
        found.append(_entry(packets, telemetry, TELEMETRY, packet, priority, secret))
    return found


def _priority(packet: messages.TelemetryPacket) -> int:
    name = packet.system_health.indicators.get("priority")
    return messages.MessagePriority.Value(name) if name else messages.MessagePriority.MESSAGE_PRIORITY_NORMAL


def _entry(packets: Packets, kind: int, usual: str, packet: Any, priority: int, secret: str | None) -> StreamEntry:
    payload = messages.BusEnvelope(
        message_type=kind,  # type: ignore[arg-type] # a number of the enum
        payload=packet.SerializeToString(),
        attributes={
            "packet_id": packet.packet_id,
            "priority": messages.MessagePriority.Name(priority),
            "run_id": packets.run_id,
            "attempt": str(packets.attempt),
            "rank": str(packets.rank),
            "revision": str(packets.revision),
            "complete": str(packets.complete).lower(),
        },
    ).SerializeToString()
    fields = {"payload": payload}
    if secret:
        fields["signature"] = base64.b64encode(hmac.digest(secret.encode(), payload, hashlib.sha256))
    is_urgent = priority >= messages.MessagePriority.MESSAGE_PRIORITY_HIGH
    return StreamEntry(EMERGENCY if is_urgent else usual, usual, fields)
