"""Groups: which group of charts each metric belongs in, and in which order they are shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from esper_otel.schema import METRICS, SEED_METRICS, STEP_METRICS, Metric, Need

LEARNING, TIME, THROUGHPUT, MACHINE, SEEDS = "learning", "time", "throughput", "machine", "seeds"

_ORDER = {metric.name: place for place, metric in enumerate(METRICS)}
_BY_NAME = {metric.name: metric for metric in METRICS}
_ASKED_FOR = {metric.name for metric in (*STEP_METRICS, *SEED_METRICS)}
_OF_MACHINE = {Need.CUDA, Need.NVML, Need.PSUTIL}
# What the name of a user's own metric says about it, in this order. Otherwise it is about learning, as most are.
_BY_WORDS = (
    (THROUGHPUT, re.compile(r"per_s(ec|econd)?$|throughput|_rate_hz$")),
    (MACHINE, re.compile(r"(^|[._/-])(gpu|cpu|mem|memory|ram|vram|power|temp|temperature|util|disk|net)([._/-]|$)")),
    (TIME, re.compile(r"_(ms|us|ns|s|sec|seconds)$|(^|[._/-])(time|latency|duration|wait)([._/-]|$)")),
    (SEEDS, re.compile(r"(^|[._/-])seeds?([._/-]|$)")),
)
# And its unit, if it was declared without one.
_NO_UNIT = frozenset({"", "1"})
_NO_UNITS: Mapping[str, str] = MappingProxyType({})
_UNITS_BY_ENDING = (
    ("rate", re.compile(r"per_s(ec|econd)?$")),
    ("ms", re.compile(r"_(ms|millis|milliseconds)$")),
    ("s", re.compile(r"_(s|sec|secs|seconds)$")),
    ("%", re.compile(r"_(percent|pct)$")),
    ("bytes", re.compile(r"_bytes$")),
)


class MetricDescription(NamedTuple):
    """A metric as the page shows it.

    Attributes:
        name: its name.
        unit: its unit; of a user's own metric without one, what its name ends with; empty if it is not known.
        description: what it means; empty if it is not known.
        group: the group of charts.
        level: ``step``, or ``seed``: values over all live seeds of a step.
        source: ``schema`` (requested), ``ours`` or ``user``.
    """

    name: str
    unit: str
    description: str
    group: str
    level: str
    source: str


def described(names: Iterable[str], units: Mapping[str, str] = _NO_UNITS) -> list[MetricDescription]:
    """Returns the metrics with these names in order of display: those of the catalogue first, in its order.

    Args:
        names: the names.
        units: units of the user's own metrics, as far as they are known.
    """
    known = [_described(name, units.get(name, "")) for name in names]
    return sorted(known, key=lambda each: (_ORDER.get(each.name, len(_ORDER)), each.name))


def _described(name: str, said_unit: str) -> MetricDescription:
    metric = _BY_NAME.get(name)
    if metric is None:
        group = next((group for group, words in _BY_WORDS if words.search(name.lower())), LEARNING)
        unit = next((unit for unit, ending in _UNITS_BY_ENDING if ending.search(name.lower())), "")
        is_said = said_unit not in _NO_UNIT
        return MetricDescription(name, said_unit if is_said else unit, "", group, "step", "user")
    source = "schema" if name in _ASKED_FOR else "ours"
    return MetricDescription(name, metric.unit, metric.description, _group(metric), metric.level, source)


def _group(metric: Metric) -> str:
    if metric.level == "seed" or metric.name in {"esper.seeds", "esper.isolation.violations"}:
        return SEEDS
    if metric.unit == "ms":
        return TIME
    if metric.unit == "rate":
        return THROUGHPUT
    if _OF_MACHINE.intersection(metric.needs) or metric.name.startswith("esper.device."):
        return MACHINE
    return LEARNING
