"""Risk: the signals of the table, each at its threshold, in process and by configuration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import esper_otel
from esper_otel import ConfigurationError, EsperSettings, Packets, Stage, Telemetry
from esper_otel.leyline import HealthStatus, MessagePriority, SystemStatePacket, TelemetryLevel
from esper_otel.leyline.risk import LOSS_STEP, RULES, Rule, Signal, configured, signals, signals_of, with_signals

pytestmark = pytest.mark.own_code

BY_NAME = {rule.name: rule for rule in RULES}
HIGH = {
    *("loss_spike", "hook_budget", "step_latency_high", "isolation_violations"),
    *("device_pressure_high", "cpu_pressure_high"),
}


def state_of(loss: float = 0.0, **values: float) -> SystemStatePacket:
    """A packet with these metrics; a double underscore stands for a dot."""
    packet = SystemStatePacket(validation_loss=loss, training_loss=loss)
    packet.training_metrics.update({name.replace("__", "."): value for name, value in values.items()})
    return packet


def names_of(found: tuple[Signal, ...]) -> list[str]:
    return [signal.name for signal in found]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.metric != LOSS_STEP], ids=lambda rule: rule.name)
def test_a_signal_comes_beyond_its_threshold_and_not_at_it(rule: Rule) -> None:
    """At it only where the table says so; values are what float32 makes of them."""
    others = {} if rule.and_below is None else {rule.and_below[0]: 0.1}
    just_above = float(np.nextafter(np.float32(rule.threshold), np.float32(math.inf)))
    just_below = float(np.nextafter(np.float32(rule.threshold), np.float32(-math.inf)))
    for value, comes in (
        (just_above, True),
        (just_below, False),
        (rule.threshold, rule.is_inclusive or float(np.float32(rule.threshold)) > rule.threshold),
        (math.nan, False),
        (math.inf, False),
    ):
        packet = SystemStatePacket()
        packet.training_metrics.update({rule.metric: value, **others})
        assert names_of(signals(packet)) == [rule.name] * comes, value


def test_each_signal_has_the_priority_that_goes_with_its_level() -> None:
    """WARN is NORMAL, HIGH is HIGH."""
    assert {rule.name for rule in RULES if rule.level == "HIGH"} == HIGH
    [found] = signals(state_of(hook_latency_ms=51.0))
    assert found[:3] == ("hook_budget", "HIGH", MessagePriority.MESSAGE_PRIORITY_HIGH)
    assert found.reason == "hook_latency_ms 51 above 50"
    assert found.route == "PAUSE"
    [found] = signals(state_of(kasmina__apply_ms=31.0))
    assert found[:3] == ("kasmina_apply_slow", "WARN", MessagePriority.MESSAGE_PRIORITY_NORMAL)
    assert found.route == "OPTIMIZER"


@pytest.mark.parametrize(
    ("loss", "before", "expected"),
    [
        (2.2, 2.0, ["loss_spike"]),
        (2.1, 2.0, ["loss_warning"]),
        (2.05, 2.0, []),
        (1.0, 2.0, []),
        (0.0, 0.0, []),
    ],
)
def test_a_loss_that_rises_is_told_from_the_packet_before(loss: float, before: float, expected: list[str]) -> None:
    assert names_of(signals(state_of(loss), loss_before=before)) == expected


def test_without_a_packet_before_the_recorded_difference_counts() -> None:
    assert names_of(signals(state_of(2.0, loss_delta=0.2))) == ["loss_spike"]
    assert signals(state_of(2.0)) == ()


def test_signals_of_the_optimizer_give_way_to_one_that_has_a_route() -> None:
    """As Tamiyo decides: the first command stands."""
    assert names_of(signals(state_of(grad_var=2.0, grad_conflict_rate=0.9))) == ["grad_variance_high"]
    both = signals(state_of(hook_latency_ms=60.0, grad_var=2.0, loss_volatility=0.2))
    assert names_of(both) == ["hook_budget", "loss_volatility_high"]


def test_a_device_is_under_pressure_only_when_its_memory_is_known() -> None:
    assert signals(state_of(gpu_util_percent=99.0)) == ()
    assert signals(state_of(gpu_util_percent=99.0, gpu_mem_free_gb=0.2)) == ()  # 0.2 arrives as 0.200000003
    pressed = signals(state_of(gpu_util_percent=95.0, gpu_mem_free_gb=0.1, cpu_util_percent=99.0))
    assert names_of(pressed) == ["device_pressure_high"]
    assert names_of(signals(state_of(cpu_util_percent=95.0))) == ["cpu_pressure_high"]


@pytest.mark.parametrize(
    ("device", "others", "level"),
    [
        ("", {}, "NOTE"),
        ("cpu", {}, "NOTE"),
        ("cpu", {"gpu_mem_used_gb": 1.0}, "NOTE"),
        ("", {"gpu_mem_used_gb": 1.0}, "HIGH"),
        ("", {"gpu_util_percent": 0.0}, "HIGH"),
        ("cuda", {}, "HIGH"),
        ("xpu", {}, "HIGH"),
    ],
)
def test_a_busy_cpu_is_only_a_note_where_it_trains(device: str, others: dict[str, float], level: str) -> None:
    """What Tamiyo does with the packet is the same everywhere, so the event is."""
    packet = state_of(cpu_util_percent=99.0, **others)
    packet.hardware_context.device_type = device
    packet.packet_id = "run-step-1"
    [found] = signals(packet)
    assert (found.level, found.priority, found.route) == (level, MessagePriority.MESSAGE_PRIORITY_HIGH, "OPTIMIZER")
    packets = with_signals(Packets(packet, (), "run", 1, 0, 1, 1, True, 0.0, frozenset()), (found,))
    [event] = packets.telemetry[0].events
    assert dict(event.attributes) == {
        "severity": "high",
        "priority": "MESSAGE_PRIORITY_HIGH",
        "reason": "cpu_util_percent 99 from 95",
        "route": "OPTIMIZER",
    }
    assert signals_of(packets) == (found,)
    assert [signal.level for signal in signals(state_of(hook_latency_ms=60.0, grad_var=2.0))] == ["HIGH"]


def test_signals_are_read_back_from_packets() -> None:
    """With their values, to six digits; other events are none, and whatever an event says does no harm."""
    packet = state_of(2.5, hook_latency_ms=60.5, loss_volatility=0.2, gpu_util_percent=99.0, gpu_mem_free_gb=0.1)
    packet.packet_id = "run-step-1"
    found = signals(packet, loss_before=1.0)
    assert len(found) == 4
    packets = with_signals(Packets(packet, (), "run", 1, 0, 1, 1, True, 0.0, frozenset()), found)
    read = signals_of(packets)
    assert [signal[:5] for signal in read] == [signal[:5] for signal in found]
    assert [signal.value for signal in read] == pytest.approx([1.5, 60.5, 0.2, 99.0])
    packets.telemetry[0].events.add(description="step_failed")
    packets.telemetry[0].events.add(description="hook_budget", attributes={"reason": "because"})
    assert len(signals_of(packets)) == 5
    assert math.isnan(signals_of(packets)[-1].value)


# -- the table, written down a second time -----------------------------------------------------------------


def oracle(packet: SystemStatePacket, loss_before: float | None) -> list[tuple[str, str, str]]:
    """What Tamiyo does with a packet by the contract's table, row by row: event, priority, and its action after it."""
    found: list[tuple[str, str, str]] = []
    action = "SEED"
    metrics = packet.training_metrics

    def read(name: str) -> float:
        value = metrics.get(name, 0.0)
        return 0.0 if math.isnan(value) else value

    def event(name: str, priority: str) -> None:
        found.append((name, priority, action))

    delta = read("loss_delta") if loss_before is None else packet.validation_loss - float(np.float32(loss_before))
    if delta > 0.15:
        action = "PAUSE"
        event("loss_spike", "HIGH")
    elif delta > 0.075 and action == "SEED":
        action = "OPTIMIZER"
        event("loss_warning", "NORMAL")
    if read("hook_latency_ms") > 50:
        action = "PAUSE"
        event("hook_budget", "HIGH")
    if read("step_latency_ms") > 120:
        action = "PAUSE"
        event("step_latency_high", "HIGH")
    if read("kasmina.apply_ms") > 30:
        action = "OPTIMIZER" if action == "SEED" else action
        event("kasmina_apply_slow", "NORMAL")
    if read("kasmina.finalize_ms") > 30:
        action = "OPTIMIZER" if action == "SEED" else action
        event("kasmina_finalize_slow", "NORMAL")
    if read("kasmina.isolation.violations") > 0:
        action = "PAUSE"
        event("isolation_violations", "HIGH")
    if read("loss_volatility") > 0.75 * 0.15:
        action = "OPTIMIZER" if action == "SEED" else action
        event("loss_volatility_high", "NORMAL")
    if read("grad_var") > 1.0 and action == "SEED":
        action = "OPTIMIZER"
        event("grad_variance_high", "NORMAL")
    if read("grad_conflict_rate") > 0.5 and action == "SEED":
        action = "OPTIMIZER"
        event("grad_conflict_high", "NORMAL")
    if read("gpu_util_percent") >= 95 and "gpu_mem_free_gb" in metrics and metrics["gpu_mem_free_gb"] <= 0.2:
        action = "PAUSE" if action == "SEED" else action
        event("device_pressure_high", "HIGH")
    elif read("cpu_util_percent") >= 95 and action == "SEED":
        action = "OPTIMIZER"
        event("cpu_pressure_high", "HIGH")
    return found


