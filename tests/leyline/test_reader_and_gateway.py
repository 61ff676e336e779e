"""One MeterProvider, read by ``LeylineMetricReader`` and sent by a stock OTLP exporter to a gateway: equal packets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import frame_examples
import pytest
from gateways import RunningGateway
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint as NumberDataPointMessage
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    Gauge,
    InMemoryMetricReader,
    Metric,
    MetricReader,
    MetricsData,
    NumberDataPoint,
    PeriodicExportingMetricReader,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

import esper_otel
from esper_otel import LeylineMetricReader, Stage, TamiyoClient
from esper_otel.frames.digest import digest_of
from esper_otel.frames.numbers import finite
from esper_otel.gateway.items import Item
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.leyline.packets import Packets, packets
from esper_otel.leyline.risk import signals, with_signals
from esper_otel.parts import senders

RESOURCE: Mapping[str, str | int] = {"esper.run.id": "theirs", "esper.run.attempt": 7, "service.name": "a program"}
FOLDED = "otel.metric.overflow"
HOSTILE: tuple[Any, ...] = ("", "x" * 257, "line\nbreak", "\x7f", "é" * 129, True, ("a", "b"))
ODD: tuple[Any, ...] = ("é" * 128, " ", "x" * 256, 7, 1.5, "ends with \u2028")


# The oldest SDK that we allow has no limits.
HAS_LIMITS = "aggregation_cardinality_limit" in signature(View).parameters


def provider_of(*readers: MetricReader, **more: str | int) -> MeterProvider:
    views = [View(instrument_name="*", aggregation_cardinality_limit=100_000)] if HAS_LIMITS else []
    resource = Resource({**RESOURCE, **more})
    return MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False, views=views)


def without_time(step: Packets) -> Packets:
    """The two collect one after the other: the step's time differs, and nothing else may."""
    state = type(step.state).FromString(step.state.SerializeToString())
    state.ClearField("timestamp_ns")
    telemetry = tuple(type(packet).FromString(packet.SerializeToString()) for packet in step.telemetry)
    for packet in telemetry:
        packet.ClearField("timestamp")
    return replace(step, state=state, telemetry=telemetry)


class Program:
    """Somebody's instruments, in two scopes, some with attributes of their own; each round sets other values."""

    def __init__(self, provider: MeterProvider) -> None:
        self.round = 0
        one, two = provider.get_meter("one"), provider.get_meter("two")
        self._first = {name: one.create_gauge(name) for name in ("loss", "gradient_norm", "kasmina.seed.alpha")}
        self._second = {name: two.create_gauge(name) for name in ("loss", "accuracy", "kasmina.seed.alpha")}
        self._more = {
            name: one.create_gauge(name)
            for name in (
                *("hook_latency_ms", "esper.global_step", "esper.epoch", "kasmina.seed.stage", "gpu_util_percent"),
                *("kasmina.seed.alpha_steps", "kasmina.seed.isolation_violations", "http.server.requests"),
            )
        }
        two.create_observable_gauge("kasmina.seed.fallback_used", [self._observed])
        two.create_observable_gauge("grad_var", [lambda _options: [Observation(1e39 if self.round == 3 else 0.5)]])
        two.create_counter("samples_per_s").add(12)

    def _observed(self, _options: CallbackOptions) -> list[Observation]:
        """A seed that is seen in the first two rounds only."""
        seeds = ["comes", "goes"] if self.round < 3 else ["comes"]
        return [Observation(1.0, {"seed_id": seed}) for seed in seeds]

    def set(self) -> None:
        """The next round."""
        self.round += 1
        number = self.round
        self._second["loss"].set(5.0 + number, {"split": "validation"})
        self._first["loss"].set(1.0 + number / 2, {"shard": "0"})
        if number > 1:
            self._second["loss"].set(2.0 + number)
            self._first["loss"].set(3.0 + number * number)
        self._first["gradient_norm"].set(0.5, {"seed_id": "a"})
        self._first["gradient_norm"].set(0.25, {"layer": "1", "kind": "weight"})
        self._second["accuracy"].set(0.5 + number / 64)
        for seed in ("a", "b", *HOSTILE, *ODD):
            self._first["kasmina.seed.alpha"].set(number / 8, {"seed_id": seed})
            self._second["kasmina.seed.alpha"].set(number / 4, {"seed_id": seed})
        self._first["kasmina.seed.alpha"].set(0.75)
        self._first["kasmina.seed.alpha"].set(0.75, {"seed_id": "c", "site": "left"})
        self._more["kasmina.seed.stage"].set(Stage.BLENDING if number % 2 else Stage.TRAINING, {"seed_id": "a"})
        self._more["kasmina.seed.alpha_steps"].set(number, {"seed_id": "a"})
        self._more["kasmina.seed.isolation_violations"].set(3 if number < 3 else 1, {"seed_id": "b"})
        self._more["http.server.requests"].set(1)
        if number >= 2:
            self._more["hook_latency_ms"].set(80.0)
        self._more["esper.epoch"].set(3 if number < 3 else 2**33)
        self._more["esper.global_step"].set(410 + number)
        if number == 4:
            self._more["gpu_util_percent"].set(99.0)


