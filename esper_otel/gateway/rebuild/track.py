"""Track: all data on one writer: its points, the released items and its state."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from esper_otel.frames.frame import GUESSED_STEP, VALIDATION_LOSS, Frame
from esper_otel.gateway.items import Item, Origin, Place, RunState
from esper_otel.gateway.limits import Limits, SharedPlaces
from esper_otel.gateway.rebuild.history import History
from esper_otel.gateway.rebuild.queue import Queue, ReadyFrame, WaitingFrame
from esper_otel.gateway.receive.request import TOO_MANY_METRICS, TOO_MANY_SEEDS, TOO_SPARSE, Marker, PointSender
from esper_otel.gateway.turns import ENDLESS, Turn
from esper_otel.parts.habits import Habits
from esper_otel.parts.part import MergedParts, Part, PartShape
from esper_otel.schema import FRAME_POINTS

# A budget for rows in tables of live seeds, about 100 bytes each: its maximum, and what refills it.
_MOST_ROWS, _ROWS_PER_S, _ROWS_PER_POINT = 2_000_000.0, 200_000.0, 64

# How many frames may be known to be cut before their first part arrives.
_MOST_CUT = 100

# Of how many of the user's own metrics the unit is known; more are not shown.
_MOST_UNITS = 256

# How many dead seeds may be known before they are removed.
_SPARE = 1_000


class Track:
    """The frames of one writer.

    Args:
        origin: the writer.
        limits: limits on the writer.
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long a frame without a point count waits for further points.
        ends: room for future stream ends, shared by all writers.
        tenant: the tenant whose share of the room it uses.
    """

    def __init__(
        self, origin: Origin, limits: Limits, *, hold_s: float, linger_s: float, ends: SharedPlaces, tenant: str = ""
    ) -> None:
        self.origin = origin
        self.tenant = tenant
        self._limits = limits
        self._habits = Habits()
        self._shape: PartShape | None = None
        self._queue = Queue(self._habits, hold_s=hold_s, linger_s=linger_s, most=limits.waiting)
        self._history = History(origin, self._habits, most_ends=2 * limits.seeds, room=ends, tenant=tenant)
        self._changed_s: float | None = None  # when the oldest change arrived that is not in a released frame yet
        self._known: set[str] = set()
        self._known_last, self._is_counted = 0, False
        self._rows, self._rows_s = _MOST_ROWS, 0.0
        self._ids: tuple[str, ...] = ()
        self._cut: deque[int] = deque(maxlen=_MOST_CUT)  # times of cut frames of which nothing has arrived yet
        self._outcome: str | None = None
        self._sender: PointSender | None = None
        self._validation_loss: float | None = None
        self._stored = ("", "", "", "")  # host, revision, settings and location from before a restart
        self._device = ""
        self._units: dict[str, str] = {}
        self._said_units: tuple[tuple[str, str], ...] = ()
        self._first_step: int | None = None
        self._first_step_unix_ns = self._first_unix_ns = 0
        self._last_step: int | None = None
        self._last: Item | None = None
        self._incomplete: set[int] = set()
        self._incomplete_count = 0
        self._too_late = 0
        self._differing = 0
        self.received_s: float = 0.0
        self._received_unix_ns = 0

    # -- input -------------------------------------------------------------------------------------------

    def knows(self, time_unix_ns: int) -> bool:
        """Returns whether a frame at this time is waiting or kept."""
        return time_unix_ns in self._history or self._queue.get(time_unix_ns) is not None

    def take(
        self,
        time_unix_ns: int,
        of_frame: MergedParts,
        sender: PointSender,
        now_s: float,
        received_unix_ns: int,
        rejected: Counter[str],
    ) -> WaitingFrame | None:
        """Adds a part of a frame; returns the frame if it belongs to another writer."""
        self.note(sender, now_s, received_unix_ns)
        part = of_frame.part
        if part.shape.ids:
            is_new = not self.knows(time_unix_ns)
            part = self._affordable(self._within_limits(part, rejected), rejected, is_new=is_new, now_s=now_s)
        self._history.earn(len(part.numbers), now_s)
        number = part.number(part.shape.sequence)
        waiting = self._queue.get(time_unix_ns)
        part = self._within_metrics(part, time_unix_ns, waiting, rejected)
        known = self._history.number_at(time_unix_ns) if waiting is None else waiting.sequence
        if known and number is not None and number != known:
            # A component on the way gave two frames the same time: these values are not from the first frame.
            self._differing += len(part.numbers)
            return None
        if time_unix_ns in self._history:
            self._differing += of_frame.differing
            self._history.correct(time_unix_ns, part, received_unix_ns)
            self._note_change(now_s)
            if not known and self._history.number_at(time_unix_ns):
                self._queue.note_released(self._history.number_at(time_unix_ns))
            return None
        if waiting is None:
            waiting = WaitingFrame(sender, now_s, now_s, received_unix_ns)
        was_numbered = waiting.sequence is not None
        waiting.add(part)
        waiting.differing += of_frame.differing
        waiting.is_cut |= part is not of_frame.part or time_unix_ns in self._cut
        waiting.last_s, waiting.received_unix_ns = now_s, received_unix_ns
        if not was_numbered:
            return self.put(time_unix_ns, waiting)
        self._queue.count(time_unix_ns)
        return None

    def put(self, time_unix_ns: int, waiting: WaitingFrame) -> WaitingFrame | None:
        """Adds a frame; returns it if its number shows that it belongs to another writer."""
        number = waiting.sequence
        if number is not None:
            same = self._queue.time_of(number) or self._history.time_of(number)
            if same not in (None, time_unix_ns):
                self._queue.pop(time_unix_ns)
                return waiting
            if self._queue.is_late(number):
                if not self._fits(number, time_unix_ns):
                    self._queue.pop(time_unix_ns)
                    return waiting
                if number not in self._queue.skipped:
                    self._queue.pop(time_unix_ns)
                    self.count_too_late()
                    return None
        self._queue.put(time_unix_ns, waiting)
        return None

    def _fits(self, number: int, time_unix_ns: int) -> bool:
        """Returns whether a late frame's number and time are consistent with the order of the others."""
        if self._history.is_out_of_step(number, time_unix_ns):
            return False
        if number not in self._queue.skipped:
            return True
        before, after = map(self._history.time_of, self._queue.skipped.around(number))
        return (before is None or before < time_unix_ns) and (after is None or time_unix_ns < after)

    def count_too_late(self) -> None:
        """Counts a frame that arrived too late to be accepted."""
        self._too_late += 1

    def _note_change(self, now_s: float) -> None:
        if self._changed_s is None and self._history.is_changed:
            self._changed_s = now_s

    def learn(self, shape: PartShape, now_s: float, *, is_ours: bool) -> None:
        """Learns what the writer states in its frames."""
        if shape is self._shape:
            return
        self._shape = shape
        said_step = self._habits.says_step
        self._habits.note(shape, is_ours=is_ours)
        if self._habits.says_step and not said_step:
            self._history.uncount()
            self._note_change(now_s)

    def learn_units(self, units: tuple[tuple[str, str], ...]) -> None:
        """Learns the units of the user's own metrics."""
        if units is self._said_units:
            return
        self._said_units = units
        for name, unit in units:
            if name in self._units or len(self._units) < _MOST_UNITS:
                self._units[name] = unit

    def cut(self, time_unix_ns: int, now_s: float) -> None:
        """Records that the frame at this time lacks values that its sender could not tell apart."""
        waiting = self._queue.get(time_unix_ns)
        if waiting is not None:
            waiting.is_cut = True
        elif time_unix_ns in self._history:
            self._history.cut(time_unix_ns)
            self._note_change(now_s)
        else:
            self._cut.append(time_unix_ns)

    def end_stream(self, marker: Marker, now_s: float) -> bool:
        """Ends a stream of a seed; returns whether this must be stored for a restart."""
        is_to_come = self._history.end(marker)
        self._note_change(now_s)
        return is_to_come and not self._habits.counts

    def end(self, outcome: str) -> None:
        """Records that the run has ended."""
        self._outcome = outcome

    def describe(self, device: str) -> bool:
        """Records on which device the writer trains; returns whether this must be stored for a restart."""
        is_new, self._device = device != self._device, device
        return is_new

    def note(self, sender: PointSender, now_s: float, received_unix_ns: int) -> None:
        """Records that something has arrived from the writer."""
        self._sender = sender
        self.received_s = now_s
        self._received_unix_ns = received_unix_ns

    def _within_limits(self, part: Part, rejected: Counter[str]) -> Part:
        """Returns the part without the seeds that exceed the limit."""
        ids = part.shape.ids
        if ids == self._ids:
            return part
        self._ids = ids
        new = [seed for seed in ids if seed not in self._known]
        room = self._limits.seeds - len(self._known)
        if len(new) > room and not self._is_counted:
            self._count_known()
            new = [seed for seed in ids if seed not in self._known]
            room = self._limits.seeds - len(self._known)
        self._known.update(new[: max(room, 0)])
        surplus = new[max(room, 0) :]
        if not surplus:
            return part
        self._ids = ()
        too_many = {*surplus}
        smaller = part.without(lambda _, seed: seed in too_many)
        rejected[TOO_MANY_SEEDS] += len(part.numbers) - len(smaller.numbers)
        return smaller

    def _within_metrics(
        self, part: Part, time_unix_ns: int, waiting: WaitingFrame | None, rejected: Counter[str]
    ) -> Part:
        """Returns the part without the metrics that would be too many for one frame, which is made in one turn."""
        parts = self._history.parts_at(time_unix_ns) if waiting is None else waiting.parts
        if sum(len(each.shape.names) for each in (*parts, part)) <= self._limits.metrics:
            return part
        known = {name for each in parts for name in each.shape.names}
        new = [name for name in part.shape.names if name not in known]
        surplus = {*new[max(self._limits.metrics - len(known), 0) :]}
        smaller = part.without(lambda name, seed: not seed and name in surplus)
        rejected[TOO_MANY_METRICS] += len(part.numbers) - len(smaller.numbers)
        return smaller

    def _count_known(self) -> None:
        """Forgets the seeds that are neither live nor part of a waiting frame."""
        self._known = {*self._history.live.ids, *self._queue.seeds()}
        self._known_last, self._is_counted = len(self._known), True

    def _affordable(self, part: Part, rejected: Counter[str], *, is_new: bool, now_s: float) -> Part:
        """Returns the part, without its seeds if the budget does not allow another table of live seeds.

        Each frame stores a table of all live seeds. Points and elapsed time refill the budget fast enough for any real
        recording, but not for a few points that each have a new time and a new seed.
        """
        earned = _ROWS_PER_S * (now_s - self._rows_s) + _ROWS_PER_POINT * len(part.numbers)
        self._rows, self._rows_s = min(self._rows + earned, _MOST_ROWS), now_s
        if len(self._known) > 2 * self._known_last + _SPARE:
            self._count_known()
        cost = len(self._known) if is_new else 0
        if cost <= self._rows:
            self._rows -= cost
            return part
        self._known.difference_update(part.shape.ids)
        self._ids = ()
        gone = {*part.shape.ids}
        smaller = part.without(lambda _, seed: seed in gone)
        rejected[TOO_SPARSE] += len(part.numbers) - len(smaller.numbers)
        return smaller

    # -- output ------------------------------------------------------------------------------------------

    @property
    def next(self) -> int | None:
        """The number of the frame to be released next."""
        return self._queue.next

    @property
    def due_s(self) -> float | None:
        """When ``release`` must be called again if nothing else arrives."""
        return self._queue.due_s

    def is_due(self, now_s: float) -> bool:
        """Returns whether ``release`` is due."""
        return self._queue.due_s is not None and self._queue.due_s <= now_s

    @property
    def since_s(self) -> float | None:
        """When the oldest point arrived that is not in a released frame yet; None if there is none."""
        if self._changed_s is None or self._queue.since_s is None:
            return self._queue.since_s if self._changed_s is None else self._changed_s
        return min(self._changed_s, self._queue.since_s)

    @property
    def is_changed(self) -> bool:
        """Whether released frames have changed and are to be made again."""
        return self._changed_s is not None

    @property
    def waiting_points(self) -> int:
        """Number of points in waiting frames."""
        return self._queue.points

    def release(self, now_s: float, turn: Turn = ENDLESS, *, all_now: bool = False) -> list[Item]:
        """Releases items that are due, in order; when the event loop's turn is over, the rest is due immediately."""
        items = self._history.corrections(turn)
        is_waiting = turn.is_over and len(self._queue) > 0
        for ready in () if is_waiting else self._ready(now_s, turn, all_now=all_now):
            items += self._history.release(ready)
        items += self._history.corrections(turn)
        if not self._history.is_changed:
            self._changed_s = None
        else:
            self._note_change(now_s)
            is_waiting = True
        if is_waiting:
            self._queue.due_s = now_s
        for item in items:
            self._note_item(item)
        self._is_counted = self._is_counted and not items
        return items

    def _ready(self, now_s: float, turn: Turn, *, all_now: bool) -> Iterator[ReadyFrame]:
        for ready in self._queue.ready(now_s, all_now=all_now):
            if ready.waiting.sequence is None and ready.time_unix_ns <= self._history.forgotten_unix_ns:
                self.count_too_late()
                continue
            if not ready.waiting.points:
                continue
            yield ready
            if turn.is_over:
                self._queue.due_s = now_s
                break

    def _note_item(self, item: Item) -> None:
        step, time_unix_ns = item.frame.global_step, item.frame.time_unix_ns
        self._first_unix_ns = min(self._first_unix_ns or time_unix_ns, time_unix_ns)
        is_last = self._last is None or time_unix_ns >= self._last.frame.time_unix_ns
        if is_last:
            self._last = item
            if VALIDATION_LOSS in item.frame.names:
                self._validation_loss = _value(item.frame, VALIDATION_LOSS)
        if step < GUESSED_STEP:
            if self._first_step is None or time_unix_ns <= self._first_step_unix_ns:
                self._first_step, self._first_step_unix_ns = step, time_unix_ns
            if is_last:
                self._last_step = step
        if not item.complete:
            self._incomplete.add(item.frame.time_unix_ns)
        else:
            self._incomplete.discard(item.frame.time_unix_ns)

    def size_of(self, time_unix_ns: int) -> int:
        """Returns the approximate memory of a released frame that is kept."""
        return self._history.size_of(time_unix_ns)

    def forget(self, time_unix_ns: int) -> None:
        """Forgets a released frame: points of it that still arrive are too late."""
        self._history.forget(time_unix_ns)
        if time_unix_ns in self._incomplete:
            self._incomplete.discard(time_unix_ns)
            self._incomplete_count += 1

    def restore_first(self, first: Frame) -> None:
        """Restores the first frame from before a restart."""
        self._first_unix_ns = min(self._first_unix_ns or first.time_unix_ns, first.time_unix_ns)
        if first.global_step < GUESSED_STEP and first.time_unix_ns <= self._first_step_unix_ns:
            self._first_step, self._first_step_unix_ns = first.global_step, first.time_unix_ns

    def restore_place(self, place: Place) -> None:
        """Restores the position from before a restart; call it after its frames were restored."""
        self._habits.says_step, self._habits.says_epoch = place.says_step, place.says_epoch
        self._stored = place.host, place.revision, place.settings, place.location
        self._device = self._device or place.device
        self._units = {**dict(place.units), **self._units}
        if self._validation_loss is None:
            self._validation_loss = place.validation_loss
        self._queue.restore_place(place)
        self._history.note_habits()
        self._history.restore_ends(place.ends)

    def place(self) -> Place:
        """Returns the position to store for a restart."""
        queue, habits = self._queue, self._habits
        skipped = queue.skipped
        of_frames = (queue.next, skipped.lowest, skipped.count, habits.says_step, habits.says_epoch)
        ends = () if habits.counts else self._history.ends_to_come()
        host, revision, settings, location = self._about
        return Place(
            *(self.origin, *of_frames, skipped.holes, ends),
            *(host, revision, settings, self._validation_loss, location, self._device, tuple(self._units.items())),
        )

    @property
    def _about(self) -> tuple[str, str, str, str]:
        """Host, revision, settings and location of the writer."""
        sender = self._sender
        return self._stored if sender is None else (sender.host, sender.revision, sender.settings, sender.location)

    def restore(self, item: Item, *, is_first: bool, is_torn: bool = False) -> None:
        """Restores a frame that was released before a restart, after the frames restored before it."""
        self._queue.restore(item.frame.sequence)
        self._habits.is_known = True
        self._habits.counts = self._habits.counts or item.frame.sequence > 0 or FRAME_POINTS.name in item.frame.names
        self._history.restore(item, is_first=is_first, is_torn=is_torn)
        self._note_change(self.received_s)
        self._received_unix_ns = item.received_unix_ns
        self._note_item(item)

    def close(self) -> None:
        """Frees shared room, when the writer is forgotten."""
        self._history.close()

    def state(self, *, writers: int, is_silent: bool) -> RunState:
        """Returns the writer's state, without comparison with other writers."""
        last = self._last
        sender = self._sender
        host, revision, settings, location = self._about
        run = None if last is None else last.frame.run
        return RunState(
            self.origin,
            run.world_size if run else sender.run.world_size if sender else 1,
            run.experiment if run else sender.run.experiment if sender else "",
            self._first_step,
            self._last_step,
            0 if last is None else last.frame.time_unix_ns,
            self._received_unix_ns,
            ended=None if len(self._queue) else self._outcome,
            writers=writers,
            missing=self._queue.skipped.count,
            unseen=self._queue.skipped.unseen,
            incomplete=self._incomplete_count + len(self._incomplete),
            differing=self._differing + self._history.differing,
            too_late=self._too_late,
            first_time_unix_ns=self._first_unix_ns,
            is_silent=is_silent,
            host=host,
            revision=revision,
            settings=settings,
            location=location,
            device=self._device or (run.device_id if run else ""),
            units=tuple(self._units.items()),
            last_loss=None if last is None else _value(last.frame, "loss"),
            validation_loss=self._validation_loss,
            step_received_unix_ns=0 if last is None else last.received_unix_ns,
        )


def _value(frame: Frame, name: str) -> float | None:
    return frame.numbers[frame.names.index(name)] if name in frame.names else None
