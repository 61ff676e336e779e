"""Combines readings of OpenTelemetry instruments into frames. Readings collected at one moment form a step."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from esper_otel.frames.digest import dead_of, silent_of
from esper_otel.frames.frame import ABSENT, LAST_LOSS, NO_SEEDS, WIDTH, Frame, Run, SeedTable
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.numbers import UINT64_LIMIT, whole
from esper_otel.parts import senders
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, METRICS, SEED_CELLS, SEED_RETIRED

_NAMES = {metric.name for metric in METRICS}
_STEP_NAMES = {metric.name for metric in METRICS if metric.level == "step"} - {FRAME_SEQUENCE.name, FRAME_POINTS.name}
_SEED_COLUMNS = {metric.name: column for column, metric in enumerate(SEED_CELLS)}
_SEED_NAMES = {*_SEED_COLUMNS, SEED_RETIRED.name}

# This package's scopes: unknown names in the first are the user's metrics; points in the second belong to no step.
_FRAME_SCOPE, _HEALTH_SCOPE = "esper_otel", "esper_otel.health"

# The SDK merges all attribute sets above its limit into one point that has only this attribute.
_OVERFLOW = "otel.metric.overflow"

NO_SEED_ID = "seed metric without seed_id"
TOO_MANY_SEEDS = f"more than {senders.MOST_SEEDS:,} seeds at once"
TOO_MANY_SETS = "more attribute sets than the SDK's limit"


class Reading(NamedTuple):
    """One number of one instrument.

    Attributes:
        name: name of the instrument.
        value: the number.
        time_unix_ns: when it was read.
        attributes: the attributes of the point.
        resource: the attributes of the provider's Resource.
        scope: name of the instrument's scope.
    """

    name: str
    value: float
    time_unix_ns: int
    attributes: Mapping[str, object]
    resource: Mapping[str, object]
    scope: str = ""


class CollectedFrame(NamedTuple):
    """The frame of one collection.

    Attributes:
        frame: the frame.
        complete: whether the frame contains all readings, and the live seeds are known.
        refused: numbers of readings left out, by reason.
    """

    frame: Frame
    complete: bool
    refused: Mapping[str, int]


class _Point(NamedTuple):
    """A reading that may become part of a frame. ``further`` is its number of unknown attributes."""

    further: int
    name: str
    seed: str
    value: float
    time_unix_ns: int


class FrameOfReadings:
    """Builds one frame from the readings of each collection, by the gateway's rules. Not thread-safe.

    If several runs or ranks share a provider, one of them is followed: the one with the most readings, for as long
    as it has any.

    Args:
        attempt: the attempt to use if the Resource has none.
    """

    def __init__(self, attempt: int) -> None:
        self._attempt = attempt
        self._followed: _Followed | None = None

    def frame(self, readings: Iterable[Reading]) -> CollectedFrame | None:
        """Returns the frame of readings that were collected together; None if none is in the catalogue."""
        refused = Counter[str]()
        points: dict[Run, list[_Point]] = {}
        resource: Mapping[str, object] | None = None
        run = None
        for reading in readings:
            if not _is_taken(reading):
                continue
            if reading.resource is not resource:
                resource = reading.resource
                run = self._run(resource)
            found = _pointed(reading, run)
            if isinstance(found, str):
                refused[found] += 1
            else:
                points.setdefault(found[0], []).append(found[1])
        if not points:
            return None
        by_rank = {(run.run_id, run.rank): run for run in points}
        if self._followed is None or self._followed.rank not in by_rank:
            run = max(points, key=lambda run: len(points[run]))
            self._followed = _Followed((run.run_id, run.rank))
        run = by_rank[self._followed.rank]
        frame, is_known = self._followed.frame(run, points[run], refused)
        is_cut = bool(refused[TOO_MANY_SEEDS] or refused[TOO_MANY_SETS])
        return CollectedFrame(frame, is_known and not is_cut, refused)

    def _run(self, resource: Mapping[str, object]) -> Run | None:
        """Returns the run that a Resource describes; None if its points are not accepted."""
        texts = {key: senders.text_of(value) for key, value in resource.items()}
        if len(texts) > senders.MOST_ATTRIBUTES:
            return None
        run = senders.run_of_texts(texts)
        return replace(run, attempt=self._attempt) if run and not texts.get("esper.run.attempt") else run


def _is_taken(reading: Reading) -> bool:
    if reading.scope == _HEALTH_SCOPE:
        return False
    name = reading.name
    return name in _STEP_NAMES or name in _SEED_NAMES or (reading.scope == _FRAME_SCOPE and name not in _NAMES)


def _pointed(reading: Reading, run: Run | None) -> tuple[Run, _Point] | str:
    """Returns the run and rank of a reading, and its point; or the reason why it is not accepted."""
    if run is None or len(reading.attributes) > senders.MOST_ATTRIBUTES:
        return senders.INVALID_TEXT
    label = senders.label_of_texts({key: senders.text_of(value) for key, value in reading.attributes.items()})
    is_of_seed = reading.name in _SEED_NAMES
    if is_of_seed and reading.attributes.get(_OVERFLOW) is True:
        return TOO_MANY_SETS
    if label.fault:
        return label.fault
    if is_of_seed and not label.seed:
        return NO_SEED_ID
    if label.run_id or label.rank >= 0:
        rank = label.rank if label.rank >= 0 else run.rank
        run = replace(run, run_id=label.run_id or run.run_id, rank=rank)
    seed = label.seed if is_of_seed else ""
    # A seed id on a step metric counts as an unknown attribute: the value is then only a part of the metric.
    further = label.further + (not is_of_seed and bool(label.seed))
    return run, _Point(further, reading.name, seed, reading.value, reading.time_unix_ns)


class _Followed:
    """The run and rank whose readings become frames, and the state kept between two frames."""

    def __init__(self, rank: tuple[str, int]) -> None:
        self.rank = rank
        self._numbers = itertools.count(1)
        self._step = 0
        self._loss: float | None = None
        self._live = LiveSeeds()
        self._seen: dict[str, int] = {}

    def frame(self, run: Run, points: list[_Point], refused: Counter[str]) -> tuple[Frame, bool]:
        """Returns the frame and whether all of its live seeds are known."""
        numbers: dict[tuple[str, str], float] = {}
        # If a stream has several points, the first one with the fewest unknown attributes is used.
        for point in sorted(points, key=lambda point: point.further):
            numbers.setdefault((point.name, point.seed), point.value)
        time_unix_ns = max(point.time_unix_ns for point in points)
        self._drop_surplus(numbers, refused)
        values = {name: value for (name, seed), value in numbers.items() if not seed}
        step = whole(values.pop("esper.global_step", None), UINT64_LIMIT)
        epoch = whole(values.pop("esper.epoch", None), UINT64_LIMIT)
        count = whole(values.pop("esper.seeds", None), UINT64_LIMIT)
        digest = whole(values.pop("esper.seeds.digest", None), UINT64_LIMIT)
        self._step = self._step + 1 if step is None else step
        retired = tuple(sorted(seed for name, seed in numbers if name == SEED_RETIRED.name))
        self._live.retire(retired)
        recorded, violations = _table(numbers), None
        if recorded.ids:
            stepped = self._live.step(recorded)
            self._live.commit(stepped)
            recorded, violations = stepped.recorded, stepped.violations
        is_known = self._bury(recorded.ids, count, digest, time_unix_ns)
        senders.complete(values, violations, self._loss)
        self._loss = values.get(LAST_LOSS, self._loss)
        frame = Frame(
            senders.on_its_device(run, values),
            next(self._numbers),
            self._step,
            epoch or 0,
            time_unix_ns,
            tuple(values),
            tuple(values.values()),
            {},
            recorded,
            self._live.table,
            retired,
        )
        return frame, is_known

    def _drop_surplus(self, numbers: dict[tuple[str, str], float], refused: Counter[str]) -> None:
        """Removes points of seeds beyond the largest allowed number."""
        new = sorted({seed for name, seed in numbers if name in _SEED_COLUMNS and seed not in self._live.ids})
        surplus = {*new[max(senders.MOST_SEEDS - len(self._live.ids), 0) :]}
        if surplus:
            for stream in [stream for stream in numbers if stream[1] in surplus]:
                del numbers[stream]
                refused[TOO_MANY_SEEDS] += 1

    def _bury(self, recorded: tuple[str, ...], count: int | None, digest: int | None, time_unix_ns: int) -> bool:
        """Retires seeds that are no longer live; returns False if these cannot be determined."""
        dead = (
            silent_of(self._live.ids, {*recorded}, self._seen, time_unix_ns)
            if digest is None
            else dead_of(self._live.table.ids, {*recorded}, count, digest, lambda seed: self._seen.get(seed, 0))
        )
        self._live.retire(dead or ())
        known = self._seen | dict.fromkeys(recorded, time_unix_ns)
        self._seen = {seed: known[seed] for seed in self._live.ids}
        return dead is not None


def _table(numbers: Mapping[tuple[str, str], float]) -> SeedTable:
    """Returns the seeds' rows, sorted by id."""
    ids = tuple(sorted({seed for name, seed in numbers if name in _SEED_COLUMNS}))
    if not ids:
        return NO_SEEDS
    row = {seed: place for place, seed in enumerate(ids)}
    cells = np.full((len(ids), WIDTH), ABSENT)
    for (name, seed), value in numbers.items():
        if name in _SEED_COLUMNS:
            cells[row[seed], _SEED_COLUMNS[name]] = value
    return SeedTable(ids, cells)
