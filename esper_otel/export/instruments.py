"""Instruments: every metric of the catalogue at a MeterProvider, showing the newest whole step."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

from esper_otel._version import __version__
from esper_otel.errors import InvalidCatalogue
from esper_otel.frame import Frame
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, SEED_FIELDS, Metric

_FIELD_OF = {metric.name: field for metric, field in zip(SEED_CELLS, SEED_FIELDS, strict=True)}
_NOT_INSTRUMENTS = frozenset({FRAME_SEQUENCE.name, FRAME_POINTS.name})

Attributes = Mapping[str, str | int]


class Source(Protocol):
    """A session that instruments read."""

    @property
    def attributes(self) -> Attributes:
        """Attributes of every point: who the session is, where the provider's resource does not say."""

    def newest_frame(self) -> Frame | None:
        """The newest frame; None before the first, when it is stale, and in a forked child."""

    def counts(self) -> Mapping[tuple[str, str], float]:
        """Session metrics by name and, of a metric that is split, the part; else the part is empty."""


class _Reading(NamedTuple):
    """One session as one collect sees it."""

    values: Mapping[str, float]
    seeds: tuple[tuple[Attributes, Mapping[str, float]], ...]
    counts: Mapping[tuple[str, str], float]
    attributes: Attributes


def _read(source: Source) -> _Reading:
    attributes = source.attributes
    frame = source.newest_frame()
    if frame is None:
        return _Reading({}, (), source.counts(), attributes)
    seeds = tuple(({**attributes, "seed_id": seed_id}, cells) for seed_id, cells in frame.seeds.rows())
    return _Reading(frame.values(), seeds, source.counts(), attributes)


class _Pin(threading.local):
    """What the collect that runs on this thread sees, and which instruments have seen it."""

    def __init__(self) -> None:
        self.readings: tuple[_Reading, ...] = ()
        self.served: int = -1  # every bit set: the next callback begins a new collect


class Instruments:
    """The catalogue's instruments at one provider, shared by all sessions that use it.

    An SDK registers an observable once and for ever, so the callbacks outlive sessions and read whichever are
    attached. All callbacks of one collect run on one thread, each once; the first to be asked a second time
    knows that a new collect has begun. What it reads then is pinned for the others: they all see one step.
    """

    def __init__(self, provider: MeterProvider) -> None:
        self._meter: Meter = provider.get_meter("esper_otel", __version__)
        self._lock = threading.Lock()
        self._declared: dict[str, Metric] = {}
        self._sources: tuple[Source, ...] = ()
        self._pin = _Pin()

    def attach(self, source: Source, metrics: Iterable[Metric]) -> None:
        """Registers the metrics that are new here and shows the session in every collect from now on.

        Raises:
            InvalidCatalogue: another session declared one of the names differently.
        """
        with self._lock:
            metrics = [metric for metric in metrics if metric.name not in _NOT_INSTRUMENTS]
            faults = [
                f"{metric.name} [{metric.unit}] is already registered with unit [{before.unit}] by another session"
                for metric in metrics
                if (before := self._declared.get(metric.name, metric)) != metric
            ]
            if faults:
                raise InvalidCatalogue(faults)
            for metric in metrics:
                if metric.name not in self._declared:
                    bit = 1 << len(self._declared)
                    self._declared[metric.name] = metric  # a collect may ask the new callback at once
                    self._register(metric, bit)
            self._sources = (*self._sources, source)

    def detach(self, source: Source) -> None:
        """Shows the session no more."""
        with self._lock:
            self._sources = tuple(other for other in self._sources if other is not source)

    def _register(self, metric: Metric, bit: int) -> None:
        observe = {"step": self._of_step, "seed": self._of_seeds, "session": self._of_session}[metric.level]

        def callback(_options: CallbackOptions) -> list[Observation]:
            return observe(metric.name, self._pinned(bit))

        create: Callable[..., object] = (
            self._meter.create_observable_counter if metric.kind == "counter" else self._meter.create_observable_gauge
        )
        create(metric.name, [callback], metric.unit, metric.description)

    def _pinned(self, bit: int) -> tuple[_Reading, ...]:
        pin = self._pin
        if pin.served & bit:
            pin.served = 0
            pin.readings = tuple(map(_read, self._sources))
        pin.served |= bit
        return pin.readings

    # The SDK drops NaN and infinities with a log line each, so they are left out here.

    @staticmethod
    def _of_step(name: str, readings: tuple[_Reading, ...]) -> list[Observation]:
        return [
            Observation(reading.values[name], reading.attributes)
            for reading in readings
            if math.isfinite(reading.values.get(name, math.nan))
        ]

    @staticmethod
    def _of_seeds(name: str, readings: tuple[_Reading, ...]) -> list[Observation]:
        field = _FIELD_OF[name]
        return [
            Observation(cells[field], attributes)
            for reading in readings
            for attributes, cells in reading.seeds
            if math.isfinite(cells.get(field, math.nan))
        ]

    def _of_session(self, name: str, readings: tuple[_Reading, ...]) -> list[Observation]:
        split_by = self._declared[name].split_by
        return [
            Observation(count, {**reading.attributes, split_by: part} if part else reading.attributes)
            for reading in readings
            for (counted, part), count in reading.counts.items()
            if counted == name
        ]


_of_provider: weakref.WeakKeyDictionary[MeterProvider, Instruments] = weakref.WeakKeyDictionary()
_of_provider_lock = threading.Lock()


def instruments_of(provider: MeterProvider) -> Instruments:
    """The one set of instruments at this provider."""
    with _of_provider_lock:
        instruments = _of_provider.get(provider)
        if instruments is None:
            instruments = _of_provider[provider] = Instruments(provider)
        return instruments
