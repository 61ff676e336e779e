"""Statistics of a metric over the steps of a run, and how far they can be trusted."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from esper_otel.errors import ConfigurationError

Values: TypeAlias = NDArray[np.float64]

FEWEST = 100
"""Steps below which there is no verdict."""

CONFIDENCE = 0.99

_IN_THE_TAIL = 10  # steps that must lie beyond a percentile
_LAST_SHARE = 10  # "last" is the last tenth of the steps, but no fewer than this many steps:
_FEWEST_OF_LAST = 50
_RESAMPLES = 400
_BLOCKS = 16
# Half the width of the interval in standard errors: Student's t for 15 degrees of freedom at 99 %, and the factor
# sqrt(16 / 15) by which a bootstrap of 16 blocks underestimates the error.
_HALF_WIDTH = 2.947 * 1.033
_MOST = 50_000
_AT_ONCE = 1_000_000  # numbers that a resample keeps in memory
_PERCENTILE = re.compile(r"p([0-9]{1,2}(?:\.[0-9]{1,2})?)")
_EXTREMES = {"min": 0.0, "max": 1.0}
_FORMS = "mean, last, min, max, or a percentile such as p50 or p99"


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number for a metric of a run: its mean, its last value, or a percentile.

    Attributes:
        name: ``mean``, ``last`` (mean over the last tenth of the steps, at least 50, because the value of a single
            step is noise), ``min``, ``max``, or ``p`` and a number from 0 to 99.99, such as ``p50``.
        share: for a percentile and the extremes: the share of the steps below it.
    """

    name: str
    share: float | None

    @classmethod
    def of(cls, name: str) -> Statistic:
        """Returns the statistic of this name.

        Raises:
            ConfigurationError: the name is unknown.
        """
        if name in {"mean", "last"}:
            return cls(name, None)
        if name in _EXTREMES:
            return cls(name, _EXTREMES[name])
        if found := _PERCENTILE.fullmatch(name):
            return cls(name, float(found[1]) / 100)
        raise ConfigurationError(f"unknown statistic {name!r}: known are {_FORMS}")

    @property
    def has_interval(self) -> bool:
        """Whether an interval can be given. The extremes of a run say nothing about those of the next."""
        return self.name not in _EXTREMES

    @property
    def fewest(self) -> int:
        """Steps that it takes for a verdict: 100, and for a percentile ten beyond it (p99: 1,000)."""
        if self.share is None or not self.has_interval:
            return FEWEST
        tail = min(self.share, 1 - self.share)
        return FEWEST if tail == 0 else max(FEWEST, math.ceil(round(_IN_THE_TAIL / tail, 6)))

    def of_interest(self, values: Values) -> Values:
        """Returns the values that it is computed from: the last ones, those with an order, or all."""
        if self.name == "last":
            return values[-max(_FEWEST_OF_LAST, len(values) // _LAST_SHARE) :]
        return values if self.share is None else values[~np.isnan(values)]

    def __call__(self, values: Values) -> float:
        """Returns the statistic; NaN if there is no value, or if one of those that are averaged is NaN."""
        chosen = self.of_interest(values)
        if not len(chosen):
            return math.nan
        if self.share is None:
            return float(np.mean(chosen)) if np.all(np.isfinite(chosen)) else float(np.sum(chosen))
        return float(np.quantile(chosen, self.share, method="inverted_cdf"))

    def resampled(self, values: Values, random: np.random.Generator) -> Values:
        """Returns the statistic of 400 resamples of the steps.

        Steps resemble those before them, so that not single steps are drawn but blocks of consecutive ones, of which
        there are 16 (block bootstrap, Carlstein 1986). Of a long run, 50,000 random steps are taken.
        """
        chosen = self.of_interest(values)
        if len(chosen) > _MOST:
            chosen = chosen[np.sort(random.integers(0, len(chosen), _MOST))]
        block = np.arange(len(chosen)) * _BLOCKS // len(chosen)
        drawn = random.multinomial(_BLOCKS, np.full(_BLOCKS, 1 / _BLOCKS), size=_RESAMPLES).astype(np.float64)
        if self.share is None:
            sums = np.bincount(block, weights=chosen, minlength=_BLOCKS)
            return np.asarray((drawn @ sums) / (drawn @ np.bincount(block, minlength=_BLOCKS)))
        order = np.argsort(chosen, kind="stable")
        some = max(1, _AT_ONCE // len(chosen))
        places = [_place(drawn[first : first + some, block[order]], self.share) for first in range(0, _RESAMPLES, some)]
        return np.asarray(chosen[order][np.concatenate(places)])


def _place(weights: Values, share: float) -> NDArray[np.intp]:
    """Returns where the quantile stands among ordered values that count ``weights`` times each, for each row."""
    below = np.cumsum(weights, axis=1)
    return np.asarray(np.argmax(below >= share * below[:, -1:], axis=1))


@dataclass(frozen=True, slots=True)
class Change:
    """A statistic of two runs.

    Attributes:
        run: of the run in question.
        baseline: of the run that it is compared with.
        ratio: the one divided by the other; None where that says nothing: the baseline is not above zero or not finite.
        interval: bounds of the ratio at 99 % confidence; None if there are too few steps or values that are not finite.
        steps: steps with the metric, in the run and in the baseline.
        nans: values of the run that are NaN, among those that the statistic looks at.
    """

    run: float
    baseline: float
    ratio: float | None
    interval: tuple[float, float] | None
    steps: tuple[int, int]
    nans: int = 0


def change(statistic: Statistic, run: Values, baseline: Values) -> Change:
    """Compares two runs. The same values always give the same interval."""
    of_run, of_baseline = statistic(run), statistic(baseline)
    is_ratio = 0 < of_baseline < math.inf
    ratio = of_run / of_baseline if is_ratio else None
    steps = (len(run), len(baseline))
    is_known = is_ratio and math.isfinite(of_run) and statistic.has_interval and min(steps) >= statistic.fewest
    interval = _interval(statistic, run, baseline) if is_known else None
    looked_at = statistic.of_interest(run) if statistic.share is None else run
    return Change(of_run, of_baseline, ratio, interval, steps, int(np.isnan(looked_at).sum()))


def _interval(statistic: Statistic, run: Values, baseline: Values) -> tuple[float, float] | None:
    random = np.random.default_rng(0)
    of_run, of_baseline = (statistic.resampled(values, random) for values in (run, baseline))
    with np.errstate(all="ignore"):
        ratios = of_run / of_baseline
    if not np.all(np.isfinite(ratios)):
        return None
    ratio, error = statistic(run) / statistic(baseline), float(np.std(ratios))
    return ratio - _HALF_WIDTH * error, ratio + _HALF_WIDTH * error
