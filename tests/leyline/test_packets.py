"""Packets of a frame: the whole of them, the step's events, and pages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from frame_examples import RUN, TIME_UNIX_NS, frames, make_frame, seed_table, with_recorded
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.errors import AdapterError
from esper_otel.frames.frame import NO_SEEDS, SAID_BESIDE, Frame
from esper_otel.leyline import (
    HealthStatus,
    Packets,
    Page,
    TelemetryEvent,
    TelemetryLevel,
    TelemetryPacket,
    packets,
    state,
)
from esper_otel.schema import METRICS, OWN_STEP, STEP_METRICS, Metric

HEALTHY: dict[str, Any] = {"seeds": NO_SEEDS, "live": NO_SEEDS}


def step_packet(**fields: Any) -> TelemetryPacket | None:
    """The packet of the step's own events, of a step without seeds."""
    telemetry = packets(make_frame(**HEALTHY | fields)).telemetry
    assert len(telemetry) <= 1
    return telemetry[0] if telemetry else None


def step_events(**fields: Any) -> list[TelemetryEvent]:
    packet = step_packet(**fields)
    return [] if packet is None else list(packet.events)


def test_beside_the_messages_stands_what_proto3_cannot_say() -> None:
    """0 may be missing, a correction may follow, a part may be lost: the packet alone does not tell."""
    run = dataclasses.replace(RUN, rank=2, world_size=4)
    frame = make_frame(run=run, global_step=17, recorded={"loss": math.nan, "accuracy": 0.5})
    result = packets(frame, revision=3, complete=False, now_unix_ns=TIME_UNIX_NS + 1_500_000_000)
    assert (result.run_id, result.attempt, result.rank, result.step) == (run.run_id, run.attempt, 2, 17)
    assert (result.revision, result.complete, result.age_s) == (3, False, 1.5)
    assert result.state == state(frame)
    assert result.names == {
        "accuracy",
        "esper.epoch",
        "esper.global_step",
        "esper.seeds",
        "kasmina.seed.alpha",
        "kasmina.seed.stage",
        "loss",
    }


def test_revision_and_completeness_have_plain_defaults() -> None:
    """In process nothing is corrected or lost."""
    result = packets(make_frame())
    assert (result.revision, result.complete) == (1, True)
    assert result.age_s > 0


def test_names_have_no_alpha_steps_outside_blending() -> None:
    """What the telemetry leaves out was not there."""
    rows = seed_table({"a": {"stage": 3.0, "alpha_steps": 2.0}})
    assert "kasmina.seed.alpha_steps" not in packets(make_frame(seeds=rows, live=rows)).names


def test_a_healthy_step_has_no_events() -> None:
    """An events packet in every step would teach everyone to ignore it."""
    assert step_events() == []


def test_the_events_packet_says_whose_it_is_and_holds_no_metrics() -> None:
    """One more packet beside those of the seeds, of the step itself."""
    packet = step_packet(recorded={"loss": 1.0, "accuracy": math.nan}, global_step=17)
    assert packet is not None
    assert packet.packet_id == "digits-7-step-17-events"
    assert packet.source_subsystem == "tolaria"
    assert packet.timestamp.ToNanoseconds() == TIME_UNIX_NS
    assert packet.level == TelemetryLevel.TELEMETRY_LEVEL_WARNING
    assert not packet.metrics
    assert packet.system_health.summary == "value_nonfinite"
    assert dict(packet.system_health.indicators) == {"priority": "MESSAGE_PRIORITY_NORMAL", "step_index": "17"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"recorded": {}}, ("loss_missing", "CRITICAL", {"metric": "loss"})),
        ({"recorded": {"loss": math.nan}}, ("loss_nonfinite", "CRITICAL", {"metric": "loss", "value": "nan"})),
        ({"recorded": {"loss": 1e39}}, ("loss_nonfinite", "CRITICAL", {"metric": "loss", "value": "1e+39"})),
        ({"recorded": {"loss": 1.0, "esper.step.failed": 1.0}}, ("step_failed", "ERROR", {})),
        (
            {"recorded": {"loss": 1.0, "grad_var": -math.inf}},
            ("value_nonfinite", "WARNING", {"metric": "grad_var", "value": "-inf"}),
        ),
        (
            {"recorded": {"loss": 1.0}, "context": {"esper.validation.accuracy": math.nan}},
            ("value_nonfinite", "WARNING", {"metric": "esper.validation.accuracy", "value": "nan"}),
        ),
        ({"epoch": -1}, ("value_invalid", "WARNING", {"metric": "esper.epoch", "value": "-1"})),
        ({"epoch": 2**32}, ("value_invalid", "WARNING", {"metric": "esper.epoch", "value": str(2**32)})),
        ({"global_step": -1}, ("value_invalid", "WARNING", {"metric": "esper.global_step", "value": "-1"})),
    ],
)
def test_each_thing_that_goes_wrong_is_one_event(
    fields: dict[str, Any], expected: tuple[str, str, dict[str, str]]
) -> None:
    """One row for one rule."""
    (event,) = step_events(**fields)
    level = TelemetryLevel.Name(event.level).removeprefix("TELEMETRY_LEVEL_")
    assert (event.description, level, dict(event.attributes)) == expected


