"""Reads events from the frames of a session: stages of seeds, episodes of risk signals, and a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from esper_otel.events.happenings import run_ended, run_resumed
from esper_otel.frames.block import Block
from esper_otel.frames.event_log import Attribute, Event, EventLog, Happening
from esper_otel.frames.frame import ABSENT_BITS, COLUMN, FLOAT32_BOUND, LAST_LOSS, Frame
from esper_otel.leyline import messages, state
from esper_otel.leyline.episodes import EpisodeChange, Episodes, StepSender
from esper_otel.leyline.problems import LOSS_NONFINITE
from esper_otel.leyline.risk import LOSS_STEP, RULES, Rule, Signal, signals
from esper_otel.schema import METRICS, Stage
from esper_otel.schema.events import (
    SEED_ID,
    SEED_STAGE,
    SIGNAL_ENTERED,
    SIGNAL_FIRST,
    SIGNAL_LEFT,
    SIGNAL_NAME,
    SIGNAL_SEVERITY,
    SIGNAL_VALUE,
    STAGE,
    STAGE_BEFORE,
    Severity,
)

_STAGE = COLUMN["stage"]
_SEVERITIES = {"NOTE": Severity.INFO, "WARN": Severity.WARN, "HIGH": Severity.WARN, "CRITICAL": Severity.ERROR}
_LOSS, _LOSS_DELTA = "loss", "loss_delta"
_NAMES = {metric.key: metric.name for metric in METRICS if metric.level == "step" and metric.key}
_SENDER = StepSender()
# Values of packets are float32: what is below a threshold by less than this share of it may be above it there.
_ROUNDING = 1e-6

Column = npt.NDArray[np.float64]


class EventReader:
    """Adds the events of the frames of one session to its journal.

    Frames are given in order, each once or more often: those that were read before, by an earlier session as well, are
    left out. What the journal has already is where it goes on from.

    Threads: one at a time.

    Args:
        log: the session's events.
        rules: the table of risk signals.

    Attributes:
        log: the session's events.
    """

    def __init__(self, log: EventLog, rules: tuple[Rule, ...] = RULES) -> None:
        self.log = log
        self._rules = rules
        self._episodes = Episodes()
        self._stages = {seed_id: str(event.attributes.get(STAGE.name)) for seed_id, event in log.stages().items()}
        self._read = log.sequence
        self._loss = math.nan  # the last finite loss of the frame that was read last
        self._step: int | None = None
        self._epoch: int | None = None
        self._time_unix_ns = 0
        for event in log.signals().values():
            time_s = event.time_unix_ns / 1e9
            self._episodes.note(event.step or 0, (_signal_of(event),), time_s=time_s, sender=_SENDER)

    def read(self, blocks: Sequence[Block], first: int, last: int) -> None:
        """Reads frames.

        Args:
            blocks: consecutive frames.
            first: the sequence number of the first one to read.
            last: that of the last one.
        """
        for block in blocks:
            start = max(first, self._read + 1, block.first) - block.first
            stop = min(last, block.last) + 1 - block.first
            if start < stop:
                self._take(block.part(start, stop))

    def skip(self, block: Block) -> None:
        """Notes where frames end that an earlier session has read: what follows them belongs to their last step."""
        self._step, self._epoch = int(block.steps[-1]), int(block.epochs[-1])
        self._time_unix_ns = int(block.times[-1])

    def _take(self, block: Block) -> None:
        self._loss = self._loss if block.first == self._read + 1 else math.nan
        found = [*self._resume(block), *self._changes_of_stage(block), *self._changes_of_signals(block)]
        self._read = block.last
        self.skip(block)
        if found:
            self.log.add_all(sorted(found, key=lambda each: each.sequence))
        for ids in block.retired.values():
            for seed_id in ids:
                if seed_id not in self._stages:
                    self.log.retire(seed_id)

    def end(self, outcome: str, time_unix_ns: int, exit_status: int | None = None) -> None:
        """Ends the episodes that go on, and adds the end of the run, unless it is there.

        Args:
            outcome: how the run ended.
            time_unix_ns: when; not before the last frame.
            exit_status: of the process, if it is known.
        """
        if self.log.is_over:
            return
        time_unix_ns = max(time_unix_ns, self._time_unix_ns)
        at = (self._step, self._epoch)
        left = [_of_change(change, time_unix_ns, *at, 0) for change in self._episodes.end()]
        self.log.add_all([*left, run_ended(outcome, time_unix_ns, *at, exit_status)])

    # -- a resume ----------------------------------------------------------------------------------------

    def _resume(self, block: Block) -> Iterator[Happening]:
        step = int(block.steps[0])
        if block.first == 1 and step > 1 and not self.log.has_resumed:
            yield run_resumed(int(block.times[0]), step, int(block.epochs[0]), 1)

    # -- seeds -------------------------------------------------------------------------------------------

    def _changes_of_stage(self, block: Block) -> Iterator[Happening]:
        if not block.ids and not block.retired:
            return
        stages = block.cells[:, :, _STAGE] if block.ids else np.empty((block.rows, 0))
        for column, seed_id in enumerate(block.ids):
            yield from self._stages_of(block, seed_id, stages[:, column])
        for seed_id in {each for ids in block.retired.values() for each in ids}.difference(block.ids):
            self._stages.pop(seed_id, None)

    def _stages_of(self, block: Block, seed_id: str, numbers: Column) -> Iterator[Happening]:
        """Yields the changes of one seed's stage, given its column of stages."""
        ends = {row for row, ids in block.retired.items() if seed_id in ids}
        changes = np.flatnonzero(np.diff(numbers.view(np.uint64), prepend=np.uint64(0))).tolist()
        for row in sorted({0, *changes, *ends}):
            if row in ends:
                self._stages.pop(seed_id, None)
            name = _stage_name(float(numbers[row]))
            before = self._stages.get(seed_id)
            if name is None or name == before:
                continue
            self._stages[seed_id] = name
            attributes: dict[str, Attribute] = {SEED_ID.name: seed_id, STAGE.name: name}
            if before is not None:
                attributes[STAGE_BEFORE.name] = before
            was = "" if before is None else f", after {before}"
            yield Happening(
                *(SEED_STAGE, Severity.INFO, int(block.times[row]), f"Seed {seed_id} is {name}{was}."),
                *(int(block.steps[row]), int(block.epochs[row]), attributes, block.first + row),
            )

    # -- signals -----------------------------------------------------------------------------------------

    def _changes_of_signals(self, block: Block) -> Iterator[Happening]:
        losses = _last_losses(block, self._loss)
        before = np.concatenate([[self._loss], losses[:-1]])
        self._loss = float(losses[-1])
        suspects = self._suspects(block, losses, before)
        if not suspects.any() and not self._episodes.follows(_SENDER):
            return
        for row, is_suspect in enumerate(suspects.tolist()):
            if is_suspect or self._episodes.follows(_SENDER):  # then steps without signals matter, too
                yield from self._signals_at(block, row, before=float(before[row]), is_suspect=is_suspect)

    def _signals_at(self, block: Block, row: int, *, before: float, is_suspect: bool) -> Iterator[Happening]:
        found: tuple[Signal, ...] = ()
        if is_suspect:
            packet = state(_frame_of(block, row))
            found = signals(packet, loss_before=None if math.isnan(before) else before, rules=self._rules)
            found += _of_lost_loss(block, row)
        if not found and not self._episodes.follows(_SENDER):
            return
        step, epoch, time_unix_ns = int(block.steps[row]), int(block.epochs[row]), int(block.times[row])
        for change in self._episodes.note(step, found, time_s=time_unix_ns / 1e9, sender=_SENDER):
            if change.kind != "escalated":
                yield _of_change(change, time_unix_ns, step, epoch, block.first + row)

    def _suspects(self, block: Block, losses: Column, before: Column) -> npt.NDArray[np.bool_]:
        """Returns which rows may have a signal: only of these, packets are made, which takes some 20 µs each."""
        suspects = np.zeros(block.rows, np.bool_)
        places = {name: place for place, name in enumerate(block.names)}
        for rule in self._rules:
            limit = rule.threshold - abs(rule.threshold) * _ROUNDING
            name = _LOSS_DELTA if rule.metric == LOSS_STEP else _NAMES.get(rule.metric, rule.metric)
            if name in places:
                suspects |= block.values[:, places[name]] >= limit
            if rule.metric == LOSS_STEP:
                suspects |= losses - before >= limit - (np.abs(losses) + np.abs(before)) * _ROUNDING
        if _LOSS in places:
            suspects |= _is_lost(block.values[:, places[_LOSS]])
        return suspects


