"""Levels: which points belong to frames, by the name of the metric and the instrumentation scope."""

from __future__ import annotations

from esper_otel.schema import METRICS

# Kinds of scopes: those of other senders, the frames of our exporter, the metrics on its own health, phases, and the
# description of the device. Only the first two make frames.
OTHERS, FRAMES, HEALTH, PHASES, DEVICE = range(5)
_SCOPES = {
    "esper_otel": FRAMES,
    "esper_otel.health": HEALTH,
    "esper_otel.phases": PHASES,
    "esper_otel.device": DEVICE,
}

# Levels of metrics.
STEP, SEED, SESSION = range(3)
_NUMBERS = {"step": STEP, "seed": SEED, "session": SESSION}
LEVELS = {metric.name: _NUMBERS[metric.level] for metric in METRICS}


def scope_of(name: str) -> int:
    """Returns the kind of the scope with this name."""
    return _SCOPES.get(name, OTHERS)


def level_of(name: str, scope: int) -> int | None:
    """Returns the level of a metric in a kind of scope; None if the metric is unknown.

    A metric that a user has declared is not in the catalogue; it is a step metric if it comes from one of our scopes.
    """
    return LEVELS.get(name, None if scope == OTHERS else STEP)