def test_a_reader_and_a_gateway_make_the_same_packets() -> None:
    """Field by field, over several collections, the risk signals too."""
    esper_reader = LeylineMetricReader()
    with RunningGateway() as gateway, TamiyoClient(gateway.grpc) as client:
        exporter = OTLPMetricExporter(endpoint=f"http://{gateway.http}/v1/metrics")
        periodic = PeriodicExportingMetricReader(exporter, export_interval_millis=float("inf"))
        provider = provider_of(esper_reader, periodic)
        program = Program(provider)
        cursor = None
        try:
            for _ in range(5):
                program.set()
                mine = esper_reader.pull()
                assert mine is not None
                assert provider.force_flush()
                page = client.pull("theirs", cursor, wait_s=10.0)
                cursor = page.cursor
                [theirs] = page
                assert without_time(mine) == without_time(theirs)
                ids = {state.seed_id for state in mine.state.seed_states}
                assert ids == {"a", "b", "c", "comes", "goes", *map(str, ODD)}
                assert mine.state.training_metrics["loss"] == (6.0 if program.round == 1 else 2.0 + program.round)
                events = {event.description for packet in mine.telemetry for event in packet.events}
                assert ("hook_budget" in events) is (program.round >= 2)
        finally:
            provider.shutdown()


class Behind:
    """A gateway's decoding and assembling in this process."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.reader = InMemoryMetricReader()
        self._decoder, self._assembler = Decoder(), Assembler(limits)
        self._now_s = 0.0

    def pull(self) -> Packets:
        """What a collection becomes behind a gateway."""
        data = self.reader.get_metrics_data()
        assert data is not None
        [item] = self.items(data)
        return packets(item.frame, complete=item.complete)

    def items(self, data: MetricsData) -> list[Item]:
        """What these readings become, with corrections of earlier steps."""
        return self.items_of(encode_metrics(data).SerializeToString())

    def items_of(self, body: bytes) -> list[Item]:
        """What a request becomes, likewise."""
        self._now_s += 10.0
        decoded = self._decoder.decode(body)
        self._assembler.take(decoded, now_s=self._now_s, received_unix_ns=1)
        return self._assembler.release(self._now_s + 9.0)


def test_more_seeds_than_are_taken_are_left_out_with_a_word(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones here and there; a packet that lacks some says so."""
    assert Limits().seeds == senders.MOST_SEEDS == 20_000
    monkeypatch.setattr(senders, "MOST_SEEDS", 200)  # quicker
    reader, behind = LeylineMetricReader(), Behind(Limits(seeds=200))
    provider = provider_of(reader, behind.reader)
    gauge = provider.get_meter("theirs").create_gauge("kasmina.seed.alpha")
    for count, is_all in ((10, True), (210, False), (230, False)):
        for seed in range(count):
            gauge.set(0.5, {"seed_id": f"seed-{seed}"})
        with caplog.at_level(logging.WARNING):
            mine, theirs = reader.pull(), behind.pull()
        assert mine is not None
        assert (mine.complete, len(mine.state.seed_states)) == (is_all, min(count, 200))
        assert ("20,000 seeds" in caplog.text) is not is_all
        assert without_time(mine) == without_time(theirs)
    provider.shutdown()


