"""The metric names that a session accepts, and which of their values count as out of range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from esper_otel.errors import InvalidCatalogue, InvalidValue, UnknownMetric
from esper_otel.record.values import RATIOS
from esper_otel.schema import METRICS, OWN_STEP, STEP_METRICS, Metric

# Metrics of the parts of a step, by the name of the part.
PARTS = {part: f"esper.{part}_ms" for part in ("forward", "backward", "optimizer")}

# Units of values that cannot be negative. Metrics declared by the user are not checked.
_NONNEGATIVE = frozenset({"ratio", "grad", "grad^2", "rate", "ms", "GB", "%", "count"})
_RECORDABLE_OWN = ("esper.optimizer.lr", "esper.optimizer.index", *PARTS.values())


class Names:
    """The step metrics of one session: those of the catalogue and those declared by the user.

    Args:
        own: metrics that the user declares.
        enriched: whether gated metrics are recorded; if not, they are accepted and left out.

    Raises:
        InvalidCatalogue: declarations clash; the message lists all clashes.
    """

    def __init__(self, own: Sequence[Metric] = (), *, enriched: bool = True) -> None:
        self.entries: dict[str, Metric] = {metric.name: metric for metric in METRICS}
        taken = set(self.entries) | {metric.key for metric in OWN_STEP}
        faults = []
        for metric in own:
            if not isinstance(metric, Metric):
                raise InvalidValue("metrics", f"{metric!r} is not an esper_otel.Metric")
            if metric.name in taken or metric.name.startswith("esper."):
                faults.append(f"metric name {metric.name!r} is taken by the catalogue or declared twice")
            if metric.level != "step" or metric.kind != "gauge":
                faults.append(f"metric {metric.name!r}: a user's own metrics are gauges of the step")
            taken.add(metric.name)
            self.entries[metric.name] = metric
        if faults:
            raise InvalidCatalogue(faults)
        recordable = [*STEP_METRICS, *(self.entries[name] for name in _RECORDABLE_OWN), *own]
        self.recordable: frozenset[str] = frozenset(metric.name for metric in recordable)
        self.left_out: frozenset[str] = frozenset(
            metric.name for metric in self.entries.values() if metric.gated and not enriched
        )
        # A catalogue name with dots cannot be a Python keyword; such a metric can also be given by its packet key.
        self._by_key = {metric.key: metric.name for metric in recordable if metric.key != metric.name and metric.key}
        self._low = frozenset(metric.name for metric in STEP_METRICS if metric.unit in _NONNEGATIVE)

    def resolved(self, values: Mapping[str, object]) -> dict[str, object]:
        """Returns the values under their full metric names.

        Raises:
            UnknownMetric: a name cannot be recorded.
        """
        resolved = {}
        for given, value in values.items():
            name = self._by_key.get(given, given)
            if name not in self.recordable:
                raise UnknownMetric(given, self.recordable | self._by_key.keys())
            resolved[name] = value
        return resolved

    def kept(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Returns the values without gated ones that are off; the same mapping object if no metric is left out."""
        left_out = self.left_out
        return {name: value for name, value in values.items() if name not in left_out} if left_out else values

    def lowest(self, names: Sequence[str]) -> npt.NDArray[np.float64]:
        """Returns the lowest value that each of these metrics can have."""
        return np.array([0.0 if name in self._low else -np.inf for name in names])

    def highest(self, names: Sequence[str]) -> npt.NDArray[np.float64]:
        """Returns the highest value that each of these metrics can have."""
        return np.array([1.0 if name in RATIOS else np.inf for name in names])
