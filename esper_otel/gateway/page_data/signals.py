"""Signals: the risk signals of steps that were read, as episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from esper_otel.gateway.page_data.buckets import Floats, StepArrays
from esper_otel.gateway.store.base import StoredFrame
from esper_otel.leyline import messages
from esper_otel.leyline.episodes import Episode, Episodes, StepSender
from esper_otel.leyline.risk import LOSS_STEP, Rule, Signal, signals
from esper_otel.schema import METRICS

_KEYS = {metric.name: metric.key or "" for metric in METRICS if metric.level == "step"}
_MOST = 500


class _Device(NamedTuple):
    device_type: str


class _Packet(NamedTuple):
    """The part of a state packet that the rules look at."""

    training_metrics: Mapping[str, float]
    validation_loss: float
    hardware_context: _Device


class SignalEpisodes:
    """The episodes of one rank.

    In consecutive steps with the same signals, signals with values that are no worse than before are not made again: in
    an episode they would only change its last step.

    Args:
        rules: the risk rules.

    Attributes:
        changed: the version of the last change.
    """

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.changed: int = 0
        self._rules = rules
        self._episodes = Episodes(most=_MOST)
        self._metrics = {"loss_delta", *(rule.metric for rule in rules)}
        self._metrics |= {rule.and_below[0] for rule in rules if rule.and_below is not None}
        self._given = b""  # which rules applied in the last step, ...
        self._signals: tuple[Signal, ...] = ()  # ... signals of one of the last steps in which these applied, ...
        self._worst: Floats = np.empty(0)  # ... and the largest values in these

    @property
    def left_out(self) -> int:
        """How many episodes were dropped because there are too many."""
        return self._episodes.dropped

    def all(self) -> tuple[Episode, ...]:
        """Returns the newest episodes, oldest first."""
        return self._episodes.all()

    def note(self, entries: Sequence[StoredFrame], new: StepArrays, names: Sequence[str], version: int) -> None:
        """Adds steps of one writer.

        Args:
            entries: the steps.
            new: the same steps as arrays.
            names: the metrics by column.
            version: the version in which the episodes change.
        """
        _, attempt, rank, writer = entries[0].item.origin
        sender = StepSender(rank, attempt, writer)
        with np.errstate(over="ignore"):
            rounded = new.last.astype(np.float32).astype(np.float64)  # as a packet has them
        values = {
            _KEYS.get(names[column], names[column]): row for column, row in zip(new.columns, rounded, strict=True)
        }
        of_rules, is_given = self._exceeded(entries, values)
        is_any = np.logical_or.reduce(is_given[: len(self._rules)], axis=0).tolist()
        if not any(is_any) and not self._episodes.follows(sender):
            self._given = b""
            return
        metrics = {key: row.tolist() for key, row in values.items() if key in self._metrics or key.startswith("gpu_")}
        patterns = [column.tobytes() for column in is_given.T]
        for place, entry in enumerate(entries):
            given: tuple[Signal, ...] = ()
            if not is_any[place]:
                self._given = b""
            else:
                of_step = np.where(is_given[: len(self._rules), place], of_rules[:, place], -np.inf)
                if patterns[place] != self._given or (of_step > self._worst).any():
                    found = {key: row[place] for key, row in metrics.items() if math.isfinite(row[place])}
                    self._signals = self._made(entry, found)
                    self._worst = of_step if patterns[place] != self._given else np.maximum(of_step, self._worst)
                    self._given = patterns[place]
                given = self._signals
            if given or self._episodes.follows(sender):
                frame = entry.item.frame
                self._episodes.note(frame.global_step, given, time_s=frame.time_unix_ns / 1e9, sender=sender)
                self.changed = version

    def _exceeded(
        self, entries: Sequence[StoredFrame], values: Mapping[str, Floats]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Returns the value of each rule in each step, and whether it is above the threshold.

        What decides of a rule besides its own value is in further rows of the latter.
        """
        of_rules = np.full((len(self._rules), len(entries)), np.nan)
        given, beside = [], []
        for row, rule in zip(of_rules, self._rules, strict=True):
            if rule.metric == LOSS_STEP:
                row[:] = _loss_steps(entries, values.get("loss_delta"))
            elif rule.metric in values:
                row[:] = values[rule.metric]
            is_above = (row > rule.threshold) | (rule.is_inclusive & (row == rule.threshold))
            given.append(is_above & np.isfinite(row))
            if rule.and_below is not None and rule.and_below[0] in values:
                beside.append(values[rule.and_below[0]] <= rule.and_below[1])
        return of_rules, np.array([*given, *beside])

    def _made(self, entry: StoredFrame, metrics: Mapping[str, float]) -> tuple[Signal, ...]:
        """Returns the signals of a step."""
        frame = entry.item.frame
        packet = _Packet(metrics, _rounded(frame.last_loss()), _Device(frame.run.device_type))
        return signals(cast("messages.SystemStatePacket", packet), loss_before=entry.loss_before, rules=self._rules)


def _loss_steps(entries: Sequence[StoredFrame], deltas: Floats | None) -> Floats:
    """Returns by how much the loss is above that of the packet before; what the step says itself if there is none."""
    steps = np.full(len(entries), np.nan) if deltas is None else deltas.copy()
    pairs = [(entry.item.frame.last_loss(), entry.loss_before) for entry in entries]
    now, before = np.array([[0.0 if loss is None else loss for loss in pair] for pair in pairs]).T
    has_before = np.array([before is not None for _, before in pairs])
    with np.errstate(over="ignore"):
        differences: Any = now.astype(np.float32).astype(np.float64) - before.astype(np.float32).astype(np.float64)
    return np.where(has_before, differences, steps)


def _rounded(loss: float | None) -> float:
    return 0.0 if loss is None else float(np.float32(loss))