def _is_lost(losses: Column) -> npt.NDArray[np.bool_]:
    """Returns where a loss was recorded and is not finite in float32, as the packets' event ``loss_nonfinite`` says."""
    is_there = np.ascontiguousarray(losses).view(np.uint64) != ABSENT_BITS
    with np.errstate(invalid="ignore"):
        is_finite = np.abs(losses) < FLOAT32_BOUND
    found: npt.NDArray[np.bool_] = is_there & ~is_finite
    return found


def _of_lost_loss(block: Block, row: int) -> tuple[Signal, ...]:
    """Returns a signal if the row's loss is not finite: the packets have an event of that name, and no signal."""
    place = block.names.index(_LOSS) if _LOSS in block.names else None
    if place is None or not _is_lost(block.values[row : row + 1, place])[0]:
        return ()
    # Not above, since the classes are chosen when one is first used.
    critical = int(messages.MessagePriority.MESSAGE_PRIORITY_CRITICAL)
    return (Signal(LOSS_NONFINITE, "CRITICAL", critical, f"loss {block.values[row, place]:g}", ""),)


def _stage_name(number: float) -> str | None:
    try:
        return Stage(int(number)).name if number == int(number) else None
    except (ValueError, OverflowError):  # not a number, or not one of a stage
        return None


