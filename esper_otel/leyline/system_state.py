"""Converts a frame to a SystemStatePacket, by which Tolaria informs Tamiyo about a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.numbers import UINT32_LIMIT, UINT64_LIMIT, are_finite, finite, whole
from esper_otel.leyline import messages
from esper_otel.leyline.seed_states import seed_states
from esper_otel.leyline.stencil import Stencil
from esper_otel.schema import METRICS

VERSION = 1
SOURCE = "tolaria"

# Metrics declared by the user are not in the catalogue; their key is their name.
_KEYS = {metric.name: metric.key or "" for metric in METRICS if metric.level == "step"}
_NO_KEY = ""


def step_label(frame: Frame, values: Mapping[str, float]) -> str:
    """Returns the step's number, made unique in the attempt: if step numbers went back b times, with ``-r<b>``."""
    times_back = whole(values.get("esper.steps.backwards"), UINT64_LIMIT)
    return f"{frame.global_step}-r{times_back}" if times_back else str(frame.global_step)


def packet_id(frame: Frame, values: Mapping[str, float]) -> str:
    """Returns the id of the step's state packet: ``<run>-step-<n>``, or ``<run>/<rank>-step-<n>`` if rank is not 0."""
    run = frame.run
    sender = f"{run.run_id}/{run.rank}" if run.rank else run.run_id
    return f"{sender}-step-{step_label(frame, values)}"


def system_state(frame: Frame, values: Mapping[str, float]) -> messages.SystemStatePacket:
    """Returns the step's state packet.

    Fields 4 and 11 both contain the training loss, or the last finite one. They are never left out, because a
    controller that subtracts two packets' losses would read a missing one as 0.

    Args:
        frame: the step.
        values: ``frame.values()``.
    """
    there = values
    if not are_finite(values.values()):
        there = {name: value for name, value in values.items() if finite(value) is not None}
    numbers = np.fromiter(there.values(), np.float64, len(there))
    metrics, loss_place = _metrics(tuple(there))
    loss = None if loss_place is None else numbers.item(loss_place)
    packet = messages.SystemStatePacket(
        version=VERSION,
        current_epoch=whole(frame.epoch, UINT32_LIMIT),
        validation_accuracy=finite(values.get("esper.validation.accuracy")),
        validation_loss=loss,
        timestamp_ns=frame.time_unix_ns,
        hardware_context=_hardware(frame.run, values),
        packet_id=packet_id(frame, values),
        global_step=whole(frame.global_step, UINT64_LIMIT),
        training_loss=loss,
        source_subsystem=SOURCE,
        training_run_id=frame.run.run_id,
        experiment_name=frame.run.experiment,
    )
    packet.MergeFromString(metrics.filled(numbers) + seed_states(frame.live))
    return packet


@lru_cache(maxsize=64)
def _metrics(names: tuple[str, ...]) -> tuple[Stencil, int | None]:
    """Returns the stencil of ``training_metrics`` for values with these names, and the place of the loss."""
    places = {_KEYS.get(name, name): place for place, name in enumerate(names)}
    places.pop(_NO_KEY, None)

    def build(hole: Callable[[int], float]) -> messages.SystemStatePacket:
        return messages.SystemStatePacket(training_metrics={key: hole(place) for key, place in places.items()})

    return Stencil.of(build, 4), places.get("training_loss")


def _hardware(run: Run, values: Mapping[str, float]) -> messages.HardwareContext | None:
    """Returns the known facts about the training device; None if nothing is known."""
    used = finite(values.get("gpu_mem_used_gb"))
    free = finite(values.get("gpu_mem_free_gb"))
    total = finite(values.get("esper.device.memory_total_gb"))
    if total is None and used is not None and free is not None:
        total = finite(used + free)
    if free is None:
        free = finite(values.get("esper.device.memory_available_gb"))
    utilization = "gpu_util_percent" if run.device_type == "cuda" else "cpu_util_percent"
    hardware = messages.HardwareContext(
        device_type=run.device_type,
        device_id=run.device_id,
        total_memory_gb=total,
        available_memory_gb=free,
        temperature_celsius=finite(values.get("esper.device.temperature_celsius")),
        utilization_percent=finite(values.get(utilization)),
        compute_capability=whole(run.compute_capability, UINT32_LIMIT),
    )
    return hardware if hardware.ByteSize() else None
