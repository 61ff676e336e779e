"""A short run with known values, chosen so that any change on the way can be recognized."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from esper_otel.export.blocks import points_of
from esper_otel.export.encode import AccompanyingData, Encoder
from esper_otel.export.resource import resource_for
from esper_otel.export.streams import Streams
from esper_otel.export.transport import Outcome, Result, Sender
from esper_otel.frames.frame import ABSENT, NARROW, Frame, Run, SeedTable
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.ring import blocks_of
from esper_otel.schema import METRICS, SEED_CELLS, SEED_FIELDS, SEED_RETIRED, Metric, new_check_id

RANKS = 2
FIRST_STEP = 1001
EPOCH = 5
ENDED, OUTCOME = "esper.run.ended", "completed"
STAYS, DIES = "esper-check-stays", "esper-check-dies"

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
_MS, _S = 10**6, 10**9
_BEFORE_S = 5
_AGAIN_S = 0.5
# Times since the run's first second. Steps three and four are within one second; no time is a whole microsecond.
_TIMES_NS = (123_456_789, 1_234_567_891, 2_100_200_301, 2_612_345_677, 4_050_000_003)
_FIRST_REQUEST = 3  # steps

# None means not recorded. Some values are repeated, and zeros are included as values.
_VALUES: Mapping[str, Sequence[float | None]] = {
    "loss": (1 / 3, 2 / 7, math.nan, 2 / 7, 1 / 9),
    "gradient_norm": (1.25, math.nan, math.inf, None, -math.inf),
    "accuracy": (None, 0.0, 0.0, None, 0.7),
    "step_latency_ms": (12.5, 12.5, 1000 / 3, 0.25, 12.5),
    "esper.epochs.total": (9.0, 9.0, 9.0, 9.0, 9.0),
}
# By seed and step. Unlike in a session, the step has no isolation violations of its own: a receiver that does not
# recognize the step as a session's frame would add them, which the comparison then shows.
_SEEDS: Mapping[str, Sequence[Mapping[str, float] | None]] = {
    STAYS: (
        {"stage": 3.0, "alpha": 0.1, "isolation_violations": 2.0},
        {"stage": 3.0, "alpha": 0.1, "last_kernel_latency_ms": math.inf},
        {"stage": 4.0, "alpha": math.nan, "alpha_steps": 0.0},
        None,
        {"stage": 4.0, "alpha": 0.6, "isolation_dot": -math.inf},
    ),
    DIES: ({"stage": 3.0, "alpha": 0.9}, {"stage": 3.0, "alpha": 0.9}, None, None, None),
}
RETIRED = {2: (DIES,)}  # by step


class Key(NamedTuple):
    """One series of the run: metric, rank, and seed; the seed is empty for a step metric."""

    metric: str
    rank: int
    seed: str


class MarkedRun:
    """The run's frames, and how they are sent. Threads: one.

    Args:
        sender: sends the requests.
        timeout_s: time limit of each request.
    """

    def __init__(self, sender: Sender, timeout_s: float) -> None:
        now_ns = time.time_ns()
        self._sender = sender
        self._timeout_s = timeout_s
        self.run_id: str = new_check_id()
        self.attempt: int = now_ns // _MS
        self.frames: list[list[Frame]] = [self._frames(rank, (now_ns // _S - _BEFORE_S) * _S) for rank in range(RANKS)]
        self._encoders = [Encoder(BY_NAME, resource_for) for _ in range(RANKS)]
        self._streams = [Streams() for _ in range(RANKS)]

    def send(self, deadline_s: float) -> Outcome:
        """Sends the steps of each rank in two requests. Returns the first outcome without full success, or the last."""
        outcome = Outcome(Result.DELIVERED)
        for some in (slice(_FIRST_REQUEST), slice(_FIRST_REQUEST, None)):
            for frames, encoder, streams in zip(self.frames, self._encoders, self._streams, strict=True):
                [block] = blocks_of(frames[some])
                for request in encoder.requests([block], AccompanyingData(streams.note([block]))):
                    outcome = self._delivered(request.body, deadline_s)
                    streams.named(request.names)
                    streams.settled(block.last)
                    if outcome.result is not Result.DELIVERED or outcome.rejected_points:
                        return outcome
        return outcome

    def end(self) -> None:
        """Ends the run and its series as a session does, so that it does not look alive after the check."""
        for frames, encoder, streams in zip(self.frames, self._encoders, self._streams, strict=True):
            run, started_ns, ended_ns = frames[0].run, frames[0].time_unix_ns, frames[-1].time_unix_ns + _MS
            over = {(ENDED, OUTCOME): 1.0}
            health = encoder.health_scope(over, start_unix_ns=started_ns, time_unix_ns=ended_ns)
            for body in encoder.stale(run, streams.all_ended(), time_unix_ns=ended_ns, health=[health]):
                self._delivered(body, time.monotonic() + self._timeout_s)

    def samples(self) -> dict[Key, dict[int, float]]:
        """Returns the values of each series, by the time of the step in Unix milliseconds."""
        found: dict[Key, dict[int, float]] = {}
        for rank, frames in enumerate(self.frames):
            for block in blocks_of(frames):
                points = points_of(block, BY_NAME)
                for row, frame in enumerate(frames[block.first - 1 : block.last]):
                    time_ms = frame.time_unix_ns // _MS
                    there = points.there[row]
                    named = zip(compress(points.names, there.tolist()), points.values[row, there].tolist(), strict=True)
                    of_frame = {Key(name, rank, ""): value for name, value in named}
                    of_frame |= {Key(SEED_RETIRED.name, rank, seed_id): 1.0 for seed_id in frame.retired}
                    of_frame |= {
                        Key(_SEED_NAMES[field], rank, seed_id): value
                        for seed_id, cells in frame.seeds.rows()
                        for field, value in cells.items()
                    }
                    for key, value in of_frame.items():
                        found.setdefault(key, {})[time_ms] = value
        return found

    def _delivered(self, body: bytes, deadline_s: float) -> Outcome:
        """Sends a request, and repeats it after temporary failures until the deadline; returns the last outcome."""
        while True:
            outcome = self._sender.send(body, self._timeout_s)
            if outcome.result is not Result.TEMPORARY or time.monotonic() + _AGAIN_S > deadline_s:
                return outcome
            time.sleep(_AGAIN_S)

    def _frames(self, rank: int, second_ns: int) -> list[Frame]:
        run = Run(self.run_id, self.attempt, rank, RANKS, "esper-check", "cpu", "cpu")
        live = LiveSeeds()
        frames = []
        for step, time_ns in enumerate(_TIMES_NS):
            live.retire(RETIRED.get(step, ()))
            seed_step = live.step(_table(step))
            live.commit(seed_step)
            # A value that differs between the ranks, so that swapped steps are noticed.
            values = {name: of_steps[step] for name, of_steps in _VALUES.items()} | {"samples_per_s": 64.0 + rank}
            recorded = {name: value for name, value in values.items() if value is not None}
            frames.append(
                Frame(
                    run,
                    step + 1,
                    FIRST_STEP + step,
                    EPOCH,
                    second_ns + time_ns + rank * (11 * _MS + 13),
                    tuple(recorded),
                    tuple(recorded.values()),
                    {},
                    seed_step.recorded,
                    live.table,
                    RETIRED.get(step, ()),
                )
            )
        return frames


_SEED_NAMES = {metric.field: metric.name for metric in SEED_CELLS}


def _table(step: int) -> SeedTable:
    """Returns the table of the seeds that are recorded in a step."""
    recorded = {seed_id: cells for seed_id, of_steps in _SEEDS.items() if (cells := of_steps[step]) is not None}
    rows = [[cells.get(field, ABSENT) for field in SEED_FIELDS[:NARROW]] for cells in recorded.values()]
    return SeedTable(tuple(recorded), np.array(rows).reshape(len(rows), NARROW))
