"""Recording: the steps of a run, wherever they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esper_otel import blackbox
from esper_otel.client import TamiyoClient
from esper_otel.errors import ConfigurationError
from esper_otel.leyline.packets import Packets
from esper_otel.schema import SEED_CELLS, STEP_METRICS

_FIELDS = {metric.name: metric.field for metric in SEED_CELLS}
_NAMES = {metric.name for metric in STEP_METRICS}
_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One step.

    Attributes:
        step: its number.
        epoch: the epoch it belongs to.
        unix_s: its time.
        values: step metrics by name; NaN is a value, what is missing is not there.
        seeds: cells of the seeds recorded in it, by field.
    """

    step: int
    epoch: int
    unix_s: float
    values: Mapping[str, float]
    seeds: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Recording:
    """Steps of one rank, in the order of their times.

    Attributes:
        name: the run's.
        rank: the process within the run.
        attempt: which start of the run.
        ended: how it ended; empty when it has not, or nobody knows.
        rows: the steps.
    """

    name: str
    rank: int
    attempt: int
    ended: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The run, and the rank if it is not the only one that matters."""
        return self.name if self.rank == 0 else f"{self.name}, rank {self.rank}"

    def series(self, name: str) -> list[float | None]:
        """A metric by step; None where it is missing."""
        return [row.values.get(name) for row in self.rows]


def of_file(path: Path) -> Recording:
    """From a black box.

    Raises:
        ConfigurationError: it cannot be read.
    """
    head, rows = blackbox.read(path)
    made = tuple(Row(row["step"], row["epoch"], row["time_unix_ns"] / 1e9, row["values"], row["seeds"]) for row in rows)
    return Recording(head["run_id"], head["rank"], head["attempt"], head["reason"], made)


def of_gateway(client: TamiyoClient, run_id: str, rank: int) -> Recording:
    """From a gateway: all steps that it has of the newest attempt.

    Raises:
        GatewayError: there is no such run, or it cannot be had.
        ConfigurationError: the rank has no steps.
    """
    found: dict[int, Packets] = {}
    cursor = None
    while page := client.pull(run_id, cursor, rank=rank, max_packets=_AT_ONCE):
        found |= {packets.state.timestamp_ns: packets for packets in page}  # a later revision replaces an earlier one
        cursor = page.cursor
    if not found:
        raise ConfigurationError(f"run {run_id!r} has no steps of rank {rank}")
    attempt = max(packets.attempt for packets in found.values())
    ended = [run.ended or "" for run in client.runs() if (run.run_id, run.rank, run.attempt) == (run_id, rank, attempt)]
    rows = [_row(packets) for _, packets in sorted(found.items()) if packets.attempt == attempt]
    return Recording(run_id, rank, attempt, ended[0] if ended else "", tuple(rows))


def _row(packets: Packets) -> Row:
    state = packets.state
    values = dict(state.training_metrics)
    values |= {name: math.nan for name in packets.names & _NAMES if name not in values}
    seeds: dict[str, dict[str, float]] = {}
    for packet in packets.telemetry:
        for point in packet.metrics:
            if point.name in _FIELDS:
                seeds.setdefault(point.attributes["seed_id"], {})[_FIELDS[point.name]] = point.value
    return Row(packets.step, state.current_epoch, state.timestamp_ns / 1e9, values, seeds)
