"""Accounts: sums over the steps and phases of one process, from which the bar of a run is made."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

_MS = 1_000_000
_DENSE, _SHARE = 64, 1 / 32  # every one of the first steps is a knot, then each that is this share further on
_MOST_INSIDE = 4_096
_LONGEST_MS = 1e13


class Times(NamedTuple):
    """What steps took, in milliseconds: waiting for input, hooks (with finalizing), and the rest."""

    waited: float = 0.0
    hooks: float = 0.0
    rest: float = 0.0

    def plus(self, other: Times, sign: float = 1.0) -> Times:
        """Returns the sums; with ``sign`` -1 the differences."""
        return Times(*(mine + sign * its for mine, its in zip(self, other, strict=True)))

    @property
    def total(self) -> float:
        """The whole cycle."""
        return self.waited + self.hooks + self.rest


_NONE = Times()


class StepTimes(NamedTuple):
    """One step.

    Attributes:
        step: its number.
        time_unix_ns: its time, as sent.
        waited_ms: how long it waited for its input; 0 if that was not measured.
        latency_ms: how long it took; None if that was not measured, as without enrichment.
        hooks_ms: the part of the latency in hooks and in finalizing.
    """

    step: int
    time_unix_ns: int
    waited_ms: float
    latency_ms: float | None
    hooks_ms: float


class PhaseTimes(NamedTuple):
    """One phase as it was received. A number is None if its point has not arrived; see the metrics ``esper.phase*``."""

    name: str
    end_unix_ns: int
    total_ms: float | None = None
    inside_ms: float | None = None
    length_ms: float | None = None
    own_ms: float | None = None
    number: int | None = None
    step: int | None = None


@dataclass(slots=True)
class Account:
    """The steps and phases of one process of a run, summed up. Steps are added in their order, phases in any.

    Adding a phase again changes nothing: their sums come as running totals, of which the largest is kept.

    Attributes:
        steps: how many steps there were.
        first: the first step.
        last: the last step.
        sums: times of the steps that had a new number.
        again: times of steps whose number this process had reached before.
        knots: of some steps, the number and ``sums`` up to it; for what later attempts did again.
        phases: by name, the total of own times, and the part of it inside steps.
        inside: own times of phases inside steps, by the step.
        starts: the earliest start of a phase, and the end of start-up; 0 if not known.
        ends: the latest end of a phase; 0 if there is none.
    """

    steps: int = 0
    first: StepTimes | None = None
    last: StepTimes | None = None
    highest: int = -1
    sums: Times = _NONE
    again: Times = _NONE
    knots: list[tuple[int, Times]] = field(default_factory=list)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    inside: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)
    starts: tuple[int, int] = (0, 0)
    ends: int = 0

    def add_step(self, step: StepTimes) -> None:
        """Adds the next step."""
        if step.latency_ms is None:  # the time since the step before is the best estimate
            since_ms = 0.0 if self.last is None else (step.time_unix_ns - self.last.time_unix_ns) / _MS
            times = Times(step.waited_ms, step.hooks_ms, max(since_ms - step.waited_ms - step.hooks_ms, 0.0))
        else:
            hooks_ms = min(step.hooks_ms, step.latency_ms)
            times = Times(step.waited_ms, hooks_ms, step.latency_ms - hooks_ms)
        self.steps += 1
        self.first = self.first or step
        if self.last is None or step.time_unix_ns > self.last.time_unix_ns:
            self.last = step
        if step.step <= self.highest:
            self.again = self.again.plus(times)
            return
        self.highest = step.step
        self.sums = self.sums.plus(times)
        count = len(self.knots)
        if count < _DENSE or self.steps >= (1 + _SHARE) ** (count - _DENSE) * _DENSE:
            self.knots.append((step.step, self.sums))

    def add_phase(self, phase: PhaseTimes) -> None:
        """Adds what is known of a phase."""
        total_ms, inside_ms = self.phases.get(phase.name, (0.0, 0.0))
        self.phases[phase.name] = max(total_ms, phase.total_ms or 0.0), max(inside_ms, phase.inside_ms or 0.0)
        self.ends = max(self.ends, phase.end_unix_ns)
        if phase.step is not None and phase.own_ms is not None and len(self.inside) < _MOST_INSIDE:
            self.inside[phase.name, phase.end_unix_ns] = phase.step, phase.own_ms
        if phase.length_ms is not None:
            start_unix_ns = moved(phase.end_unix_ns, -phase.length_ms)
            earliest, started_up = self.starts
            is_start_up = phase.name == "start_up"
            self.starts = (
                min(earliest or start_unix_ns, start_unix_ns),
                phase.end_unix_ns if is_start_up else started_up,
            )

    @property
    def start_unix_ns(self) -> int:
        """When the process began, as far as is known: start-up, its first phase or its first step."""
        known = [self.starts[0]] if self.starts[0] else []
        if self.first is not None:
            before_ms = self.first.waited_ms + (self._stamped_at_end() * (self.first.latency_ms or 0.0))
            known.append(moved(self.first.time_unix_ns, -before_ms))
        return min(known, default=0)

    @property
    def end_unix_ns(self) -> int:
        """The last time that is known of the process: the end of a step or of a phase."""
        if self.last is None:
            return self.ends
        after_ms = 0.0 if self._stamped_at_end() else self.last.latency_ms or 0.0
        return max(moved(self.last.time_unix_ns, after_ms), self.ends)

    def _stamped_at_end(self) -> bool:
        """Whether steps have the time at which they ended, as those that a trainer has measured itself.

        The end of start-up, where the first step or its wait begins, says which of the two it is.
        """
        first, begun = self.first, self.starts[1]
        if first is None or not begun or not first.latency_ms:
            return False
        since_ms = (first.time_unix_ns - begun) / _MS - first.waited_ms
        return abs(since_ms - first.latency_ms) < abs(since_ms)

    def up_to(self, step: int) -> Times:
        """Returns the sums over the steps up to a number; between two knots, each step has an equal share."""
        if step >= self.highest:
            return self.sums
        place = bisect_right(self.knots, step, key=lambda knot: knot[0])
        low, before = self.knots[place - 1] if place else (step, Times())
        if not place or low == step:
            return before
        high, after = self.knots[place] if place < len(self.knots) else (self.highest, self.sums)
        share = (step - low) / (high - low)
        return before.plus(after.plus(before, -1.0), share)

    def inside_up_to(self, step: int) -> float:
        """Returns how long phases inside the steps up to a number took."""
        return sum(own_ms for in_step, own_ms in self.inside.values() if in_step <= step)

    def copied(self) -> Account:
        """Returns an account with the same steps, to which phases can be added."""
        return replace(self, knots=list(self.knots), phases=dict(self.phases), inside=dict(self.inside))

    def as_json(self) -> dict[str, Any]:
        """Returns the sums over steps, as plain values; phases are stored one by one."""
        return {
            "steps": self.steps,
            "first": self.first,
            "last": self.last,
            "highest": self.highest,
            "sums": self.sums,
            "again": self.again,
            "knots": self.knots,
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Account:
        """Does the reverse.

        Raises:
            ValueError, TypeError, KeyError: these are not such values.
        """
        first, last = (None if said[name] is None else _step_of(*said[name]) for name in ("first", "last"))
        knots = [(int(step), Times(*map(float, times))) for step, times in said["knots"]]
        sums, again = (Times(*map(float, said[name])) for name in ("sums", "again"))
        return cls(int(said["steps"]), first, last, int(said["highest"]), sums, again, knots)


def moved(time_unix_ns: int, by_ms: float) -> int:
    """Returns a time later or earlier by so much, within what a message can say: anybody may send durations."""
    by_ms = min(max(by_ms, -_LONGEST_MS), _LONGEST_MS)
    return min(max(time_unix_ns + round(by_ms * _MS), 0), 2**63 - 1)


def _step_of(step: Any, time_unix_ns: Any, waited_ms: Any, latency_ms: Any, hooks_ms: Any) -> StepTimes:
    """Returns a step as it was stored.

    Raises:
        ValueError, TypeError: these are not the numbers of a step.
    """
    if not all(type(each) is int and 0 <= each < 2**64 for each in (step, time_unix_ns)):
        raise ValueError("not a step")
    latency_ms = None if latency_ms is None else float(latency_ms)
    return StepTimes(step, time_unix_ns, float(waited_ms), latency_ms, float(hooks_ms))
