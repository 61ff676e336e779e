"""The stages of each seed as intervals of steps, and its alpha at some of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import COLUMN, Frame
from esper_otel.schema import Stage

_STAGE, _ALPHA = COLUMN["stage"], COLUMN["alpha"]
_MOST_SEEDS, _MOST_STAGES, _MOST_SAMPLES = 2_000, 100, 100
_NO_STAGE = -1


@dataclass(slots=True)
class SeedTimeline:
    """One seed in one segment of a curve.

    Attributes:
        segment: number of the segment.
        seed_id: its id.
        stages: intervals, oldest first: the first step, the last step (None: it goes on), the stage.
        alpha: samples: the step and the value, None where it is not finite or missing.
        retired_step: the last step in which it was live; None while it is.
        changed: the version in which it last changed.
    """

    segment: int
    seed_id: str
    stages: list[list[int | None]] = field(default_factory=list)
    alpha: list[tuple[int, float | None]] = field(default_factory=list)
    retired_step: int | None = None
    changed: int = 0


class SeedTimelines:
    """The seeds of one rank.

    Attributes:
        left_out: how many seeds there was no room for.
    """

    def __init__(self) -> None:
        self.left_out: int = 0
        self._seeds: dict[tuple[int, str], SeedTimeline] = {}
        self._unknown: set[tuple[int, str]] = set()
        self._segment = -1
        self._ids: tuple[str, ...] = ()
        self._live: list[SeedTimeline | None] = []
        self._stages: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._last_step = 0
        self._steps, self._every = 0, 1

    def __len__(self) -> int:
        return len(self._seeds)

    def note(self, segment: int, frames: Sequence[Frame], version: int) -> None:
        """Adds the next steps of a segment, in order of time."""
        for frame in frames:
            live = frame.live
            if segment != self._segment or live.ids != self._ids:
                self._change(segment, live.ids, frame.global_step, version)
            self._last_step = frame.global_step
            if not live.ids:
                continue
            said = live.cells[:, _STAGE]
            stages = np.where(np.isfinite(said), said, 0.0).astype(np.int64)
            if not np.array_equal(stages, self._stages):
                self._begin_stages(stages, frame.global_step, version)
            if not self._steps % self._every:
                self._sample(frame, version)
            self._steps += 1

    def changed(self, since: int) -> list[SeedTimeline]:
        """Returns the seeds that have changed after a version, in order of appearance."""
        return [seed for seed in self._seeds.values() if seed.changed > since]

    def _change(self, segment: int, ids: tuple[str, ...], step: int, version: int) -> None:
        """Makes other seeds the live ones."""
        before = {} if segment != self._segment else dict(zip(self._ids, self._stages.tolist(), strict=True))
        gone = (
            self._live
            if segment != self._segment
            else [seed for seed_id, seed in zip(self._ids, self._live, strict=True) if seed_id not in {*ids}]
        )
        for seed in gone:
            if seed is not None:
                seed.retired_step, seed.changed = self._last_step, version
                seed.stages[-1][1] = self._last_step
        self._segment, self._ids = segment, ids
        self._live = [self._seed(segment, seed_id) for seed_id in ids]
        self._stages = np.array([before.get(seed_id, _NO_STAGE) for seed_id in ids], np.int64)
        self._last_step = step

    def _seed(self, segment: int, seed_id: str) -> SeedTimeline | None:
        key = (segment, seed_id)
        seed = self._seeds.get(key)
        if seed is None:
            if len(self._seeds) >= _MOST_SEEDS:
                if key not in self._unknown and len(self._unknown) < _MOST_SEEDS:
                    self._unknown.add(key)
                    self.left_out += 1
                return None
            seed = self._seeds[key] = SeedTimeline(segment, seed_id)
        return seed

    def _begin_stages(self, stages: npt.NDArray[np.int64], step: int, version: int) -> None:
        for place in np.flatnonzero(stages != self._stages).tolist():
            seed = self._live[place]
            if seed is None:
                continue
            if seed.stages and seed.stages[-1][1] is None:
                seed.stages[-1][1] = max(step - 1, seed.stages[-1][0] or 0)
            seed.stages.append([step, None, int(stages[place])])
            seed.retired_step, seed.changed = None, version
            del seed.stages[:-_MOST_STAGES]
        self._stages = stages

    def _sample(self, frame: Frame, version: int) -> None:
        """Adds a sample of every alpha; if there are too many, every second one of each seed is dropped."""
        said = frame.live.cells[:, _ALPHA]
        is_known = np.isfinite(said).tolist()
        most = 0
        for seed, value, known in zip(self._live, said.tolist(), is_known, strict=True):
            if seed is not None:
                seed.alpha.append((frame.global_step, value if known else None))
                seed.changed = version
                most = max(most, len(seed.alpha))
        if most > _MOST_SAMPLES:
            self._every *= 2
            for seed in self._seeds.values():
                del seed.alpha[1::2]


def shown(seed: SeedTimeline) -> dict[str, Any]:
    """Returns a seed in the form that the page reads; repeated values of alpha are left out."""
    values = [value for _, value in seed.alpha]
    last = len(values) - 1
    turns = [
        sample
        for place, sample in enumerate(seed.alpha)
        if place in (0, last) or not values[place - 1] == values[place] == values[place + 1]
    ]
    return {
        "id": seed.seed_id,
        "segment": seed.segment,
        "retired_step": seed.retired_step,
        "stages": seed.stages,
        "alpha": turns,
    }


STAGES = [stage.name for stage in Stage]
