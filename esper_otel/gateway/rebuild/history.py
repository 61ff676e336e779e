"""History: the released frames of one writer. A frame can be made again when points of it arrive late."""

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

# The approximate memory of a kept frame, in addition to its values and cells.
_BYTES, _BYTES_PER_VALUE = 2_000, 100

# How many dead seeds are kept with the live ones before all dead seeds are forgotten at once.
_SPARE = 100

_ALL = -1
_COLUMNS = {metric.name: column for column, metric in enumerate(SEED_CELLS)}


@dataclass(slots=True, eq=False)
class ReleasedFrame:
    """A released frame, and the data it is made from.

    Attributes:
        part: its values.
        sequence: its number; 0 if its sender does not state one.
        sender: its sender.
        step: the global step to use if its sender does not state one.
        complete: whether it contains every point.
        received_unix_ns: when its last point arrived.
        before: the live seeds before it.
        loss_before: the last finite loss before it.
        ends: seeds and columns whose streams end before it; the column is -1 if the life of the seed ends.
        frame: the frame.
        revision: how many times it was made.
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
        """Returns its approximate memory in bytes."""
        cells = 0 if self.frame is None else self.frame.seeds.cells.nbytes + self.frame.live.cells.nbytes
        return _BYTES + _BYTES_PER_VALUE * len(self.part.shape.names) + self.part.numbers.nbytes + cells


class History:
    """Makes frames from assembled parts, with the seeds that are live at that time.

    A frame from our exporter states which seeds died before it, how many live after it, and a digest of the live seeds.
    If this does not match the frames before, some of them are missing. The seeds that died in between are then found
    with the digest; if that fails, the frame is marked as incomplete. When a frame arrives late, the frames after it
    are made again.

    The seeds of a plain sender live until their streams end, or until they have been silent for five minutes.

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
        """The seeds that are live after the newest frame."""
        return self._live.table

    def time_of(self, sequence: int) -> int | None:
        """Returns the time of the released frame with this number, if it is still kept."""
        return self._times.get(sequence)

    def number_at(self, time_unix_ns: int) -> int:
        """Returns the number of the released frame at this time; 0 if it has none, or is not kept."""
        kept = self._kept.get(time_unix_ns)
        return 0 if kept is None else kept.sequence

    def __contains__(self, time_unix_ns: int) -> bool:
        return time_unix_ns in self._kept

    def is_out_of_step(self, sequence: int, time_unix_ns: int) -> bool:
        """Returns whether a lower number has a later time, which means that another process numbers its frames too."""
        oldest = next(iter(self._kept), None)
        return oldest is not None and sequence < self._kept[oldest].sequence and time_unix_ns > oldest

    # -- frames ------------------------------------------------------------------------------------------

    def release(self, ready: ReadyFrame) -> list[Item]:
        """Makes a frame; returns its item, and the items of later frames that it changes."""
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
        """Adds a late part to a released frame; returns the changed items, or none if the part contains nothing new."""
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
        """Ends a stream; returns the items of released frames that had assumed it would continue."""
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
        """Returns corrected items for frames whose steps were counted, once the writer turns out to state its steps."""
        counted = [
            time for time, kept in self._kept.items() if kept.part.shape.step is None and kept.step < GUESSED_STEP
        ]
        items = []
        for time in counted:
            self._kept[time].step, self._kept[time].complete = GUESSED_STEP + time, False
            items += self._replayed(time, changed=time)
        return items

    def forget(self, time_unix_ns: int) -> None:
        """Forgets a frame: points of it that arrive from now on are too late."""
        kept = self._kept.pop(time_unix_ns, None)
        if kept is not None:
            self._times.pop(kept.sequence, None)
            self.forgotten_unix_ns = max(self.forgotten_unix_ns, time_unix_ns)

    def size_of(self, time_unix_ns: int) -> int:
        """Returns the approximate memory of a kept frame."""
        kept = self._kept.get(time_unix_ns)
        return 0 if kept is None else kept.size()

    def restore(self, item: Item, *, is_first: bool = False) -> None:
        """Restores a frame that was released before a restart, after the frames restored before it.

        Args:
            item: the frame's newest revision.
            is_first: whether it is the writer's very first frame. If not, and it is restored first, the state before it
                is unknown.
        """
        frame = item.frame
        is_cut_off = not (self._kept or is_first)
        if is_cut_off:
            self.forgotten_unix_ns = frame.time_unix_ns - 1
            self._note_seen(frame.live.ids, frame.time_unix_ns)  # the latest time that is known for them
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
        """Corrects restored frames, once it is known what their writer states in its frames."""
        for kept in self._kept.values():
            if not self._habits.says_step:  # their steps were counted
                kept.part = kept.part.without(lambda name, _: name == "esper.global_step")
            if kept.frame is not None and _lacks_lives(kept.frame):
                kept.complete = self._habits.is_complete(kept.part)

    def ends_to_come(self) -> tuple[tuple[int, str, int], ...]:
        """Returns future stream ends as (time, seed, column); only some of them if there are very many."""
        ends = ((time, seed, column) for time, some in self._ends.items() for seed, column in sorted(some))
        return tuple(islice(ends, MOST_ENDS))

    def restore_ends(self, ends: Iterable[tuple[int, str, int]]) -> None:
        """Restores future stream ends from before a restart."""
        for time_unix_ns, seed, column in ends:
            if time_unix_ns > self.newest_unix_ns:
                self._await_end(time_unix_ns, (seed, column))

    # -- making frames ------------------------------------------------------------------------------------

    def _after(self, frame: Frame) -> None:
        """Records the state that the next frame starts from."""
        self.newest_unix_ns = frame.time_unix_ns
        self._loss = _loss_of(frame, self._loss)
        self._seen.update(dict.fromkeys(frame.seeds.ids, frame.time_unix_ns))
        if len(self._seen) > 2 * len(self._live.ids) + _SPARE:
            self._seen = {seed: self._seen[seed] for seed in self._live.ids if seed in self._seen}

    def _note_seen(self, seeds: Iterable[str], time_unix_ns: int) -> None:
        """Records that values of these seeds arrived late."""
        self._seen |= {seed: max(self._seen.get(seed, 0), time_unix_ns) for seed in seeds}

    def _guessed(self, time_unix_ns: int) -> int:
        """Returns a global step for a frame that does not state one, or not yet.

        If the writer never states its steps, they are counted. If it does, the result is larger than any real step.
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
        """Inserts a frame before frames that have already been released."""
        self._note_seen(kept.part.shape.ids, time_unix_ns)
        earlier = max((time for time in self._kept if time < time_unix_ns), default=None)
        later = min((time for time in self._kept if time > time_unix_ns), default=None)
        if earlier is not None:
            frame = self._kept[earlier].frame
            kept.before = kept.before if frame is None else frame.live
            kept.loss_before = None if frame is None else _loss_of(frame, None)
        elif later is not None:
            kept.before, kept.loss_before = self._kept[later].before, self._kept[later].loss_before
        if time_unix_ns <= self.forgotten_unix_ns:  # the frames between it and the kept ones are forgotten
            return [self._made(time_unix_ns, kept, _living(kept.before), kept.loss_before)]
        self._keep(time_unix_ns, kept)
        return self._replayed(time_unix_ns, changed=time_unix_ns)

    def _replayed(self, start_unix_ns: int, *, changed: int | None = None) -> list[Item]:
        """Makes the frames from a given time on again; returns the items that changed.

        If frames after the given one have been forgotten, only that frame is made: its effect on the others is unknown.
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
                return items  # from here on nothing changes
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
        table = part.seeds()
        violations = None
        if table.ids:
            step = live.step(table)
            live.commit(step)
            violations = step.violations
            if not self._habits.counts:  # otherwise its session did this already, with more information
                table = step.recorded
        run = kept.sender.run
        names, numbers = part.shape.names, tuple(part.numbers[part.shape.name_places].tolist())
        found_out: dict[str, float] = {}
        if not kept.sequence:
            values = dict(zip(names, numbers, strict=True))
            senders.complete(values, violations, loss)
            run = senders.on_its_device(run, values)
            found_out = {name: values[name] for name in values.keys() - {*names}}
        dead = () if digest is None or digest_of(live.table.ids) == digest else self._dead(live, kept, digest)
        if dead:
            live.retire(dead)
        if dead and not self._habits.counts:  # after a restart, no other source would state it
            retired += tuple(dead)
        are_known = dead is not None
        if not (kept.complete and are_known):
            values = {**dict(zip(names, numbers, strict=True)), **_said(part)}
            names, numbers = tuple(values), tuple(values.values())
        global_step = whole(part.number(part.shape.step), GUESSED_STEP)
        kept.frame = Frame(
            run,
            kept.sequence,
            kept.step if global_step is None else global_step,
            whole(part.number(part.shape.epoch), UINT64_LIMIT) or 0,
            time_unix_ns,
            names,
            numbers,
            found_out,
            table,
            live.table,
            retired,
        )
        kept.revision += 1
        return Item(self._origin, kept.frame, kept.revision, kept.complete and are_known, kept.received_unix_ns)

    def _dead(self, live: LiveSeeds, kept: ReleasedFrame, digest: int) -> Collection[str] | None:
        """Returns the seeds that must have died to match a frame's digest; None if they cannot be found."""
        part = kept.part
        count = whole(part.number(part.shape.live), UINT64_LIMIT)
        before = () if kept.frame is None else kept.frame.live.ids
        found = {*before} if digest_of(before) == digest else set()  # the seeds live when it was last made
        return dead_of(
            live.table.ids, {*part.shape.ids}, count, digest, lambda seed: (seed in found, self._seen.get(seed, 0))
        )

    def _ends_until(self, time_unix_ns: int) -> set[tuple[str, int]]:
        """Removes and returns the stream ends up to this time."""
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
        """Records a future stream end. Without room for it, the seed ends once it has been silent for too long."""
        if what in self._ends.get(time_unix_ns, ()):
            return
        if self._end_count >= self._most_ends or not self._room.take(self._tenant):
            return
        if time_unix_ns not in self._ends:
            heappush(self._end_times, time_unix_ns)
        self._ends.setdefault(time_unix_ns, set()).add(what)
        self._end_count += 1

    def close(self) -> None:
        """Frees the room of future stream ends, when the writer is forgotten."""
        self._room.give_back(self._tenant, self._end_count)
        self._ends, self._end_times, self._end_count = {}, [], 0

    def _silent(self, time_unix_ns: int, kept: ReleasedFrame) -> set[tuple[str, int]]:
        """Returns the ends of a plain sender's seeds that have been silent for too long."""
        shape = kept.part.shape
        if self._habits.counts or shape.digest is not None or shape.ids == self._live.table.ids:
            return set()
        return {(seed, _ALL) for seed in silent_of(self._live.ids, {*shape.ids}, self._seen, time_unix_ns)}


