"""The interface of probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from esper_otel.errors import ProbeUnavailable


class NotYet(ProbeUnavailable):
    """The probe cannot read yet, but may at any moment. It is sampled again after one period, without back-off."""


class Probe(Protocol):
    """Reads hardware. A sample has all readings or raises. The methods run on the probe's own thread and may block."""

    @property
    def gives(self) -> tuple[str, ...]:
        """Returns the names of the metrics in a sample."""

    def sample(self) -> Mapping[str, float]:
        """Returns the current readings.

        Raises:
            ProbeUnavailable: the readings are not available; the text is the reason shown to the user.
        """

    def close(self) -> None:
        """Releases the probe's resources, after its last sample."""
