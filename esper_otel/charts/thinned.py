"""Thins the steps of a run for its charts, so that neither a spike nor a value that is not finite is hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_AT_ONCE = 2000
_LAST_STEP = 2**53  # what a browser's numbers express exactly; a step that is guessed has a higher one
# The rows of a metric's array.
_LAST, _LOW, _HIGH, _TOTAL, _FINITE, _NAN, _UP, _DOWN, _FIRST_ODD = range(9)
_EMPTY = np.array([np.nan, np.nan, np.nan, 0, 0, 0, 0, 0, np.inf])
# The same for what buckets have besides metrics.
_SEGMENT, _FIRST, _STEP, _STEPS, _EPOCH, _UNIX_S = range(6)
# How several buckets become one: columns without an entry take the value of the newest bucket.
_JOINED: dict[int, Callable[[Floats, npt.NDArray[np.intp]], Floats]] = {
    _LOW: np.fmin.reduceat,
    _HIGH: np.fmax.reduceat,
    _FIRST_ODD: np.minimum.reduceat,
    **dict.fromkeys((_TOTAL, _FINITE, _NAN, _UP, _DOWN), np.add.reduceat),
}
_HEAD_JOINED: dict[int, Callable[[Floats, npt.NDArray[np.intp]], Floats]] = {
    _FIRST: np.minimum.reduceat,
    _STEP: np.maximum.reduceat,
    _STEPS: np.add.reduceat,
}


class ChartStep(NamedTuple):
    """One step, as it is added.

    Attributes:
        step: its number.
        epoch: its epoch.
        unix_s: its time.
        values: its metrics by name; NaN is a value.
    """

    step: int
    epoch: int
    unix_s: float
    values: Mapping[str, float]


class ThinnedSteps:
    """The steps of one rank, in at most so many buckets; a bucket of width 1 is one step.

    Args:
        most: the largest number of buckets.

    Attributes:
        steps: how many steps were added.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = 1
        self._heads: Floats = np.empty((6, 0))
        self._metrics: dict[str, Floats] = {}
        self._segments: list[dict[str, Any]] = []
        self._latest = -1
        self._attempt = 1
        self.steps: int = 0

    def add(self, steps: Iterable[ChartStep], attempt: int = 1) -> None:
        """Adds steps in the order of their times. A new attempt begins a segment, and a step whose number is lower.

        Args:
            steps: the steps.
            attempt: the number of the attempt that they belong to: 1, 2, ...
        """
        is_new, self._attempt = attempt != self._attempt, attempt
        if is_new and self._segments:
            self._latest = _LAST_STEP
        some: list[ChartStep] = []
        for step in steps:
            if step.step < _LAST_STEP:
                some.append(step)
            if len(some) == _AT_ONCE:
                self._take(some)
                some = []
        self._take(some)

    def _take(self, some: list[ChartStep]) -> None:
        if not some:
            return
        self.steps += len(some)
        heads = np.empty((6, len(some)))
        for place, step in enumerate(some):
            if step.step <= self._latest or not self._segments:
                is_known = any(segment["number"] == self._attempt for segment in self._segments)
                why = "back" if is_known else "resumed" if self._segments else "start"
                self._segments.append({"number": self._attempt, "why": why, "first_step": step.step})
            self._latest = step.step
            heads[:, place] = len(self._segments) - 1, step.step, step.step, 1, step.epoch, step.unix_s
        before = self._heads.shape[1]
        for name in {name for step in some for name in step.values}:
            self._metrics.setdefault(name, np.repeat(_EMPTY[:, None], before, axis=1))
        self._heads = np.concatenate([self._heads, heads], axis=1)
        for name, known in self._metrics.items():
            self._metrics[name] = np.concatenate([known, _column(name, some)], axis=1)
        self._join()
        while self._heads.shape[1] > self._most and self._width < _LAST_STEP:
            self._width *= 2
            self._join()

    def _join(self) -> None:
        keys = self._heads[_FIRST] // self._width
        is_other = (np.diff(keys) != 0) | (np.diff(self._heads[_SEGMENT]) != 0)
        starts = np.concatenate([[0], np.flatnonzero(is_other) + 1]).astype(np.intp)
        if len(starts) == len(keys):
            return
        ends = np.append(starts[1:], len(keys)) - 1
        self._heads = np.array(
            [
                _HEAD_JOINED[row](line, starts) if row in _HEAD_JOINED else line[ends]
                for row, line in enumerate(self._heads)
            ]
        )
        places = np.arange(len(keys))
        for name, known in self._metrics.items():
            newest = np.maximum.reduceat(np.where(known[_FINITE] > 0, places, -1), starts)
            last = np.where(newest < 0, np.nan, known[_LAST][newest])
            rest = [_JOINED[row](known[row], starts) for row in range(_LOW, len(known))]
            self._metrics[name] = np.array([last, *rest])

    def series(self) -> dict[str, Any]:
        """Returns what a chart draws, in the form in which the gateway answers the live page."""
        heads = self._heads
        later = np.minimum.accumulate(heads[_FIRST][::-1])[::-1]
        is_again = np.append(later[1:] <= heads[_STEP][:-1], False) if heads.shape[1] else np.empty(0)
        start_s = heads[_UNIX_S][0] if heads.shape[1] else 0.0
        columns = {
            "segment": _whole(heads[_SEGMENT]),
            "step": _whole(heads[_STEP]),
            "first_step": _whole(heads[_FIRST]),
            "steps": _whole(heads[_STEPS]),
            "epoch": _whole(heads[_EPOCH]),
            "time_ms": _whole(heads[_UNIX_S] * 1000),
            "elapsed_s": [round(each, 3) for each in (heads[_UNIX_S] - start_s).tolist()],
            "is_again": _whole(is_again),
        }
        return {
            "width": self._width,
            "segments": self._segments,
            "columns": columns,
            "metrics": {name: _metric(known, is_thinned=self._width > 1) for name, known in self._metrics.items()},
        }


