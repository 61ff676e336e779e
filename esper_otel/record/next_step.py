"""Values recorded before the next step opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esper_otel.frames.frame import SeedTable
from esper_otel.record.seeds import merged_tables
from esper_otel.record.values import CopyTime, DeviceValues, Target


class StartValues(NamedTuple):
    """The values that a step starts with.

    Attributes:
        waited_ms: milliseconds that the trainer waited for its input; None if not recorded.
        table: rows of seeds.
        retired: seeds whose lives end before the step.
    """

    waited_ms: float | None
    table: SeedTable | None
    retired: Sequence[str]


class NextStep:
    """Collects values for the next step. Threads: the recording thread.

    Attributes:
        is_anything: False only if nothing has been collected, including context, and no phase follows the steps.
        retiring: seeds whose lives end with the open step.
        context: values that stay in every frame from the next one on.
        tensors: context values that are still on a device.
        parts: durations of the step's parts that a device reports later, by metric.
    """

    def __init__(self) -> None:
        self.is_anything: bool = False
        self.retiring: list[str] = []
        self.context: dict[str, float] = {}
        self.tensors: dict[Target, Any] = {}
        self.parts: list[tuple[str, CopyTime]] = []
        self._waited_ms: float | None = None
        self._table: SeedTable | None = None

    def wait(self, milliseconds: float) -> None:
        """Adds to the time waited for input."""
        self._waited_ms = (self._waited_ms or 0.0) + milliseconds
        self.is_anything = True

    def add(self, table: SeedTable) -> None:
        """Adds rows of seeds; a later cell replaces an earlier one."""
        self._table = table if self._table is None else merged_tables(self._table, table)
        self.is_anything = True

    def retire(self, seed_id: str) -> None:
        """Ends a seed's life."""
        if seed_id not in self.retiring:
            self.retiring.append(seed_id)
        self.is_anything = True

    def replace_context(self, values: Mapping[str, float], tensors: Mapping[Target, Any]) -> None:
        """Replaces values of the context."""
        for name in values:
            self.tensors.pop(name, None)
        self.tensors.update(tensors)
        self.context.update(values)
        self.is_anything = True

    def take(self) -> StartValues:
        """Returns and clears everything except the context, which is taken when the step ends."""
        taken = StartValues(self._waited_ms, self._table, self.retiring)
        self._waited_ms = self._table = None
        self.retiring = []
        self.is_anything = bool(self.context or self.tensors or self.parts)
        return taken

    def add_parts(self, parts: Sequence[tuple[str, CopyTime]]) -> None:
        """Adds durations of the step's parts that a device reports later."""
        self.parts += parts
        self.is_anything = True

    def take_context(self, held: DeviceValues | None) -> tuple[DeviceValues | None, Mapping[str, float]]:
        """Returns and clears the context. Its tensors are added to ``held``, which is created if needed."""
        context, self.context = self.context, {}
        if self.parts:
            held = held or DeviceValues()
            held.parts += self.parts
            self.parts = []
        if self.tensors:
            held = held or DeviceValues()
            held.tensors.update(self.tensors)
            self.tensors = {}
        return held, context
