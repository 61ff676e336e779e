"""Senders: what attributes say of who has sent a point, and what a plain OpenTelemetry program leaves to be found out.

The gateway and ``LeylineMetricReader`` both make steps of such a program's points. They agree since both ask here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from esper_otel.frames.frame import LAST_LOSS, RUN_FIELDS, UNKNOWN_ATTEMPT, Run
from esper_otel.leyline.numbers import finite
from esper_otel.schema import METRICS, Need

# What one sender may say; the texts are as long as those that a session accepts.
MOST_ATTRIBUTES = 128
MOST_TEXT_BYTES = 256
MOST_SEEDS = 20_000

INVALID_TEXT = "text too long or with control characters"

# Where a run's id is looked for in a Resource, best first.
_RUN_ID_SOURCES = ("esper.run.id", "service.instance.id", "service.name")
_LARGEST_RANK = 2**31
_RUN_DEFAULTS: dict[str, Any] = dataclasses.asdict(Run("", UNKNOWN_ATTEMPT))
_CUDA_NAMES = frozenset(metric.name for metric in METRICS if {Need.CUDA, Need.NVML}.intersection(metric.needs))


class Label(NamedTuple):
    """What the attributes of a point mean.

    Attributes:
        seed: the seed's id; empty when there is none.
        run_id: the run, where the point itself says it; else empty.
        rank: the rank, where the point itself says it; else -1.
        outcome: how a run ended.
        further: how many attributes nobody here knows.
        fault: why no such point is taken; empty when it is.
    """

    seed: str = ""
    run_id: str = ""
    rank: int = -1
    outcome: str = ""
    further: int = 0
    fault: str = ""


def label_of_texts(texts: Mapping[str, str], most_bytes: int = MOST_TEXT_BYTES) -> Label:
    """The meaning of a point's attributes."""
    rest = dict(texts)
    seed, run_id, outcome = rest.pop("seed_id", ""), rest.pop("esper.run.id", ""), rest.pop("outcome", "")
    rank = rest.pop("esper.rank", "")
    if not all(is_valid(text, most_bytes) for text in (seed, run_id, outcome)):
        return Label(fault=INVALID_TEXT)
    return Label(seed, run_id, _whole(rank, -1, _LARGEST_RANK), outcome, len(rest))


def run_of_texts(texts: Mapping[str, str], most_bytes: int = MOST_TEXT_BYTES) -> Run | None:
    """The run that a Resource's attributes describe; None when a text of it is not valid."""
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
    """Whether a text is as short and as printable as those that a session accepts."""
    if text.isprintable() and len(text) * 4 <= most_bytes:
        return True
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate, which no packet can carry
        return False
    return size <= most_bytes and not any(character < " " or "\x7f" <= character <= "\x9f" for character in text)


def text_of(value: object) -> str:
    """The text that an attribute's value is, as it is on the wire: text and plain numbers; empty for anything else."""
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
    """Adds what a session of ours would say itself: the last finite loss and the new violations.

    Args:
        values: of the step.
        violations: isolation violations new in it; None when it has none recorded.
        loss: the last finite one before it.
    """
    known = values["loss"] if finite(values.get("loss")) is not None else loss
    if known is not None:
        values.setdefault(LAST_LOSS, known)
    if violations is not None:
        values.setdefault("esper.isolation.violations", violations)


def on_its_device(run: Run, names: Collection[str]) -> Run:
    """The run, on CUDA if its device is not said and a step has metrics that only CUDA has."""
    return run if run.device_type or _CUDA_NAMES.isdisjoint(names) else replace(run, device_type="cuda")


def _whole(text: str | None, default: int, limit: int) -> int:
    """The text as an integer from 0 to below ``limit``."""
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 20:
        return default
    number = int(text)
    return number if number < limit else default
