"""TelemetryPackets of seeds: one for each row of a frame, as Kasmina reports each seed in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import ABSENT, ABSENT_BITS, WIDTH, Cells, Frame, SeedTable, is_absent
from esper_otel.frames.numbers import STAGE_LIMIT, UINT32_LIMIT, finite_cells
from esper_otel.leyline import messages
from esper_otel.leyline.problems import add_event
from esper_otel.leyline.stencil import Stencil
from esper_otel.schema import SEED_CELLS, SEED_FIELDS, SEED_METRICS, Stage

SOURCE = "kasmina"

_STAGE = SEED_FIELDS.index("stage")
_ALPHA_STEPS = SEED_FIELDS.index("alpha_steps")
_VIOLATIONS = SEED_FIELDS.index("isolation_violations")
_FALLBACK = SEED_FIELDS.index("fallback_used")
_LATENCY = SEED_FIELDS.index("last_kernel_latency_ms")

_INTEGER_LIMITS = {"stage": STAGE_LIMIT, "layer_depth": UINT32_LIMIT, "age_epochs": UINT32_LIMIT}
_INTEGER_COLUMNS = [SEED_FIELDS.index(field) for field in _INTEGER_LIMITS]
_LIMITS = np.array(list(_INTEGER_LIMITS.values()), np.float64)


def known_cells(frame: Frame) -> Cells:
    """Returns, for each recorded row, the last known cells of its seed. Cells of the row itself take precedence."""
    rows, live = frame.seeds.wide(), frame.live.wide()
    if rows.ids == live.ids:
        below = live.cells
    else:
        place = {seed_id: row for row, seed_id in enumerate(live.ids)}
        unknown = np.full((1, WIDTH), ABSENT)
        below = np.concatenate([live.cells, unknown])[[place.get(seed_id, -1) for seed_id in rows.ids]]
    known: Cells = np.where(is_absent(rows.cells), below, rows.cells)
    return known


def reported_rows(rows: SeedTable, known: Cells) -> SeedTable:
    """Returns the rows with all columns; ``alpha_steps`` only for seeds in BLENDING."""
    rows = rows.wide()
    too_many = (known[:, _STAGE] != Stage.BLENDING) & ~is_absent(rows.cells[:, _ALPHA_STEPS])
    if not too_many.any():
        return rows
    cells = rows.cells.copy()
    cells.view(np.uint64)[too_many, _ALPHA_STEPS] = ABSENT_BITS
    return SeedTable(rows.ids, cells)


def seed_telemetry(
    rows: SeedTable, known: Cells, *, label: str, step: int, time_unix_ns: int, latency_budget_ms: float
) -> Iterator[messages.TelemetryPacket]:
    """Returns one packet for each row, in order.

    Each metric of the schema that was recorded in the step becomes a point. A value that is not finite, or not valid
    for an integer field of the state packet, becomes an event instead. Health depends on the last known cells, so a
    seed keeps its violations even if they are not recorded again.

    Args:
        rows: the rows returned by ``reported_rows``.
        known: the cells returned by ``known_cells``.
        label: text that makes the step's packet ids unique.
        step: the step's number.
        time_unix_ns: the step's time.
        latency_budget_ms: a last kernel latency above it is DEGRADED.
    """
    if not rows.ids:
        return
    there = finite_cells(rows.cells)
    health = _health(known, latency_budget_ms)
    stencil = _table_stencil(rows.ids, there[:, : len(SEED_METRICS)].tobytes(), health.tobytes())
    wire = stencil.filled(rows.cells)
    ending = _ending(step, time_unix_ns)
    faults = _faults(rows.cells, there)
    faulty = np.asarray(faults.any(axis=1)).tolist()
    for row, (seed_id, part) in enumerate(zip(rows.ids, stencil.slices(), strict=True)):
        packet: messages.TelemetryPacket = messages.TelemetryPacket.FromString(wire[part] + ending)
        packet.packet_id = f"kasmina-seed-{seed_id}-{label}"
        if faulty[row]:
            _report(packet, seed_id, rows.cells[row], faults[row])
        yield packet


def _health(known: Cells, latency_budget_ms: float) -> npt.NDArray[np.uint8]:
    """Returns, for each row, the index of its entry in ``_healths()``."""
    health: npt.NDArray[np.uint8] = np.full(len(known), 3, np.uint8)
    health[known[:, _LATENCY] > latency_budget_ms] = 2
    health[known[:, _FALLBACK] > 0] = 1
    health[known[:, _VIOLATIONS] > 0] = 0
    return health


def _healths() -> tuple[tuple[messages.HealthStatus, str], ...]:
    """Returns the possible healths of a seed (status, summary). The first that applies counts; the last always does."""
    status = messages.HealthStatus
    return (
        (status.HEALTH_STATUS_UNHEALTHY, "violations"),
        (status.HEALTH_STATUS_DEGRADED, "fallback"),
        (status.HEALTH_STATUS_DEGRADED, "latency_high"),
        (status.HEALTH_STATUS_HEALTHY, "nominal"),
    )


@lru_cache(maxsize=4)
def _table_stencil(ids: tuple[str, ...], present: bytes, health: bytes) -> Stencil:
    width = len(SEED_METRICS)
    rows = [
        _row_stencil(seed_id, present[row * width : (row + 1) * width], health[row]) for row, seed_id in enumerate(ids)
    ]
    return Stencil.joined(rows, 8, WIDTH)


@lru_cache(maxsize=4096)
def _row_stencil(seed_id: str, present: bytes, health: int) -> Stencil:
    raw = np.frombuffer(seed_id.encode(), np.uint8)
    stencil, places = _stencil_for_length(len(raw), present, health)
    if len(raw):
        stencil = replace(stencil, wire=stencil.wire.copy())
        stencil.wire[places] = raw
    return stencil


@lru_cache(maxsize=256)
def _stencil_for_length(size: int, present: bytes, health: int) -> tuple[Stencil, npt.NDArray[np.intp]]:
    """Returns the stencil of some id of this many bytes, and where its bytes are: building one is slow."""
    one, other = (_built_stencil(letter * size, present, health) for letter in "ab")
    return one, (one.wire != other.wire).nonzero()[0].reshape(-1, max(size, 1))


def _built_stencil(seed_id: str, present: bytes, health: int) -> Stencil:
    status, summary = _healths()[health]
    urgent = status == messages.HealthStatus.HEALTH_STATUS_UNHEALTHY
    priority = (
        messages.MessagePriority.MESSAGE_PRIORITY_HIGH if urgent else messages.MessagePriority.MESSAGE_PRIORITY_NORMAL
    )

    def build(hole: Callable[[int], float]) -> messages.TelemetryPacket:
        packet = messages.TelemetryPacket(source_subsystem=SOURCE, level=messages.TelemetryLevel.TELEMETRY_LEVEL_INFO)
        for column, (metric, is_there) in enumerate(zip(SEED_METRICS, present, strict=True)):
            if is_there:
                packet.metrics.add(
                    name=metric.name, value=hole(column), unit=metric.unit, attributes={"seed_id": seed_id}
                )
        packet.system_health.status = status
        packet.system_health.summary = summary
        packet.system_health.indicators["seed_id"] = seed_id
        packet.system_health.indicators["priority"] = messages.MessagePriority.Name(priority)
        return packet

    return Stencil.of(build, 8)


def _ending(step: int, time_unix_ns: int) -> bytes:
    """Returns the fields common to all packets of a step, serialized. Appended to a packet, they merge into it."""
    packet = messages.TelemetryPacket()
    packet.timestamp.FromNanoseconds(time_unix_ns)
    packet.system_health.indicators["step_index"] = str(step)
    return packet.SerializeToString()


def _faults(cells: Cells, there: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Returns an array that is True where a recorded cell cannot be sent as a value."""
    faults = ~(there | is_absent(cells))
    integers = cells[:, _INTEGER_COLUMNS]
    valid = (integers >= 0) & (integers < _LIMITS) & (integers == np.floor(integers))
    faults[:, _INTEGER_COLUMNS] |= there[:, _INTEGER_COLUMNS] & ~valid
    return faults


def _report(packet: messages.TelemetryPacket, seed_id: str, cells: Cells, faults: npt.NDArray[np.bool_]) -> None:
    finite = finite_cells(cells)
    for column in faults.nonzero()[0].tolist():
        add_event(
            packet,
            "value_invalid" if finite[column] else "value_nonfinite",
            messages.TelemetryLevel.TELEMETRY_LEVEL_WARNING,
            metric=SEED_CELLS[column].name,
            value=str(float(cells[column])),
            seed_id=seed_id,
        )
