"""Phases: intervals of a run that are not steps, such as checkpoints, and the log that keeps those of a session."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from esper_otel.native import threads

START_UP = "start_up"
OTHER = "other"
MOST_NAMES = 64
_MOST_WAITING = 10_000
_MS = 1_000_000
_FIELDS = 8


class Phase(NamedTuple):
    """One phase that has ended.

    Attributes:
        number: 1, 2, ... within (attempt, rank), without holes.
        name: its name.
        start_unix_ns: when it began.
        end_unix_ns: when it ended; of two phases of one name, the later one ends in a later millisecond.
        own_ms: the time for which it alone held up training: without the phases, steps and waits for input inside it.
        step: the step inside which it lay; None if it was outside steps.
        total_ms: own times of all phases of this name so far.
        inside_ms: the part of ``total_ms`` that lay inside steps.
    """

    number: int
    name: str
    start_unix_ns: int
    end_unix_ns: int
    own_ms: float
    step: int | None
    total_ms: float
    inside_ms: float

    @property
    def length_ms(self) -> float:
        """From its start to its end."""
        return (self.end_unix_ns - self.start_unix_ns) / _MS


class PhaseLog:
    """The phases of a session, until they are delivered. Only the newest are kept if very many wait.

    Threads: any.

    Args:
        start_unix_ns: when the session began.
        most: how many phases may wait.

    Attributes:
        start_unix_ns: when the totals were 0.
        added: called with each new phase, on the thread that ended it; the lock is held.
        last: number of the newest phase; 0 before the first.
        dropped: how many phases were dropped before they were delivered.
    """

    def __init__(self, start_unix_ns: int = 0, most: int = _MOST_WAITING) -> None:
        self.start_unix_ns: int = start_unix_ns
        self.added: Callable[[Phase], None] | None = None
        self.last: int = 0
        self.dropped: int = 0
        self._most = most
        self._lock = threads().RLock()
        self._given: deque[tuple[str, int, int, float, int | None]] = deque()
        self._is_adding = self._is_over = False
        self._waiting: deque[Phase] = deque()
        self._newest: dict[str, Phase] = {}

    def add(self, name: str, start_unix_ns: int, end_unix_ns: int, own_ms: float, step: int | None) -> None:
        """Adds a phase that has ended; after 64 names, further ones are counted as ``other``."""
        with self._lock:
            self._given.append((name, start_unix_ns, end_unix_ns, own_ms, step))
            if self._is_adding:  # a signal handler, amid the call below on this thread, which then adds this one, too
                return
            self._is_adding = True
            try:
                while self._given:
                    self._add(*self._given.popleft())
            finally:
                self._is_adding = False

    def _add(self, name: str, start_unix_ns: int, end_unix_ns: int, own_ms: float, step: int | None) -> None:
        own_ms = own_ms if 0.0 <= own_ms < math.inf else 0.0  # one NaN would make the total NaN for good
        if name not in self._newest and len(self._newest) >= MOST_NAMES:
            name = OTHER
        before = self._newest.get(name)
        total_ms, inside_ms = (before.total_ms, before.inside_ms) if before is not None else (0.0, 0.0)
        if before is not None and end_unix_ns // _MS <= before.end_unix_ns // _MS:
            shift_ns = (before.end_unix_ns // _MS + 1) * _MS - end_unix_ns
            start_unix_ns, end_unix_ns = start_unix_ns + shift_ns, end_unix_ns + shift_ns
        inside_ms += 0.0 if step is None else own_ms
        phase = Phase(self.last + 1, name, start_unix_ns, end_unix_ns, own_ms, step, total_ms + own_ms, inside_ms)
        self._newest[name] = phase
        self.last += 1
        if self._is_over:
            self.dropped += 1
            return
        self._waiting.append(phase)
        if len(self._waiting) > self._most:
            self._waiting.popleft()
            self.dropped += 1
        if self.added is not None:
            self.added(phase)

    def end(self) -> None:
        """Drops and counts the phases that end from now on, since nothing sends them or writes them to the disk."""
        with self._lock:
            self._is_over, self.added = True, None

    def waiting(self, until_unix_ns: int | None, most: int) -> list[Phase]:
        """Returns the oldest phases that wait, up to the first that ended after ``until_unix_ns``; None: all."""
        found: list[Phase] = []
        with self._lock:
            for phase in self._waiting:
                if len(found) == most or (until_unix_ns is not None and phase.end_unix_ns > until_unix_ns):
                    break
                found.append(phase)
        return found

    def totals(self) -> dict[str, float]:
        """Returns the own times of all phases so far, in milliseconds by name."""
        with self._lock:
            return {name: phase.total_ms for name, phase in self._newest.copy().items()}

    @property
    def count(self) -> int:
        """How many phases wait."""
        return len(self._waiting)

    def drop(self, number: int) -> None:
        """Drops the phases up to this number, and counts them."""
        with self._lock:
            self.dropped += sum(phase.number <= number for phase in self._waiting)
        self.delivered(number)

    def delivered(self, number: int) -> None:
        """Forgets the phases up to this number."""
        with self._lock:
            while self._waiting and self._waiting[0].number <= number:
                self._waiting.popleft()


def line_of(phase: Phase) -> bytes:
    """Returns a phase as a line of JSON, for files."""
    return json.dumps(phase, separators=(",", ":")).encode() + b"\n"


def phases_in(content: bytes, after: int) -> Iterator[Phase]:
    """Yields the phases of a file with a number above ``after``, in order; a line that is not a phase is skipped."""
    for line in content.splitlines():
        try:
            phase = _checked(json.loads(line))
        except (ValueError, TypeError):
            continue
        if phase.number > after:
            after = phase.number
            yield phase


def _checked(fields: object) -> Phase:
    if not isinstance(fields, list) or len(fields) != _FIELDS:
        raise ValueError("not a phase")
    number, name, start, end, own_ms, step, total_ms, inside_ms = fields
    if type(name) is not str or not all(type(each) is int for each in (number, start, end)):
        raise ValueError("not a phase")
    if step is not None and type(step) is not int:
        raise ValueError("not a phase")
    return Phase(number, name, start, end, float(own_ms), step, float(total_ms), float(inside_ms))
