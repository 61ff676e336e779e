"""Queue: the waiting frames of one writer, and when each is released."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from esper_otel.frames.numbers import UINT64_LIMIT, whole
from esper_otel.gateway.items import Place
from esper_otel.gateway.receive.request import PointSender
from esper_otel.parts.habits import Habits
from esper_otel.parts.part import Part, merged

# Frame numbers are sent as doubles, which cannot represent every integer above this.
SEQUENCE_LIMIT = 2**53

# Parts of a frame are merged when there are many, and large ones at once, so that no turn merges several of these.
_MANY_PARTS, _LARGE_PART = 64, 5_000
_MOST_RANGES = 1_000

# A range of numbers: from the first to before the second.
Hole: TypeAlias = tuple[int, int]


@dataclass(slots=True, eq=False)
class WaitingFrame:
    """A frame that is not released yet.

    Attributes:
        sender: the sender of its first part.
        first_s: when its first part arrived, on the monotonic clock.
        last_s: when its last part arrived, on the monotonic clock.
        received_unix_ns: when its last part arrived, in Unix nanoseconds.
        parts: the parts that have arrived.
        points: number of points in these parts.
        sequence: its number, once known.
        expected: its full number of points, once known.
        has_step: whether its global step is known.
        has_epoch: whether its epoch is known.
        differing: number of values that arrived twice and differed; the first one is used.
        is_cut: whether some of its points were rejected because of limits on seeds.
    """

    sender: PointSender
    first_s: float
    last_s: float
    received_unix_ns: int
    parts: list[Part] = field(default_factory=list)
    points: int = 0
    sequence: int | None = None
    expected: int | None = None
    has_step: bool = False
    has_epoch: bool = False
    differing: int = 0
    is_cut: bool = False

    def add(self, part: Part) -> None:
        """Adds a part."""
        self.parts.append(part)
        self.points += len(part.numbers)
        shape = part.shape
        self.has_step = self.has_step or shape.step is not None
        self.has_epoch = self.has_epoch or shape.epoch is not None
        if self.sequence is None and shape.sequence is not None:
            self.sequence = whole(part.number(shape.sequence), SEQUENCE_LIMIT) or None
        if self.expected is None and shape.points is not None:
            self.expected = whole(part.number(shape.points), UINT64_LIMIT)
        if len(self.parts) > _MANY_PARTS or len(part.numbers) > _LARGE_PART:
            self.joined()

    def joined(self) -> Part:
        """Merges all parts into one and returns it."""
        if len(self.parts) > 1:
            part, differing = merged(self.parts)
            self.differing += differing
            self.parts, self.points = [part], len(part.numbers)
        return self.parts[0]

    def is_whole(self) -> bool:
        """Returns whether every point of the frame has arrived."""
        if self.expected is None or self.points < self.expected:
            return False
        self.joined()  # points that arrived twice are merged
        return self.points >= self.expected


class ReadyFrame(NamedTuple):
    """A frame that is ready to be released; see ``Item`` for ``missed``."""

    time_unix_ns: int
    waiting: WaitingFrame
    complete: bool
    missed: int = 0


class SkippedNumbers:
    """The frame numbers that have not arrived: those below the lowest that has, and holes above it.

    A gateway that joins a run late never receives the numbers below the lowest one. Such frames are accepted if they
    arrive, but are not counted as missing. If there are very many holes, the oldest are forgotten: they still count as
    missing, but their frames are no longer accepted.

    Attributes:
        lowest: the lowest number that has arrived; None before the first.
        count: number of missing frames: numbers above the lowest one that were skipped and have not arrived.
    """

    def __init__(self) -> None:
        self.lowest: int | None = None
        self.count: int = 0
        self._holes: list[Hole] = []

    @property
    def holes(self) -> tuple[Hole, ...]:
        """The known holes, in order."""
        return tuple(self._holes)

    @property
    def unseen(self) -> int:
        """Number of frames below the lowest one that arrived."""
        return 0 if self.lowest is None else max(self.lowest - 1, 0)

    def __contains__(self, number: int) -> bool:
        return self._hole(number) is not None

    def _hole(self, number: int) -> Hole | None:
        """Returns the hole that contains a number, or None."""
        if self.lowest is None:
            return None
        if number < self.lowest:
            return (1, self.lowest)
        place = bisect_right(self._holes, number, key=lambda hole: hole[0]) - 1
        return self._holes[place] if place >= 0 and number < self._holes[place][1] else None

    def around(self, number: int) -> tuple[int, int]:
        """Returns the arrived numbers directly below and above the hole of a number; 0 if there is none below."""
        hole = self._hole(number)
        assert hole is not None
        return hole[0] - 1, hole[1]

    def add(self, first: int, behind: int) -> None:
        """Adds a hole from ``first`` to before ``behind``; it must be above all earlier holes."""
        self._holes.append((first, behind))
        self.count += behind - first
        del self._holes[:-_MOST_RANGES]

    def remove(self, number: int) -> None:
        """Removes a number whose frame has arrived after all."""
        hole = self._hole(number)
        if hole is None:
            return
        first, behind = hole
        after = [(number + 1, behind)] if number + 1 < behind else []
        if behind == self.lowest:
            self.lowest = number
            self._holes[:0] = after
            self.count += behind - number - 1
        else:
            place = bisect_right(self._holes, number, key=lambda hole: hole[0]) - 1
            before = [(first, number)] if first < number else []
            self._holes[place : place + 1] = before + after
            self.count -= 1
        del self._holes[:-_MOST_RANGES]

    def restore(self, lowest: int | None, holes: Iterable[Hole], count: int) -> None:
        """Restores the state from before a restart."""
        self.lowest, self._holes, self.count = lowest, list(holes), count


class Queue:
    """The waiting frames of a writer: each waits until it is complete and all before it are released, up to ``hold_s``.

    A frame that states its number waits for its points and for the frames before it. A frame without a number comes
    from a plain sender, and is released ``linger_s`` after its last point. It waits for ``hold_s`` instead if it lacks
    a global step or epoch that its sender states in other frames, or if it is the first frame and has none: they may
    arrive in a later request.

    Args:
        habits: what the writer states in its frames.
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long a frame without a point count waits for further points.
        most: the maximum number of waiting frames; beyond it, the oldest is released at once.

    Attributes:
        next: the number of the frame to be released next; None before the first.
        skipped: the numbers before it that have not arrived.
        due_s: when ``ready`` must be called again.
        points: number of points in all waiting frames, including repeated ones.
    """

    def __init__(self, habits: Habits, *, hold_s: float, linger_s: float, most: int) -> None:
        self._habits = habits
        self._hold_s = hold_s
        self._linger_s = linger_s
        self._most = most
        self._frames: dict[int, WaitingFrame] = {}
        self._counted: dict[int, int] = {}  # points of each frame
        self._is_in_order, self._last_s = True, -math.inf  # whether frames are stored in order of arrival
        self._numbered: dict[int, int] = {}
        self._numbers: list[int] = []  # the same numbers, sorted
        self._arrivals: list[tuple[float, int]] = []  # when each of them arrived, sorted
        self._late: dict[int, int] = {}
        self._unnumbered: dict[int, None] = {}
        self._released: list[int] = []  # numbers, sorted
        self._hole: tuple[int | None, float] | None = None
        self._missed = 0  # numbers that were skipped directly before the next one
        self.next: int | None = None
        self.skipped: SkippedNumbers = SkippedNumbers()
        self.due_s: float | None = None
        self.points: int = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def since_s(self) -> float | None:
        """When the oldest waiting part arrived; None if nothing waits."""
        if self._is_in_order:
            return next((waiting.first_s for waiting in self._frames.values()), None)
        return min(waiting.first_s for waiting in self._frames.values())

    def get(self, time_unix_ns: int) -> WaitingFrame | None:
        """Returns the waiting frame at this time, if there is one."""
        return self._frames.get(time_unix_ns)

    def time_of(self, sequence: int) -> int | None:
        """Returns the time of the waiting frame with this number, or None."""
        return self._numbered.get(sequence) or self._late.get(sequence)

    def seeds(self) -> set[str]:
        """Returns the seeds of waiting frames."""
        return {seed for waiting in self._frames.values() for part in waiting.parts for seed in part.shape.ids}

    def put(self, time_unix_ns: int, waiting: WaitingFrame) -> None:
        """Adds a frame, or records that its number has become known."""
        if self._frames.get(time_unix_ns, waiting) is not waiting:
            self.pop(time_unix_ns)
        self._is_in_order &= time_unix_ns in self._frames or waiting.first_s >= self._last_s
        self._last_s = max(self._last_s, waiting.first_s)
        self._frames[time_unix_ns] = waiting
        self.count(time_unix_ns)
        if waiting.sequence is None:
            self._unnumbered[time_unix_ns] = None
            return
        self._unnumbered.pop(time_unix_ns, None)
        if self.is_late(waiting.sequence):
            self._late[waiting.sequence] = time_unix_ns
            return
        self._forget_number(waiting.sequence)
        self._numbered[waiting.sequence] = time_unix_ns
        insort(self._numbers, waiting.sequence)
        insort(self._arrivals, (waiting.first_s, waiting.sequence))

    def _forget_number(self, sequence: int) -> None:
        time_unix_ns = self._numbered.pop(sequence, None)
        if time_unix_ns is None:
            return
        del self._numbers[bisect_left(self._numbers, sequence)]
        del self._arrivals[bisect_left(self._arrivals, (self._frames[time_unix_ns].first_s, sequence))]

    def count(self, time_unix_ns: int) -> None:
        """Updates the number of points of the frame at this time."""
        points = self._frames[time_unix_ns].points
        self.points += points - self._counted.get(time_unix_ns, 0)
        self._counted[time_unix_ns] = points

    def is_late(self, sequence: int) -> bool:
        """Returns whether later numbers have already been released."""
        return self.next is not None and sequence < self.next

    def note_released(self, sequence: int) -> None:
        """Records the number of a frame that was released before the number was known."""
        if self.is_late(sequence):
            self.skipped.remove(sequence)
        elif sequence not in self._numbered:
            place = bisect_left(self._released, sequence)
            if sequence not in self._released[place : place + 1]:
                self._released.insert(place, sequence)
            del self._released[: -self._most]
            self._pass_released()

    def _pass_released(self) -> None:
        """Advances past numbers that were already released."""
        if self.next is None:
            return
        end = place = bisect_left(self._released, self.next)
        while end < len(self._released) and self._released[end] == self.next:
            self.next += 1
            end += 1
        del self._released[place:end]

    def pop(self, time_unix_ns: int) -> WaitingFrame | None:
        """Removes and returns the frame at this time."""
        waiting = self._frames.get(time_unix_ns)
        if waiting is not None:
            self._unnumbered.pop(time_unix_ns, None)
            if waiting.sequence is not None and self._numbered.get(waiting.sequence) == time_unix_ns:
                self._forget_number(waiting.sequence)
            if waiting.sequence is not None and self._late.get(waiting.sequence) == time_unix_ns:
                del self._late[waiting.sequence]
            del self._frames[time_unix_ns]
        self.points -= self._counted.pop(time_unix_ns, 0)
        if not self._frames:
            self._is_in_order, self._last_s = True, -math.inf
        return waiting

    def restore(self, sequence: int) -> None:
        """Records a frame released before a restart; numbers between it and the previous one count as skipped."""
        if sequence:
            if self.next is None:
                self.skipped.lowest = 1  # earlier numbers have arrived too, or are already counted
            elif sequence > self.next:
                self.skipped.add(self.next, sequence)
            self.next = max(self.next or 0, sequence + 1)

    def restore_place(self, place: Place) -> None:
        """Restores the position from before a restart; it overrides what was derived from restored frames."""
        self.next = place.next
        self.skipped.restore(place.lowest, place.holes, place.missing)

    def ready(self, now_s: float, *, all_now: bool = False) -> Iterator[ReadyFrame]:
        """Yields the frames to be released, in order, and then sets ``due_s``.

        Args:
            now_s: the monotonic clock.
            all_now: whether to release all frames at once, complete or not.
        """
        due_s: list[float] = []

        def is_over(since_s: float, wait_s: float) -> bool:
            if all_now or now_s >= since_s + wait_s or len(self._frames) > self._most:
                return True
            due_s.append(since_s + wait_s)
            return False

        yield from self._in_order(is_over)
        for _, time_unix_ns in sorted(self._late.items()):
            waiting = self._frames[time_unix_ns]
            if waiting.is_whole() or is_over(waiting.first_s, self._hold_s):
                yield self._out(time_unix_ns, complete=waiting.is_whole())
        yield from self._unordered(is_over)
        self.due_s = min(due_s, default=None)

    def _unordered(self, is_over: Callable[[float, float], bool]) -> Iterator[ReadyFrame]:
        """Yields the frames without a number that are to be released."""
        habits = self._habits
        for time_unix_ns in sorted(self._unnumbered):
            waiting = self._frames[time_unix_ns]
            lacks = habits.counts or habits.lacks(has_step=waiting.has_step, has_epoch=waiting.has_epoch)
            is_open = lacks or not (habits.is_known or (waiting.has_step and waiting.has_epoch))
            since_s, wait_s = (waiting.first_s, self._hold_s) if is_open else (waiting.last_s, self._linger_s)
            if is_over(since_s, wait_s):
                yield self._out(time_unix_ns, complete=not lacks)
            elif not habits.counts:
                break  # those after it must not overtake it

    def _in_order(self, is_over: Callable[[float, float], bool]) -> Iterator[ReadyFrame]:
        while self._numbered:
            time_unix_ns = None if self.next is None else self._numbered.get(self.next)
            if time_unix_ns is None:
                if self._numbers[0] != 1 and not is_over(self._hole_since_s(), self._hold_s):
                    return
                self._skip_to(self._numbers[0])
                continue
            waiting = self._frames[time_unix_ns]
            is_whole = waiting.is_whole()
            if not is_whole and not is_over(waiting.first_s, self._hold_s):
                return
            yield self._out(time_unix_ns, complete=is_whole)

    def _skip_to(self, lowest: int) -> None:
        """Skips the numbers before this one; their frames are late if they still arrive."""
        first = self.next
        count = self.skipped.count + self.skipped.unseen
        if first is None:
            self.skipped.lowest = lowest
        passed = bisect_left(self._released, lowest)
        for number in self._released[:passed]:
            if first is None:
                self.skipped.lowest, first = number, number + 1
                continue
            if number > first:
                self.skipped.add(first, number)
            first = number + 1
        del self._released[:passed]
        if first is not None and first < lowest:
            self.skipped.add(first, lowest)
        self._missed += self.skipped.count + self.skipped.unseen - count
        self.next = lowest

    def _hole_since_s(self) -> float:
        """Returns when the first frame arrived that waits for an earlier one; computed once per hole."""
        if self._hole is None or self._hole[0] != self.next:
            self._hole = (self.next, self._arrivals[0][0])
        return self._hole[1]

    def _out(self, time_unix_ns: int, *, complete: bool) -> ReadyFrame:
        waiting = self._frames[time_unix_ns]
        self.pop(time_unix_ns)
        self._habits.is_known = True
        missed = 0
        if waiting.sequence is not None and waiting.sequence == self.next:
            self.next += 1
            missed, self._missed = self._missed, 0
            self._pass_released()
        elif waiting.sequence is not None:
            self.skipped.remove(waiting.sequence)
        return ReadyFrame(time_unix_ns, waiting, complete and not waiting.is_cut, missed)