@pytest.mark.parametrize(
    ("recorded", "level", "status", "priority", "summary"),
    [
        ({}, "CRITICAL", "CRITICAL", "CRITICAL", "loss_missing"),
        ({"loss": math.nan}, "CRITICAL", "CRITICAL", "CRITICAL", "loss_nonfinite"),
        ({"loss": 1.0, "esper.step.failed": 1.0}, "ERROR", "UNHEALTHY", "HIGH", "step_failed"),
        ({"loss": 1.0, "accuracy": math.nan}, "WARNING", "DEGRADED", "NORMAL", "value_nonfinite"),
        ({"loss": 1.0, "accuracy": math.nan, "esper.step.failed": 1.0}, "ERROR", "UNHEALTHY", "HIGH", "step_failed"),
        ({"accuracy": math.nan, "esper.step.failed": 1.0}, "CRITICAL", "CRITICAL", "CRITICAL", "loss_missing"),
    ],
)
def test_the_packets_level_health_and_priority_are_those_of_its_worst_event(
    recorded: dict[str, float], level: str, status: str, priority: str, summary: str
) -> None:
    """Only HIGH and CRITICAL packets belong in the emergency stream: the priority decides."""
    packet = step_packet(recorded=recorded)
    assert packet is not None
    numbers = range(1, len(packet.events) + 1)
    assert [event.event_id for event in packet.events] == [f"{packet.packet_id}-event-{n}" for n in numbers]
    assert TelemetryLevel.Name(packet.level) == f"TELEMETRY_LEVEL_{level}"
    assert HealthStatus.Name(packet.system_health.status) == f"HEALTH_STATUS_{status}"
    assert packet.system_health.indicators["priority"] == f"MESSAGE_PRIORITY_{priority}"
    assert packet.system_health.summary == summary


def test_the_events_packet_comes_after_those_of_the_seeds() -> None:
    """One packet per recorded row, then one more."""
    sources = [packet.source_subsystem for packet in packets(make_frame(recorded={})).telemetry]
    assert sources == ["kasmina", "tolaria"]


def test_packets_of_one_frame_are_equal_whenever_they_are_made() -> None:
    """A packet rebuilt elsewhere equals this one; its age does not count."""
    frame = make_frame()
    assert packets(frame, now_unix_ns=1) == packets(frame, now_unix_ns=2)
    assert packets(frame, now_unix_ns=1) != packets(frame, now_unix_ns=1, revision=2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"run": dataclasses.replace(RUN, run_id="run\ud800")}, "run id"),
        ({"run": dataclasses.replace(RUN, experiment="\ud800")}, "experiment"),
        ({"seeds": seed_table({"a\ud800": {}})}, "seed id"),
        ({"live": seed_table({"a\ud800": {}})}, "seed id"),
        ({"time_unix_ns": -1}, "step 1"),
    ],
)
def test_what_no_packet_can_carry_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    """Protobuf's own error says neither which text it was nor whose."""
    with pytest.raises(AdapterError, match=named):
        packets(make_frame(**fields))