def _said(part: Part) -> dict[str, float]:
    """Returns what an incomplete frame states in addition to its values. It is recorded, to be known after a restart.

    It includes the number of points: with it, the frame is recognized as complete when the last point has arrived.
    """
    shape = part.shape
    places = {"esper.seeds": shape.live, "esper.seeds.digest": shape.digest}
    places |= {"esper.epoch": shape.epoch, FRAME_POINTS.name: shape.points}
    return {name: float(part.numbers[place]) for name, place in places.items() if place is not None}


def _lacks_lives(frame: Frame) -> bool:
    """Returns whether a plain sender's frame was marked as incomplete because its live seeds were unknown."""
    return not frame.sequence and "esper.seeds.digest" in frame.names


def _loss_of(frame: Frame, default: float | None) -> float | None:
    """Returns the last finite loss that the frame recorded, or that was derived for it."""
    if LAST_LOSS in frame.context:
        return frame.context[LAST_LOSS]
    return frame.numbers[frame.names.index(LAST_LOSS)] if LAST_LOSS in frame.names else default


def _end(live: LiveSeeds, ends: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Ends streams; returns the seeds that died."""
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
    """Returns the streams that ended between two steps although their seeds are still live."""
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
    """Returns a ``LiveSeeds`` that starts from this table."""
    live = LiveSeeds()
    live.commit(SeedStep(table, table, None, 0, ()))
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
