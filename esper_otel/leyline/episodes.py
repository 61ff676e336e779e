"""Episodes: a risk signal that is raised in many steps is one thing that began, goes on, and ends."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from esper_otel.leyline.risk import RULES, Signal

# A signal ends after this many steps without it. Values of single steps vary, so fewer steps would split one episode
# into many; a run of a second per step still learns of the end within seconds.
QUIET_STEPS = 10
# A signal whose metric is read about once a second must also be absent for this time, because in a fast run ten steps
# have the same reading.
QUIET_S = 10.0
# A value that is this many times the worst one that was announced makes an episode escalate.
WORSE_TIMES = 2.0
# So many of a sender's latest steps are remembered, to recognise corrections and steps that arrive late.
_REMEMBERED = 16
_MOST_SENDERS = 10_000

_LEVELS = ("NOTE", "WARN", "HIGH", "CRITICAL")
_ROUTES = ("", "OPTIMIZER", "PAUSE")
_SAMPLED = frozenset(rule.name for rule in RULES if rule.is_sampled)


class StepSender(NamedTuple):
    """Where steps come from. Steps of different senders are never in the same episode.

    Attributes:
        rank: the process within the run.
        attempt: which start of the run; a higher one ends the episodes of lower ones of the same rank.
        writer: distinguishes processes with the same rank and attempt.
    """

    rank: int = 0
    attempt: int = 0
    writer: str = ""


_ONLY = StepSender()


class Episode(NamedTuple):
    """A signal from the first to the last step that raised it.

    Attributes:
        number: identifies the episode; higher for one that began later.
        sender: the sender of the steps.
        name: the signal's name.
        level: the highest so far: ``NOTE``, ``WARN``, ``HIGH`` or ``CRITICAL``.
        first: the first step with the signal.
        last: the last step with the signal so far.
        times: number of steps with the signal.
        calm: number of steps between the first and the last that did not raise it.
        worst: the largest value so far; NaN if the signal has none.
        worst_step: the step with the largest value.
        reason: the reason given by the step with the largest value.
        route: ``PAUSE`` if any step was routed there, else ``OPTIMIZER``.
        goes_on: whether the signal has not ended as far as is known.
    """

    number: int
    sender: StepSender
    name: str
    level: str
    first: int
    last: int
    times: int
    calm: int
    worst: float
    worst_step: int
    reason: str
    route: str
    goes_on: bool

    def __str__(self) -> str:
        """One line for people, such as ``cpu_pressure_high, steps 12 to 340, worst 100``."""
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        some = f" ({self.times} of {self.times + self.calm})" if self.calm else ""
        worst = "" if math.isnan(self.worst) else f", worst {self.worst:.4g}"
        return f"{self.name}, {steps}{some}{worst}{', goes on' if self.goes_on else ''}"


class EpisodeChange(NamedTuple):
    """What a step has changed.

    Attributes:
        kind: ``entered``, ``escalated`` (the level rose, the route became PAUSE, or the value is twice what was
            announced) or ``left``.
        episode: the episode after the change.
    """

    kind: str
    episode: Episode


class Episodes:
    """The episodes of one run, from the signals of its steps as they arrive.

    A signal enters with the first step that raises it. It leaves after ``QUIET_STEPS`` steps without it, and if its
    metric is sampled, not before ``QUIET_S`` seconds have passed; until then it may return and is the same episode.
    Steps are counted as they arrive, not by their numbers, so steps that are missing or recorded now and then make no
    difference. A correction of a step (its number and its time again) only adds what the step did not have before. A
    step that arrives late joins the episode that it belongs to, and never ends one. If step numbers go back while time
    goes on, the steps count as new ones.

    Threads: the caller makes sure that one thread at a time uses it.

    Args:
        most: how many episodes to keep. The oldest are dropped first, those that are over before those that go on.

    Attributes:
        dropped: number of episodes that were dropped.
    """

    def __init__(self, *, most: int = 1000) -> None:
        self.dropped: int = 0
        self._most = max(most, 1)
        self._count = 0
        self._kept: dict[int, _GrowingEpisode] = {}
        self._over: dict[int, _GrowingEpisode] = {}  # those of them that are over
        self._tracks: OrderedDict[StepSender, _SenderHistory] = OrderedDict()
        self._attempts: dict[int, int] = {}  # the highest of each rank

    def note(
        self, step: int, signals: Sequence[Signal], *, time_s: float, sender: StepSender = _ONLY
    ) -> tuple[EpisodeChange, ...]:
        """Takes a step and returns what it has changed. Give steps without signals too: they end episodes.

        Args:
            step: the step's number.
            signals: the signals of the step.
            time_s: the step's time in seconds.
            sender: where the step comes from.
        """
        changes: list[EpisodeChange] = []
        track = self._track(sender, changes)
        before = track.add(step, time_s, signals)
        is_late = track.is_late or sender.attempt < self._attempts.get(sender.rank, 0)
        for signal in signals:
            if before is not None and signal.name in before:
                episode = track.open.get(signal.name)
                is_worse = episode is not None and episode.rise(signal, step)
            else:
                open_one = track.open.get(signal.name)
                episode = self._nearest(track, sender, signal.name, step) if is_late else open_one
                if episode is None:
                    self._enter(track, sender, signal, step, time_s, changes)
                    continue
                is_worse = episode.rise(signal, step)
                if is_late:
                    episode.take_late(step, track.steps, was_calm=before is not None)
                else:
                    episode.take(step, time_s)
            if episode is not None and is_worse:
                changes.append(EpisodeChange("escalated", self._shown(episode)))
        if before is None and len(track.open) > len(signals):
            names = {signal.name for signal in signals}
            for episode in [each for name, each in track.open.items() if name not in names]:
                if episode.is_over_after(step, time_s, is_late=track.is_late):
                    self._leave(track, episode, changes)
        return tuple(changes)

    def end(self) -> tuple[EpisodeChange, ...]:
        """Ends the episodes that go on, because the run has ended. Returns them as ``left``."""
        changes: list[EpisodeChange] = []
        for track in self._tracks.values():
            self._end(track, changes)
        return tuple(changes)

    def all(self) -> tuple[Episode, ...]:
        """Returns the episodes that are kept, in the order in which they entered."""
        return tuple(map(self._shown, self._kept.values()))

    def follows(self, sender: StepSender) -> bool:
        """Whether an episode of the sender goes on, so that its steps without signals matter."""
        track = self._tracks.get(sender)
        return track is not None and bool(track.open)

    def _track(self, sender: StepSender, changes: list[EpisodeChange]) -> _SenderHistory:
        track = self._tracks.get(sender)
        if track is not None:
            self._tracks.move_to_end(sender)
            return track
        if sender.attempt > self._attempts.get(sender.rank, -1):
            for other, of_other in self._tracks.items():
                if other.rank == sender.rank and other.attempt < sender.attempt:
                    self._end(of_other, changes)
            self._attempts[sender.rank] = sender.attempt
        track = self._tracks[sender] = _SenderHistory()
        if len(self._tracks) > _MOST_SENDERS:
            self._end(self._tracks.popitem(last=False)[1], changes)
        if len(self._attempts) > 2 * _MOST_SENDERS:
            known = {each.rank for each in self._tracks}
            self._attempts = {rank: attempt for rank, attempt in self._attempts.items() if rank in known}
        return track

    def _enter(
        self,
        track: _SenderHistory,
        sender: StepSender,
        signal: Signal,
        step: int,
        time_s: float,
        changes: list[EpisodeChange],
    ) -> None:
        self._count += 1
        episode = _GrowingEpisode(self._count, sender, signal, step, time_s)
        if len(self._kept) >= self._most:
            self._drop()
        self._kept[episode.number] = track.open[signal.name] = episode
        changes.append(EpisodeChange("entered", self._shown(episode)))
        if track.is_late:
            episode.quiet = sum(each > step for each in track.steps)
            if episode.quiet >= QUIET_STEPS:
                self._leave(track, episode, changes)

    def _leave(self, track: _SenderHistory, episode: _GrowingEpisode, changes: list[EpisodeChange]) -> None:
        del track.open[episode.name]
        episode.is_open = False
        self._over[episode.number] = episode
        changes.append(EpisodeChange("left", self._shown(episode)))

    def _end(self, track: _SenderHistory, changes: list[EpisodeChange]) -> None:
        for episode in list(track.open.values()):
            self._leave(track, episode, changes)

    def _drop(self) -> None:
        """Drops the oldest episode that is over, or if all go on, the oldest one."""
        episode = self._kept.pop(next(iter(self._over or self._kept)))
        self._over.pop(episode.number, None)
        self.dropped += 1
        track = self._tracks.get(episode.sender)
        if track is not None and track.open.get(episode.name) is episode:
            del track.open[episode.name]

    def _nearest(self, track: _SenderHistory, sender: StepSender, name: str, step: int) -> _GrowingEpisode | None:
        """Returns the episode to which a late step belongs; None if all of them are too far away."""
        mine = [each for each in self._kept.values() if each.sender == sender and each.name == name]
        nearest = min(mine, key=lambda each: track.between(step, each), default=None)
        if nearest is None or name in track.open or track.between(step, nearest) < QUIET_STEPS:
            return nearest
        return None

    def _shown(self, episode: _GrowingEpisode) -> Episode:
        is_newest = self._attempts.get(episode.sender.rank, 0) <= episode.sender.attempt
        return episode.shown(goes_on=episode.is_open and is_newest)


class _SenderHistory:
    """What is known about a sender.

    Attributes:
        steps: its latest steps, each with its time and the names of its signals.
        open: its episodes that go on, by name.
        is_late: whether the last step that was added belongs before others, or corrects one.
    """

    __slots__ = ("_newest", "_newest_s", "is_late", "open", "steps")

    def __init__(self) -> None:
        self._newest = -1
        self._newest_s = -math.inf
        self.steps: dict[int, tuple[float, tuple[str, ...]]] = {}
        self.open: dict[str, _GrowingEpisode] = {}
        self.is_late = False

    def add(self, step: int, time_s: float, signals: Sequence[Signal]) -> tuple[str, ...] | None:
        """Adds a step; returns the names that it had before, None if it is not a correction."""
        at_s, before = self.steps.get(step, (math.nan, ()))
        is_known = at_s == time_s
        self.is_late = is_known or (
            step < self._newest and time_s <= self._newest_s and step > min(self.steps, default=step)
        )
        names = tuple([signal.name for signal in signals]) if signals else ()
        self.steps[step] = time_s, before + names if is_known else names
        if len(self.steps) > _REMEMBERED:
            del self.steps[next(iter(self.steps))]
        if not self.is_late:
            self._newest, self._newest_s = step, time_s
        return before if is_known else None

    def between(self, step: int, episode: _GrowingEpisode) -> int:
        """Returns the number of remembered steps between a step and an episode; -1 if the step lies in the episode."""
        if episode.first <= step <= episode.last:
            return -1
        return sum(episode.last < each < step or step < each < episode.first for each in self.steps)


class _GrowingEpisode:
    """An episode that may still change."""

    __slots__ = (
        *("announced", "calm", "first", "is_open", "last", "level", "name", "number", "quiet", "reason"),
        *("route", "sender", "time_s", "times", "worst", "worst_step"),
    )

    def __init__(self, number: int, sender: StepSender, signal: Signal, step: int, time_s: float) -> None:
        self.number = number
        self.sender = sender
        self.name, self.level, _, self.reason, self.route, self.worst = signal
        self.announced = self.worst
        self.first = self.last = self.worst_step = step
        self.time_s = time_s
        self.times = 1
        self.calm = self.quiet = 0
        self.is_open = True

    def rise(self, signal: Signal, step: int) -> bool:
        """Takes a step's level, route and value; returns whether the episode escalates."""
        if signal.value > self.worst:
            self.worst, self.worst_step, self.reason = signal.value, step, signal.reason
        if (signal.level, signal.route) == (self.level, self.route):
            is_worse = False
        else:
            level, route = _higher(_LEVELS, self.level, signal.level), _higher(_ROUTES, self.route, signal.route)
            is_worse = (level, route) != (self.level, self.route)
            self.level, self.route = level, route
        is_worse = is_worse or 0 < WORSE_TIMES * self.announced <= signal.value
        if is_worse:
            self.announced = self.worst
        return is_worse

    def take(self, step: int, time_s: float) -> None:
        """Takes a further step with the signal."""
        self.times += 1
        self.calm += self.quiet
        self.quiet = 0
        self.first, self.last, self.time_s = min(self.first, step), max(self.last, step), time_s

    def take_late(self, step: int, steps: Iterable[int], *, was_calm: bool) -> None:
        """Takes a step with the signal that is not the newest one."""
        self.times += 1
        if step > self.last:
            self.calm += sum(self.last < each < step for each in steps)
            self.quiet = sum(each > step for each in steps)
            self.last = step
        elif step < self.first:
            self.calm += sum(step < each < self.first for each in steps)
            self.first = step
        elif was_calm:
            self.calm -= 1

    def is_over_after(self, step: int, time_s: float, *, is_late: bool) -> bool:
        """Takes a step without the signal; returns whether the episode is over."""
        if is_late and step < self.last:
            self.calm += step > self.first
            return False
        self.quiet += 1
        is_waiting = self.name in _SAMPLED and 0 <= time_s - self.time_s < QUIET_S
        return self.quiet >= QUIET_STEPS and not is_waiting and not is_late

    def shown(self, *, goes_on: bool) -> Episode:
        """Returns the episode as it is now."""
        return Episode(
            *(self.number, self.sender, self.name, self.level, self.first, self.last, self.times, self.calm),
            *(self.worst, self.worst_step, self.reason, self.route, goes_on),
        )


def _higher(order: Sequence[str], one: str, other: str) -> str:
    return max(one, other, key=lambda name: order.index(name) if name in order else -1)
