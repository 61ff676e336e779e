"""Episodes: consecutive steps with the same risk signal, as one entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from esper_otel.gateway.page_data.buckets import Steps
from esper_otel.gateway.store.base import StoredFrame
from esper_otel.leyline import messages
from esper_otel.leyline.risk import Rule, Signal, signals
from esper_otel.schema import METRICS

_KEYS = {metric.name: metric.key for metric in METRICS if metric.level == "step"}
_MOST = 500


@dataclass(slots=True)
class Episode:
    """Consecutive steps of one segment that have the same signal.

    Attributes:
        segment: number of the segment.
        signal: the worst of the signals.
        worst: its value.
        first_step: the first step that has it.
        last_step: the last step that has it.
        is_open: whether the newest step has it.
    """

    segment: int
    signal: Signal
    worst: float
    first_step: int
    last_step: int
    is_open: bool = True


class _Packet(NamedTuple):
    """The part of a state packet that the rules look at."""

    training_metrics: dict[str, float]
    validation_loss: float


class Episodes:
    """The episodes of one rank, oldest first.

    Args:
        rules: the risk rules.

    Attributes:
        all: the newest episodes.
        left_out: how many older ones were dropped.
        changed: the version of the last change.
    """

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.all: list[Episode] = []
        self.left_out = 0
        self.changed = 0
        self._rules = rules
        self._metrics = {rule.metric: rule for rule in rules}
        self._metrics |= {rule.and_below[0]: rule for rule in rules if rule.and_below is not None}
        self._open: dict[str, Episode] = {}
        self._segment = -1

    def note(
        self, segment: int, entries: Sequence[StoredFrame], new: Steps, names: Sequence[str], version: int
    ) -> None:
        """Adds the next steps of a segment, in order of time.

        Args:
            segment: number of the segment.
            entries: the steps.
            new: the same steps as arrays.
            names: the metrics by column.
            version: the version in which the episodes change.
        """
        with np.errstate(over="ignore"):
            values = new.last.astype(np.float32).astype(np.float64)  # as a packet has them
        keys = [_KEYS.get(names[column], names[column]) for column in new.columns.tolist()]
        of_rules = [(key, values[place]) for place, key in enumerate(keys) if key in self._metrics]
        losses = [entry.item.frame.last_loss() for entry in entries]
        found: list[tuple[str, Sequence[float]]] = [(key or "", row.tolist()) for key, row in of_rules]
        delta = dict(zip(keys, values.tolist(), strict=True)).get("loss_delta")
        if segment != self._segment:
            self._close(version)
            self._segment = segment
        for place, entry in enumerate(entries):
            metrics = {key: row[place] for key, row in found if np.isfinite(row[place])}
            if delta is not None and np.isfinite(delta[place]):
                metrics["loss_delta"] = delta[place]
            loss = losses[place]
            before = None if loss is None else entry.loss_before
            packet = cast("messages.SystemStatePacket", _Packet(metrics, _rounded(loss)))
            self._step(entry.item.frame.global_step, signals(packet, loss_before=before, rules=self._rules), version)

    def _step(self, step: int, given: tuple[Signal, ...], version: int) -> None:
        if not given and not self._open:
            return
        now = {signal.name: signal for signal in given}
        for name in [name for name in self._open if name not in now]:
            self._open.pop(name).is_open = False
            self.changed = version
        for name, signal in now.items():
            value = _value(signal)
            episode = self._open.get(name)
            if episode is None:
                episode = self._open[name] = Episode(self._segment, signal, value, step, step)
                self.all.append(episode)
            elif value > episode.worst:
                episode.signal, episode.worst = signal, value
            episode.last_step = step
            self.changed = version
        surplus = len(self.all) - _MOST
        if surplus > _MOST:
            del self.all[:surplus]
            self.left_out += surplus

    def _close(self, version: int) -> None:
        for episode in self._open.values():
            episode.is_open = False
            self.changed = version
        self._open = {}


def _value(signal: Signal) -> float:
    """Returns the value in the reason of a signal."""
    return float(signal.reason.split()[-3])


def _rounded(loss: float | None) -> float:
    return 0.0 if loss is None else float(np.float32(loss))
