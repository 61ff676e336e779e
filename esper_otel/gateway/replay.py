"""The command ``esper-otel replay``: serves a stored run again, at its original pace or faster."""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frames.frame import LAST_LOSS, Frame
from esper_otel.gateway.command import until_told
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.options import (
    PacketOptions,
    add_access_arguments,
    add_packet_arguments,
    packet_options,
    ports_of,
)
from esper_otel.gateway.serve.ports import Gateway
from esper_otel.gateway.store.base import (
    NewData,
    Store,
    StoredFrame,
    StoredPage,
    cursor_place,
    cursor_text,
)
from esper_otel.gateway.store.memory import loss_of
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.log import announce

GAP, NAN, LATE, RESUME = "gap", "nan", "late", "resume"
WEATHER = (GAP, NAN, LATE, RESUME)

# The position of each event as a share of the run's steps; the length of a gap, a delay and a resume in steps.
_PLACES = {GAP: 0.2, NAN: 0.4, LATE: 0.6, RESUME: 0.8}
_LOST, _DELAY, _BACK = 5, 3, 10
_PAGE = 256
_LIFE = "replay"


class PlayedEvent(NamedTuple):
    """One event that pullers see.

    Attributes:
        after_ns: time since the start of the run, at the run's original pace.
        item: the step.
        is_lost: whether pullers see a gap instead of the step.
    """

    after_ns: int
    item: Item
    is_lost: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel replay``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --store directory of a gateway")
    parser.add_argument("run_id", metavar="RUN", help="the run")
    parser.add_argument(
        "--speed", type=_speed, default=1.0, metavar="N", help="multiple of the original pace; 0: all at once (1)"
    )
    parser.add_argument(
        *("--inject",),
        type=injected,
        default=frozenset(),
        metavar="LIST",
        help=f"faults to inject, any of {','.join(WEATHER)}",
    )
    add_packet_arguments(parser)
    add_access_arguments(parser, receives=False)