def _column(name: str, some: list[ChartStep]) -> Floats:
    """Returns the array of one metric, shape (9, steps), for steps that are buckets of their own."""
    given = [step.values.get(name) for step in some]
    values = np.array([np.nan if value is None else value for value in given])
    is_there = np.array([value is not None for value in given])
    is_finite = np.isfinite(values)
    finite = np.where(is_finite, values, np.nan)
    is_odd = is_there & ~is_finite
    steps = np.array([float(step.step) for step in some])
    return np.array(
        [
            *(finite, finite, finite, np.where(is_finite, values, 0.0), is_finite.astype(np.float64)),
            *((is_there & np.isnan(values)).astype(np.float64), np.isposinf(values).astype(np.float64)),
            *(np.isneginf(values).astype(np.float64), np.where(is_odd, steps, np.inf)),
        ]
    )


def _metric(known: Floats, *, is_thinned: bool) -> dict[str, Any]:
    odd = np.flatnonzero(known[_NAN] + known[_UP] + known[_DOWN])
    found: dict[str, Any] = {
        "last": _numbers(known[_LAST]),
        "odd": [[int(row), *_whole(known[_NAN : _FIRST_ODD + 1, row])] for row in odd],
    }
    if is_thinned:
        with np.errstate(invalid="ignore", over="ignore"):
            means = known[_TOTAL] / known[_FINITE]
        means = np.where(np.isfinite(means), means, known[_LAST])  # a sum may be too large for a double
        found |= {"min": _numbers(known[_LOW]), "max": _numbers(known[_HIGH]), "mean": _numbers(means)}
    return found


def _numbers(values: Floats) -> list[float | None]:
    """Returns the numbers with as many digits as a chart shows; None for those that are not finite."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]


def _whole(values: Floats) -> list[int]:
    return [int(value) for value in values.tolist()]