@pytest.mark.skipif(not HAS_LIMITS, reason="this SDK folds nothing")
def test_seeds_that_the_sdk_folds_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """A view of the program's own may tell fewer apart than the reader asks for: the packets are not complete."""
    reader, behind = LeylineMetricReader(), Behind()
    views = [View(instrument_name="*", aggregation_cardinality_limit=10)]
    readers = (reader, behind.reader)
    provider = MeterProvider(readers, Resource(RESOURCE), shutdown_on_exit=False, views=views)
    gauge = provider.get_meter("theirs").create_gauge("kasmina.seed.alpha")
    for seed in range(20):
        gauge.set(0.5, {"seed_id": f"seed-{seed}"})
    mine, theirs = reader.pull(), behind.pull()
    assert mine is not None
    assert not mine.complete
    assert without_time(mine) == without_time(theirs)
    assert "attribute sets" in caplog.text
    provider.shutdown()


def test_a_step_whose_values_the_sdk_folded_stays_incomplete() -> None:
    """Whichever of its points comes first, and whatever comes later."""
    for order in ((0, 1, 2), (1, 0, 2), (1, 2, 0)):
        gateway, message, points = Behind(), ExportMetricsServiceRequest(), []
        for seed in ("a", "", "b"):
            point = NumberDataPointMessage(time_unix_nano=frame_examples.TIME_UNIX_NS, as_double=0.5)
            key, value = ("seed_id", AnyValue(string_value=seed)) if seed else (FOLDED, AnyValue(bool_value=True))
            point.attributes.add(key=key).value.CopyFrom(value)
            points.append(point)
        items: list[Item] = []
        for place in order:
            message.Clear()
            gauge = message.resource_metrics.add().scope_metrics.add().metrics.add(name="kasmina.seed.alpha").gauge
            gauge.data_points.add().CopyFrom(points[place])
            items += gateway.items_of(message.SerializeToString())
        assert {*items[-1].frame.live.ids} == {"a", "b"}
        assert not items[-1].complete


def test_the_instruments_of_a_session_say_who_lives() -> None:
    """A session of ours at somebody's MeterProvider: a retired seed is gone at once, a silent one stays."""
    reader, behind = LeylineMetricReader(), Behind()
    provider = provider_of(reader, behind.reader)
    steps = ({"a", "b"}, {"b"}, {"a"}, {"c"}, set[str](), {"c", "d"})
    retired = ((), (), ("b",), (), ("a",), ())
    alive = ({"a", "b"}, {"a", "b"}, {"a"}, {"a", "c"}, {"c"}, {"c", "d"})
    own = esper_otel.Metric("tokens_per_s", unit="rate")
    quiet = esper_otel.EsperSettings(tolaria_step_enrichment_enabled=False)  # a probe would make signals now and then
    with esper_otel.start(run_id="ours", meter_provider=provider, metrics=[own], settings=quiet) as telemetry:
        for recorded, gone, living in zip(steps, retired, alive, strict=True):
            for seed in gone:
                telemetry.retire_seed(seed)
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0, tokens_per_s=3.0)
                for seed in recorded:
                    now.seed(seed, stage=Stage.TRAINING, alpha=0.5)
            mine, theirs = reader.pull(), behind.pull()
            assert mine is not None
            assert mine.complete
            assert {state.seed_id for state in mine.state.seed_states} == living
            assert mine.state.training_metrics["tokens_per_s"] == 3.0
            assert without_time(replace(mine, attempt=0)) == without_time(replace(theirs, attempt=0))
    provider.shutdown()


