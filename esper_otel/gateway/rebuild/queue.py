"""Queue: frames of one writer that are not released yet, and when each is."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from esper_otel.gateway.items import Place
from esper_otel.gateway.rebuild.habits import Habits
from esper_otel.gateway.rebuild.parts import Part, merged
from esper_otel.gateway.receive.request import PointSender
from esper_otel.leyline.numbers import UINT64_LIMIT, whole

# Numbers of frames are sent as doubles: from here on two of them can be the same.
SEQUENCE_LIMIT = 2**53

_MANY_PARTS = 64
_MOST_RANGES = 1_000

# From the first number to before the second.
Hole: TypeAlias = tuple[int, int]


@dataclass(slots=True, eq=False)
class WaitingFrame:
    """A frame that is not released yet.

    Attributes:
        sender: who sent its first part.
        first_s: when its first part came, on the monotonic clock.
        last_s: when its last part came.
        received_unix_ns: the same in Unix nanoseconds.
        parts: what came of it.
        points: how many points these have.
        sequence: its number, once it is known.
        expected: how many points it has, once that is known.
        has_step: whether its global step is known.
        has_epoch: whether its epoch is.
        differing: values that came twice and were not the same; the first one counts.
        is_cut: whether points of it were refused, which would have made too many seeds.
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
        """Takes a further part."""
        self.parts.append(part)
        self.points += len(part.numbers)
        shape = part.shape
        self.has_step = self.has_step or shape.step is not None
        self.has_epoch = self.has_epoch or shape.epoch is not None
        if self.sequence is None and shape.sequence is not None:
            self.sequence = whole(part.number(shape.sequence), SEQUENCE_LIMIT) or None
        if self.expected is None and shape.points is not None:
            self.expected = whole(part.number(shape.points), UINT64_LIMIT)
        if len(self.parts) > _MANY_PARTS:
            self.joined()

    def joined(self) -> Part:
        """All parts as one."""
        if len(self.parts) > 1:
            part, differing = merged(self.parts)
            self.differing += differing
            self.parts, self.points = [part], len(part.numbers)
        return self.parts[0]

    def is_whole(self) -> bool:
        """Whether every point of the frame is there."""
        if self.expected is None or self.points < self.expected:
            return False
        self.joined()  # of what came twice, one counts
        return self.points >= self.expected


class ReadyFrame(NamedTuple):
    """A frame whose turn it is."""

    time_unix_ns: int
    waiting: WaitingFrame
    complete: bool


class SkippedNumbers:
    """The numbers that have not come: those before the lowest that has, and holes after it.

    A gateway that joins a run late never gets the numbers before the lowest one: they are taken when they come, and
    are not counted as missing. Of very many holes the oldest are forgotten: they stay counted, and what comes of them
    is not taken any more.

    Attributes:
        lowest: the lowest number that has come; None before the first.
        count: how many numbers are missing: those that were skipped after the lowest one and have not come.
    """

    def __init__(self) -> None:
        self.lowest: int | None = None
        self.count = 0
        self._holes: list[Hole] = []

    @property
    def holes(self) -> tuple[Hole, ...]:
        """The holes that are known, in order."""
        return tuple(self._holes)

    @property
    def unseen(self) -> int:
        """How many numbers are before the lowest one."""
        return 0 if self.lowest is None else max(self.lowest - 1, 0)

    def __contains__(self, number: int) -> bool:
        return self._hole(number) is not None

    def _hole(self, number: int) -> Hole | None:
        """The hole that a number is in."""
        if self.lowest is None:
            return None
        if number < self.lowest:
            return (1, self.lowest)
        place = bisect_right(self._holes, number, key=lambda hole: hole[0]) - 1
        return self._holes[place] if place >= 0 and number < self._holes[place][1] else None

    def around(self, number: int) -> tuple[int, int]:
        """The numbers next to the hole that this one is in, both of which have come; 0 when there is none before."""
        hole = self._hole(number)
        assert hole is not None
        return hole[0] - 1, hole[1]

    def add(self, first: int, behind: int) -> None:
        """Notes the numbers from ``first``, which is higher than those noted before, to before ``behind``."""
        self._holes.append((first, behind))
        self.count += behind - first
        del self._holes[:-_MOST_RANGES]

    def remove(self, number: int) -> None:
        """The frame of this number has come after all."""
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
        """Goes on from what was known in an earlier life."""
        self.lowest, self._holes, self.count = lowest, list(holes), count


