"""Trends of the loss and the gradient norm: delta, moving average, variance, volatility."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

from esper_otel.errors import InvalidValue

SMOOTHING = 0.2
WINDOW = 9  # 2 / SMOOTHING - 1: the span over which a rolling window is as old on average as the EWMA

_LOSS, _GRADIENT = 1, 2
_NAN = float("nan")

_EWMA = ("loss_ewma",)
_AND_DELTA = (*_EWMA, "loss_delta")
_AND_VOLATILITY = (*_AND_DELTA, "loss_volatility")
_OF_NORM = ("grad_norm_ewma", "grad_var")

# The state: which of the two series has a value in this step; the loss's EWMA and window of last values; the norm's
# EWMA and variance. The window ends with the last loss and is empty before the first loss. The variance is negative
# before the first norm.
State: TypeAlias = tuple[int, float, tuple[float, ...], float, float]


class Dynamics:
    """Derives trends from the finite values x of ``loss`` and ``gradient_norm``.

    - ``loss_delta``: x minus the previous finite x.
    - ``loss_ewma``, ``grad_norm_ewma``: m <- m + a (x - m), started at the first x.
    - ``loss_volatility``: population standard deviation of the last w values, computed from the whole window in each
      step, so that rounding errors do not accumulate over millions of steps.
    - ``grad_var``: v <- (1 - a) (v + a (x - m)^2) with m before the update, 0.0 at the first x (T. Finch,
      "Incremental calculation of weighted mean and variance", 2009).

    On the series without gaps, the results equal those of pandas ``ewm(alpha=a, adjust=False, ignore_na=True)`` with
    ``.mean()`` and ``.var(bias=True)``, and ``rolling(w, min_periods=2).std(ddof=0)``. If an input is missing or not
    finite, or a result overflows, the state of that input stays unchanged and its metrics are absent in that step.

    One processor handles both inputs, since every processor adds work to each step and objects to each frame.

    Args:
        without: metrics to leave out because another processor gives them.
    """

    needs: tuple[str, ...] = ("loss", "gradient_norm")

    def __init__(
        self, *, smoothing: float = SMOOTHING, window: int = WINDOW, without: Collection[str] = frozenset()
    ) -> None:
        if not 0.0 < smoothing <= 1.0:
            raise InvalidValue("smoothing", f"{smoothing!r} is not above 0 and at most 1")
        if window < 2:
            raise InvalidValue("window", f"{window!r} is below 2: a deviation needs two values")
        every = ("loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma", "grad_var")
        self.gives: tuple[str, ...] = tuple(name for name in every if name not in without)
        self._without = tuple(without)
        self._smoothing = smoothing
        self._window = window

    def initial(self) -> State:
        """Returns the state before the first finite values."""
        return (0, 0.0, (), 0.0, -1.0)

    def advance(self, state: State, given: Mapping[str, float]) -> State:
        """Returns the state after a step; the same object if the step has neither input."""
        _, loss_ewma, window, norm_ewma, variance = state
        moved = 0
        x = given.get("loss", _NAN)
        if x - x == 0.0:  # neither NaN nor an infinity
            if window:
                ewma = loss_ewma + self._smoothing * (x - loss_ewma)
                delta = x - window[-1]
                if ewma - ewma == 0.0 and delta - delta == 0.0:
                    moved, loss_ewma = _LOSS, ewma
                    window = window[1:] + (x,) if len(window) == self._window else (*window, x)  # noqa: RUF005
            else:
                moved, loss_ewma, window = _LOSS, x, (x,)
        x = given.get("gradient_norm", _NAN)
        if x - x == 0.0:
            if variance >= 0.0:
                away = x - norm_ewma
                step = self._smoothing * away
                spread = (1.0 - self._smoothing) * (variance + step * away)
                ewma = norm_ewma + step
                if ewma - ewma == 0.0 and spread - spread == 0.0:
                    moved, norm_ewma, variance = moved | _GRADIENT, ewma, spread
            else:
                moved, norm_ewma, variance = moved | _GRADIENT, x, 0.0
        return (moved, loss_ewma, window, norm_ewma, variance) if moved else state

    def readings(self, state: State) -> dict[str, float]:
        """Returns the metrics of the step that led to ``state``."""
        return dict(zip(*self.derived(state), strict=True))

    def derived(self, state: State) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Returns the same as ``readings``, as names and numbers."""
        moved, loss_ewma, window, norm_ewma, variance = state
        names: tuple[str, ...] = ()
        numbers: tuple[float, ...] = ()
        if moved & _LOSS:
            names, numbers = _EWMA, (loss_ewma,)
            if len(window) > 1:
                volatility = _deviation(window)
                if volatility is None:
                    names, numbers = _AND_DELTA, (loss_ewma, window[-1] - window[-2])
                else:
                    names, numbers = _AND_VOLATILITY, (loss_ewma, window[-1] - window[-2], volatility)
        if moved & _GRADIENT:
            names += _OF_NORM
            numbers += (norm_ewma, variance)
        if self._without:
            kept = [(name, number) for name, number in zip(names, numbers, strict=True) if name not in self._without]
            names, numbers = tuple(name for name, _ in kept), tuple(number for _, number in kept)
        return names, numbers


def _deviation(window: tuple[float, ...]) -> float | None:
    """Returns the population standard deviation; None if it is beyond the range of a double."""
    count = len(window)
    try:
        center = math.fsum(window) / count
    except OverflowError:  # the sum of finite losses is infinite
        return None
    deviation = math.dist(window, (center,) * count) / math.sqrt(count)
    return deviation if math.isfinite(deviation) else None
