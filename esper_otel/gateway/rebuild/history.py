"""History: the released frames of one writer. A frame can be made again when points of it arrive late."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, islice

import numpy as np

from esper_otel.frames.frame import GUESSED_STEP, Frame, SeedTable, alike, is_absent
from esper_otel.frames.live_seeds import LiveSeeds, SeedStep
from esper_otel.frames.numbers import whole
from esper_otel.gateway.items import MOST_ENDS, Item, Origin
from esper_otel.gateway.limits import SharedPlaces
from esper_otel.gateway.rebuild.queue import SEQUENCE_LIMIT, ReadyFrame
from esper_otel.gateway.receive.request import Marker
from esper_otel.gateway.turns import Turn
from esper_otel.parts.habits import Habits
from esper_otel.parts.maker import WHOLE_LIFE, FrameInput, FrameMaker, StreamEnd, loss_of
from esper_otel.parts.part import SEED_COLUMNS, Part, is_equal, merged, part_of
from esper_otel.schema import SEED_FIELDS, SEED_RETIRED

# The approximate memory of a kept frame, in addition to its values and cells.
_BYTES, _BYTES_PER_VALUE = 2_000, 100
# How many stream ends that have come are stored for a restart, with those to come.
_MOST_PAST_ENDS = 500

# A budget for making frames again because frames before them have changed: its maximum, and what refills it. A frame
# counts for more if many seeds are live in it.
_MOST_REMADE, _REMADE_PER_S, _REMADE_PER_POINT = 20_000.0, 500.0, 1.0
_SEEDS_PER_FRAME = 100


@dataclass(slots=True, eq=False)
class ReleasedFrame(FrameInput):
    """A released frame, and the data it is made from.

    Attributes:
        received_unix_ns: when its last point arrived.
        before: the live seeds before it.
        loss_before: the last finite loss before it.
        frame: the frame.
        revision: how many times it was made.
        missed: see ``Item``.
        is_cut: whether values of it were rejected, so that it never is complete.
    """

    received_unix_ns: int
    before: SeedTable
    loss_before: float | None
    frame: Frame | None = None
    revision: int = 0
    missed: int = 0
    is_cut: bool = False

    def retire_by_ends(self) -> None:
        """Lets its ends say that seeds have died, and not its part: a frame before it may prove that they came back."""
        ended = {(seed, column) for _, seed, column in self.ends}
        dead = {
            seed
            for seed, cells in self.before.rows()
            if seed in self.part.shape.retired and all((seed, SEED_FIELDS.index(field)) in ended for field in cells)
        }
        if dead:
            self.part: Part = self.part.without(lambda name, seed: name == SEED_RETIRED.name and seed in dead)

    def size(self) -> int:
        """Returns its approximate memory in bytes."""
        cells = 0 if self.frame is None else self.frame.seeds.cells.nbytes + self.frame.live.cells.nbytes
        return _BYTES + _BYTES_PER_VALUE * len(self.part.shape.names) + self.part.numbers.nbytes + cells


class History:
    """Makes frames from assembled parts.

    What arrives late only marks frames as changed. ``corrections`` makes them again, in order of time, and each next
    frame for as long as the state before it differs from what it was made with. A few points could change thousands of
    frames, so a budget limits this: when it is used up, frames that did not change themselves stay as they were. Those
    that have not been made again yet when the gateway is killed are found when they are restored.

    Args:
        origin: the writer of the frames.
        habits: what the writer states in its frames.
        most_ends: the maximum number of future stream ends to keep.
        room: room for future stream ends, shared by all writers.
        tenant: the tenant whose share of the room it uses.
    """

    def __init__(self, origin: Origin, habits: Habits, *, most_ends: int, room: SharedPlaces, tenant: str = "") -> None:
        self._origin = origin
        self._habits = habits
        self._most_ends = most_ends
        self._kept: dict[int, ReleasedFrame] = {}
        self._order: list[int] = []  # the times of the kept frames, sorted
        self._times: dict[int, int] = {}
        self._changed: dict[int, bool] = {}  # times; whether the frame itself changed, or only the state before it
        self._changed_times: list[int] = []  # a heap with all of them
        self._front: LiveSeeds | None = None  # the state before the frame to be made again next, if it is known
        self._budget, self._budget_s = _MOST_REMADE, 0.0
        self._maker = FrameMaker(habits)
        self._room, self._tenant = room, tenant
        self._ends: dict[int, set[StreamEnd]] = {}
        self._past_ends: deque[StreamEnd] = deque(maxlen=_MOST_PAST_ENDS)
        self._late_ends: deque[StreamEnd] = deque(maxlen=_MOST_PAST_ENDS)  # past ends of frames to be made again
        self._end_times: list[int] = []  # a heap
        self._end_count = 0
        self.newest_unix_ns: int = 0
        self.forgotten_unix_ns: int = 0
        self.differing: int = 0

    @property
    def live(self) -> SeedTable:
        """The seeds that are live after the newest frame."""
        return self._maker.live.table

    def time_of(self, sequence: int) -> int | None:
        """Returns the time of the released frame with this number, if it is still kept."""
        return self._times.get(sequence)

    def number_at(self, time_unix_ns: int) -> int:
        """Returns the number of the released frame at this time; 0 if it has none, or is not kept."""
        kept = self._kept.get(time_unix_ns)
        return 0 if kept is None else kept.sequence

    def __contains__(self, time_unix_ns: int) -> bool:
        return time_unix_ns in self._kept

    def parts_at(self, time_unix_ns: int) -> tuple[Part, ...]:
        """Returns what the frame at this time was made from; nothing if it is not kept."""
        kept = self._kept.get(time_unix_ns)
        return () if kept is None else (kept.part,)

    def is_out_of_step(self, sequence: int, time_unix_ns: int) -> bool:
        """Returns whether a lower number has a later time, which means that another process numbers its frames too."""
        oldest = next(iter(self._kept), None)
        return oldest is not None and sequence < self._kept[oldest].sequence and time_unix_ns > oldest

    # -- frames ------------------------------------------------------------------------------------------

    def release(self, ready: ReadyFrame) -> list[Item]:
        """Makes a frame; returns its item. ``corrections`` makes a frame that is older than the newest one."""
        time_unix_ns, waiting, complete, missed = ready
        part = waiting.joined()
        maker = self._maker
        self.differing += waiting.differing
        kept = ReleasedFrame(
            part,
            waiting.sender.run,
            waiting.sequence or 0,
            maker.guessed_step(time_unix_ns),
            complete,
            self._ends_until(time_unix_ns),
            waiting.received_unix_ns,
            maker.live.table,
            maker.loss,
            missed=missed,
            is_cut=waiting.is_cut,
        )
        if time_unix_ns < self.newest_unix_ns:
            return self._inserted(time_unix_ns, kept)
        kept.ends |= maker.silent(time_unix_ns, part)
        self._keep(time_unix_ns, kept)
        item = self._made(time_unix_ns, kept, maker.live, maker.loss)
        self._after(item.frame)
        return [item]

    def correct(self, time_unix_ns: int, part: Part, received_unix_ns: int) -> None:
        """Adds a late part to a released frame."""
        kept = self._kept[time_unix_ns]
        known = kept.part
        if part.shape is known.shape and part.numbers.tobytes() == known.numbers.tobytes():
            return
        joined = merged((known, part), last_counts=True)
        if len(joined.part.numbers) == len(known.numbers) and not joined.differing:
            return
        self.differing += joined.differing
        self._maker.note_seen(part.shape.ids, time_unix_ns)
        kept.part, kept.received_unix_ns = joined.part, received_unix_ns
        kept.complete = kept.complete or (not kept.is_cut and self._habits.is_complete(joined.part))
        number = whole(joined.part.number(joined.part.shape.sequence), SEQUENCE_LIMIT)
        if not kept.sequence and number and number not in self._times:
            kept.sequence, kept.complete = number, not kept.is_cut and self._habits.is_complete(joined.part)
            self._keep(time_unix_ns, kept)
        self._note_changed(time_unix_ns, itself=True)

    def cut(self, time_unix_ns: int) -> None:
        """Marks a released frame as incomplete: it lacks values that its sender could not tell apart."""
        kept = self._kept[time_unix_ns]
        kept.is_cut = True
        if kept.complete:
            kept.complete = False
            self._note_changed(time_unix_ns, itself=True)

    def end(self, marker: Marker) -> bool:
        """Ends a stream; returns whether its end is still to come."""
        if marker.name not in SEED_COLUMNS or (
            marker.time_unix_ns <= self.forgotten_unix_ns and self._maker.may_live_on(marker.seed, marker.time_unix_ns)
        ):
            return False
        end = StreamEnd(marker.time_unix_ns, marker.seed, SEED_COLUMNS[marker.name])
        if marker.time_unix_ns > self.newest_unix_ns:
            self._await_end(end)
            return True
        after = self._add_end(end)
        if after is not None:
            self._late_ends.append(end)
            self._note_changed(after)
        return False

    def _add_end(self, end: StreamEnd) -> int | None:
        """Adds a stream end to the frame that it precedes; returns that one's time, or None if nothing is new."""
        place = bisect_left(self._order, end.time_unix_ns)
        if place == len(self._order) or end in self._kept[self._order[place]].ends:
            return None
        self._kept[self._order[place]].ends.add(end)
        return self._order[place]

    def uncount(self) -> None:
        """Corrects the frames whose steps were counted, once the writer turns out to state its steps."""
        for time, kept in self._kept.items():
            if kept.part.shape.step is None and kept.step < GUESSED_STEP:
                kept.step, kept.complete = GUESSED_STEP + time, False
                self._note_changed(time, itself=True)

    @property
    def is_changed(self) -> bool:
        """Whether ``corrections`` has something to do."""
        return bool(self._changed)

    def earn(self, points: int, now_s: float) -> None:
        """Refills the budget for making frames again: some points have arrived."""
        earned = _REMADE_PER_S * (now_s - self._budget_s) + _REMADE_PER_POINT * points
        self._budget, self._budget_s = min(self._budget + earned, _MOST_REMADE), now_s

    def corrections(self, turn: Turn) -> list[Item]:
        """Makes changed frames again, until the event loop's turn is over; returns the items that differ."""
        items = []
        while self._changed and not turn.is_over:
            time = heappop(self._changed_times)
            if time in self._changed:
                item = self._remade(time)
                if item is not None:
                    items.append(item)
        if not self._changed:
            self._changed_times.clear()
            self._past_ends.extend(self._late_ends)
            self._late_ends.clear()
        return items

    def forget(self, time_unix_ns: int) -> None:
        """Forgets a frame: points of it that arrive from now on are too late."""
        kept = self._kept.pop(time_unix_ns, None)
        if kept is not None:
            del self._order[bisect_left(self._order, time_unix_ns)]
            self._changed.pop(time_unix_ns, None)
            self._times.pop(kept.sequence, None)
            self.forgotten_unix_ns = max(self.forgotten_unix_ns, time_unix_ns)

    def size_of(self, time_unix_ns: int) -> int:
        """Returns the approximate memory of a kept frame."""
        kept = self._kept.get(time_unix_ns)
        return 0 if kept is None else kept.size()

    def restore(self, item: Item, *, is_first: bool = False, is_torn: bool = False) -> None:
        """Restores a frame that was released before a restart, after the frames restored before it.

        Args:
            item: the frame's newest revision.
            is_first: whether it is the writer's very first frame. If not, and it is restored first, the state before it
                is unknown.
            is_torn: whether frames between this one and the one before it may be lost: then a plain sender's seed that
                is not live any more has died in one of those, and does not come back.
        """
        frame = item.frame
        is_cut_off = not (self._kept or is_first)
        if is_cut_off:
            self.forgotten_unix_ns = frame.time_unix_ns - 1
            self._maker.note_live(frame.live.ids, frame.time_unix_ns)
        part = part_of(frame, complete=item.complete)
        is_whole = item.complete or (self._habits.is_complete(part) if self._habits.counts else _lacks_lives(frame))
        ends = set[StreamEnd]() if is_cut_off or self._habits.counts else _ended(self.live, frame)
        if is_torn and not (is_cut_off or self._habits.counts):
            gone = {*self.live.ids}.difference(frame.live.ids, frame.retired)
            ends |= {StreamEnd(frame.time_unix_ns, seed, WHOLE_LIFE) for seed in gone}
        kept = ReleasedFrame(
            part,
            frame.run,
            frame.sequence,
            frame.global_step,
            is_whole,
            ends,
            item.received_unix_ns,
            frame.live if is_cut_off else self.live,
            self._maker.loss,
            frame,
            item.revision,
        )
        self._keep(frame.time_unix_ns, kept)
        if not is_cut_off and _has_unstated_change(frame, self.live, can_end=not self._habits.counts):
            self._note_changed(frame.time_unix_ns)
        self._maker.live = _living(frame.live)
        self._after(frame)

    def note_habits(self) -> None:
        """Corrects restored frames, once it is known what their writer states in its frames."""
        for kept in self._kept.values():
            if not self._habits.says_step:  # their steps were counted
                kept.part = kept.part.without(lambda name, _: name == "esper.global_step")
            if kept.frame is not None and _lacks_lives(kept.frame):
                kept.complete = self._habits.is_complete(kept.part)

    def ends_to_come(self) -> tuple[tuple[int, str, int], ...]:
        """Returns stream ends as (time, seed, column), some that have come, too; only some if there are very many.

        An end that has come is among them once the frames after it have been made again: then they show what it ended.
        """
        past = [end for end in self._past_ends if end.time_unix_ns > self.forgotten_unix_ns]
        ends = chain(past, (end for some in self._ends.values() for end in sorted(some)))
        return tuple(islice(ends, MOST_ENDS))

    def restore_ends(self, ends: Iterable[tuple[int, str, int]]) -> None:
        """Restores stream ends from before a restart; what those that have come have ended is known already."""
        after = set[int]()
        for end in map(StreamEnd._make, ends):
            if end.time_unix_ns > self.newest_unix_ns:
                self._await_end(end)
            elif end.time_unix_ns > self.forgotten_unix_ns:
                place = self._add_end(end)
                if place is not None:
                    self._past_ends.append(end)
                    after.add(place)
        for time_unix_ns in after:
            self._kept[time_unix_ns].retire_by_ends()

    # -- making frames ------------------------------------------------------------------------------------

    def _after(self, frame: Frame) -> None:
        """Records the state that the next frame starts from."""
        self.newest_unix_ns = frame.time_unix_ns
        self._maker.note(frame)

    def _keep(self, time_unix_ns: int, kept: ReleasedFrame) -> None:
        if time_unix_ns not in self._kept:
            insort(self._order, time_unix_ns)
        self._kept[time_unix_ns] = kept
        if kept.sequence:
            self._times[kept.sequence] = time_unix_ns

    def _inserted(self, time_unix_ns: int, kept: ReleasedFrame) -> list[Item]:
        """Inserts a frame before frames that have already been released."""
        self._maker.note_seen(kept.part.shape.ids, time_unix_ns)
        place = bisect_left(self._order, time_unix_ns)
        if place:
            frame = self._kept[self._order[place - 1]].frame
            kept.before = kept.before if frame is None else frame.live
            kept.loss_before = None if frame is None else loss_of(frame, None)
        elif self._order:
            later = self._kept[self._order[0]]
            kept.before, kept.loss_before = later.before, later.loss_before
        if time_unix_ns <= self.forgotten_unix_ns:  # the frames between it and the kept ones are forgotten
            return [self._made(time_unix_ns, kept, _living(kept.before), kept.loss_before)]
        if place < len(self._order):
            later = self._kept[self._order[place]]
            kept.ends |= {end for end in later.ends if end.time_unix_ns <= time_unix_ns}
            if kept.ends:
                later.ends -= kept.ends
                self._note_changed(self._order[place])
        self._keep(time_unix_ns, kept)
        self._note_changed(time_unix_ns, itself=True)
        return []

    def _note_changed(self, time_unix_ns: int, *, itself: bool = False) -> None:
        if time_unix_ns not in self._changed:
            heappush(self._changed_times, time_unix_ns)
        self._changed[time_unix_ns] = itself or self._changed.get(time_unix_ns, False)

    def _remade(self, time_unix_ns: int) -> Item | None:
        """Makes a changed frame again, and notes that the next one is to be made again; returns its item if it differs.

        If frames after it have been forgotten, its effect on the others is unknown.
        """
        is_changed = self._changed.pop(time_unix_ns)
        kept = self._kept[time_unix_ns]
        was = kept.frame
        front, self._front = self._front, None
        live = front if front is not None and front.table is kept.before else _living(kept.before)
        item = self._made(time_unix_ns, kept, live, kept.loss_before)
        loss = loss_of(item.frame, kept.loss_before)
        place = bisect_right(self._order, time_unix_ns)
        if time_unix_ns == self.newest_unix_ns:
            self._maker.live, self._maker.loss = live, loss
        elif time_unix_ns > self.forgotten_unix_ns and place < len(self._order):
            time = self._order[place]
            after = self._kept[time]
            if not _is_equal_state(after, live.table, loss) and (time in self._changed or self._spend(live)):
                after.before, after.loss_before = live.table, loss
                self._note_changed(time)
                self._front = live
        if is_changed or was is None or not _is_same(was, item.frame):
            return item
        kept.frame, kept.revision = was, kept.revision - 1
        return None

    def _spend(self, live: LiveSeeds) -> bool:
        """Takes the cost of making one more frame again from the budget; returns whether there is enough of it."""
        cost = 1.0 + len(live.ids) / _SEEDS_PER_FRAME
        if cost > self._budget:
            return False
        self._budget -= cost
        return True

    def _made(self, time_unix_ns: int, kept: ReleasedFrame, live: LiveSeeds, loss: float | None) -> Item:
        kept.frame, is_complete = self._maker.made(time_unix_ns, kept, live, loss, kept.frame)
        kept.revision += 1
        missed = kept.missed if kept.revision == 1 else 0
        return Item(self._origin, kept.frame, kept.revision, is_complete, kept.received_unix_ns, missed)

    def _ends_until(self, time_unix_ns: int) -> set[StreamEnd]:
        """Removes and returns the stream ends up to this time."""
        found: set[StreamEnd] = set()
        count = 0
        while self._end_times and self._end_times[0] <= time_unix_ns:
            ends = self._ends.pop(heappop(self._end_times))
            count += len(ends)
            found |= ends
            self._past_ends.extend(sorted(ends))
        self._end_count -= count
        self._room.give_back(self._tenant, count)
        return found

    def _await_end(self, end: StreamEnd) -> None:
        """Records a future stream end. Without room for it, the seed ends once it has been silent for too long."""
        time_unix_ns = end.time_unix_ns
        if end in self._ends.get(time_unix_ns, ()):
            return
        if self._end_count >= self._most_ends or not self._room.take(self._tenant):
            return
        if time_unix_ns not in self._ends:
            heappush(self._end_times, time_unix_ns)
        self._ends.setdefault(time_unix_ns, set()).add(end)
        self._end_count += 1

    def close(self) -> None:
        """Frees the room of future stream ends, when the writer is forgotten."""
        self._room.give_back(self._tenant, self._end_count)
        self._ends, self._end_times, self._end_count = {}, [], 0