# Instruments of any program, by scope: names of the catalogue, a user's own name, and one that nobody knows.
SCOPES = ("theirs", "also theirs", "esper_otel", "esper_otel.health")
NAMES = (
    *("loss", "gradient_norm", "gpu_util_percent", "hook_latency_ms", "esper.training.loss"),
    *("esper.isolation.violations", "esper.validation.accuracy", "tokens_per_s", "esper.dropped"),
    *("esper.global_step", "esper.epoch", "esper.seeds"),
    *("kasmina.seed.stage", "kasmina.seed.alpha", "kasmina.seed.alpha_steps", "kasmina.seed.learning_rate"),
    *("kasmina.seed.isolation_violations", "kasmina.seed.last_kernel_latency_ms", "esper.seed.retired"),
)
ATTRIBUTES: tuple[dict[str, Any], ...] = (
    *({}, {}, {"seed_id": "a"}, {"seed_id": "a"}, {"seed_id": "b"}, {"seed_id": "c"}, {"seed_id": ""}),
    *({"split": "test"}, {"seed_id": "a", "site": "left"}, {"seed_id": "line\nbreak"}, {"seed_id": 7}),
    *({"seed_id": True}, {"seed_id": "d", "split": "test", "site": "left"}, {"esper.rank": 0}),
)
VALUES = st.integers(0, 9) | st.sampled_from([0.5, 3.0, 30.0, -1.0]) | frame_examples.numbers()


@st.composite
def collections(draw: st.DrawFn) -> list[MetricsData]:
    """Collections of one provider, one after the other; some say by a digest which seeds live."""
    found = []
    time_unix_ns = 1_790_000_000 * 10**9
    resource = Resource({**RESOURCE, "service.name": "a program"})
    for _ in range(draw(st.integers(1, 5))):
        time_unix_ns += draw(st.sampled_from([1, 10**9, 200 * 10**9, 400 * 10**9]))
        scopes: dict[str, dict[str, list[NumberDataPoint]]] = {}

        def add(scope: str, name: str, value: float, attributes: Mapping[str, Any]) -> None:
            points = scopes.setdefault(scope, {}).setdefault(name, [])  # noqa: B023 - called in this round only
            points.append(NumberDataPoint(attributes, 0, time_unix_ns, value))  # noqa: B023

        streams = st.tuples(st.sampled_from(SCOPES), st.sampled_from(NAMES), VALUES, st.sampled_from(ATTRIBUTES))
        for stream in draw(st.lists(streams, max_size=12)):
            add(*stream)
        if draw(st.integers(0, 3)) == 0:
            living = draw(st.sets(st.sampled_from(["a", "b", "c", "d", "7"])))
            add("esper_otel", "esper.seeds.digest", digest_of(tuple(living)), {})
            if draw(st.booleans()):
                add("esper_otel", "esper.seeds", len(living), {})
        data = [
            ScopeMetrics(
                InstrumentationScope(scope),
                [Metric(name, None, None, Gauge(points)) for name, points in metrics.items()],
                "",
            )
            for scope, metrics in scopes.items()
        ]
        found.append(MetricsData([ResourceMetrics(resource, data, "")]))
    return found


@given(collections())
def test_whatever_is_collected_a_reader_and_a_gateway_make_the_same_packets(rounds: list[MetricsData]) -> None:
    """Values, seeds, live seeds, completeness and risk signals, collection after collection."""
    reader, behind = LeylineMetricReader(), Behind()
    loss_before = None
    for data in rounds:
        reader._set_collect_callback(lambda *_, data=data, **__: data)
        mine, items = reader.pull(), behind.items(data)
        item = next((each for each in items if each.revision == 1), None)
        assert (mine is None) == (item is None)
        if mine is None or item is None:
            continue
        theirs = packets(item.frame, complete=item.complete)
        theirs = with_signals(theirs, signals(theirs.state, loss_before=loss_before))
        loss_before = finite(item.frame.last_loss())
        assert mine == theirs
