"""Frame: one training step, frozen. The only type between recording, exporting and converting."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.schema import SEED_FIELDS, SEED_METRICS

# A missing cell is a quiet NaN with a payload of our own, so that a recorded NaN stays a value. Arithmetic on
# cells would lose the payload; cells are only ever copied and compared.
ABSENT_BITS = 0x7FF8_E59E_0A85_E117
ABSENT: float = struct.unpack("<d", struct.pack("<Q", ABSENT_BITS))[0]

WIDTH = len(SEED_FIELDS)
COLUMN = {field: column for column, field in enumerate(SEED_FIELDS)}
NARROW = len(SEED_METRICS)  # the request's fields, which come first

Cells = npt.NDArray[np.float64]


def is_absent(cells: Cells) -> npt.NDArray[np.bool_]:
    """True where a cell is missing; a NaN that was recorded is not. Same shape as ``cells``."""
    absent: npt.NDArray[np.bool_] = cells.view(np.uint64) == ABSENT_BITS
    return absent


class SeedTable(NamedTuple):
    """Rows of seeds: ``cells`` has one for each id, float64, columns in the order of ``SEED_FIELDS``.

    There are 19 columns, or the first 10 where no cell of the others is there: most seeds say the request's fields
    only. In memory, rows or columns stand together.
    """

    ids: tuple[str, ...]
    cells: Cells

    def wide(self) -> SeedTable:
        """The same table with all 19 columns; itself, if it has them."""
        if self.cells.shape[1] == WIDTH:
            return self
        cells = _blank(len(self.ids)).copy()
        cells[:, :NARROW] = self.cells
        return SeedTable(self.ids, cells)

    def rows(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Each seed's id with the cells that are present, by field name."""
        present = ~is_absent(self.cells)
        for seed_id, cells, mask in zip(self.ids, self.cells.tolist(), present.tolist(), strict=True):
            yield (
                seed_id,
                {field: cell for field, cell, there in zip(SEED_FIELDS, cells, mask, strict=False) if there},
            )


def alike(*tables: SeedTable) -> tuple[SeedTable, ...]:
    """The tables with equally many columns: as they are where they have that, else all with 19.

    Whatever puts cells of two tables side by side or compares them goes through here.
    """
    if len({table.cells.shape[1] for table in tables}) <= 1:
        return tables
    return tuple(table.wide() for table in tables)


@lru_cache(maxsize=4)
def _blank(rows: int) -> Cells:
    """Cells of which none is there."""
    return np.full((rows, WIDTH), ABSENT)


def _no_rows() -> SeedTable:
    cells = np.empty((0, WIDTH))
    cells.flags.writeable = False
    return SeedTable((), cells)


NO_SEEDS = _no_rows()


# Outcomes of runs in which nothing went wrong, as far as is known.
FINE = frozenset({"completed", "exit", "interrupted"})

# That of a run whose process has left none.
KILLED = "killed"

# The attempt of a run of which it is not known yet; a Resource leaves it out.
UNKNOWN_ATTEMPT = 0


def _field(attribute: str, limit: int | None = None, **default: Any) -> Any:
    """A field of a run with the attribute that it is on the wire; a whole number below ``limit``, or a text."""
    return field(metadata={"attribute": attribute, "limit": limit}, **default)


@dataclass(frozen=True, slots=True)
class Run:
    """What all frames of one attempt and rank have in common; rendered into the OTLP resource.

    Attributes:
        run_id: the run's name; the same after a resume and on every rank.
        attempt: which start of the run: the same for all its ranks, and larger at each start. Unix milliseconds of the
            start, if nothing else was given.
        rank: this process among ``world_size``.
        experiment: name of the experiment; empty when there is none.
        device_type: ``cuda`` or ``cpu``; empty until it is known.
        device_id: PyTorch's name of the device, such as ``cuda:0``.
        compute_capability: major * 10 + minor; 0 on CPU or while it is not known.
    """

    run_id: str = _field("esper.run.id")
    attempt: int = _field("esper.run.attempt", 2**63)
    rank: int = _field("esper.rank", 2**31, default=0)
    world_size: int = _field("esper.world_size", 2**31, default=1)
    experiment: str = _field("esper.experiment.name", default="")
    device_type: str = _field("esper.device.type", default="")
    device_id: str = _field("esper.device.id", default="")
    compute_capability: int = _field("esper.device.compute_capability", 2**31, default=0)


class RunField(NamedTuple):
    """A field of ``Run``: its name, its attribute on the wire, and below what a number is; None for a text."""

    name: str
    attribute: str
    limit: int | None


RUN_FIELDS = tuple(RunField(each.name, each.metadata["attribute"], each.metadata["limit"]) for each in fields(Run))


