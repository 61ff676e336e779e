"""Values: from whatever a trainer has to floats, now or when the device has delivered them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from esper_otel.errors import InvalidValue
from esper_otel.frames.frame import ABSENT, FLOAT32_BOUND
from esper_otel.record.device import pack, scalar
from esper_otel.schema import SEED_FIELDS, STEP_METRICS, Stage

if TYPE_CHECKING:
    from torch import Tensor

    Scalar: TypeAlias = float | Tensor

# Of cells that can be packed as they are, without asking a tensor.
ROW_TYPES: frozenset[type] = frozenset({float, int, bool, Stage, np.float64, np.float32, np.int64, np.bool_})

_MAX = sys.float_info.max

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1

# Values that stay until they are replaced.
CONTEXT: frozenset[str] = frozenset({"esper.validation.loss", "esper.validation.accuracy"})

# What we say of a step whose seeds say their isolation violations.
VIOLATIONS = "esper.isolation.violations"

# Shares of 1.
RATIOS = tuple(metric.name for metric in STEP_METRICS if metric.unit == "ratio")

# A step value's name, or a seed's id and field.
Target: TypeAlias = str | tuple[str, str]


def number(name: str, value: object) -> float | Tensor:
    """One number, or the 0-d tensor that will hold it. An int beyond the range of a double is infinite.

    Raises:
        InvalidValue: it is neither.
    """
    kind = type(value)
    if kind is float or kind is bool or kind is int:
        try:
            return float(value)  # type: ignore[arg-type] # one of the three
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")  # type: ignore[operator] # an int
    one: float | Tensor = scalar(name, value)
    return one


def are_floats(values: Iterable[object]) -> bool:
    """Whether every value is a plain float. Touches no tensor."""
    # A plain loop takes half the time of map(type, ...) or a generator; it runs in every step.
    for value in values:  # noqa: SIM110 - as above
        if value.__class__ is not float:
            return False
    return True


def are_ordinary(values: Collection[Any]) -> bool:
    """Whether every value is a plain float and not negative, and all, and their sum, are finite. Touches no tensor."""
    for value in values:
        if value.__class__ is not float or value < 0.0:
            return False
    total: float = sum(values)
    return total <= _MAX  # neither infinite nor NaN


class ValueShape:
    """Names that come together in many steps.

    Attributes:
        names: the names.
        names_with_violations: the names and ``VIOLATIONS``.
        numbers_of: the values of a mapping, in the order of the names; KeyError when one is not there.
    """

    __slots__ = ("_loss", "_ratios", "names", "names_with_violations", "numbers_of")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names: tuple[str, ...] = names
        self.names_with_violations: tuple[str, ...] = (*names, VIOLATIONS)
        self.numbers_of: Callable[[Mapping[str, Any]], tuple[Any, ...]] = operator.itemgetter(*names)
        self._loss = names.index("loss")
        self._ratios = tuple(place for place, name in enumerate(names) if name in RATIOS)

    def is_plain(self, numbers: tuple[float, ...]) -> bool:
        """Whether nothing is to be said about ordinary values: the loss is finite in float32, no share is above 1."""
        for place in self._ratios:
            if numbers[place] > 1.0:
                return False
        return numbers[self._loss] < FLOAT32_BOUND


def shape_of(values: Mapping[str, object]) -> ValueShape | None:
    """The shape of steps like this one; None for one that is too odd to have one."""
    return ValueShape(tuple(values)) if "loss" in values and len(values) > 1 else None


def read(given: Mapping[str, object]) -> tuple[dict[str, float], dict[Target, Tensor]]:
    """Splits values into floats and tensors to wait for; ``None`` is left out."""
    plain: dict[str, float] = {}
    tensors: dict[Target, Tensor] = {}
    for name, value in given.items():
        if value is None:
            continue
        one = number(name, value)
        if isinstance(one, float):
            plain[name] = one
        else:
            tensors[name] = one
    return plain, tensors


def read_row(seed_id: str, cells: Sequence[object]) -> tuple[tuple[float, ...], dict[Target, Tensor]]:
    """The first cells of one seed as floats, ``ABSENT`` where there is None or a tensor to wait for."""
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
    """The time of copies to a device, known when they have completed."""

    def done(self) -> bool:
        """Whether the time is known; never waits."""

    def wait(self) -> None:
        """Waits until it is."""

    def milliseconds(self) -> float | None:
        """The time; None when the device could not tell."""


class DeviceValues:
    """Values of one step that a device has yet to deliver.

    ``seal`` starts the one copy to the host; after it ``done`` never waits and ``wait`` does.
    """

    def __init__(self) -> None:
        self.tensors: dict[Target, Tensor] = {}
        self.copies: list[CopyTime] = []
        self._targets: tuple[Target, ...] = ()
        self._pending: Any = None

    def forget(self, names: Iterable[Target]) -> None:
        """Drops tensors whose names have been given anew."""
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
        return (self._pending is None or self._pending.done()) and all(copy.done() for copy in self.copies)

    def wait(self) -> None:
        """Waits until everything has arrived."""
        self.wait_for_values()
        for copy in self.copies:
            copy.wait()

    def wait_for_values(self) -> None:
        """Waits for the sealed values, not for the timings of copies."""
        if self._pending is not None:
            self._pending.wait()

    def arrived(self) -> dict[Target, float]:
        """The sealed values that arrived; one that the device lost is missing. Call once it is done."""
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
        """Milliseconds of the step's host-to-device copies; None when there were none or the device cannot tell."""
        times = [time for time in (copy.milliseconds() for copy in self.copies) if time is not None]
        return sum(times) if times else None


def whole(name: str, value: object, highest: int) -> int:
    """The value as an int, if it is a whole number from 0 to ``highest``."""
    if type(value) is int and 0 <= value <= highest:
        return value
    try:
        number = operator.index(value)  # type: ignore[arg-type] # TypeError is the answer
    except TypeError:
        raise InvalidValue(name, f"{value!r} is not a whole number") from None
    if not 0 <= number <= highest:
        raise InvalidValue(name, f"{number} is not from 0 to {highest}")
    return number
