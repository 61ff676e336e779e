"""The state packet, field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame

from esper_otel.frames.frame import NO_SEEDS, Frame, Run
from esper_otel.leyline import SystemStatePacket, state
from esper_otel.schema import METRICS, STEP_METRICS

pytestmark = pytest.mark.own_code

BARE: dict[str, Any] = {"recorded": {}, "context": {}, "seeds": NO_SEEDS, "live": NO_SEEDS}
CUDA = replace(RUN, device_type="cuda", device_id="cuda:1", compute_capability=90)
RANK_3 = replace(RUN, rank=3, world_size=4)


def recorded(**values: float) -> dict[str, Any]:
    """Fields of a frame with these values; two underscores in a name stand for a dot."""
    return BARE | {"recorded": {name.replace("__", "."): value for name, value in values.items()}}


def field(packet: SystemStatePacket, path: str) -> Any:
    value: Any = packet
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("version", BARE, 1),
        ("current_epoch", BARE | {"epoch": 7}, 7),
        ("current_epoch", BARE | {"epoch": -1}, 0),
        ("validation_accuracy", recorded(esper__validation__accuracy=0.75), 0.75),
        ("validation_accuracy", BARE, 0.0),
        ("validation_loss", recorded(esper__training__loss=2.5, esper__validation__loss=1.0), 2.5),
        ("training_loss", recorded(esper__training__loss=2.5, esper__validation__loss=1.0), 2.5),
        ("training_loss", recorded(loss=math.nan, esper__training__loss=2.5), 2.5),
        ("training_loss", BARE, 0.0),
        ("timestamp_ns", BARE, TIME_UNIX_NS),
        ("global_step", BARE | {"global_step": 2**53}, 2**53),
        ("global_step", BARE | {"global_step": -1}, 0),
        ("source_subsystem", BARE, "tolaria"),
        ("training_run_id", BARE, "digits-7"),
        ("experiment_name", BARE | {"run": replace(RUN, experiment="digits")}, "digits"),
        ("packet_id", BARE | {"global_step": 17}, "digits-7-step-17"),
        ("packet_id", BARE | {"global_step": 17, "run": RANK_3}, "digits-7/3-step-17"),
        ("packet_id", recorded(esper__steps__backwards=2.0), "digits-7-step-1-r2"),
        ("packet_id", recorded(esper__steps__backwards=0.0), "digits-7-step-1"),
        ("packet_id", recorded(esper__steps__backwards=math.nan), "digits-7-step-1"),
        ("hardware_context.device_type", BARE | {"run": CUDA}, "cuda"),
        ("hardware_context.device_type", BARE, ""),
        ("hardware_context.device_id", BARE | {"run": CUDA}, "cuda:1"),
        ("hardware_context.compute_capability", BARE | {"run": CUDA}, 90),
        ("hardware_context.total_memory_gb", recorded(esper__device__memory_total_gb=80.0, gpu_mem_used_gb=1.0), 80.0),
        ("hardware_context.total_memory_gb", recorded(gpu_mem_used_gb=30.0, gpu_mem_free_gb=50.0), 80.0),
        ("hardware_context.total_memory_gb", recorded(gpu_mem_used_gb=3e38, gpu_mem_free_gb=3e38), 0.0),
        ("hardware_context.total_memory_gb", recorded(gpu_mem_used_gb=30.0), 0.0),
        ("hardware_context.available_memory_gb", recorded(gpu_mem_free_gb=50.0), 50.0),
        (
            "hardware_context.available_memory_gb",
            recorded(gpu_mem_free_gb=50.0, esper__device__memory_available_gb=9.0),
            50.0,
        ),
        ("hardware_context.available_memory_gb", recorded(esper__device__memory_available_gb=9.0), 9.0),
        ("hardware_context.temperature_celsius", recorded(esper__device__temperature_celsius=61.0), 61.0),
        ("hardware_context.temperature_celsius", recorded(esper__device__temperature_celsius=math.inf), 0.0),
        ("hardware_context.utilization_percent", recorded(gpu_util_percent=97.0, cpu_util_percent=12.0), 12.0),
        (
            "hardware_context.utilization_percent",
            recorded(gpu_util_percent=97.0, cpu_util_percent=12.0) | {"run": CUDA},
            97.0,
        ),
    ],
)
def test_each_field_is_filled_as_the_contract_says(path: str, given: Mapping[str, Any], expected: object) -> None:
    """One row for one rule."""
    assert field(state(make_frame(**given)), path) == expected


def test_hardware_that_nobody_knows_is_absent() -> None:
    """An empty context would claim that somebody had looked."""
    assert not state(make_frame(**BARE)).HasField("hardware_context")


@pytest.mark.parametrize("name", [metric.name for metric in STEP_METRICS])
def test_each_step_metric_stands_under_its_name(name: str) -> None:
    """Tamiyo looks the schema's names up verbatim."""
    also = {"training_loss": 0.25} if name == "loss" else {}
    assert state(make_frame(**BARE | {"recorded": {name: 0.25}})).training_metrics == {name: 0.25, **also}


