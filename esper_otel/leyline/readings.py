"""Readings of OpenTelemetry instruments, put together to a frame: what was read at one moment is a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from esper_otel.frame import ABSENT, WIDTH, Cells, Frame, Run, SeedTable, is_absent
from esper_otel.leyline.numbers import UINT32_LIMIT, UINT64_LIMIT, finite, whole
from esper_otel.leyline.seed_telemetry import reported_rows
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, METRICS, SEED_CELLS, SEED_FIELDS, Need

_STEP_NAMES = {metric.name for metric in METRICS if metric.level == "step"} - {
    FRAME_SEQUENCE.name,
    FRAME_POINTS.name,
}
_SEED_COLUMNS = {metric.name: column for column, metric in enumerate(SEED_CELLS)}
_CUDA_NAMES = {metric.name for metric in METRICS if {Need.CUDA, Need.NVML}.intersection(metric.needs)}
_VIOLATIONS = SEED_FIELDS.index("isolation_violations")

# Where a run's id is looked for in a Resource, best first.
_RUN_ID_SOURCES = ("esper.run.id", "service.instance.id", "service.name")


class Reading(NamedTuple):
    """One number of one instrument; ``resource`` holds the attributes of the provider's Resource."""

    name: str
    value: float
    time_unix_ns: int
    attributes: Mapping[str, object]
    resource: Mapping[str, object]


class _Sender(NamedTuple):
    run_id: str
    rank: int


class Assembler:
    """Makes one frame of the readings of each collection; not thread-safe.

    When several runs or ranks share a provider it follows one of them: the one with the most readings, for as
    long as it has any.

    Args:
        attempt: the attempt where the Resource does not say.
    """

    def __init__(self, attempt: int) -> None:
        self._attempt = attempt
        self._followed: _Followed | None = None

    def frame(self, readings: Iterable[Reading]) -> Frame | None:
        """The frame of readings that were collected together; None when none is of the catalogue."""
        senders: dict[_Sender, list[Reading]] = {}
        for reading in readings:
            if reading.name in _STEP_NAMES or (reading.name in _SEED_COLUMNS and "seed_id" in reading.attributes):
                senders.setdefault(_sender(reading), []).append(reading)
        if not senders:
            return None
        if self._followed is None or self._followed.sender not in senders:
            sender = max(senders, key=lambda sender: len(senders[sender]))
            self._followed = _Followed(sender, self._attempt)
        return self._followed.frame(senders[self._followed.sender])


class _Followed:
    """The sender whose readings become frames, and what must be remembered between two of them."""

    def __init__(self, sender: _Sender, attempt: int) -> None:
        self.sender = sender
        self._attempt = attempt
        self._numbers = itertools.count(1)
        self._loss: float | None = None
        self._violations: dict[str, float] = {}
        self._live: dict[str, Cells] = {}

    def frame(self, readings: list[Reading]) -> Frame:
        number = next(self._numbers)
        values: dict[str, float] = {}
        rows: dict[str, Cells] = {}
        # A metric with further attributes is a part of something; what has the fewest comes last and stays.
        for reading in sorted(readings, key=lambda reading: -len(reading.attributes)):
            if reading.name in _STEP_NAMES:
                values[reading.name] = reading.value
            else:
                seed_id = _text(reading.attributes["seed_id"])
                row = rows.setdefault(seed_id, np.full(WIDTH, ABSENT))
                row[_SEED_COLUMNS[reading.name]] = reading.value
        step = whole(values.pop("esper.global_step", None), UINT64_LIMIT)
        epoch = whole(values.pop("esper.epoch", None), UINT32_LIMIT)
        live_count = whole(values.pop("esper.seeds", None), UINT64_LIMIT)
        self._complete(values, rows)
        return Frame(
            run=_run(self.sender, self._attempt, readings),
            sequence=number,
            global_step=number if step is None else step,
            epoch=epoch or 0,
            time_unix_ns=max(reading.time_unix_ns for reading in readings),
            names=tuple(values),
            numbers=tuple(values.values()),
            context={},
            seeds=_table(rows),
            live=self._live_after(rows, live_count),
        )

    def _complete(self, values: dict[str, float], rows: Mapping[str, Cells]) -> None:
        """Adds what a session of ours would say itself: the last finite loss and the new violations."""
        if finite(values.get("loss")) is not None:
            self._loss = values["loss"]
        if self._loss is not None:
            values.setdefault("esper.training.loss", self._loss)
        counts = {seed_id: float(row[_VIOLATIONS]) for seed_id, row in rows.items()}
        counts = {seed_id: count for seed_id, count in counts.items() if math.isfinite(count)}
        if counts:
            new = sum(_newly(self._violations.get(seed_id, 0.0), count) for seed_id, count in counts.items())
            values.setdefault("esper.isolation.violations", new)
            self._violations.update(counts)

    def _live_after(self, rows: Mapping[str, Cells], count: int | None) -> SeedTable:
        """The live seeds: those read now; and those read before, if the sender says that more are alive."""
        known = {} if count is None else dict(self._live)
        for seed_id, row in rows.items():
            before = known.pop(seed_id, row)
            known[seed_id] = np.where(is_absent(row), before, row)
        surplus = len(known) - max(len(rows), count or 0)
        for seed_id in list(known)[: max(surplus, 0)]:  # the longest unseen come first
            del known[seed_id]
        table = _table(known)
        live = reported_rows(table, table.cells)
        self._live = dict(zip(live.ids, live.cells, strict=True))
        self._violations = {seed_id: was for seed_id, was in self._violations.items() if seed_id in known}
        return live


def _newly(before: float, now: float) -> float:
    """Violations counted since; a count that fell was reset and counts from 0."""
    return max(now - before if now >= before else now, 0.0)


def _table(rows: Mapping[str, Cells]) -> SeedTable:
    return SeedTable(tuple(rows), np.array(list(rows.values()), np.float64).reshape(-1, WIDTH))


def _sender(reading: Reading) -> _Sender:
    attributes, resource = reading.attributes, reading.resource
    run_id = attributes.get("esper.run.id") or next(filter(None, map(resource.get, _RUN_ID_SOURCES)), "unknown")
    rank = attributes.get("esper.rank", resource.get("esper.rank"))
    return _Sender(_text(run_id), _integer(rank, 0))


def _run(sender: _Sender, attempt: int, readings: Iterable[Reading]) -> Run:
    resource: Mapping[str, object] = {}
    on_cuda = False
    for reading in readings:
        resource = reading.resource
        on_cuda |= reading.name in _CUDA_NAMES
    return Run(
        run_id=sender.run_id,
        attempt=_integer(resource.get("esper.run.attempt"), attempt),
        rank=sender.rank,
        world_size=_integer(resource.get("esper.world_size"), 1),
        experiment=_text(resource.get("esper.experiment.name", "")),
        device_type=_text(resource.get("esper.device.type", "cuda" if on_cuda else "")),
        device_id=_text(resource.get("esper.device.id", "")),
        compute_capability=_integer(resource.get("esper.device.compute_capability"), 0),
    )


def _text(attribute: object) -> str:
    return str(attribute).encode(errors="replace").decode()


def _integer(attribute: object, default: int) -> int:
    try:
        return int(str(attribute))
    except ValueError:
        return default
