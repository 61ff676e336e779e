"""Registers every metric of the catalogue with a MeterProvider; the instruments report the newest complete step."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

from esper_otel._version import __version__
from esper_otel.errors import InvalidCatalogue
from esper_otel.export.cardinality import SeedParts, limit_of
from esper_otel.export.device_points import DEVICE_SCOPE, DevicePoint
from esper_otel.export.scopes import SCHEMA_URL
from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import Frame
from esper_otel.log import Warnings
from esper_otel.schema import (
    DEVICE_INFO,
    FRAME_POINTS,
    FRAME_SEQUENCE,
    SEED_CELLS,
    SEED_FIELDS,
    SEED_RETIRED,
    TWINS,
    Metric,
)

_FIELD_OF = {metric.name: field for metric, field in zip(SEED_CELLS, SEED_FIELDS, strict=True)}
_UNSHOWN = ("esper.seeds.unshown", "")

# Spare parts of the seeds' instruments to keep registered, since none can be added during a collect.
_PARTS_AHEAD = 5
_NEARLY_FULL = 0.8
_FIX = (
    "give the provider View(instrument_name='kasmina.seed.*', aggregation_cardinality_limit=N) and the same for "
    "'esper.seed.*', with N above the number of seed ids to expect; the steps sent over OTLP always have all seeds"
)
_OF_DEVICE = frozenset({DEVICE_INFO, *(twin.metric for twin in TWINS)})
_NOT_INSTRUMENTS = frozenset({FRAME_SEQUENCE.name, FRAME_POINTS.name, SEED_RETIRED.name})

Attributes = Mapping[str, str | int]


class InstrumentedSession(Protocol):
    """A session that instruments read."""

    @property
    def attributes(self) -> Attributes:
        """Attributes of every point; they identify the session where the provider's Resource does not."""

    def newest_frame(self) -> Frame | None:
        """Returns the newest frame; None before the first frame, when the newest is stale, and in a forked child."""

    def probed(self) -> Mapping[str, float]:
        """Returns the probes' fresh readings, which are not all in every frame."""

    def counts(self) -> Mapping[tuple[str, str], float]:
        """Returns the session's own metrics by name and part; the part is empty for a metric that is not split."""

    def device_points(self) -> Sequence[DevicePoint]:
        """Returns what is known of the device."""


class _Reading(NamedTuple):
    """The values of one session in one collect; its seeds are grouped by the part that reports them."""

    values: Mapping[str, float]
    seeds: Mapping[int, list[tuple[Attributes, Mapping[str, float]]]]
    counts: Mapping[tuple[str, str], float]
    attributes: Attributes
    device: Sequence[DevicePoint] = ()


class _Pin(threading.local):
    """The values of the collect that runs on this thread, and a bit mask of the instruments that have read them."""

    def __init__(self) -> None:
        self.readings: tuple[_Reading, ...] = ()
        self.served: int = -1  # all bits set, so that the next callback starts a new collect


