"""The exceptions of esper_otel.

EsperOtelError
├── MistakeError             a mistake in the program: raised at once, always
│   ├── UnknownMetric        a name that the catalogue does not have (ValueError)
│   ├── InvalidValue         a value of the wrong type or shape (TypeError)
│   ├── InvalidName          an empty run id, a seed id with control characters, ... (ValueError)
│   ├── InvalidCatalogue     metric declarations that contradict each other (ValueError)
│   └── WrongState           a call out of order: a step inside a step, a closed session (RuntimeError)
├── ConfigurationError       a setting or environment variable that cannot be used (ValueError)
├── ProbeUnavailable         hardware, driver or library that is not there; its text is the reason
├── AdapterError             telemetry that cannot become a Leyline packet
└── GatewayError             a gateway refused a pull, or could not be asked
    ├── GatewayUnavailable   it was not there in time; the same pull may be tried again
    ├── UnknownRun           nothing is stored of the run
    └── StaleCursor          the cursor is not of this life of the run's store: begin without one

What depends on data or on the world (NaN, a dead endpoint, a driver that went away) raises nothing into
the training loop: it is counted and logged. ``ProbeUnavailable`` travels between our own parts only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EsperOtelError(Exception):
    """Base of every exception that esper_otel defines."""


class MistakeError(EsperOtelError):
    """A mistake in the calling program."""


class UnknownMetric(MistakeError, ValueError):
    """A metric or field name that is not declared; ``name`` and ``nearest`` say which and what fits."""

    def __init__(self, name: object, known: Iterable[str], *, what: str = "metric") -> None:
        names = sorted(known)
        self.name = name
        self.nearest: tuple[str, ...] = tuple(difflib.get_close_matches(str(name), names, n=3, cutoff=0.5))
        hint = (
            "did you mean " + " or ".join(repr(near) for near in self.nearest) + "?"
            if self.nearest
            else "known: " + ", ".join(names)
        )
        super().__init__(f"unknown {what} {name!r}: {hint}")


class InvalidValue(MistakeError, TypeError):
    """A value whose type or shape can never be right; ``name`` says which one."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(f"{name}: {message}")


class InvalidName(MistakeError, ValueError):
    """A run id, seed id or metric name that cannot be used."""


class InvalidCatalogue(MistakeError, ValueError):
    """Declarations that contradict each other; ``faults`` lists all of them."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults: tuple[str, ...] = tuple(faults)
        super().__init__("; ".join(self.faults))


class WrongState(MistakeError, RuntimeError):
    """A call that is valid only at another moment."""


class ConfigurationError(EsperOtelError, ValueError):
    """A setting that cannot be used; the message names it, the value and the fix."""


class ProbeUnavailable(EsperOtelError):
    """What a probe needs is not there; the text is the reason shown to the user."""


class AdapterError(EsperOtelError):
    """Telemetry that cannot become a Leyline packet; the message names the field."""


class GatewayError(EsperOtelError):
    """A gateway refused a pull; the message is its reason."""


class GatewayUnavailable(GatewayError):
    """A gateway that did not answer in time; the same pull may be tried again."""


class UnknownRun(GatewayError):
    """No step of this run is stored."""


class StaleCursor(GatewayError):
    """A cursor that the run's store did not give, or that it gave in another life."""
