"""The TelemetryPacket of a seed's row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame, seed_table
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.frames.frame import ABSENT, is_absent
from esper_otel.leyline import HealthStatus, TelemetryLevel, TelemetryPacket, packets
from esper_otel.leyline.seed_telemetry import _built_stencil, _row_stencil
from esper_otel.schema import SEED_METRICS, Stage

pytestmark = pytest.mark.own_code

Rows = Mapping[str, Mapping[str, float]]


def telemetry(rows: Rows, live: Rows | None = None, **arguments: Any) -> tuple[TelemetryPacket, ...]:
    """The packets of a step that recorded these rows; without ``live`` nothing else is known of the seeds."""
    table = seed_table(rows)
    frame = make_frame(seeds=table, live=table if live is None else seed_table(live), global_step=17)
    return packets(frame, **arguments).telemetry


def one(live: Mapping[str, float] | None = None, /, **cells: float) -> TelemetryPacket:
    (packet,) = telemetry({"seed-3": cells}, None if live is None else {"seed-3": live})
    return packet


def points(packet: TelemetryPacket) -> dict[str, float]:
    return {point.name: point.value for point in packet.metrics}


EVERYTHING = {metric.field: float(number) for number, metric in enumerate(SEED_METRICS)} | {"stage": 4.0}


def test_a_row_becomes_one_packet_as_kasmina_fills_it() -> None:
    """Names, units, attribute, level, time and ids are what Nissa already parses."""
    packet = one(**EVERYTHING | {"isolation_violations": 0.0, "fallback_used": 0.0})
    assert packet.packet_id == "kasmina-seed-seed-3-17"
    assert packet.source_subsystem == "kasmina"
    assert packet.level == TelemetryLevel.TELEMETRY_LEVEL_INFO
    assert packet.timestamp.ToNanoseconds() == TIME_UNIX_NS
    assert [(point.name, point.unit) for point in packet.metrics] == [(m.name, m.unit) for m in SEED_METRICS]
    assert all(point.attributes == {"seed_id": "seed-3"} for point in packet.metrics)
    assert packet.system_health.summary == "nominal"
    assert not packet.events
    assert not packet.spans


@pytest.mark.parametrize("metric", SEED_METRICS, ids=lambda metric: metric.field)
def test_each_metric_is_a_point_only_when_it_was_recorded(metric: Any) -> None:
    """Missing is not zero, and zero is not missing."""
    blending = {"stage": 4.0}
    assert points(one(blending, **{metric.field: 0.0})) == {metric.name: 0.0}


def test_values_keep_the_precision_of_a_double() -> None:
    """A point has room for it, unlike the state packet."""
    assert points(one(alpha=0.1))["kasmina.seed.alpha"] == 0.1


@pytest.mark.parametrize(
    ("row", "live", "is_there"),
    [
        ({"stage": Stage.BLENDING, "alpha_steps": 8.0}, {}, True),
        ({"alpha_steps": 8.0}, {"stage": Stage.BLENDING, "alpha_steps": 8.0}, True),
        ({"stage": Stage.TRAINING, "alpha_steps": 8.0}, {}, False),
        ({"stage": Stage.SHADOWING, "alpha_steps": 8.0}, {"stage": Stage.BLENDING}, False),
        ({"alpha_steps": 8.0}, {"stage": Stage.TRAINING}, False),
        ({"alpha_steps": 8.0}, {}, False),
        ({"alpha_steps": math.nan}, {"stage": Stage.TRAINING}, False),
    ],
)
def test_alpha_steps_are_there_in_blending_only(row: dict[str, float], live: dict[str, float], is_there: bool) -> None:
    """The row's own stage counts, else the last known one."""
    packet = one(live, **row)
    assert ("kasmina.seed.alpha_steps" in points(packet)) is is_there
    assert not packet.events


@pytest.mark.parametrize(
    ("cells", "status", "summary", "priority"),
    [
        ({"isolation_violations": 1.0, "fallback_used": 1.0}, "UNHEALTHY", "violations", "HIGH"),
        ({"fallback_used": 1.0, "last_kernel_latency_ms": 99.0}, "DEGRADED", "fallback", "NORMAL"),
        ({"last_kernel_latency_ms": 10.5}, "DEGRADED", "latency_high", "NORMAL"),
        ({"last_kernel_latency_ms": 10.0}, "HEALTHY", "nominal", "NORMAL"),
        ({"isolation_violations": 0.0, "fallback_used": 0.0}, "HEALTHY", "nominal", "NORMAL"),
        ({"isolation_violations": math.nan}, "HEALTHY", "nominal", "NORMAL"),
        ({}, "HEALTHY", "nominal", "NORMAL"),
    ],
)
@pytest.mark.parametrize("recorded_now", [True, False], ids=["recorded now", "known from before"])
def test_health_is_the_worst_that_is_known_of_the_seed(
    cells: dict[str, float], status: str, summary: str, priority: str, recorded_now: bool
) -> None:
    """A seed does not get well because a step recorded only its alpha."""
    health = one(cells, **cells if recorded_now else {"alpha": 0.5}).system_health
    assert HealthStatus.Name(health.status) == f"HEALTH_STATUS_{status}"
    assert health.summary == summary
    assert health.indicators == {
        "seed_id": "seed-3",
        "priority": f"MESSAGE_PRIORITY_{priority}",
        "step_index": "17",
    }


