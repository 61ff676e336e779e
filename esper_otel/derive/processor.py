"""What a processor is: a fold over steps whose state is frozen and whose readings are pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from esper_otel.schema import Metric


@runtime_checkable
class Processor(Protocol):
    """Derives metrics from those of each step.

    The state is anything immutable made of plain values (numbers, strings, tuples), since it goes into
    checkpoints as it is. ``advance`` runs once per published step, in order, on the training path, and
    ``readings`` right after it, once; both must neither wait for a device nor for anything else.

    Attributes:
        needs: metrics that ``advance`` reads, as names or entries.
        gives: metrics that ``readings`` may return, as names or entries. An entry that the catalogue does not
            have is declared with it.
    """

    @property
    def needs(self) -> Sequence[str | Metric]:
        """Metrics that ``advance`` reads."""

    @property
    def gives(self) -> Sequence[str | Metric]:
        """Metrics that ``readings`` may return."""

    def initial(self) -> Any:
        """The state before the first step."""

    def advance(self, state: Any, given: Mapping[str, float]) -> Any:
        """The state after a step, or the very same object when this step has no reading."""

    def readings(self, state: Any) -> Mapping[str, float]:
        """The metrics of the step that led to ``state``."""
