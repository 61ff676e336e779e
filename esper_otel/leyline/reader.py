"""``LeylineMetricReader``, which converts the readings of any MeterProvider to Leyline packets."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk.metrics import MetricsTimeoutError
from opentelemetry.sdk.metrics import _Gauge as SynchronousGauge
from opentelemetry.sdk.metrics.export import Gauge, MetricReader, MetricsData, NumberDataPoint, Sum

from esper_otel.errors import WrongState
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.numbers import finite
from esper_otel.leyline.packets import Packets, packets
from esper_otel.leyline.risk import signals, with_signals
from esper_otel.parts import senders
from esper_otel.parts.habits import Habits
from esper_otel.parts.levels import DEVICE, FRAMES, HEALTH, SEED, SESSION, level_of, scope_of
from esper_otel.parts.maker import FrameInput, FrameMaker
from esper_otel.parts.part import Part, Stream
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE

_logger = logging.getLogger(__name__)
_QUIET_S = 60.0

# The SDK merges attribute sets above its cardinality limit (2000 by default) into one point without a seed id. The
# limit counts all ids in the life of an instrument; at most MOST_SEEDS of them are accepted at once.
_MOST_IDS = 100_000
_INSTRUMENTS = (
    *(sdk.Counter, sdk.UpDownCounter, SynchronousGauge),
    *(sdk.ObservableCounter, sdk.ObservableUpDownCounter, sdk.ObservableGauge),
)

# Our exporter states these two of each frame; no instrument does.
_OF_EXPORTER = (FRAME_SEQUENCE.name, FRAME_POINTS.name)

_TOO_MANY_SEEDS = f"more than {senders.MOST_SEEDS:,} seeds at once"


class LeylineMetricReader(MetricReader):
    """An OpenTelemetry reader that a controller pulls packets from: ``MeterProvider(metric_readers=[reader])``.

    Each pull collects once and treats the readings as one step. Gauges and sums with names from the catalogue are used,
    seed metrics if they have the attribute ``seed_id``; all others are ignored. The packets, including risk signals,
    equal those that a gateway makes from the same points. If a stream has several points, for example from two scopes,
    the first one with the fewest additional attributes is used. If several runs or ranks share the MeterProvider, one
    of them is followed: the one with the most readings, for as long as it has any. Ids that a session rejects, and
    seeds beyond 20,000 at once, are left out, with a warning; packets without such seeds are not ``complete``.

    Defaults for missing information: steps are numbered by pull, the epoch is 0, the attempt is the Unix millisecond in
    which the reader was created, isolation violations are those since the last pull, and the run id is the Resource's
    ``esper.run.id``, ``service.instance.id`` or ``service.name``, in this order. If readings state the step or the
    epoch in some collections, packets of those that do not are not ``complete``, and their step is a number from
    ``GUESSED_STEP`` on. A seed's life ends after five minutes without points, unless the readings identify the live
    seeds (``esper.seeds.digest``), as those of a session do.

    Two cases cannot be detected, because of the SDK: it drops a NaN of a gauge, and it repeats the last value of a
    synchronous gauge that is no longer set. In both cases an old value appears with the time of the pull.

    Threads: any thread may pull; pulls run one at a time.

    Args:
        latency_budget_ms: a seed whose last kernel took longer is reported as DEGRADED.
    """

    def __init__(self, *, latency_budget_ms: float = 10.0) -> None:
        try:
            super().__init__(cardinality_limits=dict.fromkeys(_INSTRUMENTS, _MOST_IDS))
        except TypeError:  # the SDK before 1.45.2 has no limits
            super().__init__()
        self._latency_budget_ms = latency_budget_ms
        self._attempt = time.time_ns() // 1_000_000
        self._followed: _RankFrames | None = None
        self._pulling = threading.Lock()
        self._received: deque[MetricsData] = deque(maxlen=1)
        self._is_shut_down = False
        self._loss_before: float | None = None
        self._next_warning_s = 0.0

    def pull(self, *, timeout_s: float = 10.0) -> Packets | None:
        """Collects and converts. Returns None if no metric of the catalogue was read, or not in time.

        The SDK checks the time only between callbacks, so a callback that never returns also blocks the pull.

        Raises:
            WrongState: the reader has no MeterProvider, or has been shut down.
        """
        if self._is_shut_down:
            raise WrongState("this reader has been shut down, with its MeterProvider or by itself")
        if self._collect is None:
            raise WrongState("this reader has no MeterProvider: make one with MeterProvider(metric_readers=[reader])")
        deadline = time.monotonic() + timeout_s
        if not self._pulling.acquire(timeout=timeout_s):
            _logger.warning("no packets: another pull was not done within %s s", timeout_s)
            return None
        try:
            self._received.clear()
            self.collect(timeout_millis=(deadline - time.monotonic()) * 1e3)
            return self._packets(*self._received)
        except MetricsTimeoutError:
            _logger.warning("no packets: the instruments' callbacks took longer than %s s", timeout_s)
            return None
        finally:
            self._pulling.release()

    def _packets(self, data: MetricsData | None = None) -> Packets | None:
        """Returns the packets of a collection, with its risk signals; None if no reading is in the catalogue."""
        refused = Counter[str]()
        points = {} if data is None else _points(data, self._attempt, refused)
        if not points:
            return None
        by_rank = {(run.run_id, run.rank): run for run in points}
        if self._followed is None or self._followed.rank not in by_rank:
            run = max(points, key=lambda run: len(points[run]))
            self._followed = _RankFrames((run.run_id, run.rank))
        run = by_rank[self._followed.rank]
        frame, is_complete = self._followed.frame(run, points[run], refused)
        if refused and time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + _QUIET_S
            reasons = ", ".join(f"{count} x {reason}" for reason, count in refused.items())
            _logger.warning("readings are left out of the packets: %s", reasons)
        step = packets(frame, complete=is_complete, latency_budget_ms=self._latency_budget_ms)
        found = signals(step.state, loss_before=self._loss_before)
        self._loss_before = finite(frame.last_loss())
        return with_signals(step, found)

    def _receive_metrics(
        self,
        metrics_data: MetricsData,
        timeout_millis: float = 10_000,  # noqa: ARG002 - the SDK's signature
        **kwargs: object,  # noqa: ARG002 - the SDK's signature
    ) -> None:
        self._received.append(metrics_data)

    def shutdown(
        self,
        timeout_millis: float = 30_000,  # noqa: ARG002 - the SDK's signature
        **kwargs: object,  # noqa: ARG002 - the SDK's signature
    ) -> None:
        """Shuts the reader down; later pulls raise WrongState. The MeterProvider calls this when it shuts down."""
        self._is_shut_down = True


class _CandidatePoint(NamedTuple):
    """A reading that may become part of a frame. ``further`` is its number of unknown attributes."""

    further: int
    stream: Stream
    value: float
    time_unix_ns: int
    is_ours: bool


def _points(data: MetricsData, attempt: int, refused: Counter[str]) -> dict[Run, list[_CandidatePoint]]:
    """Returns the readings that may become frames, by run and rank; counts the others by reason."""
    points: dict[Run, list[_CandidatePoint]] = {}
    for of_resource in data.resource_metrics:
        run = _run(of_resource.resource.attributes, attempt)
        for of_scope in of_resource.scope_metrics:
            scope = scope_of(of_scope.scope.name)
            for metric in of_scope.metrics:
                name, level = metric.name, level_of(metric.name, scope)
                is_other = scope in (HEALTH, DEVICE) or level in (None, SESSION) or name in _OF_EXPORTER
                if is_other or not isinstance(metric.data, Gauge | Sum):
                    continue
                for point in metric.data.data_points:
                    label = _label(point.attributes or {}, is_of_seed=level == SEED)
                    if run is None or label.fault:
                        refused[label.fault or senders.INVALID_TEXT] += 1
                        continue
                    # A seed id on a step metric counts as an unknown attribute: the value is a part of the metric.
                    further = label.further + (level != SEED and bool(label.seed))
                    stream = (name, label.seed if level == SEED else "")
                    made = _CandidatePoint(further, stream, _number(point), point.time_unix_nano, scope == FRAMES)
                    points.setdefault(label.run_of(run), []).append(made)
    return points


def _run(resource: Mapping[str, object], attempt: int) -> Run | None:
    """Returns the run that a Resource describes; None if its points are not accepted."""
    texts = {key: senders.text_of(value) for key, value in resource.items()}
    run = senders.run_of_texts(texts) if len(texts) <= senders.MOST_ATTRIBUTES else None
    return replace(run, attempt=attempt) if run and not texts.get("esper.run.attempt") else run


def _label(attributes: Mapping[str, object], *, is_of_seed: bool) -> senders.Label:
    """Returns the meaning of a point's attributes."""
    if len(attributes) > senders.MOST_ATTRIBUTES:
        return senders.Label(fault=senders.INVALID_TEXT)
    label = senders.label_of_texts({key: senders.text_of(value) for key, value in attributes.items()})
    return senders.Label(fault=senders.NO_SEED) if is_of_seed and not (label.seed or label.fault) else label