def test_what_the_row_says_counts_more_than_what_was_known() -> None:
    """Kasmina resets violations to 0: the seed is well again."""
    assert one({"isolation_violations": 3.0}, isolation_violations=0.0).system_health.summary == "nominal"


def test_the_latency_budget_is_a_setting() -> None:
    """10 ms is the prototype's."""
    (packet,) = telemetry({"a": {"last_kernel_latency_ms": 30.0}}, latency_budget_ms=50.0)
    assert packet.system_health.summary == "nominal"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("field", ["alpha", "isolation_dot", "learning_rate", "blend_allowed"])
def test_a_value_that_is_not_finite_is_an_event_and_no_point(field: str, value: float) -> None:
    """Tamiyo must not compute with it, and nobody must miss it."""
    packet = one(**{field: value, "kernel_attached": 1.0})
    assert points(packet) == {"kasmina.seed.kernel_attached": 1.0}
    (event,) = packet.events
    assert event.event_id == "kasmina-seed-seed-3-17-event-1"
    assert event.description == "value_nonfinite"
    assert event.level == TelemetryLevel.TELEMETRY_LEVEL_WARNING
    assert event.attributes["value"] == str(value)
    assert event.attributes["metric"].endswith(field.replace("isolation_", "isolation."))
    assert event.attributes["seed_id"] == "seed-3"


@pytest.mark.parametrize(
    ("field", "value"),
    [("stage", 12.0), ("stage", 4.5), ("layer_depth", -1.0), ("age_epochs", 0.5), ("age_epochs", 2.0**32)],
)
def test_a_number_that_its_integer_field_cannot_hold_is_an_event(field: str, value: float) -> None:
    """The state packet leaves it out; here is why."""
    (event,) = one(**{field: value}).events
    assert event.description == "value_invalid"
    assert event.attributes["value"] == str(value)


def test_each_row_gets_its_own_numbers_events_and_health() -> None:
    """Rows are converted together; none may lean on its neighbour. They are in the order of their ids."""
    rows = {"b": {"alpha": 0.25}, "a": {"alpha": math.nan}, "c": {"isolation_violations": 2.0}}
    live = {"a": {"stage": 4.0}, "x": {"isolation_violations": 1.0}, "b": {"fallback_used": 1.0}}
    a, b, c = telemetry(rows, live)
    assert [packet.packet_id for packet in telemetry(dict(reversed(rows.items())), live)] == [
        packet.packet_id for packet in (a, b, c)
    ]
    assert [packet.packet_id for packet in (b, a, c)] == [f"kasmina-seed-{seed}-17" for seed in "bac"]
    assert [packet.system_health.summary for packet in (b, a, c)] == ["fallback", "nominal", "violations"]
    assert [points(packet) for packet in (b, a, c)] == [
        {"kasmina.seed.alpha": 0.25},
        {},
        {"kasmina.seed.isolation_violations": 2.0},
    ]
    assert [len(packet.events) for packet in (b, a, c)] == [0, 1, 0]


def test_ids_stay_unique_when_step_numbers_went_back() -> None:
    """The same step number comes twice in one attempt."""
    recorded = {"loss": 2.5, "esper.steps.backwards": 2.0}
    first, second = (packets(make_frame(recorded=recorded, run=RUN)), packets(make_frame()))
    assert first.telemetry[0].packet_id == "kasmina-seed-seed-1-1-r2"
    assert second.telemetry[0].packet_id == "kasmina-seed-seed-1-1"


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        st.dictionaries(st.sampled_from([metric.field for metric in SEED_METRICS]), st.floats(), max_size=5),
        max_size=4,
    )
)
def test_every_recorded_cell_is_a_point_or_an_event(rows: dict[str, dict[str, float]]) -> None:
    """Nothing recorded disappears but ``alpha_steps`` outside BLENDING, and no row gets what it did not record."""
    for packet, cells in zip(telemetry(rows), dict(sorted(rows.items())).values(), strict=True):
        names = {metric.field: metric.name for metric in SEED_METRICS}
        expected = {names[field] for field in cells if field != "alpha_steps" or cells.get("stage") == Stage.BLENDING}
        in_events = {event.attributes["metric"] for event in packet.events}
        assert points(packet).keys() | in_events == expected
        assert all(math.isfinite(point.value) for point in packet.metrics)


def test_a_missing_cell_is_told_from_a_recorded_nan() -> None:
    """Both are NaN to arithmetic; the tests above rely on the helper keeping them apart."""
    cells = seed_table({"a": {"alpha": math.nan}}).cells
    assert is_absent(cells).sum() == cells.size - 1
    assert math.isnan(ABSENT)


@pytest.mark.parametrize(
    "seed_id", ["a", "b", "ab", "seed-3", "säed ∆", "seed_id", "x" * 127, "x" * 128, "é" * 128, "\x00"]
)
def test_an_id_is_put_into_what_was_built_for_another_of_its_length(seed_id: str) -> None:
    """Building it anew for each of 20,000 seeds takes seconds."""
    present, health = bytes(number % 2 for number, _ in enumerate(SEED_METRICS)), 3
    quick, slow = (make(seed_id, present, health) for make in (_row_stencil, _built_stencil))
    assert quick.wire.tobytes() == slow.wire.tobytes()
    assert (quick.holes == slow.holes).all()
    assert (quick.cells == slow.cells).all()
    assert quick.ends == slow.ends
