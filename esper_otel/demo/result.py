"""The result of a run, and the packets pulled by a controller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from esper_otel import Packets, Telemetry
from esper_otel.schema import SEED_METRICS, STEP_METRICS

_STEP_NAMES = tuple(metric.name for metric in STEP_METRICS)
_SEED_NAMES = tuple(metric.name for metric in SEED_METRICS)

Value = float | dict[str, float]


class Puller:
    """Pulls packets, as Tamiyo does from outside the step. Counts them and keeps the last value of each metric.

    Attributes:
        states: number of SystemStatePackets pulled.
        telemetry: number of TelemetryPackets of seeds pulled.
        metrics: last values by name; for seed metrics, a mapping by seed id. NaN if the last value was not finite.
    """

    def __init__(self, source: Telemetry) -> None:
        self._source = source
        self.states: int = 0
        self.telemetry: int = 0
        self._steps: dict[str, float] = {}
        self._seeds: dict[str, dict[str, float]] = {}

    def pull(self) -> Iterator[Packets]:
        """Returns all packets published since the last pull, oldest first."""
        while page := self._source.pull():
            for packets in page:
                self._take(packets)
                yield packets

    def _take(self, packets: Packets) -> None:
        self.states += 1
        self.telemetry += sum(packet.source_subsystem == "kasmina" for packet in packets.telemetry)
        values = packets.state.training_metrics
        for name in _STEP_NAMES:
            if name in packets.names:  # a packet leaves out values that are not finite
                self._steps[name] = values.get(name, math.nan)
        for packet in packets.telemetry:
            for point in packet.metrics:
                self._seeds.setdefault(point.name, {})[point.attributes["seed_id"]] = point.value

    @property
    def metrics(self) -> dict[str, Value]:
        """See the class."""
        steps: dict[str, Value] = {name: self._steps[name] for name in _STEP_NAMES if name in self._steps}
        return steps | {name: self._seeds[name] for name in _SEED_NAMES if name in self._seeds}


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The result of one run of the demo.

    Attributes:
        run_id: the run.
        steps: number of steps trained.
        is_interrupted: whether the user interrupted the run.
        losses: the loss of every step, for comparing runs.
        validation: loss and accuracy of the last validation.
        frames: ``recorded``, ``exported``, ``received`` (None if the endpoint is the user's) and ``dropped``.
        packets: numbers of ``states`` and ``telemetry`` packets pulled.
        metrics: last values by name; for seed metrics, a mapping by seed id.
        absent: for each of the other metrics, why it has no value.
        destination: the receiver of the frames, described for the user.
        last_error: last error of the export, or None.
        export: ``retries``, ``latency_ms`` of the last request and ``buffer_bytes``.
    """

    run_id: str
    steps: int
    is_interrupted: bool
    losses: tuple[float, ...]
    validation: tuple[float, float] | None
    frames: Mapping[str, int | None]
    packets: Mapping[str, int]
    metrics: Mapping[str, Value]
    absent: Mapping[str, str]
    destination: str = ""
    last_error: str | None = field(default=None)
    export: Mapping[str, int | float | str | None] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Returns the result as an object for JSON. Values that are not finite become None."""
        return {
            "run_id": self.run_id,
            "steps": self.steps,
            "frames": dict(self.frames),
            "packets": dict(self.packets),
            "metrics": {
                name: {seed: _finite(each) for seed, each in value.items()}
                if isinstance(value, dict)
                else _finite(value)
                for name, value in self.metrics.items()
            },
            "absent": dict(self.absent),
        }


def reasons(metrics: Mapping[str, Value], absent: Mapping[str, str]) -> dict[str, str]:
    """Returns why metrics have no last value, by name, in the schema's order."""
    return {
        name: absent.get(name, "it was in no packet of this run")
        for name in (*_STEP_NAMES, *_SEED_NAMES)
        if name not in metrics
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
