"""OpenTelemetry for training runs that a controller can steer by."""

from esper_otel._version import __version__

__all__ = ["__version__"]
