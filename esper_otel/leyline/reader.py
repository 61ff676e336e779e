"""LeylineMetricReader: the readings of any MeterProvider as Leyline packets, whoever set the gauges."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator

from opentelemetry.sdk.metrics import (
    Counter,
    MetricsTimeoutError,
    ObservableCounter,
    ObservableGauge,
    ObservableUpDownCounter,
    UpDownCounter,
)
from opentelemetry.sdk.metrics import _Gauge as SynchronousGauge
from opentelemetry.sdk.metrics.export import Gauge, MetricReader, MetricsData, NumberDataPoint, Sum

from esper_otel.errors import WrongState
from esper_otel.leyline.numbers import finite
from esper_otel.leyline.packets import Packets, packets
from esper_otel.leyline.readings import CollectedFrame, FrameOfReadings, Reading
from esper_otel.leyline.risk import signals, with_signals

_logger = logging.getLogger(__name__)
_QUIET_S = 60.0

# The SDK folds what exceeds its limit, 2000 unless told otherwise, into one point that names no seed. It counts the ids
# of the instrument's whole life, of which at most MOST_SEEDS are taken at once.
_MOST_IDS = 100_000
_INSTRUMENTS = (
    Counter,
    UpDownCounter,
    SynchronousGauge,
    ObservableCounter,
    ObservableUpDownCounter,
    ObservableGauge,
)


class LeylineMetricReader(MetricReader):
    """An OpenTelemetry reader that a controller pulls packets from: ``MeterProvider(metric_readers=[reader])``.

    Each pull collects once and takes what it reads as one step. Gauges and sums under catalogue names count,
    seed metrics with the attribute ``seed_id``; everything else is ignored. The packets, their risk signals too, are
    those that a gateway makes of the same points. Of several points of one stream, such as those of two scopes, the
    first one with the fewest further attributes counts. Ids that a session refuses, and seeds beyond 20,000 at once,
    are left out, with a warning; a packet that lacks such seeds is not ``complete``.

    Where the readings do not say it: steps are numbered by pull, the epoch is 0, the attempt is the Unix millisecond at
    which the reader was made, isolation violations are those new since the last pull, and the run is named after the
    Resource: ``esper.run.id``, else ``service.instance.id``, else ``service.name``. A seed lives until it has been
    silent for five minutes, unless the readings say which seeds live (``esper.seeds.digest``), as a session's do.

    Two things no reader can see: the SDK drops a gauge's NaN, and repeats the last value of a synchronous gauge
    that is not set any more. Both look like an old value, at the time of the pull.

    Threads: any may pull; pulls wait for each other.

    Args:
        latency_budget_ms: a seed whose last kernel took longer is reported as DEGRADED.
    """

    def __init__(self, *, latency_budget_ms: float = 10.0) -> None:
        super().__init__(cardinality_limits=dict.fromkeys(_INSTRUMENTS, _MOST_IDS))
        self._latency_budget_ms = latency_budget_ms
        self._assembler = FrameOfReadings(attempt=time.time_ns() // 1_000_000)
        self._pulling = threading.Lock()
        self._received: deque[MetricsData] = deque(maxlen=1)
        self._is_shut_down = False
        self._loss_before: float | None = None
        self._next_warning_s = 0.0

    def pull(self, *, timeout_s: float = 10.0) -> Packets | None:
        """Collects and converts; None when nothing under a catalogue name was read, or not in time.

        The SDK looks at the time between two callbacks: one that never returns blocks the pull with it.

        Raises:
            WrongState: the reader belongs to no MeterProvider, or has been shut down.
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
            made = self._assembler.frame(reading for data in list(self._received) for reading in _readings(data))
            return None if made is None else self._packets(made)
        except MetricsTimeoutError:
            _logger.warning("no packets: the instruments' callbacks took longer than %s s", timeout_s)
            return None
        finally:
            self._pulling.release()

    def _packets(self, made: CollectedFrame) -> Packets:
        """The packets of a collection, with the signals of its risks."""
        if made.refused and time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + _QUIET_S
            reasons = ", ".join(f"{count} x {reason}" for reason, count in made.refused.items())
            _logger.warning("readings are left out of the packets: %s", reasons)
        step = packets(made.frame, complete=made.complete, latency_budget_ms=self._latency_budget_ms)
        found = signals(step.state, loss_before=self._loss_before)
        self._loss_before = finite(made.frame.last_loss())
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
        """Ends the reader: later pulls raise. The MeterProvider calls it when it shuts down."""
        self._is_shut_down = True


def _readings(data: MetricsData) -> Iterator[Reading]:
    for resource_metrics in data.resource_metrics:
        resource = resource_metrics.resource.attributes
        for scope_metrics in resource_metrics.scope_metrics:
            scope = scope_metrics.scope.name
            for metric in scope_metrics.metrics:
                if isinstance(metric.data, Gauge | Sum):
                    for point in metric.data.data_points:
                        number, attributes = _number(point), point.attributes or {}
                        yield Reading(metric.name, number, point.time_unix_nano, attributes, resource, scope)


def _number(point: NumberDataPoint) -> float:
    try:
        return float(point.value)
    except OverflowError:  # an integer beyond the range of a double
        return math.inf if point.value > 0 else -math.inf
