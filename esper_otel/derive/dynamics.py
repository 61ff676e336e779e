"""Trends of the loss and the gradient norm: delta, moving average, variance, volatility."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import dist, fsum, sqrt
from typing import TypeAlias

from esper_otel.errors import InvalidValue

SMOOTHING = 0.2
WINDOW = 9  # 2 / SMOOTHING - 1: the span over which a rolling window is as old on average as the EWMA

_LOSS, _GRADIENT, _BOTH = 1, 2, 3
_NAN = float("nan")

_OF_LOSS = ("loss_ewma", "loss_delta", "loss_volatility")
_OF_BOTH = (*_OF_LOSS, "grad_norm_ewma", "grad_var")

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
        self._without = frozenset(without)
        self._smoothing = smoothing
        self._window = window
        self._usual = -1 if len(self.gives) < len(every) else window  # length of the window in the usual case
        self._rest = 1.0 - smoothing
        self._root = sqrt(window)

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
        moved, ewma, window, norm_ewma, variance = state
        readings: dict[str, float] = {}
        if moved & _LOSS:
            readings["loss_ewma"] = ewma
            if len(window) > 1:
                readings["loss_delta"] = window[-1] - window[-2]
                volatility = _deviation(window)
                if volatility is not None:
                    readings["loss_volatility"] = volatility
        if moved & _GRADIENT:
            readings |= {"grad_norm_ewma": norm_ewma, "grad_var": variance}
        return {name: reading for name, reading in readings.items() if name not in self._without}

    def step(self, state: State, loss: float, norm: float) -> tuple[State, tuple[str, ...], tuple[float, ...]]:
        """Returns the state, names and numbers of ``advance`` and ``readings`` in one, for the training loop.

        Args:
            state: the state before the step; the same object is returned if the step has neither input.
            loss: the step's loss; NaN if it is missing.
            norm: its gradient norm; NaN if it is missing.
        """
        _, ewma, window, norm_ewma, variance = state
        count, smoothing = self._window, self._smoothing
        if len(window) == self._usual:
            # The usual case. Results that are all finite follow from finite inputs: there is nothing else to check.
            delta = loss - window[-1]
            window = window[1:] + (loss,)  # noqa: RUF005 - unpacking takes twice as long
            try:
                center = fsum(window) / count
                deviation = dist(window, (center,) * count) / self._root
            except (OverflowError, ValueError):  # infinities, or losses whose sum is one
                return self._step(state, loss, norm)
            ewma += smoothing * (loss - ewma)
            if norm != norm:  # noqa: PLR0124 - NaN
                if (ewma + delta + deviation) * 0.0 == 0.0:
                    return (_LOSS, ewma, window, norm_ewma, variance), _OF_LOSS, (ewma, delta, deviation)
            elif variance >= 0.0:
                away = norm - norm_ewma
                change = smoothing * away
                norm_ewma += change
                variance = self._rest * (variance + change * away)
                if (ewma + delta + deviation + norm_ewma + variance) * 0.0 == 0.0:
                    state = (_BOTH, ewma, window, norm_ewma, variance)
                    return state, _OF_BOTH, (ewma, delta, deviation, norm_ewma, variance)
        return self._step(state, loss, norm)

    def _step(self, state: State, loss: float, norm: float) -> tuple[State, tuple[str, ...], tuple[float, ...]]:
        """Does the same for any input."""
        after = self.advance(state, {"loss": loss, "gradient_norm": norm})
        readings = {} if after is state else self.readings(after)
        return after, tuple(readings), tuple(readings.values())


def _deviation(window: tuple[float, ...]) -> float | None:
    """Returns the population standard deviation; None if it is beyond the range of a double."""
    count = len(window)
    try:
        center = fsum(window) / count
    except OverflowError:  # the sum of finite losses is infinite
        return None
    deviation = dist(window, (center,) * count) / sqrt(count)
    return deviation if deviation - deviation == 0.0 else None
