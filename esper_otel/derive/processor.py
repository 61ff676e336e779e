"""The interface of processors, which derive metrics from those of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from esper_otel.schema import Metric


@runtime_checkable
class Processor(Protocol):
    """Derives metrics from those of each step.

    The state must be immutable and consist of plain values (numbers, strings, tuples), since it is stored in
    checkpoints unchanged. ``advance`` runs once per published step, in order, in the training thread, followed by
    one call of ``readings``. Neither may wait, for a device or anything else.

    Attributes:
        needs: metrics that ``advance`` reads, as names or ``Metric`` entries.
        gives: metrics that ``readings`` may return, as names or ``Metric`` entries. An entry that is not in
            the catalogue is thereby declared.
    """

    @property
    def needs(self) -> Sequence[str | Metric]:
        """Metrics that ``advance`` reads."""

    @property
    def gives(self) -> Sequence[str | Metric]:
        """Metrics that ``readings`` may return."""

    def initial(self) -> Any:
        """Returns the state before the first step."""

    def advance(self, state: Any, given: Mapping[str, float]) -> Any:
        """Returns the state after a step, or the same object if the step has no readings."""

    def readings(self, state: Any) -> Mapping[str, float]:
        """Returns the metrics of the step that led to ``state``."""
