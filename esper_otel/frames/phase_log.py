"""Phases: intervals of a run that are not steps, such as checkpoints, and the journal that keeps those of a session."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

from esper_otel.frames.journal import Journal

START_UP = "start_up"
CHECKPOINT = "checkpoint"
OTHER = "other"
MOST_NAMES = 64
_MS = 1_000_000
_FIELDS = 8

# A name, start and end in Unix nanoseconds, own milliseconds, and the step inside which it lay.
_Given: TypeAlias = tuple[str, int, int, float, int | None]


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

    @property
    def due_unix_ns(self) -> int:
        """See ``Numbered``."""
        return self.end_unix_ns


class PhaseLog(Journal[Phase, _Given]):
    """The phases of a session, until they are delivered: see ``Journal``. ``start_unix_ns`` is when totals were 0."""

    def __init__(self, start_unix_ns: int = 0, most: int = 10_000) -> None:
        super().__init__(start_unix_ns, most)
        self._newest: dict[str, Phase] = {}

    def add(self, name: str, start_unix_ns: int, end_unix_ns: int, own_ms: float, step: int | None) -> None:
        """Adds a phase that has ended; after 64 names, further ones are counted as ``other``."""
        self.add_all([(name, start_unix_ns, end_unix_ns, own_ms, step)])

    def _entry(self, number: int, given: _Given) -> Phase:
        name, start_unix_ns, end_unix_ns, own_ms, step = given
        own_ms = own_ms if 0.0 <= own_ms < math.inf else 0.0  # one NaN would make the total NaN for good
        if name not in self._newest and len(self._newest) >= MOST_NAMES:
            name = OTHER
        before = self._newest.get(name)
        total_ms, inside_ms = (before.total_ms, before.inside_ms) if before is not None else (0.0, 0.0)
        if before is not None and end_unix_ns // _MS <= before.end_unix_ns // _MS:
            shift_ns = (before.end_unix_ns // _MS + 1) * _MS - end_unix_ns
            start_unix_ns, end_unix_ns = start_unix_ns + shift_ns, end_unix_ns + shift_ns
        inside_ms += 0.0 if step is None else own_ms
        phase = Phase(number, name, start_unix_ns, end_unix_ns, own_ms, step, total_ms + own_ms, inside_ms)
        self._newest[name] = phase
        return phase

    def totals(self) -> dict[str, float]:
        """Returns the own times of all phases so far, in milliseconds by name."""
        with self._lock:
            return {name: phase.total_ms for name, phase in self._newest.copy().items()}


def checked_phase(fields: object) -> Phase:
    """Returns the phase that a line of a file describes.

    Raises:
        ValueError: it describes none.
        TypeError: as above.
    """
    if not isinstance(fields, list) or len(fields) != _FIELDS:
        raise ValueError("not a phase")
    number, name, start, end, own_ms, step, total_ms, inside_ms = fields
    whole = (number, start, end) if step is None else (number, start, end, step)
    if type(name) is not str or not all(type(each) is int and 0 <= each < 2**63 for each in whole):
        raise ValueError("not a phase")
    if not all(0.0 <= each < math.inf for each in (own_ms, total_ms, inside_ms)):
        raise ValueError("not a phase")
    return Phase(number, name, start, end, float(own_ms), step, float(total_ms), float(inside_ms))