class Instruments:
    """The catalogue's instruments at one provider, shared by all sessions that use it.

    An SDK cannot unregister an observable, so the callbacks outlive sessions and read those that are attached. All
    callbacks of one collect run on one thread, each once. When a callback runs for the second time, a new collect has
    begun; the values read then are kept for the other callbacks, so that all instruments report the same step.
    """

    def __init__(self, provider: MeterProvider) -> None:
        self._provider = weakref.ref(provider)
        self._meter: Meter = provider.get_meter("esper_otel", __version__, SCHEMA_URL)
        self._meter_of_device: Meter = provider.get_meter(DEVICE_SCOPE, __version__, SCHEMA_URL)
        self._lock = threading.Lock()
        self._declared: dict[str, Metric] = {}
        self._bits = itertools.count()
        self._room = SeedParts(0)
        self._parts = 1
        self._growing: threading.Thread | None = None
        self._has_warned = False
        self._sources: tuple[InstrumentedSession, ...] = ()
        self._pin = _Pin()
        self._warnings = Warnings()

    def attach(self, source: InstrumentedSession, metrics: Iterable[Metric]) -> None:
        """Registers the metrics that are not registered yet and reports the session in every later collect.

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
            new = [metric for metric in metrics if metric.name not in self._declared]
            self._declared.update({metric.name: metric for metric in new})  # a collect may ask a new callback at once
            made = {metric.name: self._register(metric, self._meter_of(metric)) for metric in new}
            of_seeds = [instrument for name, instrument in made.items() if self._declared[name].level == "seed"]
            if of_seeds:  # all seed metrics are from the catalogue and are registered by the first session
                self._room = SeedParts(limit_of(self._provider(), of_seeds))
                self._add_parts(_PARTS_AHEAD)
            self._sources = (*self._sources, source)

    def detach(self, source: InstrumentedSession) -> None:
        """Stops reporting the session."""
        with self._lock:
            self._sources = tuple(other for other in self._sources if other is not source)

    def _meter_of(self, metric: Metric) -> Meter:
        return self._meter_of_device if metric in _OF_DEVICE else self._meter

    def _register(self, metric: Metric, meter: Meter, part: int = 0) -> object:
        bit = 1 << next(self._bits)

        def callback(_options: CallbackOptions) -> list[Observation]:
            readings = self._pinned(bit)
            if metric.level == "seed":
                return self._of_seeds(metric.name, part, readings)
            if metric in _OF_DEVICE:
                return self._of_device(metric.name, readings)
            return (self._of_step if metric.level == "step" else self._of_session)(metric.name, readings)

        creators: dict[str, Callable[..., object]] = {
            "counter": meter.create_observable_counter,
            "updowncounter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        return creators[metric.kind](metric.name, [callback], metric.unit, metric.description)

    def _add_parts(self, wanted: int) -> None:
        """Registers further sets of seed instruments, each in its own scope, up to the wanted number and the limit."""
        provider = self._provider()
        while provider is not None and self._parts < min(wanted, self._room.parts):
            meter = provider.get_meter(f"esper_otel.seeds.{self._parts + 1}", __version__, SCHEMA_URL)
            for metric in SEED_CELLS:
                self._register(metric, meter, self._parts)
            self._parts += 1

    def _grow(self, wanted: int) -> None:
        with self._lock:
            self._add_parts(wanted)

    def _pinned(self, bit: int) -> tuple[_Reading, ...]:
        pin = self._pin
        if pin.served & bit:
            pin.served = 0
            pin.readings = tuple(map(self._read, self._sources))
            self._look_ahead()
        pin.served |= bit
        return pin.readings

    def _read(self, source: InstrumentedSession) -> _Reading:
        attributes, counts, frame = source.attributes, source.counts(), source.newest_frame()
        device = source.device_points()
        if frame is None:
            return _Reading({}, {}, counts, attributes, device)
        seeds: dict[int, list[tuple[Attributes, Mapping[str, float]]]] = {}
        unshown = 0
        owner = tuple(attributes.items())
        for seed_id, cells in frame.seeds.rows():
            part = self._room.part_of((owner, seed_id))
            if part is None or part >= self._parts:
                unshown += 1
            else:
                seeds.setdefault(part, []).append(({**attributes, "seed_id": seed_id}, cells))
        values = {**source.probed(), **frame.values(), "esper.seeds.digest": digest_of(frame.live.ids)}
        return _Reading(values, seeds, {**counts, _UNSHOWN: unshown}, attributes, device)

    def _look_ahead(self) -> None:
        """Adds instruments for the seeds of the next collects; warns when the limit is near or reached."""
        room = self._room
        used = room.used / room.size
        unshown = sum(reading.counts.get(_UNSHOWN, 0) for reading in self._pin.readings)
        if unshown and used == 1.0:
            text = "the readers of a MeterProvider leave out %d live seeds, its limit is %d seed ids: %s"
            self._warnings.say("room is full", text, unshown, room.size, _FIX)
        elif used >= _NEARLY_FULL and not self._has_warned:
            self._has_warned = True
            text = "%d of the %d seed ids that a MeterProvider can tell apart are used: %s"
            self._warnings.say("room", text, room.used, room.size, _FIX)
        wanted = min(int(used * room.parts) + _PARTS_AHEAD, room.parts)
        if wanted > self._parts and (self._growing is None or not self._growing.is_alive()):
            # In another thread, since the SDK holds the lock that registering needs.
            self._growing = threading.Thread(
                target=self._grow, args=(wanted,), name="esper-otel-instruments", daemon=True
            )
            with suppress(RuntimeError):  # the interpreter is shutting down
                self._growing.start()

    # The SDK drops NaN and infinities and logs a line for each, so they are left out here.

    @staticmethod
    def _of_step(name: str, readings: tuple[_Reading, ...]) -> list[Observation]:
        return [
            Observation(reading.values[name], reading.attributes)
            for reading in readings
            if math.isfinite(reading.values.get(name, math.nan))
        ]

    @staticmethod
    def _of_seeds(name: str, part: int, readings: tuple[_Reading, ...]) -> list[Observation]:
        field = _FIELD_OF[name]
        return [
            Observation(cells[field], attributes)
            for reading in readings
            for attributes, cells in reading.seeds.get(part, ())
            if math.isfinite(cells.get(field, math.nan))
        ]

    @staticmethod
    def _of_device(name: str, readings: tuple[_Reading, ...]) -> list[Observation]:
        return [
            Observation(value, {**attributes, **reading.attributes})
            for reading in readings
            for metric, value, attributes in reading.device
            if metric.name == name
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
    """Returns the set of instruments at this provider; creates it on the first call."""
    with _of_provider_lock:
        instruments = _of_provider.get(provider)
        if instruments is None:
            instruments = _of_provider[provider] = Instruments(provider)
        return instruments
