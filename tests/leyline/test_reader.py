"""LeylineMetricReader: OTel readings in, packets out, whoever set the gauges."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from patience import patience

from esper_otel import LeylineMetricReader, Stage, WrongState
from esper_otel.leyline import Packets
from esper_otel.schema import SEED_METRICS, STEP_METRICS


@pytest.fixture
def reader() -> LeylineMetricReader:
    return LeylineMetricReader()


@pytest.fixture
def provider(reader: LeylineMetricReader) -> Iterator[MeterProvider]:
    resource = Resource({"service.name": "somebody-elses", "esper.run.id": "digits-7", "esper.rank": 0})
    provider = MeterProvider(metric_readers=[reader], resource=resource, shutdown_on_exit=False)
    yield provider
    provider.shutdown()


def pulled(reader: LeylineMetricReader) -> Packets:
    packets = reader.pull()
    assert packets is not None
    return packets


def test_every_metric_of_the_request_set_by_somebody_else_is_in_the_packets(
    reader: LeylineMetricReader, provider: MeterProvider
) -> None:
    """A program that has never heard of our recorder can be steered all the same."""
    meter = provider.get_meter("trainer")
    for number, metric in enumerate(STEP_METRICS, 1):
        meter.create_gauge(metric.name, metric.unit).set(number / 8)
    for metric in SEED_METRICS:
        gauge = meter.create_gauge(metric.name, metric.unit)
        gauge.set(Stage.BLENDING if metric.name.endswith(".stage") else 0.5, {"seed_id": "seed-1"})
    packets = pulled(reader)
    assert {metric.name: packets.state.training_metrics.get(metric.name) for metric in STEP_METRICS} == {
        metric.name: number / 8 for number, metric in enumerate(STEP_METRICS, 1)
    }
    assert {metric.name for metric in (*STEP_METRICS, *SEED_METRICS)} <= packets.names
    assert (packets.run_id, packets.rank, packets.step, packets.state.packet_id) == (
        "digits-7",
        0,
        1,
        "digits-7-step-1",
    )
    seed, events = packets.telemetry
    assert "isolation_violations" in {event.description for event in events.events}  # 0.5 of them are new
    assert [(point.name, point.unit, dict(point.attributes)) for point in seed.metrics] == [
        (metric.name, metric.unit, {"seed_id": "seed-1"}) for metric in SEED_METRICS
    ]
    [state] = packets.state.seed_states
    assert (state.seed_id, int(state.stage), state.metrics["alpha"]) == ("seed-1", 4, 0.5)


def test_pulls_are_numbered_when_nobody_says_the_step(reader: LeylineMetricReader, provider: MeterProvider) -> None:
    """Packet ids stay unique."""
    gauge = provider.get_meter("trainer").create_gauge("loss")
    ids = []
    for loss in (2.0, 1.0):
        gauge.set(loss)
        packets = pulled(reader)
        ids.append((packets.step, packets.state.packet_id, packets.state.training_loss))
    assert ids == [(1, "digits-7-step-1", 2.0), (2, "digits-7-step-2", 1.0)]


def test_the_step_and_epoch_that_gauges_say_are_the_packets(
    reader: LeylineMetricReader, provider: MeterProvider
) -> None:
    """The same names that our own instruments have."""
    meter = provider.get_meter("trainer")
    for name, value in {"loss": 1.0, "esper.global_step": 412, "esper.epoch": 3}.items():
        meter.create_gauge(name).set(value)
    packets = pulled(reader)
    assert (packets.step, packets.state.global_step, packets.state.current_epoch) == (412, 412, 3)


def test_alpha_steps_outside_blending_is_left_out(reader: LeylineMetricReader, provider: MeterProvider) -> None:
    """The schema: BLENDING only."""
    meter = provider.get_meter("trainer")
    attributes = {"seed_id": "a"}
    meter.create_gauge("kasmina.seed.stage").set(Stage.TRAINING, attributes)
    meter.create_gauge("kasmina.seed.alpha_steps").set(8, attributes)
    packets = pulled(reader)
    assert "kasmina.seed.alpha_steps" not in packets.names
    assert "alpha_steps" not in packets.state.seed_states[0].metrics


def test_violations_are_those_new_since_the_last_pull(reader: LeylineMetricReader, provider: MeterProvider) -> None:
    """A sum that never falls would pause Tamiyo for ever."""
    gauge = provider.get_meter("trainer").create_gauge("kasmina.seed.isolation_violations")
    new = []
    for count in (2, 2, 5, 1):
        gauge.set(count, {"seed_id": "a"})
        new.append(pulled(reader).state.training_metrics["kasmina.isolation.violations"])
    assert new == [2, 0, 3, 1]


def test_an_infinity_of_a_sum_is_in_no_packet(reader: LeylineMetricReader, provider: MeterProvider) -> None:
    """Tamiyo feeds values to a network; and 1e39 is not finite in float32."""
    provider.get_meter("trainer").create_gauge("loss").set(1.0)
    pulled(reader)

    def observe(_options: CallbackOptions) -> list[Observation]:
        return [Observation(1e39)]

    provider.get_meter("trainer").create_observable_gauge("gradient_norm", [observe])
    packets = pulled(reader)
    assert "gradient_norm" in packets.names
    assert "gradient_norm" not in packets.state.training_metrics
    assert all(math.isfinite(value) for value in packets.state.training_metrics.values())
    assert [event.description for event in packets.telemetry[-1].events] == ["value_nonfinite"]


def test_nothing_of_ours_is_no_packet(reader: LeylineMetricReader, provider: MeterProvider) -> None:
    """An HTTP server's gauges are no training step."""
    assert reader.pull() is None
    provider.get_meter("web").create_gauge("http.server.requests").set(3)
    assert reader.pull() is None


def test_a_reader_without_a_provider_or_after_shutdown_says_so(reader: LeylineMetricReader) -> None:
    """A mistake in the program raises at once."""
    with pytest.raises(WrongState, match=r"MeterProvider\(metric_readers"):
        reader.pull()
    MeterProvider(metric_readers=[reader], shutdown_on_exit=False).shutdown()
    with pytest.raises(WrongState, match="shut down"):
        reader.pull()


def test_a_callback_that_hangs_costs_other_pullers_their_timeout_only(
    reader: LeylineMetricReader, provider: MeterProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """No unbounded wait."""
    release, entered = threading.Event(), threading.Event()

    def observe(_options: CallbackOptions) -> list[Observation]:
        entered.set()
        release.wait(10)
        return [Observation(1.0)]

    provider.get_meter("trainer").create_observable_gauge("loss", [observe])
    first = threading.Thread(target=reader.pull)
    first.start()
    assert entered.wait(120)
    started = time.monotonic()
    assert reader.pull(timeout_s=0.1) is None
    assert time.monotonic() - started < patience(5)
    release.set()
    first.join(120)
    assert "another pull" in caplog.text