def _last_losses(block: Block, before: float) -> Column:
    """Returns the last finite loss as of each row; NaN before the first one."""
    places = {name: place for place, name in enumerate(block.names)}
    losses = np.full(block.rows, np.nan)
    for name in (LAST_LOSS, _LOSS):
        if name in places:
            column = block.values[:, places[name]]
            with np.errstate(invalid="ignore"):
                losses = np.where(np.abs(column) < FLOAT32_BOUND, column, losses)
    losses = np.concatenate([[before], losses])
    newest = np.maximum.accumulate(np.where(np.isnan(losses), 0, np.arange(block.rows + 1)))
    filled: Column = losses[newest][1:]
    return filled


def _frame_of(block: Block, row: int) -> Frame:
    """Returns a frame with the values of a row, for its signals. It has no seeds."""
    values = block.values[row]
    there = np.flatnonzero(np.ascontiguousarray(values).view(np.uint64) != ABSENT_BITS).tolist()
    names = tuple(block.names[place] for place in there)
    numbers = tuple(values[there].tolist())
    head = (int(block.steps[row]), int(block.epochs[row]), int(block.times[row]))
    return Frame(block.run, block.first + row, *head, names, numbers, {})


def _of_change(
    change: EpisodeChange, time_unix_ns: int, step: int | None, epoch: int | None, sequence: int
) -> Happening:
    episode, has_entered = change.episode, change.kind == "entered"
    attributes: dict[str, Attribute] = {
        SIGNAL_NAME.name: episode.name,
        SIGNAL_SEVERITY.name: episode.level,
        SIGNAL_FIRST.name: episode.first,
    }
    if math.isfinite(episode.worst):
        attributes[SIGNAL_VALUE.name] = episode.worst
    if has_entered:
        name, severity = SIGNAL_ENTERED, _SEVERITIES.get(episode.level, Severity.WARN)
        body = f"Signal {episode.name} has begun: {episode.reason}."
    else:
        _, _, steps = str(episode._replace(goes_on=False)).partition(", ")
        name, severity, body = SIGNAL_LEFT, Severity.INFO, f"Signal {episode.name} has ended: {steps}."
    return Happening(name, severity, time_unix_ns, body, step, epoch, attributes, sequence)


def _signal_of(event: Event) -> Signal:
    """Returns the signal of an event of an earlier session, to go on from it."""
    said = event.attributes
    value = said.get(SIGNAL_VALUE.name, math.nan)
    number = math.nan if isinstance(value, str) else float(value)
    return Signal(str(said.get(SIGNAL_NAME.name)), str(said.get(SIGNAL_SEVERITY.name)), 0, "", "", number)
