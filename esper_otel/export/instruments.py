"""Instruments: every metric of the catalogue at a MeterProvider, showing the newest whole step."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

from esper_otel._version import __version__
from esper_otel.errors import InvalidCatalogue
from esper_otel.export.cardinality import SeedParts, limit_of
from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import Frame
from esper_otel.log import Warnings
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, SEED_FIELDS, SEED_RETIRED, Metric

_FIELD_OF = {metric.name: field for metric, field in zip(SEED_CELLS, SEED_FIELDS, strict=True)}
_UNSHOWN = ("esper.seeds.unshown", "")

# Parts of the seeds' instruments that stand ready: none can be added while they are read.
_PARTS_AHEAD = 5
_NEARLY_FULL = 0.8
_FIX = (
    "give the provider View(instrument_name='kasmina.seed.*', aggregation_cardinality_limit=N) and the same for "
    "'esper.seed.*', N above the number of seed ids that will come; what is sent over OTLP always has all seeds"
)
_NOT_INSTRUMENTS = frozenset({FRAME_SEQUENCE.name, FRAME_POINTS.name, SEED_RETIRED.name})

Attributes = Mapping[str, str | int]


class InstrumentedSession(Protocol):
    """A session that instruments read."""

    @property
    def attributes(self) -> Attributes:
        """Attributes of every point: who the session is, where the provider's resource does not say."""

    def newest_frame(self) -> Frame | None:
        """The newest frame; None before the first, when it is stale, and in a forked child."""

    def counts(self) -> Mapping[tuple[str, str], float]:
        """Session metrics by name and, of a metric that is split, the part; else the part is empty."""


class _Reading(NamedTuple):
    """One session as one collect sees it; its seeds by the part of the instruments that shows them."""

    values: Mapping[str, float]
    seeds: Mapping[int, list[tuple[Attributes, Mapping[str, float]]]]
    counts: Mapping[tuple[str, str], float]
    attributes: Attributes


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
        self._provider = weakref.ref(provider)
        self._meter: Meter = provider.get_meter("esper_otel", __version__)
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
            new = [metric for metric in metrics if metric.name not in self._declared]
            self._declared.update({metric.name: metric for metric in new})  # a collect may ask a new callback at once
            made = {metric.name: self._register(metric, self._meter) for metric in new}
            of_seeds = [instrument for name, instrument in made.items() if self._declared[name].level == "seed"]
            if of_seeds:  # they are all of the catalogue, and come with the first session
                self._room = SeedParts(limit_of(self._provider(), of_seeds))
                self._add_parts(_PARTS_AHEAD)
            self._sources = (*self._sources, source)

    def detach(self, source: InstrumentedSession) -> None:
        """Shows the session no more."""
        with self._lock:
            self._sources = tuple(other for other in self._sources if other is not source)

    def _register(self, metric: Metric, meter: Meter, part: int = 0) -> object:
        bit = 1 << next(self._bits)

        def callback(_options: CallbackOptions) -> list[Observation]:
            readings = self._pinned(bit)
            if metric.level == "seed":
                return self._of_seeds(metric.name, part, readings)
            return (self._of_step if metric.level == "step" else self._of_session)(metric.name, readings)

        create: Callable[..., object] = (
            meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
        )
        return create(metric.name, [callback], metric.unit, metric.description)

    def _add_parts(self, wanted: int) -> None:
        """Registers the instruments of seeds once more, in scopes of their own, as far as there is need and room."""
        provider = self._provider()
        while provider is not None and self._parts < min(wanted, self._room.parts):
            meter = provider.get_meter(f"esper_otel.seeds.{self._parts + 1}", __version__)
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
        if frame is None:
            return _Reading({}, {}, counts, attributes)
        seeds: dict[int, list[tuple[Attributes, Mapping[str, float]]]] = {}
        unshown = 0
        owner = tuple(attributes.items())
        for seed_id, cells in frame.seeds.rows():
            part = self._room.part_of((owner, seed_id))
            if part is None or part >= self._parts:
                unshown += 1
            else:
                seeds.setdefault(part, []).append(({**attributes, "seed_id": seed_id}, cells))
        values = {**frame.values(), "esper.seeds.digest": digest_of(frame.live.ids)}
        return _Reading(values, seeds, {**counts, _UNSHOWN: unshown}, attributes)

    def _look_ahead(self) -> None:
        """Sees to it that there are instruments for the seeds of the next collect, and says when there will be none."""
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
            # Not here: the SDK holds the lock that registering takes.
            self._growing = threading.Thread(
                target=self._grow, args=(wanted,), name="esper-otel-instruments", daemon=True
            )
            with suppress(RuntimeError):  # the interpreter is about to end
                self._growing.start()

    # The SDK drops NaN and infinities with a log line each, so they are left out here.

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
