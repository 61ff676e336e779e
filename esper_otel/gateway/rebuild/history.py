"""History: the frames of one writer that were released; each can be made anew when something of it comes late."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

import numpy as np

from esper_otel.frames.digest import dead_of, digest_of, silent_of
from esper_otel.frames.frame import ABSENT_BITS, GUESSED_STEP, LAST_LOSS, Frame, SeedTable, alike, is_absent
from esper_otel.frames.live_seeds import LiveSeeds, SeedStep
from esper_otel.gateway.items import MOST_ENDS, Item, Origin
from esper_otel.gateway.limits import SharedPlaces
from esper_otel.gateway.rebuild.habits import Habits
from esper_otel.gateway.rebuild.parts import Part, is_equal, merged, part_of
from esper_otel.gateway.rebuild.queue import SEQUENCE_LIMIT, ReadyFrame
from esper_otel.gateway.receive.request import Marker, PointSender
from esper_otel.leyline import senders
from esper_otel.leyline.numbers import UINT64_LIMIT, whole
from esper_otel.schema import FRAME_POINTS, SEED_CELLS

# What a kept frame takes beside its values and cells, about.
_BYTES, _BYTES_PER_VALUE = 2_000, 100

# So many dead seeds are remembered with the living before they are forgotten, all at once.
_SPARE = 100

_ALL = -1
_COLUMNS = {metric.name: column for column, metric in enumerate(SEED_CELLS)}


@dataclass(slots=True, eq=False)
class ReleasedFrame:
    """A released frame, and what it is made of.

    Attributes:
        part: its values.
        sequence: its number; 0 when its sender does not say it.
        sender: who sent it.
        step: its global step, if its sender does not say it.
        complete: whether every point is in it.
        received_unix_ns: when its last point came.
        before: the live seeds before it.
        loss_before: the last finite loss before it.
        ends: seeds and columns whose streams end before it; the column is -1 when the seed's life does.
        frame: the frame.
        revision: how often it was made.
    """

    part: Part
    sequence: int
    sender: PointSender
    step: int
    complete: bool
    received_unix_ns: int
    before: SeedTable
    loss_before: float | None
    ends: set[tuple[str, int]]
    frame: Frame | None = None
    revision: int = 0

    def size(self) -> int:
        """The memory it takes, about."""
        cells = 0 if self.frame is None else self.frame.seeds.cells.nbytes + self.frame.live.cells.nbytes
        return _BYTES + _BYTES_PER_VALUE * len(self.part.shape.names) + self.part.numbers.nbytes + cells


class History:
    """Makes frames of what was put together, with the seeds that live at that time.

    A frame of ours says which seeds' lives ended before it, how many live after it, and a digest of these. If what is
    known of the frames before does not fit, some of them are missing: seeds that have died since are found by the
    digest, or the frame is marked as not complete. When a frame comes late, those after it are made anew.

    The seeds of a plain sender live until their streams end, or until they have been silent for five minutes.

    Args:
        origin: whose frames they are.
        habits: what the writer says in its frames.
        most_ends: how many ends of streams are remembered that are to come.
        room: the same for all writers together.
        tenant: whose part of the room it takes.
    """

    def __init__(self, origin: Origin, habits: Habits, *, most_ends: int, room: SharedPlaces, tenant: str = "") -> None:
        self._origin = origin
        self._habits = habits
        self._most_ends = most_ends
        self._kept: dict[int, ReleasedFrame] = {}
        self._times: dict[int, int] = {}
        self._live = LiveSeeds()
        self._seen: dict[str, int] = {}
        self._room, self._tenant = room, tenant
        self._ends: dict[int, set[tuple[str, int]]] = {}
        self._end_times: list[int] = []  # a heap
        self._end_count = 0
        self._loss: float | None = None
        self._step = 0
        self.newest_unix_ns = 0
        self.forgotten_unix_ns = 0
        self.differing = 0

    @property
    def live(self) -> SeedTable:
        """The live seeds after the newest frame."""
        return self._live.table

    def time_of(self, sequence: int) -> int | None:
        """The time of the released frame with this number, if it is still kept."""
        return self._times.get(sequence)

    def number_at(self, time_unix_ns: int) -> int:
        """The number of the released frame of this time; 0 when it has none, or is not kept."""
        kept = self._kept.get(time_unix_ns)
        return 0 if kept is None else kept.sequence

    def __contains__(self, time_unix_ns: int) -> bool:
        return time_unix_ns in self._kept

    def is_out_of_step(self, sequence: int, time_unix_ns: int) -> bool:
        """Whether a frame of an older number has a newer time: another process counts too."""
        oldest = next(iter(self._kept), None)
        return oldest is not None and sequence < self._kept[oldest].sequence and time_unix_ns > oldest

    # -- frames ------------------------------------------------------------------------------------------

    def release(self, ready: ReadyFrame) -> list[Item]:
        """The items that a frame makes: its own, and those of later frames that it changes."""
        time_unix_ns, waiting, complete = ready
        part = waiting.joined()
        self.differing += waiting.differing
        kept = ReleasedFrame(
            part,
            waiting.sequence or 0,
            waiting.sender,
            self._guessed(time_unix_ns),
            complete,
            waiting.received_unix_ns,
            self._live.table,
            self._loss,
            self._ends_until(time_unix_ns),
        )
        if time_unix_ns < self.newest_unix_ns:
            return self._insert(time_unix_ns, kept)
        kept.ends |= self._silent(time_unix_ns, kept)
        self._keep(time_unix_ns, kept)
        item = self._made(time_unix_ns, kept, self._live, self._loss)
        self._after(item.frame)
        return [item]

    def correct(self, time_unix_ns: int, part: Part, received_unix_ns: int) -> list[Item]:
        """The items that a late part of a released frame makes; none when it says nothing new."""
        kept = self._kept[time_unix_ns]
        known = kept.part
        if part.shape is known.shape and part.numbers.tobytes() == known.numbers.tobytes():
            return []
        joined = merged((known, part), last_counts=True)
        if len(joined.part.numbers) == len(known.numbers) and not joined.differing:
            return []
        self.differing += joined.differing
        self._note_seen(part.shape.ids, time_unix_ns)
        kept.part, kept.received_unix_ns = joined.part, received_unix_ns
        kept.complete = kept.complete or self._habits.is_complete(joined.part)
        number = whole(joined.part.number(joined.part.shape.sequence), SEQUENCE_LIMIT)
        if not kept.sequence and number and number not in self._times:
            kept.sequence, kept.complete = number, self._habits.is_complete(joined.part)
            self._keep(time_unix_ns, kept)
        return self._replayed(time_unix_ns, changed=time_unix_ns)

    def end(self, marker: Marker) -> list[Item]:
        """Notes the end of a stream; the items of released frames in which it was taken to go on."""
        if marker.time_unix_ns <= self.forgotten_unix_ns or marker.name not in _COLUMNS:
            return []
        what = (marker.seed, _COLUMNS[marker.name])
        if marker.time_unix_ns > self.newest_unix_ns:
            self._await_end(marker.time_unix_ns, what)
            return []
        after = min((time for time in self._kept if time >= marker.time_unix_ns), default=None)
        if after is None or what in self._kept[after].ends:
            return []
        self._kept[after].ends.add(what)
        return self._replayed(after)

    def uncount(self) -> list[Item]:
        """The items of frames whose numbers were counted, now that the writer says numbers after all."""
        counted = [
            time for time, kept in self._kept.items() if kept.part.shape.step is None and kept.step < GUESSED_STEP
        ]
        items = []
        for time in counted:
            self._kept[time].step, self._kept[time].complete = GUESSED_STEP + time, False
            items += self._replayed(time, changed=time)
        return items

    def forget(self, time_unix_ns: int) -> None:
        """Lets go of a frame: what comes of it from now on is too late."""
        kept = self._kept.pop(time_unix_ns, None)
        if kept is not None:
            self._times.pop(kept.sequence, None)
            self.forgotten_unix_ns = max(self.forgotten_unix_ns, time_unix_ns)

    def size_of(self, time_unix_ns: int) -> int:
        """The memory that a frame takes while it is kept, about."""
        kept = self._kept.get(time_unix_ns)
        return 0 if kept is None else kept.size()

    def restore(self, item: Item, *, is_first: bool = False) -> None:
        """Goes on from a frame that was released in an earlier life, with those restored before it.

        Args:
            item: the frame's newest revision.
            is_first: whether none was released before it. Else what was before the one restored first is unknown.
        """
        frame = item.frame
        is_cut_off = not (self._kept or is_first)
        if is_cut_off:
            self.forgotten_unix_ns = frame.time_unix_ns - 1
            self._note_seen(frame.live.ids, frame.time_unix_ns)  # at the latest, as far as is known
        part = part_of(frame, complete=item.complete)
        is_whole = item.complete or (self._habits.is_complete(part) if self._habits.counts else _lacks_lives(frame))
        kept = ReleasedFrame(
            part,
            frame.sequence,
            PointSender(frame.run),
            frame.global_step,
            is_whole,
            item.received_unix_ns,
            frame.live if is_cut_off else self._live.table,
            self._loss,
            set() if is_cut_off or self._habits.counts else _ended(self._live.table, frame.live),
            frame,
            item.revision,
        )
        self._keep(frame.time_unix_ns, kept)
        self._live = _living(frame.live)
        if frame.global_step < GUESSED_STEP:
            self._step = max(self._step, frame.global_step)
        self._after(frame)

    def note_habits(self) -> None:
        """Puts right what restored frames were taken for before it was known what their writer says in its frames."""
        for kept in self._kept.values():
            if not self._habits.says_step:  # their numbers were counted
                kept.part = kept.part.without(lambda name, _: name == "esper.global_step")
            if kept.frame is not None and _lacks_lives(kept.frame):
                kept.complete = self._habits.is_complete(kept.part)

    def ends_to_come(self) -> tuple[tuple[int, str, int], ...]:
        """Ends of streams that are to come: their times, seeds and columns; of very many some."""
        ends = ((time, seed, column) for time, some in self._ends.items() for seed, column in sorted(some))
        return tuple(islice(ends, MOST_ENDS))

    def restore_ends(self, ends: Iterable[tuple[int, str, int]]) -> None:
        """Goes on waiting for ends that were to come in an earlier life."""
        for time_unix_ns, seed, column in ends:
            if time_unix_ns > self.newest_unix_ns:
                self._await_end(time_unix_ns, (seed, column))

    # -- how they are made -------------------------------------------------------------------------------

    def _after(self, frame: Frame) -> None:
        """Notes what the next frame starts from."""
        self.newest_unix_ns = frame.time_unix_ns
        self._loss = _loss_of(frame, self._loss)
        self._seen.update(dict.fromkeys(frame.seeds.ids, frame.time_unix_ns))
        if len(self._seen) > 2 * len(self._live.ids) + _SPARE:
            self._seen = {seed: self._seen[seed] for seed in self._live.ids if seed in self._seen}

    def _note_seen(self, seeds: Iterable[str], time_unix_ns: int) -> None:
        """Notes seeds of which something came late."""
        self._seen |= {seed: max(self._seen.get(seed, 0), time_unix_ns) for seed in seeds}

    def _guessed(self, time_unix_ns: int) -> int:
        """The number of a step whose frame does not say it, or not yet.

        A writer that never says one has its steps counted. In the steps of one that does, none is as large as this.
        """
        if self._habits.says_step:
            return GUESSED_STEP + time_unix_ns
        self._step += 1
        return self._step

    def _keep(self, time_unix_ns: int, kept: ReleasedFrame) -> None:
        self._kept[time_unix_ns] = kept
        if kept.sequence:
            self._times[kept.sequence] = time_unix_ns

    def _insert(self, time_unix_ns: int, kept: ReleasedFrame) -> list[Item]:
        """Puts a frame between those that were released before it."""
        self._note_seen(kept.part.shape.ids, time_unix_ns)
        earlier = max((time for time in self._kept if time < time_unix_ns), default=None)
        later = min((time for time in self._kept if time > time_unix_ns), default=None)
        if earlier is not None:
            frame = self._kept[earlier].frame
            kept.before = kept.before if frame is None else frame.live
            kept.loss_before = None if frame is None else _loss_of(frame, None)
        elif later is not None:
            kept.before, kept.loss_before = self._kept[later].before, self._kept[later].loss_before
        if time_unix_ns <= self.forgotten_unix_ns:  # what was between it and those that are kept is not known any more
            return [self._made(time_unix_ns, kept, _living(kept.before), kept.loss_before)]
        self._keep(time_unix_ns, kept)
        return self._replayed(time_unix_ns, changed=time_unix_ns)

    def _replayed(self, start_unix_ns: int, *, changed: int | None = None) -> list[Item]:
        """Makes the frames from a time on anew; the items of those that are not as they were.

        A frame before which others were forgotten is made alone: what it means for those after it is not known.
        """
        items: list[Item] = []
        is_alone = start_unix_ns <= self.forgotten_unix_ns
        times = [start_unix_ns] if is_alone else sorted(time for time in self._kept if time >= start_unix_ns)
        live = _living(self._kept[start_unix_ns].before)
        loss = self._kept[start_unix_ns].loss_before
        for time in times:
            kept = self._kept[time]
            was = kept.frame
            if time > start_unix_ns and _is_equal_state(kept, live.table, loss):
                return items  # from here on everything is as it was
            kept.before, kept.loss_before = live.table, loss
            item = self._made(time, kept, live, loss)
            loss = _loss_of(item.frame, loss)
            if time == changed or was is None or not _is_same(was, item.frame):
                items.append(item)
            else:
                kept.frame, kept.revision = was, kept.revision - 1
        if times and times[-1] == self.newest_unix_ns:
            self._live, self._loss = live, loss
        return items

    def _made(self, time_unix_ns: int, kept: ReleasedFrame, live: LiveSeeds, loss: float | None) -> Item:
        part = kept.part
        retired = part.shape.retired
        if retired:
            live.retire(retired)
        digest = whole(part.number(part.shape.digest), UINT64_LIMIT)
        if kept.ends and digest is None:
            retired += _end(live, kept.ends)
        values = part.values()
        table = part.seeds()
        violations = None
        if table.ids:
            step = live.step(table)
            live.commit(step)
            violations = step.violations
            if not self._habits.counts:  # else its session has done so, which knows more
                table = step.recorded
        run = kept.sender.run
        found_out: dict[str, float] = {}
        if not kept.sequence:
            said = {*values}
            senders.complete(values, violations, loss)
            run = senders.on_its_device(run, values)
            found_out = {name: values.pop(name) for name in values.keys() - said}
        dead = () if digest is None or digest_of(live.table.ids) == digest else self._dead(live, kept, digest)
        if dead:
            live.retire(dead)
        if dead and not self._habits.counts:  # nobody says so again after a restart
            retired += tuple(dead)
        are_known = dead is not None
        if not (kept.complete and are_known):
            values |= _said(part)
        global_step = whole(part.number(part.shape.step), GUESSED_STEP)
        kept.frame = Frame(
            run,
            kept.sequence,
            kept.step if global_step is None else global_step,
            whole(part.number(part.shape.epoch), UINT64_LIMIT) or 0,
            time_unix_ns,
            tuple(values),
            tuple(values.values()),
            found_out,
            table,
            live.table,
            retired,
        )
        kept.revision += 1
        return Item(self._origin, kept.frame, kept.revision, kept.complete and are_known, kept.received_unix_ns)

    def _dead(self, live: LiveSeeds, kept: ReleasedFrame, digest: int) -> Collection[str] | None:
        """The seeds that have died since, as the digest of a frame says; None when these cannot be found."""
        part = kept.part
        count = whole(part.number(part.shape.live), UINT64_LIMIT)
        before = () if kept.frame is None else kept.frame.live.ids
        found = {*before} if digest_of(before) == digest else set()  # who lived when the frame was made last
        return dead_of(
            live.table.ids, {*part.shape.ids}, count, digest, lambda seed: (seed in found, self._seen.get(seed, 0))
        )

    def _ends_until(self, time_unix_ns: int) -> set[tuple[str, int]]:
        """Ends that a frame of this time is the first to see."""
        found: set[tuple[str, int]] = set()
        count = 0
        while self._end_times and self._end_times[0] <= time_unix_ns:
            ends = self._ends.pop(heappop(self._end_times))
            count += len(ends)
            found |= ends
        self._end_count -= count
        self._room.give_back(self._tenant, count)
        return found

    def _await_end(self, time_unix_ns: int, what: tuple[str, int]) -> None:
        """Notes an end that is to come. If there is no room the seed ends by its silence."""
        if what in self._ends.get(time_unix_ns, ()):
            return
        if self._end_count >= self._most_ends or not self._room.take(self._tenant):
            return
        if time_unix_ns not in self._ends:
            heappush(self._end_times, time_unix_ns)
        self._ends.setdefault(time_unix_ns, set()).add(what)
        self._end_count += 1

    def close(self) -> None:
        """Its writer is forgotten: frees the room of the ends that were to come."""
        self._room.give_back(self._tenant, self._end_count)
        self._ends, self._end_times, self._end_count = {}, [], 0

    def _silent(self, time_unix_ns: int, kept: ReleasedFrame) -> set[tuple[str, int]]:
        """Seeds of a plain sender that were silent for so long that they no longer live."""
        shape = kept.part.shape
        if self._habits.counts or shape.digest is not None or shape.ids == self._live.table.ids:
            return set()
        return {(seed, _ALL) for seed in silent_of(self._live.ids, {*shape.ids}, self._seen, time_unix_ns)}


def _said(part: Part) -> dict[str, float]:
    """What is said of an incomplete frame beside its values, to be recorded in it, so that it is known after a restart.

    With the number of its points the frame is complete as soon as the last of them has come.
    """
    shape = part.shape
    places = {"esper.seeds": shape.live, "esper.seeds.digest": shape.digest}
    places |= {"esper.epoch": shape.epoch, FRAME_POINTS.name: shape.points}
    return {name: float(part.numbers[place]) for name, place in places.items() if place is not None}


def _lacks_lives(frame: Frame) -> bool:
    """Whether a plain sender's frame was marked as not complete because its live seeds were not known."""
    return not frame.sequence and "esper.seeds.digest" in frame.names


