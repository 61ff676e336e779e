"""Risk signals of a step's packets, determined by a table of thresholds."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from esper_otel.errors import ConfigurationError, unknown
from esper_otel.leyline import messages
from esper_otel.leyline.packets import Packets
from esper_otel.leyline.problems import SOURCE, add_event, conclude

_EVENTS_SUFFIX = "-events"
_FLOAT32 = struct.Struct("<f")


class Signal(NamedTuple):
    """A risk indicated by a step's values.

    Attributes:
        name: the signal's name, such as ``hook_budget``.
        level: how serious it is for this run: ``NOTE``, ``WARN`` or ``HIGH``. It is that of the rule, with one
            exception: a busy CPU is only a ``NOTE`` in a run that trains on its CPU (see ``trains_on_gpu``).
        priority: a number of ``MessagePriority``, as Tamiyo's rules give it: NORMAL for a rule of level WARN, HIGH for
            one of level HIGH, on any device.
        reason: the value and the threshold that it exceeds.
        route: the decision of Tamiyo's rules after this signal and those before it: ``PAUSE`` or ``OPTIMIZER``. The
            route of a step's last signal is that of the step.
        value: the value that exceeds the threshold; larger is worse, for every signal.
    """

    name: str
    level: str
    priority: int
    reason: str
    route: str
    value: float = math.nan


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table. Rows are evaluated in order.

    Attributes:
        name: name of the signal.
        metric: key of the state packet's metrics; ``LOSS_STEP`` is the loss minus that of the previous packet.
        threshold: the value above which the signal is given; the packet's values are float32.
        level: ``WARN`` or ``HIGH``.
        route: ``PAUSE`` or ``OPTIMIZER``; applies only if no earlier signal has set a route, unless ``overrules``.
        overrules: whether the route replaces one set by an earlier signal.
        is_inclusive: whether the signal is also given at the threshold itself.
        only_unrouted: whether the signal is omitted if an earlier signal has set a route.
        and_below: a second metric and its limit; the metric must be present and not above the limit.
        unless: the name of a signal that suppresses this one.
        is_sampled: whether the metric is read about once a second, so that many steps may have the same reading.
        only_note_on_cpu: whether the signal is only a ``NOTE`` in a run that trains on its CPU.
    """

    name: str
    metric: str
    threshold: float
    level: str
    route: str
    overrules: bool = False
    is_inclusive: bool = False
    only_unrouted: bool = False
    and_below: tuple[str, float] | None = None
    unless: str = ""
    is_sampled: bool = False
    only_note_on_cpu: bool = False


LOSS_STEP = "loss step"

RULES = (
    Rule("loss_spike", LOSS_STEP, 0.15, "HIGH", "PAUSE", overrules=True),
    Rule("loss_warning", LOSS_STEP, 0.075, "WARN", "OPTIMIZER", only_unrouted=True),
    Rule("hook_budget", "hook_latency_ms", 50.0, "HIGH", "PAUSE", overrules=True),
    Rule("step_latency_high", "step_latency_ms", 120.0, "HIGH", "PAUSE", overrules=True),
    Rule("kasmina_apply_slow", "kasmina.apply_ms", 30.0, "WARN", "OPTIMIZER"),
    Rule("kasmina_finalize_slow", "kasmina.finalize_ms", 30.0, "WARN", "OPTIMIZER"),
    Rule("isolation_violations", "kasmina.isolation.violations", 0.0, "HIGH", "PAUSE", overrules=True),
    Rule("loss_volatility_high", "loss_volatility", 0.1125, "WARN", "OPTIMIZER"),
    Rule("grad_variance_high", "grad_var", 1.0, "WARN", "OPTIMIZER", only_unrouted=True),
    Rule("grad_conflict_high", "grad_conflict_rate", 0.5, "WARN", "OPTIMIZER", only_unrouted=True),
    Rule(
        *("device_pressure_high", "gpu_util_percent", 95.0, "HIGH", "PAUSE"),
        is_inclusive=True,
        and_below=("gpu_mem_free_gb", 0.2),
        is_sampled=True,
    ),
    Rule(
        *("cpu_pressure_high", "cpu_util_percent", 95.0, "HIGH", "OPTIMIZER"),
        is_inclusive=True,
        only_unrouted=True,
        unless="device_pressure_high",
        is_sampled=True,
        only_note_on_cpu=True,
    ),
)

_BY_NAME = {rule.name: rule for rule in RULES}
_OF_GPU = frozenset({"gpu_util_percent", "gpu_mem_free_gb", "gpu_mem_used_gb"})


def configured(thresholds: Mapping[str, float]) -> tuple[Rule, ...]:
    """Returns the table with other thresholds, given by signal name; infinity disables a signal.

    Raises:
        ConfigurationError: no signal has this name, or a threshold is NaN.
    """
    names = [rule.name for rule in RULES]
    for name in thresholds:
        if name not in names:
            raise unknown("signal", name, names)
        if math.isnan(thresholds[name]):
            raise ConfigurationError(f"the threshold of {name!r} is not a number; inf disables the signal")
    return tuple(replace(rule, threshold=thresholds.get(rule.name, rule.threshold)) for rule in RULES)


