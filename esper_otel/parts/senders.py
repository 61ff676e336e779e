"""Identifies the sender of a point by its attributes, and fills in what a plain OpenTelemetry program does not send.

The gateway and ``LeylineMetricReader`` both use this module, so they build the same steps from such points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from esper_otel.frames.frame import LAST_LOSS, RUN_FIELDS, UNKNOWN_ATTEMPT, Run
from esper_otel.frames.numbers import finite
from esper_otel.schema import METRICS, Need
from esper_otel.schema.who import device_in_words

# Limits for one sender. The texts may be as long as those that a session accepts.
MOST_ATTRIBUTES = 128
MOST_TEXT_BYTES = 256
MOST_SEEDS = 20_000

INVALID_TEXT = "text too long or with control characters"
NO_SEED = "seed metric without seed_id"
TOO_MANY_SETS = "more attribute sets than the sender's SDK keeps apart"

# The SDK merges all attribute sets above its limit into one point that has only this attribute.
_OVERFLOW = "otel.metric.overflow"

# Resource attributes that may contain a run's id, in order of preference.
_RUN_ID_SOURCES = ("esper.run.id", "service.instance.id", "service.name")
_LARGEST_RANK = 2**31
_RUN_DEFAULTS: dict[str, Any] = dataclasses.asdict(Run("", UNKNOWN_ATTEMPT))
_CUDA_NAMES = frozenset(metric.name for metric in METRICS if {Need.CUDA, Need.NVML}.intersection(metric.needs))


class Label(NamedTuple):
    """The meaning of a point's attributes.

    Attributes:
        seed: the seed's id, or empty.
        run_id: the run given by the point itself, or empty.
        rank: the rank given by the point itself, or -1.
        outcome: how a run ended.
        phase: name of a phase.
        device: the device that the attributes describe, in words; empty if they describe none.
        further: number of unknown attributes.
        fault: why points with these attributes are rejected; empty if they are accepted.
    """

    seed: str = ""
    run_id: str = ""
    rank: int = -1
    outcome: str = ""
    phase: str = ""
    device: str = ""
    further: int = 0
    fault: str = ""

    def run_of(self, run: Run) -> Run:
        """Returns the run of a point: the point's own attributes override those of its Resource."""
        if not self.run_id and self.rank < 0:
            return run
        return replace(run, run_id=self.run_id or run.run_id, rank=self.rank if self.rank >= 0 else run.rank)


def label_of_texts(texts: Mapping[str, str], most_bytes: int = MOST_TEXT_BYTES) -> Label:
    """Returns the meaning of a point's attributes."""
    rest = dict(texts)
    if _OVERFLOW in rest:
        return Label(fault=TOO_MANY_SETS)
    seed, run_id, outcome = rest.pop("seed_id", ""), rest.pop("esper.run.id", ""), rest.pop("outcome", "")
    rank, phase = rest.pop("esper.rank", ""), rest.get("phase", "")
    device = device_in_words(rest) if "hw.type" in rest else ""
    if not all(is_valid(text, most_bytes) for text in (seed, run_id, outcome, phase)):
        return Label(fault=INVALID_TEXT)
    return Label(seed, run_id, _whole(rank, -1, _LARGEST_RANK), outcome, phase, device, len(rest))


def run_of_texts(texts: Mapping[str, str], most_bytes: int = MOST_TEXT_BYTES) -> Run | None:
    """Returns the run that a Resource's attributes describe; None if one of the texts is invalid."""
    found: dict[str, Any] = {}
    for each in RUN_FIELDS:
        text = texts.get(each.attribute)
        if text is not None:
            found[each.name] = text if each.limit is None else _whole(text, _RUN_DEFAULTS[each.name], each.limit)
    found["run_id"] = next(filter(None, map(texts.get, _RUN_ID_SOURCES)), "unknown")
    run = Run(**{**_RUN_DEFAULTS, **found})
    ours = [getattr(run, each.name) for each in RUN_FIELDS if each.limit is None]
    return run if all(is_valid(text, most_bytes) for text in ours) else None


def is_valid(text: str, most_bytes: int = MOST_TEXT_BYTES) -> bool:
    """Whether a session would accept the text: not too long and without control characters."""
    if text.isprintable() and len(text) * 4 <= most_bytes:
        return True
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate, which no packet can carry
        return False
    return size <= most_bytes and not any(character < " " or "\x7f" <= character <= "\x9f" for character in text)


def text_of(value: object) -> str:
    """Returns an attribute's value as text, if it is text or a plain number on the wire; otherwise an empty text."""
    match value:
        case bool():
            return ""
        case str() | int():
            return str(value)
        case float():
            return f"{value:.17g}"
        case _:
            return ""


def complete(values: dict[str, float], violations: float | None, loss: float | None) -> None:
    """Adds values that a session would send itself: the last finite loss and the new violations.

    Args:
        values: the values of the step.
        violations: number of new isolation violations in the step; None if none were recorded.
        loss: the last finite loss before the step.
    """
    known = values["loss"] if finite(values.get("loss")) is not None else loss
    if known is not None:
        values.setdefault(LAST_LOSS, known)
    if violations is not None:
        values.setdefault("esper.isolation.violations", violations)


def on_its_device(run: Run, names: Collection[str]) -> Run:
    """Returns the run; if its device is unknown and a step has CUDA-only metrics, with the device type CUDA."""
    return run if run.device_type or _CUDA_NAMES.isdisjoint(names) else replace(run, device_type="cuda")


def _whole(text: str | None, default: int, limit: int) -> int:
    """Returns the text as an integer of at least 0 and below ``limit``."""
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 20:
        return default
    number = int(text)
    return number if number < limit else default
