"""Queue: frames of one writer that are not released yet, and when each is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from esper_otel.gateway.decoded import Sender
from esper_otel.gateway.parts import Part, merged
from esper_otel.gateway.skipped import Skipped
from esper_otel.leyline.numbers import UINT64_LIMIT, whole

_MANY_PARTS = 64


@dataclass(slots=True, eq=False)
class Waiting:
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
        differing: values that came twice and were not the same; the first one counts.
    """

    sender: Sender
    first_s: float
    last_s: float
    received_unix_ns: int
    parts: list[Part] = field(default_factory=list)
    points: int = 0
    sequence: int | None = None
    expected: int | None = None
    differing: int = 0

    def add(self, part: Part) -> None:
        """Takes a further part."""
        self.parts.append(part)
        self.points += len(part.numbers)
        shape = part.shape
        if self.sequence is None and shape.sequence is not None:
            self.sequence = whole(part.number(shape.sequence), UINT64_LIMIT) or None
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


class Ready(NamedTuple):
    """A frame whose turn it is."""

    time_unix_ns: int
    waiting: Waiting
    complete: bool


class Queue:
    """Frames wait here until they are whole and those before them are out, or for as long as ``hold_s``.

    A frame that says its number waits for its points and for the frames before it. One that does not is a plain
    sender's, and goes ``linger_s`` after its last point; from a sender that has said numbers it is a part of a
    frame, and waits for the rest.

    Args:
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long one waits that does not say how many points it has.
        most: how many frames wait; when there are more the oldest goes at once.
    """

    def __init__(self, *, hold_s: float, linger_s: float, most: int) -> None:
        self._hold_s = hold_s
        self._linger_s = linger_s
        self._most = most
        self._frames: dict[int, Waiting] = {}
        self._numbered: dict[int, int] = {}
        self._late: dict[int, None] = {}
        self._unnumbered: dict[int, None] = {}
        self._hole: tuple[int | None, float] | None = None
        self.next: int | None = None
        self.skipped = Skipped()
        self.due_s: float | None = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def points(self) -> int:
        """Points of all waiting frames."""
        return sum(waiting.points for waiting in self._frames.values())

    @property
    def since_s(self) -> float | None:
        """When the first part came of what waits here; None when nothing waits."""
        return min((waiting.first_s for waiting in self._frames.values()), default=None)

    def get(self, time_unix_ns: int) -> Waiting | None:
        """The frame of this time, if it waits here."""
        return self._frames.get(time_unix_ns)

    def time_of(self, sequence: int) -> int | None:
        """The time of the waiting frame with this number."""
        return self._numbered.get(sequence)

    def seeds(self) -> set[str]:
        """The seeds of waiting frames."""
        return {seed for waiting in self._frames.values() for part in waiting.parts for seed in part.shape.ids}

    def put(self, time_unix_ns: int, waiting: Waiting) -> None:
        """Takes a frame, or notes that its number has become known."""
        self._frames[time_unix_ns] = waiting
        if waiting.sequence is None:
            self._unnumbered[time_unix_ns] = None
            return
        self._unnumbered.pop(time_unix_ns, None)
        if self.next is not None and waiting.sequence < self.next:
            self._late[time_unix_ns] = None
        else:
            self._numbered[waiting.sequence] = time_unix_ns

    def pop(self, time_unix_ns: int) -> Waiting | None:
        """Gives a frame away."""
        waiting = self._frames.pop(time_unix_ns, None)
        if waiting is not None:
            self._unnumbered.pop(time_unix_ns, None)
            self._late.pop(time_unix_ns, None)
            if waiting.sequence is not None and self._numbered.get(waiting.sequence) == time_unix_ns:
                del self._numbered[waiting.sequence]
        return waiting

    def restore(self, sequence: int) -> None:
        """Notes that a frame was released in an earlier life, and those between it and the one before were not."""
        if sequence:
            if self.next is not None and sequence > self.next:
                self.skipped.add(self.next, sequence)
            self.next = max(self.next or 0, sequence + 1)

    def ready(self, now_s: float, lacks: Callable[[int, Waiting], bool], *, all_now: bool = False) -> Iterator[Ready]:
        """The frames whose turn it is, in order; afterwards ``due_s`` says when to ask again.

        Args:
            now_s: the monotonic clock.
            lacks: whether a whole frame should wait for something else; asked when all before it have been taken.
            all_now: whether everything goes at once, whole or not.
        """
        due_s: list[float] = []

        def is_over(since_s: float, wait_s: float) -> bool:
            if all_now or now_s >= since_s + wait_s or len(self._frames) > self._most:
                return True
            due_s.append(since_s + wait_s)
            return False

        yield from self._in_order(is_over, lacks)
        for time_unix_ns in list(self._late):
            waiting = self._frames[time_unix_ns]
            if waiting.is_whole() or is_over(waiting.first_s, self._hold_s):
                yield self._out(time_unix_ns, complete=waiting.is_whole())
        is_plain = self.next is None and not self._numbered
        for time_unix_ns in sorted(self._unnumbered):
            waiting = self._frames[time_unix_ns]
            lingered = is_plain and is_over(waiting.last_s, self._linger_s)
            if lingered or is_over(waiting.first_s, self._hold_s):
                yield self._out(time_unix_ns, complete=is_plain)
            elif is_plain:
                break  # those after it must not overtake it
        self.due_s = min(due_s, default=None)

    def _in_order(
        self, is_over: Callable[[float, float], bool], lacks: Callable[[int, Waiting], bool]
    ) -> Iterator[Ready]:
        while self._numbered:
            time_unix_ns = None if self.next is None else self._numbered.get(self.next)
            if time_unix_ns is None:
                lowest = min(self._numbered) if self._is_hole_new() or self.next is None else None
                if lowest != 1 and not is_over(self._hole_since_s(), self._hold_s):
                    return
                lowest = min(self._numbered)
                if self.next is not None:
                    self.skipped.add(self.next, lowest)
                self.next = lowest
                continue
            waiting = self._frames[time_unix_ns]
            is_whole = waiting.is_whole()
            goes = is_whole and not lacks(time_unix_ns, waiting)
            if not goes and not is_over(waiting.first_s, self._hold_s):
                return
            yield self._out(time_unix_ns, complete=is_whole)

    def _is_hole_new(self) -> bool:
        return self._hole is None or self._hole[0] != self.next

    def _hole_since_s(self) -> float:
        """When the first frame came that waits for one before it. Looked for once a hole, there may be many."""
        if self._hole is None or self._hole[0] != self.next:
            first_s = min(self._frames[time_unix_ns].first_s for time_unix_ns in self._numbered.values())
            self._hole = (self.next, first_s)
        return self._hole[1]

    def _out(self, time_unix_ns: int, *, complete: bool) -> Ready:
        waiting = self._frames[time_unix_ns]
        self.pop(time_unix_ns)
        if waiting.sequence is not None and waiting.sequence == self.next:
            self.next += 1
        return Ready(time_unix_ns, waiting, complete)
