"""``LeylineMetricReader``, which converts the readings of any MeterProvider to Leyline packets."""

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
from esper_otel.frames.numbers import finite
from esper_otel.leyline.packets import Packets, packets
from esper_otel.leyline.readings import CollectedFrame, FrameOfReadings, Reading
from esper_otel.leyline.risk import signals, with_signals

_logger = logging.getLogger(__name__)
_QUIET_S = 60.0

# The SDK merges attribute sets above its cardinality limit (2000 by default) into one point without a seed id. The
# limit counts all ids in the life of an instrument; at most MOST_SEEDS of them are accepted at once.
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

    Each pull collects once and treats the readings as one step. Gauges and sums with names from the catalogue are used,
    seed metrics if they have the attribute ``seed_id``; all others are ignored. The packets, including risk signals,
    equal those that a gateway makes from the same points. If a stream has several points, for example from two scopes,
    the first one with the fewest additional attributes is used. Ids that a session rejects, and seeds beyond 20,000 at
    once, are left out, with a warning; packets without such seeds are not ``complete``.

    Defaults for missing information: steps are numbered by pull, the epoch is 0, the attempt is the Unix millisecond
    in which the reader was created, isolation violations are those since the last pull, and the run id is the
    Resource's ``esper.run.id``, ``service.instance.id`` or ``service.name``, in this order. A seed's life ends after
    five minutes without points, unless the readings identify the live seeds (``esper.seeds.digest``), as those of a
    session do.

    Two cases cannot be detected, because of the SDK: it drops a NaN of a gauge, and it repeats the last value of a
    synchronous gauge that is no longer set. In both cases an old value appears with the time of the pull.

    Threads: any thread may pull; pulls run one at a time.

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
            made = self._assembler.frame(reading for data in list(self._received) for reading in _readings(data))
            return None if made is None else self._packets(made)
        except MetricsTimeoutError:
            _logger.warning("no packets: the instruments' callbacks took longer than %s s", timeout_s)
            return None
        finally:
            self._pulling.release()

    def _packets(self, made: CollectedFrame) -> Packets:
        """Returns the packets of a collection, with its risk signals."""
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
        """Shuts the reader down; later pulls raise WrongState. The MeterProvider calls this when it shuts down."""
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
