"""Emergencies: which packets of a run are urgent. What goes on from step to step is urgent only when it begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from esper_otel.leyline import messages
from esper_otel.leyline.episodes import Episodes, StepSender
from esper_otel.leyline.packets import Packets
from esper_otel.leyline.problems import priority_of
from esper_otel.leyline.risk import Signal, signals_of

# Identifies a step among those of a run: attempt, writer, id of the state packet, revision.
_Key: TypeAlias = tuple[int, str, str, int]

_MOST_SEEDS = 10_000
_URGENT = ("HIGH", "CRITICAL")
_VIOLATIONS = "kasmina.seed.isolation_violations"


class Emergencies:
    """Decides which packets of a run go to the emergency stream.

    A packet does if it is of priority HIGH or CRITICAL *and* a reason for that is new: a risk signal, another event, or
    an UNHEALTHY seed that begins or escalates (see ``Episodes``). Packets of later steps in which the same goes on are
    not emergencies. A busy CPU is not an emergency in a run that trains on its CPU.

    A decision stands until ``confirm``: if the packets could not be published, the same ones get the same answer again.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._decided: dict[_Key, frozenset[str]] = {}
        self._episodes = Episodes()
        self._seeds = Episodes(most=_MOST_SEEDS)

    def expect(self, page: Iterable[Packets]) -> None:
        """Must be called before the packets of a page are decided.

        If the last page was not published and steps of it are not in this one, for example because the source had to
        drop them, what they should have announced is announced again.
        """
        keys = set(map(_key, page))
        if any(urgent for key, urgent in self._decided.items() if key not in keys):
            self._begin()
        self._decided = {key: urgent for key, urgent in self._decided.items() if key in keys}

    def of(self, packets: Packets) -> frozenset[str]:
        """Returns the ids of a step's packets that are emergencies."""
        key = _key(packets)
        decided = self._decided.get(key)
        if decided is None:
            decided = self._decided[key] = self._decide(packets)
        return decided

    def confirm(self) -> None:
        """Forgets the decisions, because the packets have been published."""
        self._decided.clear()

    def _decide(self, packets: Packets) -> frozenset[str]:
        state = packets.state
        events_id = f"{state.packet_id}-events"
        time_s = state.timestamp_ns / 1e9
        sender = StepSender(packets.rank, packets.attempt, packets.writer)
        urgent = set()
        for packet in packets.telemetry:
            if packet.packet_id != events_id and self._has_begun(packet, sender, packets.step, time_s):
                urgent.add(packet.packet_id)
        changes = self._episodes.note(packets.step, urgent_signals(packets), time_s=time_s, sender=sender)
        if any(change.kind != "left" and change.episode.level in _URGENT for change in changes):
            urgent.update((state.packet_id, events_id))
        return frozenset(urgent)

    def _has_begun(self, packet: messages.TelemetryPacket, sender: StepSender, step: int, time_s: float) -> bool:
        """Whether a seed is in trouble that it was not in before. Only steps with a packet of the seed count."""
        health = packet.system_health
        seed_id = health.indicators.get("seed_id", "")
        whose = sender._replace(writer=f"{sender.writer}/{seed_id}")
        found = []
        if health.status == messages.HealthStatus.HEALTH_STATUS_UNHEALTHY:
            count = next((point.value for point in packet.metrics if point.name == _VIOLATIONS), 0.0)
            found = [Signal("unhealthy", "HIGH", 0, health.summary, "", count)]
        elif not self._seeds.follows(whose):
            return False
        changes = self._seeds.note(step, found, time_s=time_s, sender=whose)
        return any(change.kind != "left" for change in changes)


def _key(packets: Packets) -> _Key:
    return packets.attempt, packets.writer, packets.state.packet_id, packets.revision


def urgent_signals(packets: Packets) -> list[Signal]:
    """Returns the risk signals of a step, and its other events that are urgent, as signals."""
    found = list(signals_of(packets))
    names = {signal.name for signal in found}
    events_id = f"{packets.state.packet_id}-events"
    for event in (each for packet in packets.telemetry if packet.packet_id == events_id for each in packet.events):
        priority = priority_of(event)
        if event.description not in names and priority >= messages.MessagePriority.MESSAGE_PRIORITY_HIGH:
            is_high = priority == messages.MessagePriority.MESSAGE_PRIORITY_HIGH
            found.append(Signal(event.description, "HIGH" if is_high else "CRITICAL", priority, "", ""))
    return found