def threshold_of(option: str) -> tuple[str, float]:
    """Reads the value of an option ``--threshold``: the name of a signal and its threshold, as ``hook_budget=80``.

    Raises:
        ConfigurationError: it has another form.
    """
    name, _, value = option.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigurationError(f"--threshold {option}: give SIGNAL=VALUE, such as hook_budget=80") from None


def signals(
    state: messages.SystemStatePacket, *, loss_before: float | None = None, rules: tuple[Rule, ...] = RULES
) -> tuple[Signal, ...]:
    """Returns the packet's risk signals in the table's order. Missing values give no signal.

    Args:
        state: a step's packet.
        loss_before: ``validation_loss`` of the previous packet; if unknown, ``loss_delta`` is used instead.
        rules: the table.
    """
    values = state.training_metrics
    # The difference is computed as a controller would: from losses rounded to float32, in double precision.
    loss_step = values.get("loss_delta") if loss_before is None else state.validation_loss - _rounded(loss_before)
    found: dict[str, Signal] = {}
    route = ""
    for rule in rules:
        value = loss_step if rule.metric == LOSS_STEP else values.get(rule.metric)
        if value is None or not (value > rule.threshold or (rule.is_inclusive and value == rule.threshold)):
            continue
        if not math.isfinite(value):
            continue
        if (rule.only_unrouted and route) or rule.unless in found:
            continue
        reason = f"{rule.metric} {value:.6g} {'from' if rule.is_inclusive else 'above'} {rule.threshold:g}"
        if rule.and_below is not None:
            other, limit = rule.and_below
            if other not in values or not values[other] <= limit:
                continue
            reason += f", {other} {values[other]:.6g} up to {limit:g}"
        if rule.overrules or not route:
            route = rule.route
        found[rule.name] = Signal(rule.name, _level(rule, state), _priority(rule.level), reason, route, value)
    return tuple(found.values())


def trains_on_gpu(state: messages.SystemStatePacket) -> bool:
    """Whether the packet is of a run that trains on a GPU: by its device, or if that is unknown, by its metrics."""
    device = state.hardware_context.device_type
    return device != "cpu" if device else not _OF_GPU.isdisjoint(state.training_metrics)


def with_signals(packets: Packets, found: tuple[Signal, ...]) -> Packets:
    """Returns the packets with the signals added as events to the step's packet of events."""
    if not found:
        return packets
    events_id = packets.state.packet_id + _EVENTS_SUFFIX
    others = tuple(packet for packet in packets.telemetry if packet.packet_id != events_id)
    events = messages.TelemetryPacket(packet_id=events_id, source_subsystem=SOURCE)
    events.timestamp.FromNanoseconds(packets.state.timestamp_ns)
    for packet in packets.telemetry[len(others) :]:  # the packet of events comes last
        events.CopyFrom(packet)
    for signal in found:
        add_event(
            events,
            signal.name,
            messages.TelemetryLevel.TELEMETRY_LEVEL_WARNING,
            severity="high" if signal.priority == messages.MessagePriority.MESSAGE_PRIORITY_HIGH else "warn",
            priority=messages.MessagePriority.Name(signal.priority),
            reason=signal.reason,
            route=signal.route,
        )
    conclude(events, packets.step)
    return replace(packets, telemetry=(*others, events))


def signals_of(packets: Packets) -> tuple[Signal, ...]:
    """Returns the signals that ``with_signals`` has added to the packets; values have six digits."""
    events_id = packets.state.packet_id + _EVENTS_SUFFIX
    return tuple(
        _read(event, packets.state)
        for packet in packets.telemetry
        if packet.packet_id == events_id
        for event in packet.events
        if event.description in _BY_NAME
    )


def _read(event: messages.TelemetryEvent, state: messages.SystemStatePacket) -> Signal:
    rule, said = _BY_NAME[event.description], event.attributes
    reason = said.get("reason", "")
    number = reason.removeprefix(f"{rule.metric} ").partition(" ")[0]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    return Signal(rule.name, _level(rule, state), _priority(rule.level), reason, said.get("route", ""), value)


def _level(rule: Rule, state: messages.SystemStatePacket) -> str:
    return "NOTE" if rule.only_note_on_cpu and not trains_on_gpu(state) else rule.level


def _priority(level: str) -> int:
    is_high = level == "HIGH"
    return (
        messages.MessagePriority.MESSAGE_PRIORITY_HIGH if is_high else messages.MessagePriority.MESSAGE_PRIORITY_NORMAL
    )


def _rounded(value: float) -> float:
    """Returns a number as float32 has it."""
    try:
        (rounded,) = _FLOAT32.unpack(_FLOAT32.pack(value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(rounded)
