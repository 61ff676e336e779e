"""FrameMaker: makes the frames of one writer from parts: their values, the seeds recorded in them, the live seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esper_otel.frames.digest import dead_of, digest_of, silent_of
from esper_otel.frames.frame import ABSENT_BITS, GUESSED_STEP, LAST_LOSS, Frame, Run, SeedTable, is_absent
from esper_otel.frames.live_seeds import LiveSeeds, SeedStep
from esper_otel.frames.numbers import UINT64_LIMIT, whole
from esper_otel.parts import senders
from esper_otel.parts.habits import Habits
from esper_otel.parts.part import Part
from esper_otel.schema import FRAME_POINTS

# How many dead seeds are kept with the live ones before all dead seeds are forgotten at once.
_SPARE = 100

WHOLE_LIFE = -1  # in place of a column


class StreamEnd(NamedTuple):
    """The end of a seed's stream; the column is -1 if the life of the seed ends."""

    time_unix_ns: int
    seed: str
    column: int


@dataclass(slots=True, eq=False)
class FrameInput:
    """What a frame is made from.

    Attributes:
        part: its values.
        run: its run.
        sequence: its number; 0 if its sender does not state one.
        step: the global step to use if its sender does not state one.
        complete: whether it contains every point.
        ends: the streams that end after the frame before it, and not after it.
    """

    part: Part
    run: Run
    sequence: int
    step: int
    complete: bool
    ends: set[StreamEnd]


class FrameMaker:
    """Makes frames from their input, with the seeds that are live at that time.

    A frame from our exporter states which seeds died before it, how many live after it, and a digest of the live seeds.
    If this does not match the frames before, some of them are missing. The seeds that died in between are then found
    with the digest; if that fails, the frame is marked as incomplete.

    The seeds of a plain sender live until their streams end, or until they have been silent for five minutes.

    Args:
        habits: what the writer states in its frames.

    Attributes:
        live: the seeds that are live after the newest frame.
        loss: the last finite loss up to the newest frame; None if there is none.
    """

    def __init__(self, habits: Habits) -> None:
        self._habits = habits
        self.live: LiveSeeds = LiveSeeds()
        self.loss: float | None = None
        self._seen: dict[str, int] = {}
        self._unsure: set[str] = set()  # those of them that may have been seen last at an earlier time
        self._step = 0

    def guessed_step(self, time_unix_ns: int) -> int:
        """Returns a global step for a frame that does not state one, or not yet.

        If the writer never states its steps, they are counted. If it does, the result is larger than any real step.
        """
        if self._habits.says_step:
            return GUESSED_STEP + time_unix_ns
        self._step += 1
        return self._step

    def silent(self, time_unix_ns: int, part: Part) -> set[StreamEnd]:
        """Returns the ends of a plain sender's seeds that have been silent for too long."""
        shape = part.shape
        if self._habits.counts or shape.digest is not None or shape.ids == self.live.table.ids:
            return set()
        return {
            StreamEnd(time_unix_ns, seed, WHOLE_LIFE)
            for seed in silent_of(self.live.ids, {*shape.ids}, self._seen, time_unix_ns)
        }

    def made(
        self, time_unix_ns: int, given: FrameInput, live: LiveSeeds, loss: float | None, before: Frame | None = None
    ) -> tuple[Frame, bool]:
        """Makes a frame.

        Args:
            time_unix_ns: its time.
            given: what it is made from.
            live: the live seeds before it; they become those after it.
            loss: the last finite loss before it.
            before: the frame as it was made before, if it is made again.

        Returns:
            The frame, and whether it contains every point and all of its live seeds are known.
        """
        part = given.part
        retired = part.shape.retired
        if retired:
            live.retire(retired)
        digest = whole(part.number(part.shape.digest), UINT64_LIMIT)
        if given.ends and digest is None:
            retired += _end(live, given.ends)
        table = part.seeds()
        violations = None
        if table.ids:
            step = live.step(table)
            live.commit(step)
            violations = step.violations
            if not self._habits.counts:  # otherwise its session did this already, with more information
                table = step.recorded
        run = given.run
        names, numbers = part.shape.names, tuple(part.numbers[part.shape.name_places].tolist())
        found_out: dict[str, float] = {}
        if not given.sequence:
            values = dict(zip(names, numbers, strict=True))
            senders.complete(values, violations, loss)
            run = senders.on_its_device(run, values)
            found_out = {name: values[name] for name in values.keys() - {*names}}
        dead = () if digest is None or digest_of(live.table.ids) == digest else self._dead(live, part, digest, before)
        if dead:
            live.retire(dead)
        if dead and not self._habits.counts:  # after a restart, no other source would state it
            retired += tuple(dead)
        is_complete = given.complete and dead is not None
        if not is_complete:
            values = {**dict(zip(names, numbers, strict=True)), **_said(part)}
            names, numbers = tuple(values), tuple(values.values())
        global_step = whole(part.number(part.shape.step), GUESSED_STEP)
        frame = Frame(
            run,
            given.sequence,
            given.step if global_step is None else global_step,
            whole(part.number(part.shape.epoch), UINT64_LIMIT) or 0,
            time_unix_ns,
            names,
            numbers,
            found_out,
            table,
            live.table,
            retired,
        )
        return frame, is_complete

    def note(self, frame: Frame) -> None:
        """Records the newest frame: the next one starts from its state."""
        self.loss = loss_of(frame, self.loss)
        if frame.global_step < GUESSED_STEP:
            self._step = max(self._step, frame.global_step)
        self._seen.update(dict.fromkeys(frame.seeds.ids, frame.time_unix_ns))
        self._unsure.difference_update(frame.seeds.ids)
        if len(self._seen) > 2 * len(self.live.ids) + _SPARE:
            self._seen = {seed: self._seen[seed] for seed in self.live.ids if seed in self._seen}

    def note_seen(self, seeds: Iterable[str], time_unix_ns: int) -> None:
        """Records that values of these seeds arrived late."""
        self._seen |= {seed: max(self._seen.get(seed, 0), time_unix_ns) for seed in seeds}

    def note_live(self, seeds: Iterable[str], time_unix_ns: int) -> None:
        """Records that these seeds were live at a time; they may have been seen last before it."""
        self.note_seen(seeds, time_unix_ns)
        self._unsure.update(seeds)

    def may_live_on(self, seed: str, ended_unix_ns: int) -> bool:
        """Returns whether a seed had a value after a time of which the frames are forgotten.

        After a restart the time of its last value may be unknown. Then the end counts: seeds seldom come back.
        """
        return self._seen.get(seed, 0) > ended_unix_ns and seed not in self._unsure

    def _dead(self, live: LiveSeeds, part: Part, digest: int, before: Frame | None) -> Collection[str] | None:
        """Returns the seeds that must have died to match a frame's digest; None if they cannot be found."""
        count = whole(part.number(part.shape.live), UINT64_LIMIT)
        ids = () if before is None else before.live.ids
        found = {*ids} if digest_of(ids) == digest else set()  # the seeds live when it was last made
        return dead_of(
            live.table.ids, {*part.shape.ids}, count, digest, lambda seed: (seed in found, self._seen.get(seed, 0))
        )


