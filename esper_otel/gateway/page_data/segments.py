"""Segments: the parts of a rank's curve in which step numbers only grow, and which of their steps were done again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from esper_otel.frames.frame import Frame
from esper_otel.gateway.items import Origin

# Beyond this, steps whose numbers go back stay in the segment before, and then further attempts in the newest segment:
# they are shown, but not told apart.
_MOST_BACK, _MOST = 64, 512


@dataclass(slots=True)
class Segment:
    """A part of a curve.

    Attributes:
        origin: the writer.
        why: why it begins: ``start``, ``resumed`` (a new attempt), ``back`` (the step number went back) or ``second``
            (another process that claims the same rank).
        first_unix_ns: time of its first step.
        first_step: its smallest step number.
        last_step: its largest step number.
        again_from: from this step on, its steps were done again by a later segment; None if there is no such step.
    """

    origin: Origin
    why: str
    first_unix_ns: int
    first_step: int
    last_step: int
    again_from: int | None = None


@dataclass(slots=True)
class _WriterSegments:
    """The segments of one writer, by time, and its newest step."""

    places: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    last_unix_ns: int = 0
    last_step: int = -1


class Stretch(NamedTuple):
    """Consecutive frames that belong in one segment: those from ``start`` to before ``stop``."""

    segment: int
    start: int
    stop: int


class Segments:
    """The segments of one rank, in order of appearance.

    Attributes:
        all: the segments.
    """

    def __init__(self) -> None:
        self.all: list[Segment] = []
        self._writers: dict[Origin, _WriterSegments] = {}

    def divide(self, origin: Origin, frames: Sequence[Frame], *, is_known: bool = False) -> list[Stretch]:
        """Returns which segments the frames of one writer belong in.

        Args:
            origin: the writer.
            frames: some of its frames whose step numbers are known, in order of arrival.
            is_known: whether all of them were divided before; then nothing changes.
        """
        stretches: list[Stretch] = []
        begun = 0
        segment = -1
        for place, frame in enumerate(frames):
            found = self._place(origin, frame, is_known=is_known)
            if found != segment:
                if segment >= 0:
                    stretches.append(Stretch(segment, begun, place))
                segment, begun = found, place
        if segment >= 0:
            stretches.append(Stretch(segment, begun, len(frames)))
        return stretches

    def _place(self, origin: Origin, frame: Frame, *, is_known: bool) -> int:
        writer = self._writers.setdefault(origin, _WriterSegments())
        step, time_unix_ns = frame.global_step, frame.time_unix_ns
        is_newest = time_unix_ns > writer.last_unix_ns
        if is_newest and not is_known:
            if not writer.places or (step < writer.last_step and len(self.all) < _MOST_BACK):
                self._begin(origin, writer, step, time_unix_ns)
            writer.last_unix_ns, writer.last_step = time_unix_ns, step
        if not writer.places:  # possible if the frames of a range are read that were dropped before
            self._begin(origin, writer, step, time_unix_ns)
        found = writer.places[max(bisect_right(writer.begins, time_unix_ns) - 1, 0)]
        segment = self.all[found]
        if step < segment.first_step:
            segment.first_step = step
            self._find_again()
        segment.last_step = max(segment.last_step, step)
        return found

    def _begin(self, origin: Origin, writer: _WriterSegments, step: int, time_unix_ns: int) -> None:
        if len(self.all) >= _MOST:
            writer.places, writer.begins = [_MOST - 1], [time_unix_ns]
            return
        why = "back" if writer.places else "start"
        others = [segment.origin for segment in self.all]
        if not writer.places and others:
            is_second = any(other.attempt == origin.attempt for other in others)
            why = "second" if is_second else "resumed"
        writer.places.append(len(self.all))
        writer.begins.append(time_unix_ns)
        self.all.append(Segment(origin, why, time_unix_ns, step, step))
        self._find_again()

    def _find_again(self) -> None:
        """Finds out from which step on the steps of each segment were done again by a later one."""
        lowest: int | None = None
        of_later: dict[str, int] = {}  # by writer, within an attempt
        attempt = None
        of_attempt: int | None = None
        for segment in sorted(self.all, key=attrgetter("origin.attempt", "first_unix_ns"), reverse=True):
            if segment.origin.attempt != attempt:
                attempt = segment.origin.attempt
                lowest, of_attempt = _least(lowest, of_attempt), None
                of_later = {}
            writer = segment.origin.writer
            segment.again_from = _least(lowest, of_later.get(writer))
            of_later[writer] = (
                segment.first_step if writer not in of_later else min(of_later[writer], segment.first_step)
            )
            of_attempt = _least(of_attempt, segment.first_step)

    def attempts(self) -> dict[int, int]:
        """Returns the attempts, each with its number: 1, 2, ..."""
        known = sorted({segment.origin.attempt for segment in self.all})
        return {attempt: number for number, attempt in enumerate(known, 1)}


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