KEYS = {
    "esper.training.loss": "training_loss",
    "esper.validation.loss": "validation_loss",
    "esper.epochs.total": "epochs_total",
    "esper.optimizer.lr": "optimizer_lr",
    "esper.isolation.violations": "kasmina.isolation.violations",
}


@pytest.mark.parametrize(("name", "key"), KEYS.items())
def test_the_five_keys_beyond_the_schema_are_filled(name: str, key: str) -> None:
    """These five and no other."""
    assert state(make_frame(**BARE | {"recorded": {name: 0.25}})).training_metrics == {key: 0.25}


def test_nothing_else_of_ours_stands_in_the_map() -> None:
    """Tamiyo's networks see every key: each further one would be an input that they were not built for."""
    everything = {metric.name: 1.0 for metric in METRICS if metric.name.startswith("esper.") and metric.level == "step"}
    frame_only = {"esper.frame.sequence", "esper.frame.points"}  # no frame has these two
    packet = state(make_frame(**BARE | {"recorded": dict.fromkeys(everything.keys() - frame_only, 1.0)}))
    assert set(packet.training_metrics) == set(KEYS.values())


def test_a_users_own_metric_stands_under_its_name() -> None:
    """Declared with one line, delivered like ours."""
    packet = state(make_frame(**BARE | {"recorded": {"tokens_per_s": 3.0}}))
    assert packet.training_metrics == {"tokens_per_s": 3.0}


def test_zero_is_kept_and_missing_is_not_made_zero() -> None:
    """Missing is not zero."""
    packet = state(make_frame(**BARE | {"recorded": {"loss": 0.0, "accuracy": -0.0}}))
    assert dict(packet.training_metrics) == {"loss": 0.0, "accuracy": 0.0, "training_loss": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400])
def test_a_value_that_is_not_finite_in_float32_is_left_out(value: float) -> None:
    """One NaN in the map poisons the running statistics of Tamiyo's network for good."""
    packet = state(
        make_frame(**BARE | {"recorded": {"loss_ewma": value, "accuracy": 1.0, "esper.training.loss": value}})
    )
    assert dict(packet.training_metrics) == {"accuracy": 1.0}
    assert packet.training_loss == packet.validation_loss == 0.0


def test_what_processors_derive_is_in_the_packet() -> None:
    """They are values like those that were put."""
    frame: Frame = make_frame(**BARE | {"derived": {"loss_ewma": 1.25}})
    assert state(frame).training_metrics == {"loss_ewma": 1.25}


def test_converting_changes_nothing_in_the_frame() -> None:
    """A frame is shared by exporter, instruments and packets."""
    frame = make_frame(run=Run("run", 1), recorded={"loss": 2.0, "accuracy": math.nan})
    before = (dict(frame.recorded), dict(frame.context), frame.live.cells.tobytes())
    first = state(frame)
    assert (dict(frame.recorded), dict(frame.context), frame.live.cells.tobytes()) == before
    assert state(frame) == first