def loss_of(frame: Frame, default: float | None) -> float | None:
    """Returns the last finite loss that the frame recorded, or that was derived for it."""
    if LAST_LOSS in frame.context:
        return frame.context[LAST_LOSS]
    return frame.numbers[frame.names.index(LAST_LOSS)] if LAST_LOSS in frame.names else default


def _said(part: Part) -> dict[str, float]:
    """Returns what an incomplete frame states in addition to its values. It is recorded, to be known after a restart.

    It includes the number of points: with it, the frame is recognized as complete when the last point has arrived.
    """
    shape = part.shape
    places = {"esper.seeds": shape.live, "esper.seeds.digest": shape.digest}
    places |= {"esper.epoch": shape.epoch, FRAME_POINTS.name: shape.points}
    return {name: float(part.numbers[place]) for name, place in places.items() if place is not None}


def _end(live: LiveSeeds, ends: Iterable[StreamEnd]) -> tuple[str, ...]:
    """Ends streams; returns the seeds that died."""
    retired = sorted(seed for _, seed, column in ends if column < 0)
    known = range(live.table.cells.shape[1])
    cells = [(live.ids[seed], column) for _, seed, column in ends if column in known and seed in live.ids]
    if cells:
        table = SeedTable(live.table.ids, live.table.cells.copy())
        table.cells.view(np.uint64)[tuple(np.array(cells).T)] = ABSENT_BITS
        live.commit(SeedStep(table, table))
        rows = sorted({row for row, _ in cells})
        retired += [table.ids[row] for row in np.array(rows)[is_absent(table.cells[rows]).all(axis=1)].tolist()]
    return live.retire(dict.fromkeys(retired))