def _loss_of(frame: Frame, default: float | None) -> float | None:
    """The last finite loss, as the frame says or as was found out for it."""
    return frame.context.get(LAST_LOSS, frame.recorded.get(LAST_LOSS, default))


def _end(live: LiveSeeds, ends: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Ends streams; returns the seeds whose lives are over."""
    retired = sorted(seed for seed, column in ends if column < 0)
    known = range(live.table.cells.shape[1])
    cells = [(live.ids[seed], column) for seed, column in ends if column in known and seed in live.ids]
    if cells:
        table = SeedTable(live.table.ids, live.table.cells.copy())
        for row, column in cells:
            table.cells.view(np.uint64)[row, column] = ABSENT_BITS
        live.commit(SeedStep(table, table, None, 0, ()))
        retired += [table.ids[row] for row in {row for row, _ in cells} if is_absent(table.cells[row]).all()]
    return live.retire(dict.fromkeys(retired))


def _ended(before: SeedTable, after: SeedTable) -> set[tuple[str, int]]:
    """Streams of seeds that live on which have ended between two steps."""
    before, after = alike(before, after)
    if before.ids != after.ids:
        row = {seed: number for number, seed in enumerate(after.ids)}
        both = [number for number, seed in enumerate(before.ids) if seed in row]
        ids = tuple(before.ids[number] for number in both)
        before = SeedTable(ids, before.cells[both])
        after = SeedTable(ids, after.cells[[row[seed] for seed in ids]])
    gone = is_absent(after.cells) & ~is_absent(before.cells)
    return {(before.ids[row], column) for row, column in np.argwhere(gone).tolist()}


def _living(table: SeedTable) -> LiveSeeds:
    """Live seeds that begin with these."""
    live = LiveSeeds()
    live.commit(SeedStep(table, table, None, 0, ()))
    return live


def _is_same(one: Frame, other: Frame) -> bool:
    """Whether two frames of the same points are the same: they can differ in what was before them."""
    live, other_live = alike(one.live, other.live)
    return (
        live.ids == other_live.ids
        and live.cells.tobytes() == other_live.cells.tobytes()
        and one.retired == other.retired
        and _are_equal(one.recorded, other.recorded)
        and _are_equal(one.context, other.context)
    )


def _are_equal(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(is_equal(value, other[name]) for name, value in one.items())


def _is_equal_state(kept: ReleasedFrame, live: SeedTable, loss: float | None) -> bool:
    """Whether this is what the frame was made of beside its own values."""
    was, loss_was = kept.before, kept.loss_before
    is_same_loss = loss == loss_was or (loss is not None and loss_was is not None and is_equal(loss, loss_was))
    return is_same_loss and live.ids == was.ids and live.cells.tobytes() == was.cells.tobytes()