def around(threshold: float) -> st.SearchStrategy[float]:
    """Numbers on both sides of a threshold, the nearest float32 among them; 0 and NaN."""
    at = np.float32(threshold)
    nearest = [at, np.nextafter(at, np.float32(math.inf)), np.nextafter(at, np.float32(-math.inf))]
    return st.sampled_from(
        [threshold, *map(float, nearest), threshold * 2, threshold + 1.0, threshold / 2, 0.0, math.nan]
    )


METRICS = {
    "loss_delta": 0.15,
    "hook_latency_ms": 50.0,
    "step_latency_ms": 120.0,
    "kasmina.apply_ms": 30.0,
    "kasmina.finalize_ms": 30.0,
    "kasmina.isolation.violations": 0.0,
    "loss_volatility": 0.1125,
    "grad_var": 1.0,
    "grad_conflict_rate": 0.5,
    "gpu_util_percent": 95.0,
    "gpu_mem_free_gb": 0.2,
    "cpu_util_percent": 95.0,
}


@given(
    st.fixed_dictionaries({}, optional={name: around(threshold) for name, threshold in METRICS.items()}),
    st.floats(0, 10),
    st.none() | st.sampled_from([0.0, 0.075, 0.0751, 0.15, 0.1500001, 0.3]),
)
def test_the_signals_are_what_tamiyos_rules_do_with_the_packet(
    values: dict[str, float], before: float, rise: float | None
) -> None:
    """Events, priorities, order, and what has been decided after each: whatever is missing, at a threshold, or NaN."""
    packet = SystemStatePacket(validation_loss=before + (rise or 0.0))
    packet.training_metrics.update(values)
    loss_before = None if rise is None else before
    found = [
        (signal.name, MessagePriority.Name(signal.priority).removeprefix("MESSAGE_PRIORITY_"), signal.route)
        for signal in signals(packet, loss_before=loss_before)
    ]
    assert found == oracle(packet, loss_before)


