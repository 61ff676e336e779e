"""Needs: what recording asks of the parts that stand after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Deriving(Protocol):
    """Derives metrics from those of a step; ``commit`` advances, ``peek`` does not.

    Attributes:
        reads_probes: whether it needs what probes read, too.
    """

    reads_probes: bool

    def commit(self, given: Mapping[str, float]) -> Any:
        """Advances to the next step; what it derived."""

    def peek(self, given: Mapping[str, float]) -> Any:
        """What ``commit`` would return."""


class Probing(Protocol):
    """Readings of hardware probes."""

    def readings(self, now_s: float) -> Mapping[str, float]:
        """The readings that are fresh at ``now_s`` of ``time.monotonic``."""
