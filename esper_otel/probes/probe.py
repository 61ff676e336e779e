"""What a probe is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Probe(Protocol):
    """Reads hardware. ``sample`` runs on a thread of the probe's own; it may take its time."""

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the metrics that a sample may hold."""

    def sample(self) -> Mapping[str, float]:
        """The readings now.

        Raises:
            ProbeUnavailable: what it needs is not there; the text is the reason shown to the user.
        """
