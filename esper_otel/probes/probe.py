"""What a probe is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from esper_otel.errors import ProbeUnavailable


class NotYet(ProbeUnavailable):
    """What a probe needs may be there any moment, and asking costs nothing: it is asked again after one period."""


class Probe(Protocol):
    """Reads hardware, all that it gives or nothing. Its methods run on a thread of its own and may take their time."""

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the metrics that a sample holds."""

    def sample(self) -> Mapping[str, float]:
        """The readings now.

        Raises:
            ProbeUnavailable: what it needs is not there; the text is the reason shown to the user.
        """

    def close(self) -> None:
        """Gives back what it holds, after its last sample."""