def test_pressure_on_the_device_pauses_only_while_nothing_else_has_decided() -> None:
    pressed = {"gpu_util_percent": 99.0, "gpu_mem_free_gb": 0.1}
    assert [signal.route for signal in signals(state_of(**pressed))] == ["PAUSE"]
    both = signals(state_of(kasmina__apply_ms=31.0, **pressed))
    assert [(signal.name, signal.route) for signal in both] == [
        ("kasmina_apply_slow", "OPTIMIZER"),
        ("device_pressure_high", "OPTIMIZER"),
    ]
    overruled = signals(state_of(kasmina__apply_ms=31.0, kasmina__isolation__violations=1.0, loss_volatility=0.2))
    assert [signal.route for signal in overruled] == ["OPTIMIZER", "PAUSE", "PAUSE"]


@given(st.sampled_from(RULES), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6, width=32))
def test_a_threshold_is_the_users(rule: Rule, threshold: float, value: float) -> None:
    """Also one below zero: what is missing still suggests nothing."""
    rules = configured({rule.name: threshold})
    assert signals(SystemStatePacket(), rules=rules) == ()
    if rule.metric == LOSS_STEP or rule.and_below is not None:
        return
    packet = SystemStatePacket()
    packet.training_metrics[rule.metric] = value
    beyond = value > threshold or (rule.is_inclusive and value == threshold)
    assert names_of(signals(packet, rules=rules)) == [rule.name] * beyond


