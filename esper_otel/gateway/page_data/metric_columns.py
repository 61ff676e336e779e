"""Turns frames into arrays, with a column for each metric that a run has recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import LAST_LOSS, Frame, is_absent
from esper_otel.gateway.page_data.buckets import Counts, Floats, StepArrays
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS

# No metrics of the training: numbers of the frame itself, and a loss that repeats the last finite one.
_NO_METRICS = {FRAME_POINTS.name, FRAME_SEQUENCE.name, LAST_LOSS}
_NO_METRICS |= {"esper.global_step", "esper.epoch", "esper.seeds.digest"}
# A stage is a number, but no quantity. It is shown as a timeline; see ``seeds``.
_OF_SEEDS = [(column, metric.name) for column, metric in enumerate(SEED_CELLS) if metric.field != "stage"]
MOST_METRICS = 256
_MOST_LAYOUTS = 256

_Names = tuple[str, ...]


class MetricColumns:
    """Which column each metric has, in order of first appearance.

    Attributes:
        names: the metrics of the steps that were read.
        left_out: how many further ones there were when there was no room for them.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._left_out: set[str] = set()
        self._layouts: dict[tuple[_Names, ...], tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = {}

    @property
    def left_out(self) -> int:
        """How many metrics there was no room for."""
        return len(self._left_out)

    def steps_of(self, frames: Sequence[Frame], numbers: Sequence[int]) -> StepArrays:
        """Returns frames as arrays.

        Args:
            frames: at least one, in order of time; their step numbers are known.
            numbers: their positions in the store.
        """
        whole: list[tuple[slice, npt.NDArray[np.intp], Floats]] = []
        start = 0
        for layout, some in groupby(frames, _layout):
            rows = list(some)
            places, columns = self._places(layout)
            values = np.array([_values(frame) for frame in rows]).reshape(len(rows), -1)[:, places]
            whole.append((slice(start, start + len(rows)), columns, values.T))
            start += len(rows)
        of_seeds = list(self._of_seeds(frames))
        # The distinct ones, in order. np.unique would import numpy.ma first, which takes 20 ms.
        there = np.flatnonzero(np.bincount(np.concatenate([columns for _, columns, *_ in (*whole, *of_seeds)])))
        last = np.full((len(there), len(frames)), np.nan)
        low, high = np.full_like(last, np.inf), np.full_like(last, -np.inf)
        odd = np.zeros((3, *last.shape), np.uint32)
        for which, columns, values in whole:
            into = np.searchsorted(there, columns)
            finite = np.isfinite(values)
            last[into, which] = values
            if finite.all():
                low[into, which] = high[into, which] = values
                continue
            low[into, which], high[into, which] = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
            odd[:, into, which] = kinds_of(values)
        for which, columns, (mean, smallest, largest, counts) in of_seeds:
            into = np.searchsorted(there, columns)
            last[into, which], low[into, which], high[into, which] = mean, smallest, largest
            odd[:, into, which] = counts
        heads = np.array([(frame.global_step, frame.epoch % 2**63, frame.time_unix_ns) for frame in frames], np.int64)
        steps, epochs, times = heads.T
        positions = np.array(numbers, np.int64)
        return StepArrays(steps, epochs, times, positions, there, last, low, high, odd if odd.any() else None)

    def column(self, name: str) -> int | None:
        """Returns the metric's column, a new one if it has none; None if there is no room, or if it is not charted."""
        column = self.names.get(name)
        if column is not None or name in _NO_METRICS:
            return column
        if len(self.names) >= MOST_METRICS:
            if len(self._left_out) < MOST_METRICS:
                self._left_out.add(name)
            return None
        column = self.names[name] = len(self.names)
        return column

    def _places(self, layout: tuple[_Names, ...]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Returns which of a frame's values are shown, and their columns."""
        known = self._layouts.get(layout)
        if known is None:
            place = {name: place for place, name in enumerate(chain.from_iterable(layout))}
            shown = {self.column(name): position for name, position in place.items()}
            shown.pop(None, None)
            known = np.array(list(shown.values()), np.intp), np.array(list(shown), np.intp)
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[layout] = known
        return known

    def _of_seeds(
        self, frames: Sequence[Frame]
    ) -> Iterable[tuple[slice, npt.NDArray[np.intp], tuple[Floats, Floats, Floats, Counts]]]:
        """Returns the metrics of seeds: for each step the mean, the smallest and the largest over its live seeds."""
        start = 0
        for (count, _), some in groupby(frames, lambda frame: frame.live.cells.shape):
            rows = list(some)
            which = slice(start, start + len(rows))
            start += len(rows)
            if not count:
                continue
            cells = np.stack([frame.live.cells for frame in rows])
            is_there = ~is_absent(cells)
            recorded = np.flatnonzero(np.logical_or.reduce(is_there, axis=(0, 1))).tolist()
            shown = [(self.column(name), column) for column, name in _OF_SEEDS if column in recorded]
            known = [(into, column) for into, column in shown if into is not None]
            if not known:
                continue
            fields = [column for _, column in known]
            cells, is_there = cells[:, :, fields], is_there[:, :, fields]
            finite: npt.NDArray[np.bool_] = np.isfinite(cells)
            counts = finite.sum(axis=1)
            means = np.where(finite, cells, 0.0).sum(axis=1) / np.maximum(counts, 1)
            low = np.where(finite, cells, np.inf).min(axis=1)
            high = np.where(finite, cells, -np.inf).max(axis=1)
            odd = np.stack([(kind & is_there).sum(axis=1, dtype=np.uint32).T for kind in _kinds(cells)])
            mean = np.where(counts > 0, means, np.nan)
            yield which, np.array([into for into, _ in known], np.intp), (mean.T, low.T, high.T, odd)


def kinds_of(values: Floats) -> Counts:
    """Returns 1 where a value is NaN, +Inf or -Inf: an array for each of these kinds, as ``values``."""
    return np.stack(_kinds(values)).astype(np.uint32)


def _kinds(values: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    return np.isnan(values), values == np.inf, values == -np.inf


def _layout(frame: Frame) -> tuple[_Names, ...]:
    """Returns the names of a frame's values, those that count last."""
    return (*map(tuple, (frame.derived, frame.context, frame.probed)), frame.names)


def _values(frame: Frame) -> tuple[float, ...]:
    if frame.derived or frame.context or frame.probed:
        return (*frame.derived.values(), *frame.context.values(), *frame.probed.values(), *frame.numbers)
    return frame.numbers