def checked_run(said: Any) -> Run:
    """The run that a file describes.

    Raises:
        ValueError: a field is missing, unknown, or not what it has to be.
    """
    if not isinstance(said, Mapping) or said.keys() != {each.name for each in RUN_FIELDS}:
        raise ValueError("a run has other fields")
    for each in RUN_FIELDS:
        value = said[each.name]
        is_good = type(value) is str if each.limit is None else type(value) is int and 0 <= value < each.limit
        if not is_good:
            raise ValueError(f"{each.name} is {str(value)[:40]}")
    return Run(**said)


NO_READINGS: Mapping[str, float] = {}

# A step without a number gets one: this plus its time in Unix nanoseconds. Numbers from senders are never as large.
GUESSED_STEP = 2**63

# Recorded, with ``esper.seeds``, in an incomplete frame that was rebuilt elsewhere: what its sender reported about the
# frame and what cannot be derived from the rest. These are not values of the step.
SAID_BESIDE = frozenset({"esper.seeds.digest", "esper.frame.points"})

# The last finite loss; equal to the loss in a frame whose loss is finite.
LAST_LOSS = "esper.training.loss"
VALIDATION_LOSS = "esper.validation.loss"

# What rounds to infinity in the packets' float32 begins here: the largest float32 and half a unit in its last place.
FLOAT32_BOUND = float(2**128 - 2**103)


class Frame(NamedTuple):
    """One step: what was recorded in it, by catalogue name, with presence.

    A name that is not there was not provided; a NaN is a value like any other. Treat the mappings as
    read-only: they are shared with all other readers of the frame.

    Attributes:
        run: what all frames of this attempt have in common.
        sequence: 1, 2, ... within (attempt, rank), without holes.
        global_step: the step's number; goes back when training does.
        epoch: the epoch it belongs to.
        time_unix_ns: Unix time of the step in nanoseconds, strictly increasing in milliseconds.
        names: of the step values put or measured, and of what we add about the step.
        numbers: their values, in the same order.
        context: step values that stay until they are replaced (validation, epochs); of a plain sender's frame, what a
            gateway has found out.
        seeds: the rows recorded in this step.
        live: every live seed with its last known cells.
        retired: seeds whose lives ended after the frame before; their series end.
        derived: what processors read in this step.
        probed: readings of probes; what was recorded stands before them.
    """

    run: Run
    sequence: int
    global_step: int
    epoch: int
    time_unix_ns: int
    names: tuple[str, ...]
    numbers: tuple[float, ...]
    context: Mapping[str, float]
    seeds: SeedTable = NO_SEEDS
    live: SeedTable = NO_SEEDS
    retired: tuple[str, ...] = ()
    derived: Mapping[str, float] = NO_READINGS
    probed: Mapping[str, float] = NO_READINGS

    @property
    def recorded(self) -> dict[str, float]:
        """The step values put or measured, by name."""
        return dict(zip(self.names, self.numbers, strict=True))

    def last_loss(self) -> float | None:
        """The last finite loss, this step's included, as ``values()`` has it; None before the first."""
        loss = self._value("loss")
        return loss if loss is not None and -FLOAT32_BOUND < loss < FLOAT32_BOUND else self._value(LAST_LOSS)

    def _value(self, name: str) -> float | None:
        if name in self.names:
            return self.numbers[self.names.index(name)]
        for values in (self.probed, self.context, self.derived):
            if name in values:
                return values[name]
        return None

    def values(self) -> dict[str, float]:
        """Every step value of the frame by catalogue name, readings of processors and our own included."""
        values = {**self.derived, **self.context}
        values.update(self.probed)
        values.update(zip(self.names, self.numbers, strict=True))  # what the caller gave stands
        loss = values.get("loss", FLOAT32_BOUND)
        if -FLOAT32_BOUND < loss < FLOAT32_BOUND:
            values[LAST_LOSS] = loss
        values["esper.global_step"] = self.global_step
        values["esper.epoch"] = self.epoch
        values.setdefault("esper.seeds", len(self.live.ids))
        return values


# Measured with tracemalloc on Python 3.11: 770 bytes and 32 a value, with what is derived, its place in a dict and
# its size; 300 more and the cells themselves where there are seeds.
_FRAME_BYTES = 770
_VALUE_BYTES = 32
_TABLE_BYTES = 300


def frame_bytes(frame: Frame) -> int:
    """About how much memory a frame holds on to, in bytes. Seed tables shared between fields count once."""
    size = _FRAME_BYTES + _VALUE_BYTES * len(frame.numbers)
    live, seeds = frame.live.cells, frame.seeds.cells
    if not frame.live.ids:
        return size
    size += _TABLE_BYTES + live.nbytes
    return size if seeds is live else size + _TABLE_BYTES + seeds.nbytes
