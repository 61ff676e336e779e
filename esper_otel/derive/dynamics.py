"""How loss and gradient norm move: delta, moving average, variance, volatility."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from esper_otel.errors import InvalidValue

SMOOTHING = 0.2
WINDOW = 9  # 2 / SMOOTHING - 1: the span over which a rolling window is as old on average as the EWMA


def _checked_smoothing(smoothing: float) -> float:
    if not 0.0 < smoothing <= 1.0:
        raise InvalidValue("smoothing", f"{smoothing!r} is not above 0 and at most 1")
    return smoothing


LossState: TypeAlias = tuple[()] | tuple[float, tuple[float, ...]]


class LossDynamics:
    """Derives ``loss_delta``, ``loss_ewma`` and ``loss_volatility`` from the finite values of ``loss``.

    - delta: x minus the previous finite x.
    - EWMA: m <- m + a (x - m), started at the first x.
    - volatility: population standard deviation of the last w values, computed anew from the window, so that
      nothing drifts over millions of steps.

    Equals pandas ``ewm(alpha=a, adjust=False, ignore_na=True).mean()`` and
    ``rolling(w, min_periods=2).std(ddof=0)`` on the series without gaps. A step whose loss is missing, not
    finite, or overflows a result leaves the state as it was and has no reading.

    The state is ``(ewma, window)``; the window ends with the last x.
    """

    needs = ("loss",)
    gives = ("loss_delta", "loss_ewma", "loss_volatility")

    def __init__(self, *, smoothing: float = SMOOTHING, window: int = WINDOW) -> None:
        if window < 2:
            raise InvalidValue("window", f"{window!r} is below 2: a deviation needs two values")
        self._smoothing = _checked_smoothing(smoothing)
        self._kept = window - 1

    def initial(self) -> LossState:
        """The state before the first finite loss."""
        return ()

    def advance(self, state: LossState, given: Mapping[str, float]) -> LossState:
        """The state after a step."""
        x = given.get("loss")
        if x is None or x - x != 0.0:  # neither NaN nor an infinity
            return state
        if not state:
            return (x, (x,))
        mean, window = state
        mean += self._smoothing * (x - mean)
        delta = x - window[-1]
        if mean - mean != 0.0 or delta - delta != 0.0:
            return state
        return (mean, (*window[-self._kept :], x))

    def readings(self, state: LossState) -> dict[str, float]:
        """The metrics of the step that led to ``state``."""
        if not state:
            return {}
        mean, window = state
        count = len(window)
        if count == 1:
            return {"loss_ewma": mean}
        readings = {"loss_delta": window[-1] - window[-2], "loss_ewma": mean}
        try:
            center = math.fsum(window) / count
        except OverflowError:  # the sum of finite losses is beyond the range of a double
            return readings
        volatility = math.dist(window, (center,) * count) / math.sqrt(count)
        if math.isfinite(volatility):
            readings["loss_volatility"] = volatility
        return readings


GradientState: TypeAlias = tuple[()] | tuple[float, float]


class GradientDynamics:
    """Derives ``grad_norm_ewma`` and ``grad_var`` from the finite values of ``gradient_norm``.

    - EWMA: m <- m + a (x - m), started at the first x.
    - variance: v <- (1 - a) (v + a (x - m)^2) with m before the update, 0.0 at the first x (T. Finch,
      "Incremental calculation of weighted mean and variance", 2009).

    Equals pandas ``ewm(alpha=a, adjust=False, ignore_na=True).var(bias=True)``. A step whose norm is missing,
    not finite, or overflows a result leaves the state as it was and has no reading.

    The state is ``(ewma, variance)``.
    """

    needs = ("gradient_norm",)
    gives = ("grad_norm_ewma", "grad_var")

    def __init__(self, *, smoothing: float = SMOOTHING) -> None:
        self._smoothing = _checked_smoothing(smoothing)

    def initial(self) -> GradientState:
        """The state before the first finite norm."""
        return ()

    def advance(self, state: GradientState, given: Mapping[str, float]) -> GradientState:
        """The state after a step."""
        x = given.get("gradient_norm")
        if x is None or x - x != 0.0:
            return state
        if not state:
            return (x, 0.0)
        mean, variance = state
        away = x - mean
        step = self._smoothing * away
        variance = (1.0 - self._smoothing) * (variance + step * away)
        mean += step
        if mean - mean != 0.0 or variance - variance != 0.0:
            return state
        return (mean, variance)

    def readings(self, state: GradientState) -> dict[str, float]:
        """The metrics of the step that led to ``state``."""
        return {"grad_norm_ewma": state[0], "grad_var": state[1]} if state else {}