class Queue:
    """Frames wait here until they are whole and those before them are out, or for as long as ``hold_s``.

    A frame that says its number waits for its points and for the frames before it. One that does not is a plain
    sender's, and goes ``linger_s`` after its last point; but it waits for ``hold_s`` when it lacks what its sender
    says in other frames, and the first one when it has no global step or epoch: they may come in a later request.

    Args:
        habits: what the writer says in its frames.
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long one waits that does not say how many points it has.
        most: how many frames wait; when there are more the oldest goes at once.

    Attributes:
        next: the number of the frame whose turn it is; None before the first.
        skipped: the numbers before it that have not come.
        due_s: when ``ready`` must be asked again.
        points: of all waiting frames, doubled ones included.
    """

    def __init__(self, habits: Habits, *, hold_s: float, linger_s: float, most: int) -> None:
        self._habits = habits
        self._hold_s = hold_s
        self._linger_s = linger_s
        self._most = most
        self._frames: dict[int, WaitingFrame] = {}
        self._counted: dict[int, int] = {}  # points of each
        self._is_in_order, self._last_s = True, -math.inf  # whether the first frame came first
        self._numbered: dict[int, int] = {}
        self._late: dict[int, int] = {}
        self._unnumbered: dict[int, None] = {}
        self._released: set[int] = set()
        self._hole: tuple[int | None, float] | None = None
        self.next: int | None = None
        self.skipped = SkippedNumbers()
        self.due_s: float | None = None
        self.points = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def since_s(self) -> float | None:
        """When the first part came of what waits here; None when nothing waits."""
        if self._is_in_order:
            return next((waiting.first_s for waiting in self._frames.values()), None)
        return min(waiting.first_s for waiting in self._frames.values())

    def get(self, time_unix_ns: int) -> WaitingFrame | None:
        """The frame of this time, if it waits here."""
        return self._frames.get(time_unix_ns)

    def time_of(self, sequence: int) -> int | None:
        """The time of the waiting frame with this number."""
        return self._numbered.get(sequence) or self._late.get(sequence)

    def seeds(self) -> set[str]:
        """The seeds of waiting frames."""
        return {seed for waiting in self._frames.values() for part in waiting.parts for seed in part.shape.ids}

    def put(self, time_unix_ns: int, waiting: WaitingFrame) -> None:
        """Takes a frame, or notes that its number has become known."""
        self._is_in_order &= time_unix_ns in self._frames or waiting.first_s >= self._last_s
        self._last_s = max(self._last_s, waiting.first_s)
        self._frames[time_unix_ns] = waiting
        self.count(time_unix_ns)
        if waiting.sequence is None:
            self._unnumbered[time_unix_ns] = None
            return
        self._unnumbered.pop(time_unix_ns, None)
        of_turn = self._late if self.is_late(waiting.sequence) else self._numbered
        of_turn[waiting.sequence] = time_unix_ns

    def count(self, time_unix_ns: int) -> None:
        """Notes that the frame of this time has other points than before."""
        points = self._frames[time_unix_ns].points
        self.points += points - self._counted.get(time_unix_ns, 0)
        self._counted[time_unix_ns] = points

    def is_late(self, sequence: int) -> bool:
        """Whether the turn of this number is over."""
        return self.next is not None and sequence < self.next

    def note_released(self, sequence: int) -> None:
        """Takes the number of a frame that was released before its number was known."""
        if self.is_late(sequence):
            self.skipped.remove(sequence)
        elif sequence not in self._numbered:
            self._released.add(sequence)
            if len(self._released) > self._most:
                self._released.remove(min(self._released))
            self._pass_released()

    def _pass_released(self) -> None:
        """Goes on behind numbers that were released already."""
        while self.next in self._released:
            self._released.remove(self.next)
            self.next += 1

    def pop(self, time_unix_ns: int) -> WaitingFrame | None:
        """Gives a frame away."""
        waiting = self._frames.pop(time_unix_ns, None)
        self.points -= self._counted.pop(time_unix_ns, 0)
        if not self._frames:
            self._is_in_order, self._last_s = True, -math.inf
        if waiting is not None:
            self._unnumbered.pop(time_unix_ns, None)
            for of_turn in (self._numbered, self._late):
                if waiting.sequence is not None and of_turn.get(waiting.sequence) == time_unix_ns:
                    del of_turn[waiting.sequence]
        return waiting

    def restore(self, sequence: int) -> None:
        """Notes that a frame was released in an earlier life, and those between it and the one before were not."""
        if sequence:
            if self.next is None:
                self.skipped.lowest = 1  # those before it came too, or were counted
            elif sequence > self.next:
                self.skipped.add(self.next, sequence)
            self.next = max(self.next or 0, sequence + 1)

    def restore_place(self, place: Place) -> None:
        """Goes on from what was known in an earlier life; that counts more than what its frames tell."""
        self.next = place.next
        self.skipped.restore(place.lowest, place.holes, place.missing)

    def ready(self, now_s: float, *, all_now: bool = False) -> Iterator[ReadyFrame]:
        """The frames whose turn it is, in order; afterwards ``due_s`` says when to ask again.

        Args:
            now_s: the monotonic clock.
            all_now: whether everything goes at once, whole or not.
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
        """The frames without a number."""
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
                lowest = min(self._numbered) if self._is_hole_new() or self.next is None else None
                if lowest != 1 and not is_over(self._hole_since_s(), self._hold_s):
                    return
                self._skip_to(min(self._numbered))
                continue
            waiting = self._frames[time_unix_ns]
            is_whole = waiting.is_whole()
            if not is_whole and not is_over(waiting.first_s, self._hold_s):
                return
            yield self._out(time_unix_ns, complete=is_whole)

    def _skip_to(self, lowest: int) -> None:
        """Gives up the numbers before this one for now: what comes of them is late."""
        first = self.next
        if first is None:
            self.skipped.lowest = lowest
        for number in sorted(each for each in self._released if each < lowest):
            self._released.remove(number)
            if first is None:
                self.skipped.lowest, first = number, number + 1
                continue
            if number > first:
                self.skipped.add(first, number)
            first = number + 1
        if first is not None and first < lowest:
            self.skipped.add(first, lowest)
        self.next = lowest

    def _is_hole_new(self) -> bool:
        return self._hole is None or self._hole[0] != self.next

    def _hole_since_s(self) -> float:
        """When the first frame came that waits for one before it. Looked for once a hole, there may be many."""
        if self._hole is None or self._hole[0] != self.next:
            first_s = min(self._frames[time_unix_ns].first_s for time_unix_ns in self._numbered.values())
            self._hole = (self.next, first_s)
        return self._hole[1]

    def _out(self, time_unix_ns: int, *, complete: bool) -> ReadyFrame:
        waiting = self._frames[time_unix_ns]
        self.pop(time_unix_ns)
        self._habits.is_known = True
        if waiting.sequence is not None and waiting.sequence == self.next:
            self.next += 1
            self._pass_released()
        elif waiting.sequence is not None:
            self.skipped.remove(waiting.sequence)
        return ReadyFrame(time_unix_ns, waiting, complete and not waiting.is_cut)
