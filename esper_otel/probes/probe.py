"""The interface of probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from esper_otel.errors import ProbeUnavailable
from esper_otel.schema import Metric


class NotYet(ProbeUnavailable):
    """The probe cannot read yet, but may at any moment. It is sampled again after one period, without back-off."""


class OtherHardware(ProbeUnavailable):
    """The machine lacks the hardware of this probe. Another probe of the same metrics has a better reason."""


class Probe(Protocol):
    """Reads hardware. A sample has all readings or raises. The methods run on the probe's own thread and may block.

    The readings are in every step until the next sample. Those of a probe with an attribute ``once = True`` are in the
    first step after each sample only, which costs the other steps nothing.
    """

    @property
    def gives(self) -> tuple[str | Metric, ...]:
        """Returns the metrics in a sample: names from the catalogue, or declarations of the probe's own metrics."""

    def sample(self) -> Mapping[str, float]:
        """Returns the current readings.

        Raises:
            ProbeUnavailable: the readings are not available; the text is the reason shown to the user.
        """

    def close(self) -> None:
        """Releases the probe's resources, after its last sample."""


def names_of(probe: Probe) -> tuple[str, ...]:
    """Returns the names of the metrics in a sample."""
    return tuple(entry if isinstance(entry, str) else entry.name for entry in probe.gives)
