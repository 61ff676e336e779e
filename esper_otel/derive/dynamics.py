"""How loss and gradient norm move: delta, moving average, variance, volatility."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

from esper_otel.errors import InvalidValue

SMOOTHING = 0.2
WINDOW = 9  # 2 / SMOOTHING - 1: the span over which a rolling window is as old on average as the EWMA

_LOSS, _GRADIENT = 1, 2
_NAN = float("nan")

# Which of the two moved in the step; EWMA of the loss, its last values; EWMA of the norm, its variance. The window
# ends with the last loss and is empty before the first; the variance is negative before the first norm.
State: TypeAlias = tuple[int, float, tuple[float, ...], float, float]


class Dynamics:
    """Derives how loss and gradient norm move, from the finite values of ``loss`` and ``gradient_norm``.

    - ``loss_delta``: x minus the previous finite x.
    - ``loss_ewma``, ``grad_norm_ewma``: m <- m + a (x - m), started at the first x.
    - ``loss_volatility``: population standard deviation of the last w values, computed anew from the window, so
      that nothing drifts over millions of steps.
    - ``grad_var``: v <- (1 - a) (v + a (x - m)^2) with m before the update, 0.0 at the first x (T. Finch,
      "Incremental calculation of weighted mean and variance", 2009).

    Equals pandas ``ewm(alpha=a, adjust=False, ignore_na=True)``, ``.mean()`` and ``.var(bias=True)``, and
    ``rolling(w, min_periods=2).std(ddof=0)``, on the series without gaps. A step whose input is missing, not
    finite, or overflows a result leaves that input's state as it was, and has none of its readings.

    One processor for both: every step pays for each processor, and for each object that a frame keeps.

    Args:
        without: metrics that somebody else gives.
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
        """The state before the first finite values."""
        return (0, 0.0, (), 0.0, -1.0)

    def advance(self, state: State, given: Mapping[str, float]) -> State:
        """The state after a step; the same object if neither moved."""
        _, loss_ewma, window, norm_ewma, variance = state
        moved = 0
        x = given.get("loss", _NAN)
        if x - x == 0.0:  # neither NaN nor an infinity
            if window:
                ewma = loss_ewma + self._smoothing * (x - loss_ewma)
                delta = x - window[-1]
                if ewma - ewma == 0.0 and delta - delta == 0.0:
                    moved, loss_ewma = _LOSS, ewma
                    window = window[1:] + (x,) if len(window) == self._window else (*window, x)  # noqa: RUF005 - the sum is faster
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
        """The metrics of the step that led to ``state``."""
        moved, loss_ewma, window, norm_ewma, variance = state
        readings: dict[str, float] = {}
        if moved & _LOSS:
            readings["loss_ewma"] = loss_ewma
            if len(window) > 1:
                readings["loss_delta"] = window[-1] - window[-2]
                volatility = _deviation(window)
                if volatility is not None:
                    readings["loss_volatility"] = volatility
        if moved & _GRADIENT:
            readings["grad_norm_ewma"] = norm_ewma
            readings["grad_var"] = variance
        for name in self._without:
            readings.pop(name, None)
        return readings


def _deviation(window: tuple[float, ...]) -> float | None:
    """The population standard deviation; None when it is beyond the range of a double."""
    count = len(window)
    try:
        center = math.fsum(window) / count
    except OverflowError:  # the sum of finite losses is
        return None
    deviation = math.dist(window, (center,) * count) / math.sqrt(count)
    return deviation if math.isfinite(deviation) else None
