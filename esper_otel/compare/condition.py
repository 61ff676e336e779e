"""Conditions under which a comparison fails, such as ``step_latency_ms.p50 > 1.05x``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from esper_otel.compare.statistic import Change, Statistic
from esper_otel.errors import ConfigurationError

_FORM = re.compile(
    r"\s*(?P<metric>\S+)\.(?P<statistic>[a-z]+[0-9]*(?:\.[0-9]+)?)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*"
)
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_EXAMPLES = '"step_latency_ms.p50 > 1.05x" (times the baseline) or "gradient_norm.p99 > 10"'


class Verdict(Enum):
    """What a condition says of a run."""

    PASSED = "passed"
    FAILED = "failed"
    NONE = "no verdict"


@dataclass(frozen=True, slots=True)
class Condition:
    """A metric's statistic and the limit beyond which the run fails.

    Attributes:
        text: as the user wrote it.
        metric: name of the metric.
        statistic: what is computed from its values.
        sign: ``<``, ``<=``, ``>`` or ``>=``.
        limit: a number.
        is_ratio: whether the limit is a multiple of the baseline's statistic and not a number of its own.
    """

    text: str
    metric: str
    statistic: Statistic
    sign: str
    limit: float
    is_ratio: bool

    @classmethod
    def of(cls, text: str) -> Condition:
        """Reads a condition.

        Raises:
            ConfigurationError: it cannot be understood.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigurationError(f"cannot read the condition {text!r}: write, for example, {_EXAMPLES}")
        limit = found["limit"]
        is_ratio = limit.endswith("x")
        try:
            number = float(limit.removesuffix("x"))
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (is_ratio and number <= 0):
            raise ConfigurationError(
                f"{limit!r} in the condition {text!r} is not a limit: write, for example, {_EXAMPLES}"
            )
        statistic = Statistic.of(found["statistic"])
        return cls(text.strip(), found["metric"], statistic, found["sign"], number, is_ratio)

    def judge(self, change: Change) -> tuple[Verdict, str]:
        """Returns the verdict and its reason.

        A ratio fails the run if it is beyond the limit and the interval says that this is not noise: "no change" lies
        outside of it (or the limit itself, if it demands an improvement). A value of the run that is NaN always fails
        it, since a NaN must not pass a gate unnoticed; for ``last``, one among the last steps.
        """
        fewest = self.statistic.fewest
        steps = change.steps if self.is_ratio else change.steps[:1]
        if change.nans:
            return Verdict.FAILED, f"{change.nans} values are not a number"
        if min(steps) < fewest:
            return Verdict.NONE, f"{min(steps)} steps, needs {fewest}"
        if not self.is_ratio:
            is_beyond = _SIGNS[self.sign](change.run, self.limit)
            return (Verdict.FAILED, "beyond the limit") if is_beyond else (Verdict.PASSED, "within the limit")
        if change.ratio is None:
            return Verdict.NONE, f"no multiple of the baseline's {change.baseline:.6g}"
        return self._of_ratio(change.ratio, change.interval)

    @property
    def _reference(self) -> float:
        """The ratio that must lie outside the interval before a run fails."""
        return min(1.0, self.limit) if self.sign.startswith(">") else max(1.0, self.limit)

    def _of_ratio(self, ratio: float, interval: tuple[float, float] | None) -> tuple[Verdict, str]:
        if not _SIGNS[self.sign](ratio, self.limit):
            return Verdict.PASSED, "within the limit"
        if math.isinf(ratio) or not self.statistic.has_interval:
            return Verdict.FAILED, "beyond the limit"
        if interval is None:
            return Verdict.NONE, "values that are not finite leave no interval"
        if interval[0] <= self._reference <= interval[1]:
            return Verdict.PASSED, "beyond the limit, but may be noise"
        return Verdict.FAILED, "beyond the limit"
