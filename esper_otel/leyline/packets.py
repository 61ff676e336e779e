"""Packets: a frame converted to Leyline messages, with further data that these have no fields for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import overload

import numpy as np

from esper_otel.errors import AdapterError
from esper_otel.frames.frame import SAID_BESIDE, Frame, is_absent
from esper_otel.leyline import messages
from esper_otel.leyline.order import ordered
from esper_otel.leyline.problems import step_events
from esper_otel.leyline.seed_telemetry import known_cells, reported_rows, seed_telemetry
from esper_otel.leyline.system_state import step_label, system_state
from esper_otel.schema import SEED_CELLS

_SEED_NAMES = tuple(metric.name for metric in SEED_CELLS)


@dataclass(frozen=True, slots=True)
class Packets:
    """One step as Leyline packets. They compare equal to packets of the same step made elsewhere, regardless of age.

    Attributes:
        state: the step's SystemStatePacket.
        telemetry: a TelemetryPacket for each seed row recorded in the step; then, if the step had problems, one
            with events.
        run_id: the run's name.
        attempt: number that identifies this start of the run; larger at each start.
        rank: the process within the run.
        step: the step's number. Numbers from ``esper_otel.frames.frame.GUESSED_STEP`` on were assigned by a gateway,
            or by a ``LeylineMetricReader``, to steps whose numbers are missing.
        revision: 1, or higher for a later correction of the step.
        complete: whether the packets contain every value of the step, and all of its live seeds are known.
        age_s: seconds from the step's time to the creation of these packets.
        names: metrics that were recorded or derived in the step, including those whose value was not finite.
        writer: distinguishes live processes with the same run, attempt and rank; empty for the first process, and in
            packets pulled in the training process.
        number: the step's number among all steps of its process: 1, 2, ... without a hole; 0 if it is not known.
        values: what the packets have no place for, such as ``esper.forward_ms``, by name; only if it was asked for.
    """

    state: messages.SystemStatePacket
    telemetry: tuple[messages.TelemetryPacket, ...]
    run_id: str
    attempt: int
    rank: int
    step: int
    revision: int
    complete: bool
    age_s: float = field(compare=False)
    names: frozenset[str]
    writer: str = ""
    number: int = field(default=0, compare=False)
    values: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Page(Sequence[Packets]):
    """A sequence of packets of consecutive steps, oldest first, with a cursor for the next pull.

    Attributes:
        packets: the packets.
        cursor: the position at which the next pull continues.
        gap: number of steps before the first one that this puller does not get: they were dropped, or have not arrived.
    """

    packets: tuple[Packets, ...]
    cursor: str
    gap: int = 0

    def __len__(self) -> int:
        return len(self.packets)

    @overload
    def __getitem__(self, index: int) -> Packets: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Packets, ...]: ...
    def __getitem__(self, index: int | slice) -> Packets | tuple[Packets, ...]:
        return self.packets[index]


def packets(
    frame: Frame,
    *,
    revision: int = 1,
    complete: bool = True,
    latency_budget_ms: float = 10.0,
    now_unix_ns: int | None = None,
) -> Packets:
    """Converts the frame to Leyline packets. Everything except ``age_s`` depends only on the arguments.

    Args:
        frame: the step.
        revision: 1, or higher for a later correction of the step.
        complete: whether every value of the step is in the frame.
        latency_budget_ms: a seed whose last kernel took longer is reported as DEGRADED.
        now_unix_ns: the time for which ``age_s`` is computed; by default the current time.

    Raises:
        AdapterError: a text is not valid Unicode, so no packet can contain it.
    """
    if now_unix_ns is None:
        now_unix_ns = time.time_ns()
    frame = ordered(frame)
    values = frame.values()
    try:
        state_packet = system_state(frame, values)
        telemetry, seed_names = _of_seeds(frame, values, latency_budget_ms) if frame.seeds.ids else ([], ())
    except ValueError as error:
        raise _explained(frame, error) from error
    events = step_events(frame, values, state_packet.packet_id)
    if events is not None:
        telemetry.append(events)
    return Packets(
        state=state_packet,
        telemetry=tuple(telemetry),
        run_id=frame.run.run_id,
        attempt=frame.run.attempt,
        rank=frame.run.rank,
        step=frame.global_step,
        revision=revision,
        complete=complete,
        age_s=(now_unix_ns - frame.time_unix_ns) / 1e9,
        names=_names(tuple(values), seed_names),
        number=frame.sequence,
    )


def _of_seeds(
    frame: Frame, values: Mapping[str, float], latency_budget_ms: float
) -> tuple[list[messages.TelemetryPacket], tuple[str, ...]]:
    """Returns a packet for each seed row, and the names of the seed metrics in them."""
    known = known_cells(frame)
    rows = reported_rows(frame.seeds, known)
    telemetry = seed_telemetry(
        rows,
        known,
        label=step_label(frame, values),
        step=frame.global_step,
        time_unix_ns=frame.time_unix_ns,
        latency_budget_ms=latency_budget_ms,
    )
    recorded = np.asarray((~is_absent(rows.cells)).any(axis=0)).tolist()
    return list(telemetry), tuple(itertools.compress(_SEED_NAMES, recorded))


@lru_cache(maxsize=64)
def _names(of_step: tuple[str, ...], of_seeds: tuple[str, ...]) -> frozenset[str]:
    return frozenset(of_step).union(of_seeds) - SAID_BESIDE


def state(frame: Frame) -> messages.SystemStatePacket:
    """Converts the frame to the SystemStatePacket that a controller reads inside the step.

    Raises:
        AdapterError: a text is not valid Unicode, so no packet can contain it.
    """
    try:
        frame = ordered(frame)
        return system_state(frame, frame.values())
    except ValueError as error:
        raise _explained(frame, error) from error


def _explained(frame: Frame, error: ValueError) -> AdapterError:
    texts = [("run id", frame.run.run_id), ("experiment", frame.run.experiment), ("device id", frame.run.device_id)]
    texts += [("seed id", seed_id) for seed_id in frame.live.ids + frame.seeds.ids]
    for what, text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            return AdapterError(f"{what} {text!r} is not valid Unicode: it has a lone surrogate")
    return AdapterError(f"step {frame.global_step} of run {frame.run.run_id!r} cannot be converted to packets: {error}")
