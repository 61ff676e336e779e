"""More seed ids than an SDK tells apart, at a MeterProvider that is not ours."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider, ObservableGauge
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import View
from prometheus_client import CollectorRegistry

import esper_otel
from esper_otel import LeylineMetricReader, Telemetry
from esper_otel.export import cardinality as room_module
from esper_otel.export import instruments
from esper_otel.export import provider as own
from esper_otel.export.cardinality import SeedParts, limit_of

with_limits = pytest.mark.skipif(
    "cardinality_limits" not in inspect.signature(InMemoryMetricReader).parameters, reason="SDK before 1.45.2"
)
OF_SEEDS = ("kasmina.seed.*", "esper.seed.*")


def step(telemetry: Telemetry, ids: list[str]) -> dict[str, float]:
    """A step in which these seeds are recorded; their alphas."""
    alphas = np.linspace(0.0, 1.0, len(ids))
    telemetry.seeds(ids, alpha=alphas, learning_rate=alphas)
    telemetry.record_step({"loss": 1.0}, epoch=0)
    return dict(zip(ids, alphas.tolist(), strict=True))


def shown(reader: InMemoryMetricReader, name: str = "kasmina.seed.alpha") -> dict[str, tuple[float, str]]:
    """Value and scope by seed id; each point must have one."""
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, tuple[float, str]] = {}
    for scoped in data.resource_metrics[0].scope_metrics:
        for metric in scoped.metrics:
            for point in metric.data.data_points if metric.name == name else ():
                seed_id = str((point.attributes or {}).get("seed_id"))
                assert seed_id not in found
                found[seed_id] = (point.value, scoped.scope.name)  # type: ignore[union-attr] # of a gauge
    return found


def values(found: Mapping[str, tuple[float, str]]) -> dict[str, float]:
    return {seed_id: value for seed_id, (value, _) in found.items()}


def unshown(reader: InMemoryMetricReader) -> float:
    return sum(value for value, _ in shown(reader, "esper.seeds.unshown").values())


def test_every_live_seed_is_shown_however_many_there_were() -> None:
    """The SDK's limit is 2,000 over an instrument's life, and what is above it is one point without a name."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    scopes: dict[str, str] = {}
    with esper_otel.start(run_id="many", meter_provider=provider) as telemetry:
        telemetry.seeds(["stays"], alpha=[0.5])
        for generation in range(3):
            ids = ["stays", *(f"seed-{generation}-{number}" for number in range(2_500))]
            expected = step(telemetry, ids)
            found = shown(reader)
            assert values(found) == expected
            assert values(shown(reader, "esper.seed.learning_rate")) == expected
            assert scopes.setdefault("stays", found["stays"][1]) == "esper_otel"
            for seed_id in ids[1:]:
                telemetry.retire_seed(seed_id)
        assert unshown(reader) == 0
    provider.shutdown()


def test_a_seed_keeps_its_series_and_sessions_have_room_of_their_own() -> None:
    """A scope is a part of a series; a seed that is back must not begin another one."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    ids = [f"seed-{number}" for number in range(1_500)]
    scopes = []
    for run_id in ("first", "second", "third", "third"):
        with esper_otel.start(run_id=run_id, meter_provider=provider) as telemetry:
            expected = step(telemetry, ids)
            found = shown(reader)
            assert values(found) == expected
            scopes.append({seed_id: scope for seed_id, (_, scope) in found.items()})
    assert scopes[2] == scopes[3]
    assert {scope for of_session in scopes for scope in of_session.values()} == {
        *("esper_otel", "esper_otel.seeds.2", "esper_otel.seeds.3")
    }
    provider.shutdown()


def test_prometheus_scrapes_every_seed_under_the_same_labels() -> None:
    """Its exporter takes the names of a metric's labels from the first scope that has it."""
    registry = CollectorRegistry()
    provider = MeterProvider(metric_readers=[PrometheusMetricReader(registry=registry)])
    with esper_otel.start(run_id="many", meter_provider=provider) as telemetry:
        expected = step(telemetry, [f"seed-{number}" for number in range(2_500)])
        samples = [
            sample
            for family in registry.collect()
            if family.name.startswith("kasmina_seed_alpha")
            for sample in family.samples
        ]
    assert {sample.labels["seed_id"]: sample.value for sample in samples} == expected
    assert len(samples) == len(expected)
    assert {sample.labels["otel_scope_name"] for sample in samples} == {"esper_otel", "esper_otel.seeds.2"}
    assert {sample.labels["esper_run_id"] for sample in samples} == {"many"}
    provider.shutdown()


def test_packets_of_a_reader_have_every_seed() -> None:
    reader = LeylineMetricReader()
    provider = MeterProvider(metric_readers=[reader, InMemoryMetricReader()])
    with esper_otel.start(run_id="many", meter_provider=provider) as telemetry:
        expected = step(telemetry, [f"seed-{number}" for number in range(2_500)])
        packets = reader.pull()
        assert packets is not None
        assert {state.seed_id for state in packets.state.seed_states} == expected.keys()
    provider.shutdown()