def main(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C, also after the last step was played, then returns 0."""
    source = FileStore(options.folder, read_only=True)
    try:
        if options.run_id not in source.run_ids():
            known = ", ".join(source.run_ids()) or "none"
            raise ConfigurationError(f"no step of run {options.run_id!r} is in {options.folder}; runs there: {known}")
        items = list(_items(source, options.run_id))
        ended = {origin: outcome for origin, outcome in source.outcomes().items() if origin.run_id == options.run_id}
    finally:
        source.close()
    return asyncio.run(_serve(options, items, ended))


async def _serve(options: argparse.Namespace, items: Sequence[Item], ended: Mapping[Origin, str]) -> int:
    events, ended = replayed(items, ended, options.inject)
    player = Player(events, ended, options.speed, packet_options(options))
    async with Gateway(player.core, ports_of(options), receives=False) as gateway:
        playing = asyncio.create_task(player.play())
        try:
            what = f"{len(events)} steps of run {options.run_id} at {options.speed:g} times their pace"
            await until_told(gateway, what, as_json=options.json)
        finally:
            playing.cancel()
    announce("replay ended", f"pulled steps {player.core.counts['pulled_steps']}")
    return 0


class Player:
    """Gives events to pullers at the right time; the age of a step is measured in the run's own time.

    Args:
        events: the events, in order.
        ended: outcomes of the run's attempts; reported after the last event.
        speed: multiple of the run's original pace; 0 plays all at once.
        made: options for making packets.
    """

    def __init__(
        self, events: Sequence[PlayedEvent], ended: Mapping[Origin, str], speed: float, made: PacketOptions
    ) -> None:
        self._events = events
        self._ended = ended
        self._speed = speed
        self._begin_ns = events[0].item.frame.time_unix_ns if events else 0
        self._started_s = time.monotonic()
        self._shelf = ReplayStore()
        self.core: Core = Core(self._shelf, clock_ns=self._now_ns, **made)

    def _now_ns(self) -> int:
        last_ns = self._events[-1].after_ns if self._events else 0
        passed_ns = int((time.monotonic() - self._started_s) * self._speed * 1e9) if self._speed else last_ns
        return self._begin_ns + passed_ns

    async def play(self) -> None:
        """Plays the run once."""
        self._started_s = time.monotonic()
        for event in self._events:
            due_s = self._started_s + (event.after_ns / 1e9 / self._speed if self._speed else 0.0)
            await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
            if event.is_lost:
                self._shelf.lose(event.item)
            self.core.publish(event.item, is_lost=event.is_lost)
        self.core.end(self._ended)


class ReplayStore(Store):
    """The steps of one run, with holes where steps were lost."""

    def __init__(self) -> None:
        super().__init__()
        self._run_id = ""
        self._all: list[StoredFrame] = []
        self._of_rank: dict[int, list[StoredFrame]] = {}
        self._last = 0
        self._last_of: dict[int, int] = {}
        self._losses: dict[Origin, float | None] = {}

    @property
    def size(self) -> int:
        """Is not measured: 0."""
        return 0

    def _add(self, new: NewData) -> None:
        for item in new.items:
            position, number = self._places(item)
            entry = StoredFrame(position, number, item, self._losses.get(item.origin))
            self._all.append(entry)
            self._of_rank.setdefault(item.origin.rank, []).append(entry)
            self._losses[item.origin] = loss_of(item.frame)

    def lose(self, item: Item) -> None:
        """Leaves a hole in place of a step."""
        self._places(item)
        self._losses[item.origin] = loss_of(item.frame)
        self._note_dropped(1)

    def _places(self, item: Item) -> tuple[int, int]:
        rank = item.origin.rank
        self._run_id = item.origin.run_id
        self._last += 1
        self._last_of[rank] = self._last_of.get(rank, 0) + 1
        return self._last, self._last_of[rank]

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Returns the entries after a cursor, up to the next hole. See ``Store``."""
        if run_id != self._run_id:
            raise UnknownRun(f"no step of run {run_id!r} is here; this is a replay of run {self._run_id!r}")
        key = attrgetter("position" if rank is None else "number")
        entries = self._all if rank is None else self._of_rank.get(rank, [])
        place = cursor_place(cursor, _LIFE, rank, self._last if rank is None else self._last_of.get(rank, 0))
        start = bisect_right(entries, place, key=key)
        found: list[StoredFrame] = []
        for entry in entries[start : start + most]:
            if found and key(entry) > key(found[-1]) + 1:
                break
            found.append(entry)
        last = key(found[-1]) if found else place
        gap = key(found[0]) - place - 1 if found else 0
        return StoredPage(found, cursor_text(_LIFE, rank, last), gap)

    def holds(self, run_id: str) -> bool:  # noqa: ARG002 - there is only one
        """Returns True: the only run has steps."""
        return True

    def last_number(self, run_id: str, rank: int) -> int:  # noqa: ARG002 - there is only one run
        """Returns the number of the newest step of a rank."""
        return self._last_of.get(rank, 0)

    def run_ids(self) -> list[str]:
        """Returns the id of the run."""
        return [self._run_id] if self._last else []


def injected(text: str) -> frozenset[str]:
    """Parses the faults that ``--inject`` names."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    unknown = ", ".join(sorted(names - set(WEATHER)))
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown}: known are {', '.join(WEATHER)}")
    return names


def replayed(
    items: Sequence[Item], ended: Mapping[Origin, str], weather: frozenset[str]
) -> tuple[list[PlayedEvent], Mapping[Origin, str]]:
    """Returns the events that pullers see, in order, and the outcomes of the attempts.

    ``gap``: five steps are lost after a fifth of the run. ``nan``: the loss of one step is NaN; values derived from it
    stay as they were. ``late``: a step first arrives incomplete, without its loss; a complete correction follows three
    steps later. ``resume``: after four fifths, the run continues as a new attempt that starts ten steps further back.

    Args:
        items: the steps of the run, in order of release; not empty.
        ended: outcomes of its attempts.
        weather: the faults to inject.
    """
    begin_ns = min(item.frame.time_unix_ns for item in items)
    events, newest_ns = [], 0
    for item in items:  # a step that arrived late is played after those that arrived before it
        newest_ns = max(newest_ns, item.frame.time_unix_ns - begin_ns)
        events.append(PlayedEvent(newest_ns, item))
    places = {name: int(len(items) * share) for name, share in _PLACES.items()}
    if RESUME in weather:  # the last fault first, so that earlier positions stay valid
        events, ended = _resumed(events, ended, places[RESUME])
    if LATE in weather:
        _delay(events, places[LATE])
    if NAN in weather:
        place = places[NAN]
        before = loss_of(events[place - 1].item.frame) if place else None
        events[place] = _with_loss(events[place], {"loss": math.nan, LAST_LOSS: before})
    if GAP in weather:
        for place in range(places[GAP], min(places[GAP] + _LOST, len(events))):
            events[place] = events[place]._replace(is_lost=True)
    return events, ended


def _resumed(
    events: list[PlayedEvent], ended: Mapping[Origin, str], place: int
) -> tuple[list[PlayedEvent], Mapping[Origin, str]]:
    first = max(event.item.origin.attempt for event in events) + 1
    attempts = {
        attempt: first + number for number, attempt in enumerate(sorted({e.item.origin.attempt for e in events}))
    }
    back = max(place - _BACK, 0)
    pause_ns = events[place].after_ns - events[back].after_ns
    again = []
    for event in events[back:]:
        item = event.item
        attempt = attempts[item.origin.attempt]
        run = replace(item.frame.run, attempt=attempt)
        frame = item.frame._replace(run=run, time_unix_ns=item.frame.time_unix_ns + pause_ns)
        item = item._replace(origin=item.origin._replace(attempt=attempt), frame=frame)
        again.append(event._replace(after_ns=event.after_ns + pause_ns, item=item))
    return events[:place] + again, {
        origin._replace(attempt=attempts[origin.attempt]): outcome
        for origin, outcome in ended.items()
        if origin.attempt in attempts
    }


def _delay(events: list[PlayedEvent], place: int) -> None:
    whole = events[place]
    later = min(place + _DELAY, len(events) - 1)
    correction = whole.item._replace(revision=whole.item.revision + 1, complete=True)
    events.insert(later + 1, PlayedEvent(events[later].after_ns, correction))
    events[place] = _with_loss(
        whole._replace(item=whole.item._replace(complete=False)), {"loss": None, LAST_LOSS: None}
    )


def _with_loss(event: PlayedEvent, changed: Mapping[str, float | None]) -> PlayedEvent:
    """Returns the event with changed losses; None removes a loss."""
    frame: Frame = event.item.frame
    values = {name: value for name, value in {**frame.recorded, **changed}.items() if value is not None}
    context = {name: value for name, value in frame.context.items() if name not in changed}
    frame = frame._replace(names=tuple(values), numbers=tuple(values.values()), context=context)
    return event._replace(item=event.item._replace(frame=frame))


def _items(source: Store, run_id: str) -> Iterator[Item]:
    cursor = ""
    while True:
        found = source.after(run_id, cursor, None, _PAGE)
        if not found.entries:
            return
        yield from (entry.item for entry in found.entries)
        cursor = found.cursor


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = -1.0
    if not 0 <= speed < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return speed
