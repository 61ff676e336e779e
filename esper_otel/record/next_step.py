"""The next step: what it will have that was said before it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esper_otel.frames.frame import SeedTable
from esper_otel.record.seeds import merged_tables
from esper_otel.record.values import DeviceValues, Target


class Beginning(NamedTuple):
    """What a step has from its beginning.

    Attributes:
        waited_ms: milliseconds that the trainer waited for its input; None when it did not say.
        table: rows of seeds.
        retired: seeds whose lives end before the step.
    """

    waited_ms: float | None
    table: SeedTable | None
    retired: Sequence[str]


class NextStep:
    """Collects for the next step. Threads: the one that records.

    Attributes:
        is_anything: false only when there is nothing to take, the context included.
        retiring: seeds that are in no step after the open one.
        context: values that stay in every frame from the next on.
        tensors: those of them that a device has yet to deliver.
    """

    def __init__(self) -> None:
        self.is_anything: bool = False
        self.retiring: list[str] = []
        self.context: dict[str, float] = {}
        self.tensors: dict[Target, Any] = {}
        self._waited_ms: float | None = None
        self._table: SeedTable | None = None

    def wait(self, milliseconds: float) -> None:
        """Adds to the input wait."""
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

    def take(self) -> Beginning:
        """All but the context, which is taken when the step is over."""
        taken = Beginning(self._waited_ms, self._table, self.retiring)
        self._waited_ms = self._table = None
        self.retiring = []
        self.is_anything = bool(self.context or self.tensors)
        return taken

    def take_context(self, held: DeviceValues | None) -> tuple[DeviceValues | None, Mapping[str, float]]:
        """The context, and what holds the tensors of it beside those of ``held``."""
        context, self.context = self.context, {}
        if self.tensors:
            held = held or DeviceValues()
            held.tensors.update(self.tensors)
            self.tensors = {}
        return held, context
