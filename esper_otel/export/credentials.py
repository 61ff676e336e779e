"""Loads credential providers, which installed packages register under OpenTelemetry's entry point group."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

from esper_otel.errors import ConfigurationError

_T = TypeVar("_T")

_GROUP = "opentelemetry_otlp_credential_provider"


def provided(name: str, kind: type[_T], expected: str) -> _T:
    """Returns the credentials that the provider of this name creates.

    Raises:
        ConfigurationError: there is no such provider, it fails, or it returns something of another type.
    """
    found = list(entry_points(group=_GROUP, name=name))
    if not found:
        raise ConfigurationError(f"credential provider {name!r} is not among the entry points {_GROUP!r}")
    try:
        made = found[0].load()()
    except Exception as error:
        raise ConfigurationError(f"credential provider {name!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ConfigurationError(f"credential provider {name!r} gives a {type(made).__name__}, not {expected}")
    return made