def _lacks_lives(frame: Frame) -> bool:
    """Returns whether a plain sender's frame was marked as incomplete because its live seeds were unknown."""
    return not frame.sequence and "esper.seeds.digest" in frame.names


def _ended(before: SeedTable, frame: Frame) -> set[StreamEnd]:
    """Returns the streams that ended before a frame although their seeds are still live; when, is not known."""
    before, after = alike(before, frame.live)
    if before.ids != after.ids:
        row = {seed: number for number, seed in enumerate(after.ids)}
        both = [number for number, seed in enumerate(before.ids) if seed in row]
        ids = tuple(before.ids[number] for number in both)
        before = SeedTable(ids, before.cells[both])
        after = SeedTable(ids, after.cells[[row[seed] for seed in ids]])
    gone = is_absent(after.cells) & ~is_absent(before.cells)
    return {StreamEnd(frame.time_unix_ns, before.ids[row], column) for row, column in np.argwhere(gone).tolist()}


def _has_unstated_change(frame: Frame, before: SeedTable, *, can_end: bool) -> bool:
    """Returns whether a frame differs from the one before it in something that it does not state itself.

    Args:
        frame: the frame.
        before: the live seeds after the frame before it.
        can_end: whether streams may have ended before the frame: then it proves nothing if a cell is missing in it.
    """
    before, live, seeds = alike(before, frame.live, frame.seeds)
    if before.ids == live.ids and before.cells.tobytes() == live.cells.tobytes():
        return False
    retired = {*frame.retired}
    if not retired.issuperset({*before.ids}.difference(live.ids)):
        return True
    if live.ids == seeds.ids and live.cells.tobytes() == seeds.cells.tobytes():
        return False
    place = {seed: row for row, seed in enumerate(before.ids) if seed not in retired}
    rows = [row for row, seed in enumerate(live.ids) if seed in place]
    known, cells = before.cells[[place[live.ids[row]] for row in rows]], live.cells[rows]
    differs = known.view(np.uint64) != cells.view(np.uint64)
    of_seed = {seed: row for row, seed in enumerate(seeds.ids)}
    recorded = [row for row, of_live in enumerate(rows) if live.ids[of_live] in of_seed]
    if recorded:  # a cell may be missing because of another one's value: ``LiveSeeds`` erases some
        stated = ~is_absent(seeds.cells[[of_seed[live.ids[rows[row]]] for row in recorded]])
        differs[recorded] &= ~stated & ~is_absent(cells[recorded])
    return bool((differs & ~is_absent(cells) if can_end else differs).any())


def _living(table: SeedTable) -> LiveSeeds:
    """Returns a ``LiveSeeds`` that starts from this table."""
    live = LiveSeeds()
    live.commit(SeedStep(table, table))
    return live


def _is_same(one: Frame, other: Frame) -> bool:
    """Returns whether two frames made from the same points are equal; the state before them may have differed."""
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
    """Returns whether the frame was made from this state."""
    was, loss_was = kept.before, kept.loss_before
    is_same_loss = loss == loss_was or (loss is not None and loss_was is not None and is_equal(loss, loss_was))
    return is_same_loss and live.ids == was.ids and live.cells.tobytes() == was.cells.tobytes()