def test_infinity_silences_a_signal_and_a_wrong_name_is_said() -> None:
    assert signals(state_of(hook_latency_ms=1e9), rules=configured({"hook_budget": math.inf})) == ()
    with pytest.raises(ConfigurationError, match="hook_budget"):
        configured({"hook_budge": 1.0})


# -- in process ------------------------------------------------------------------------------------------


def pulled(telemetry: Telemetry) -> list[Packets]:
    return list(telemetry.pull(max_packets=1000))


def events_of(packets: Packets) -> dict[str, dict[str, str]]:
    return {event.description: dict(event.attributes) for packet in packets.telemetry for event in packet.events}


@pytest.fixture(autouse=True)
def _nowhere_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setenv("ESPER_RISK_THRESHOLDS", '{"cpu_pressure_high": Infinity}')  # this machine may be busy


def test_a_pulled_step_has_its_signals_beside_other_events() -> None:
    with esper_otel.start(run_id="risky") as telemetry:
        for loss in (1.0, 1.5, math.nan):
            with telemetry.step(epoch=0) as now:
                now.put(loss=loss, hook_latency_ms=60.0 if loss != 1.0 else 1.0)
                now.seed("seed-1", stage=Stage.TRAINING)
        calm, risky, broken = pulled(telemetry)
    assert events_of(calm) == {}
    found = events_of(risky)
    assert list(found)[:2] == ["loss_spike", "hook_budget"]
    assert found["hook_budget"] == {
        "severity": "high",
        "priority": "MESSAGE_PRIORITY_HIGH",
        "reason": "hook_latency_ms 60 above 50",
        "route": "PAUSE",
    }
    events = risky.telemetry[-1]
    assert events.packet_id == "risky-step-2-events"
    assert events.level == TelemetryLevel.TELEMETRY_LEVEL_WARNING
    assert events.system_health.indicators["priority"] == "MESSAGE_PRIORITY_HIGH"
    assert list(events_of(broken)) == ["loss_nonfinite", "hook_budget"]
    events = broken.telemetry[-1]
    assert events.level == TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
    assert events.system_health.status == HealthStatus.HEALTH_STATUS_CRITICAL
    assert events.system_health.summary == "loss_nonfinite"
    assert events.system_health.indicators == {"priority": "MESSAGE_PRIORITY_CRITICAL", "step_index": "3"}


def test_one_step_pulled_alone_has_the_signals_that_it_has_among_others() -> None:
    """The loss before is that of the step before, pulled or not."""
    with esper_otel.start(run_id="risky") as telemetry:
        for loss in (1.0, 1.1, 1.5, 1.2, 1.3):
            with telemetry.step(epoch=0) as now:
                now.put(loss=loss)
        together = list(telemetry.pull(f"{telemetry.run.attempt}:0", max_packets=10))
        alone = [packets for _ in range(5) for packets in telemetry.pull(max_packets=1)]
    assert [events_of(packets) for packets in alone] == [events_of(packets) for packets in together]
    assert "loss_spike" in events_of(alone[2])


def test_thresholds_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RISK_THRESHOLDS", '{"hook_budget": Infinity, "loss_spike": 0.01}')
    with esper_otel.start() as telemetry:
        for loss in (1.0, 1.02):
            with telemetry.step(epoch=0) as now:
                now.put(loss=loss, hook_latency_ms=60.0)
        _, packets = pulled(telemetry)
    assert list(events_of(packets)) == ["loss_spike"]
    with pytest.raises(ConfigurationError, match="did you mean"):
        esper_otel.start(settings=EsperSettings(risk_thresholds={"loss_spik": 1.0}))


def test_the_page_of_signals_has_the_table() -> None:
    """Each signal with its threshold: rendered, never copied by hand."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "signals.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"`{rule.name}`" in page