def test_state_refuses_the_same() -> None:
    """Both doors give the same error."""
    with pytest.raises(AdapterError, match=r"run id 'run.ud800' is not valid Unicode"):
        state(make_frame(run=dataclasses.replace(RUN, run_id="run\ud800")))


def numbers_of(result: Packets) -> list[float]:
    """Every floating-point number in the messages."""
    seeds = [
        [seed.gradient_norm, seed.learning_rate, seed.risk_score, *seed.metrics.values()]
        for seed in result.state.seed_states
    ]
    hardware = result.state.hardware_context
    return [
        result.state.validation_accuracy,
        result.state.validation_loss,
        result.state.training_loss,
        hardware.total_memory_gb,
        hardware.available_memory_gb,
        hardware.temperature_celsius,
        hardware.utilization_percent,
        *result.state.training_metrics.values(),
        *(number for seed in seeds for number in seed),
        *(point.value for packet in result.telemetry for point in packet.metrics),
    ]


step_values = st.dictionaries(
    st.sampled_from([metric.name for metric in STEP_METRICS + OWN_STEP] + ["tokens_per_s"]),
    st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e39, 3.4028235677973366e38, 2.0**1023]),
)


@given(frames(), step_values)
def test_no_packet_ever_holds_a_number_that_is_not_finite(frame: Frame, values: dict[str, float]) -> None:
    """Never: one is enough to ruin a controller's network."""
    result = packets(with_recorded(frame, values))
    assert all(math.isfinite(number) for number in numbers_of(result))


# Where a metric without a key in the map goes. These say how the packets are made, count what they list, or are for
# people: whose step it was, its parts and memory, which the contract has no place for.
_ELSEWHERE = {
    *("esper.step.failed", "esper.steps.backwards", "esper.global_step", "esper.epoch", "esper.seeds"),
    *("esper.optimizer.index", "esper.forward_ms", "esper.backward_ms", "esper.optimizer_ms"),
    *("esper.tokens_per_s", "esper.tflops_per_s", "esper.mfu"),
    *(metric.name for metric in METRICS if metric.name.startswith("esper.memory.")),
}
_FIELDS = {"esper.validation.accuracy"} | {metric.name for metric in METRICS if metric.name.startswith("esper.device.")}


@given(frames(seeds=NO_SEEDS), step_values)
def test_every_step_value_is_in_the_state_or_in_an_event(frame: Frame, values: dict[str, float]) -> None:
    """Left out is never left unsaid."""
    frame = with_recorded(frame, values)
    result = packets(frame)
    catalogue = {metric.name: metric for metric in METRICS}
    reported = {
        event.attributes["metric"] for packet in result.telemetry for event in packet.events if event.attributes
    }
    for name in frame.values().keys() - SAID_BESIDE:
        assert name in result.names
        key = catalogue.get(name, Metric(name)).key
        assert name in reported or key in result.state.training_metrics or name in _FIELDS | _ELSEWHERE, (
            f"{name} is neither in the packet nor reported"
        )


@given(frames())
def test_ids_are_unique_within_a_step(frame: Frame) -> None:
    """Tamiyo uses a packet's id as a key."""
    result = packets(frame)
    ids = [result.state.packet_id, *(packet.packet_id for packet in result.telemetry)]
    assert len(set(ids)) == len(ids)


def test_a_page_is_a_sequence_with_a_cursor_and_a_gap() -> None:
    """A controller loops over it and comes back with the cursor."""
    first, second = packets(make_frame()), packets(make_frame(global_step=2))
    page = Page((first, second), cursor="2", gap=7)
    assert list(page) == [first, second]
    assert (len(page), page[0], page[-1], page[1:]) == (2, first, second, (second,))
    assert (page.cursor, page.gap) == ("2", 7)
    assert not Page((), cursor="2")
    assert first in page


def test_packets_and_pages_cannot_be_changed() -> None:
    """Several consumers may hold the same ones."""
    page = Page((packets(make_frame()),), cursor="1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        page.cursor = "2"  # type: ignore[misc] # the mistake under test
    with pytest.raises(dataclasses.FrozenInstanceError):
        page[0].step = 2  # type: ignore[misc] # the mistake under test
