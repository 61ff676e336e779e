"""Conversion of a trainer's values to floats, at once or when a device has delivered them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from esper_otel.errors import InvalidValue
from esper_otel.frames.frame import ABSENT
from esper_otel.record.device import pack, scalar
from esper_otel.schema import SEED_FIELDS, STEP_METRICS, Stage

if TYPE_CHECKING:
    from torch import Tensor

    Scalar: TypeAlias = float | Tensor

# Types of cells that can be packed without conversion.
ROW_TYPES: frozenset[type] = frozenset({float, int, bool, Stage, np.float64, np.float32, np.int64, np.bool_})

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1

# Values that stay until they are replaced.
CONTEXT: frozenset[str] = frozenset({"esper.validation.loss", "esper.validation.accuracy"})

# Recorded by the publisher for a step whose seeds report isolation violations.
VIOLATIONS = "esper.isolation.violations"

# Metrics whose values are shares of 1.
RATIOS = tuple(metric.name for metric in STEP_METRICS if metric.unit == "ratio")

# A step value's name, or a seed's id and field.
Target: TypeAlias = str | tuple[str, str]


def number(name: str, value: object) -> float | Tensor:
    """Returns the number, or the 0-d tensor that holds it. An int beyond the range of a double becomes infinite.

    Raises:
        InvalidValue: the value is neither a number nor such a tensor.
    """
    kind = type(value)
    if kind is float or kind is bool or kind is int:
        try:
            return float(value)  # type: ignore[arg-type] # one of the three
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")  # type: ignore[operator] # an int
    one: float | Tensor = scalar(name, value)
    return one


def read(given: Mapping[str, object]) -> tuple[dict[str, float], dict[Target, Tensor]]:
    """Splits values into floats and tensors to wait for. Values that are ``None`` are left out."""
    plain: dict[str, float] = {}
    tensors: dict[Target, Tensor] = {}
    for name, value in given.items():
        if value.__class__ is float:
            plain[name] = value
            continue
        if value is None:
            continue
        one = number(name, value)
        if isinstance(one, float):
            plain[name] = one
        else:
            tensors[name] = one
    return plain, tensors


def read_row(seed_id: str, cells: Sequence[object]) -> tuple[tuple[float, ...], dict[Target, Tensor]]:
    """Returns a seed's cells as floats, with ``ABSENT`` for None and for tensors; and the tensors to wait for."""
    row = []
    tensors: dict[Target, Tensor] = {}
    for field, cell in zip(SEED_FIELDS, cells, strict=False):
        one = ABSENT if cell is None else cell if isinstance(cell, Stage) else number(field, cell)
        if not isinstance(one, float | Stage):
            tensors[seed_id, field] = one
            one = ABSENT
        row.append(float(one))
    return tuple(row), tensors


class CopyTime(Protocol):
    """The duration of copies to a device, known when they have completed."""

    def done(self) -> bool:
        """Whether the duration is known; never waits."""

    def wait(self) -> None:
        """Waits until the duration is known."""

    def milliseconds(self) -> float | None:
        """The duration; None if the device could not report it."""


class DeviceValues:
    """Values of one step that are still on a device.

    ``seal`` starts the copy to the host, once. After that, ``done`` reports whether it is complete and ``wait`` waits.
    """

    def __init__(self) -> None:
        self.tensors: dict[Target, Tensor] = {}
        self.copies: list[CopyTime] = []
        self.parts: list[tuple[str, CopyTime]] = []  # of the step, by metric
        self._targets: tuple[Target, ...] = ()
        self._pending: Any = None

    def forget(self, names: Iterable[Target]) -> None:
        """Drops tensors whose names have been given new values."""
        for name in names:
            self.tensors.pop(name, None)

    def seal(self) -> None:
        """Starts copying the tensors to the host, on the current stream."""
        if self.tensors:
            self._targets = tuple(self.tensors)
            self._pending = pack(tuple(self.tensors.values()))
            self.tensors = {}

    def done(self) -> bool:
        """Whether everything has arrived; never waits."""
        if self._pending is not None and not self._pending.done():
            return False
        return all(copy.done() for copy in self.copies) and all(time.done() for _, time in self.parts)

    def wait(self) -> None:
        """Waits until everything has arrived."""
        self.wait_for_values()
        for time in (*self.copies, *(time for _, time in self.parts)):
            time.wait()

    def wait_for_values(self) -> None:
        """Waits for the sealed values, not for the timings of copies."""
        if self._pending is not None:
            self._pending.wait()

    def arrived(self) -> dict[Target, float]:
        """Returns the sealed values, without those that a device lost. Call it only when ``done()``."""
        if self._pending is None:
            return {}
        values = zip(self._targets, self._pending.values(), strict=True)
        self._pending = None
        return {
            target: value
            for target, value in values
            # An undefined conflict rate is computed as NaN on the device: it is missing, not a reading.
            if value is not None and not (target == "grad_conflict_rate" and value != value)  # noqa: PLR0124
        }

    def copy_ms(self) -> float | None:
        """Milliseconds of the step's host-to-device copies; None if there were none or CUDA could not report them."""
        times = [time for time in (copy.milliseconds() for copy in self.copies) if time is not None]
        return sum(times) if times else None

    def parts_ms(self) -> dict[str, float]:
        """Returns the durations of the step's parts by metric, without those that CUDA could not report."""
        found: dict[str, float] = {}
        for name, time in self.parts:
            spent_ms = time.milliseconds()
            if spent_ms is not None:
                found[name] = found.get(name, 0.0) + spent_ms
        return found


def whole(name: str, value: object, highest: int) -> int:
    """Returns the value as an int if it is a whole number from 0 to ``highest``; otherwise raises InvalidValue."""
    if type(value) is int and 0 <= value <= highest:
        return value
    try:
        number = operator.index(value)  # type: ignore[arg-type] # TypeError is the answer
    except TypeError:
        raise InvalidValue(name, f"{value!r} is not a whole number") from None
    if not 0 <= number <= highest:
        raise InvalidValue(name, f"{number} is not from 0 to {highest}")
    return number