def by_views() -> tuple[InMemoryMetricReader, list[View]]:
    return InMemoryMetricReader(), [View(instrument_name=n, aggregation_cardinality_limit=100) for n in OF_SEEDS]


def by_reader() -> tuple[InMemoryMetricReader, list[View]]:
    return InMemoryMetricReader(cardinality_limits={ObservableGauge: 100}), []


@with_limits
@pytest.mark.parametrize("limited", [by_views, by_reader])
def test_a_limit_that_the_user_has_set_is_kept_and_said_before_it_is_met(
    limited: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not fit is counted, not folded into a point that says nothing."""
    reader, views = limited()
    provider = MeterProvider(metric_readers=[reader], views=views)
    with esper_otel.start(run_id="few", meter_provider=provider) as telemetry:
        ids = [f"seed-{number}" for number in range(150)]
        expected = step(telemetry, ids[:70])
        assert values(shown(reader)) == expected
        assert not caplog.records
        expected = step(telemetry, ids[:90])
        assert values(shown(reader)) == expected
        [warning] = caplog.records
        assert warning.levelname == "WARNING"
        assert warning.getMessage().startswith("90 of the 99 seed ids that a MeterProvider can tell apart are used")
        assert "aggregation_cardinality_limit" in warning.getMessage()
        expected = step(telemetry, ids)
        assert values(shown(reader)) == {seed_id: expected[seed_id] for seed_id in ids[:99]}
        assert unshown(reader) == 51
        assert caplog.records[-1].getMessage().startswith("the readers of a MeterProvider leave out 51 live seeds")
        assert len(caplog.records) == 2  # each once, or once a minute
    provider.shutdown()


@with_limits
def test_a_higher_limit_of_the_users_needs_no_further_scopes(caplog: pytest.LogCaptureFixture) -> None:
    """The fix that the warning names; the SDK has nothing to say of it either."""
    reader = InMemoryMetricReader()
    views = [View(instrument_name=name, aggregation_cardinality_limit=10_000) for name in OF_SEEDS]
    provider = MeterProvider(metric_readers=[reader], views=views)
    with esper_otel.start(run_id="many", meter_provider=provider) as telemetry:
        expected = step(telemetry, [f"seed-{number}" for number in range(5_000)])
        found = shown(reader)
    assert values(found) == expected
    assert {scope for _, scope in found.values()} == {"esper_otel"}
    assert not caplog.records
    provider.shutdown()


def test_more_than_stand_ready_are_shown_by_the_next_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instruments cannot be added while they are read."""
    monkeypatch.setattr(instruments, "_PARTS_AHEAD", 2)
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    with esper_otel.start(run_id="burst", meter_provider=provider) as telemetry:
        expected = step(telemetry, [f"seed-{number}" for number in range(5_000)])
        assert len(shown(reader)) == 2 * 1_999
        growing = instruments.instruments_of(provider)._growing
        assert growing is not None
        growing.join(10)
        assert values(shown(reader)) == expected
        assert unshown(reader) == 0
    provider.shutdown()


def test_readers_of_our_own_tell_the_further_fields_of_many_seeds_apart_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the request's ten."""
    reader = InMemoryMetricReader()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "console")
    monkeypatch.setattr(own, "_reader", lambda _name: reader)
    with esper_otel.start(run_id="read") as telemetry:
        expected = step(telemetry, [f"seed-{number}" for number in range(2_500)])
        assert values(shown(reader, "esper.seed.learning_rate")) == expected


def test_a_provider_of_another_make_counts_as_one_with_the_default() -> None:
    assert limit_of(NoOpMeterProvider(), [object()]) == 2_000
    assert limit_of(MeterProvider(), []) == 2_000


@given(st.integers(2, 9), st.lists(st.integers(0, 30)), st.integers(1, 20))
def test_no_part_has_more_than_it_may_and_each_seed_one(limit: int, seeds: list[int], ids: int) -> None:
    """Against a plain list of who came first."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(room_module, "SEED_IDS", ids)
        patched.setattr(room_module, "_DEFAULT", 2)
        room = SeedParts(limit)
    order = list(dict.fromkeys(seeds))
    expected = {seed: order.index(seed) // (limit - 1) for seed in order[: room.size]}
    assert [room.part_of(seed) for seed in seeds] == [expected.get(seed) for seed in seeds]
    assert room.size >= ids
    assert all(list(expected.values()).count(part) < limit for part in range(room.parts))


def test_a_provider_that_nobody_holds_any_more_is_freed() -> None:
    """Its instruments are known by it, and must not hold it."""
    provider = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False)
    with esper_otel.start(run_id="gone", meter_provider=provider):
        pass
    provider.shutdown()
    gone = weakref.ref(provider)
    del provider
    gc.collect()
    assert gone() is None