def _number(point: NumberDataPoint) -> float:
    try:
        return float(point.value)
    except OverflowError:  # an integer beyond the range of a double
        return math.inf if point.value > 0 else -math.inf


class _RankFrames:
    """The run and rank whose readings become frames, and the state kept between two frames."""

    def __init__(self, rank: tuple[str, int]) -> None:
        self.rank = rank
        self._habits = Habits()
        self._maker = FrameMaker(self._habits)

    def frame(self, run: Run, points: list[_CandidatePoint], refused: Counter[str]) -> tuple[Frame, bool]:
        """Returns the frame, and whether it contains all readings and all of its live seeds are known."""
        numbers: dict[Stream, float] = {}
        # If a stream has several points, the first one with the fewest unknown attributes is used.
        for point in sorted(points, key=lambda point: point.further):
            numbers.setdefault(point.stream, point.value)
        time_unix_ns = max(point.time_unix_ns for point in points)
        part = Part.of(numbers)
        self._habits.note(part.shape, is_ours=any(point.is_ours for point in points))
        live = self._maker.live
        new = [seed for seed in part.shape.ids if seed not in live.ids]
        if surplus := {*new[max(senders.MOST_SEEDS - len(live.ids), 0) :]}:
            part = part.without(lambda _, seed: seed in surplus)
            refused[_TOO_MANY_SEEDS] += len(numbers) - len(part.numbers)
        is_whole = not refused.keys() & {_TOO_MANY_SEEDS, senders.TOO_MANY_SETS} and self._habits.is_complete(part)
        step, ends = self._maker.guessed_step(time_unix_ns), self._maker.silent(time_unix_ns, part)
        given = FrameInput(part, run, 0, step, is_whole, ends)
        frame, is_complete = self._maker.made(time_unix_ns, given, live, self._maker.loss)
        self._maker.note(frame)
        return frame, is_complete
