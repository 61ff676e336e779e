"""The steps of a run, read from a black box or a gateway."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from esper_otel.charts.event_list import ShownEvent
from esper_otel.errors import ConfigurationError, GatewayError
from esper_otel.frames import black_box
from esper_otel.frames.frame import Frame
from esper_otel.hours.bar import RunHours
from esper_otel.leyline import messages
from esper_otel.leyline.packets import Packets
from esper_otel.parts.senders import is_valid
from esper_otel.pull.client import TamiyoClient
from esper_otel.pull.infos import RunInfo
from esper_otel.pull.views import RunRanks
from esper_otel.schema import METRICS, SEED_CELLS, STEP_METRICS
from esper_otel.text import printable

_FIELDS = {metric.name: metric.field for metric in SEED_CELLS}
# Metrics of the catalogue that are not in packets: a packet names only the step's metrics and the user's own.
_NOT_IN_PACKETS = {metric.name for metric in METRICS} - {metric.name for metric in STEP_METRICS}
# The names of what packets give under another key, so that a run has the same names from a gateway and a black box.
_BY_KEY = {metric.key: metric.name for metric in METRICS if metric.level == "step" and metric.key}
_AT_ONCE = 1000
# Limits of what a report reads, since a gateway might answer without end.
_MOST_STEPS = 2_000_000
_MOST_NUMBERS = 50_000_000  # of all steps, in 8 bytes each
_MOST_S = 600.0
_MOST_ATTEMPTS = 20
_MOST_EVENTS, _MOST_TEXT, _MOST_EVENTS_S = 2_000, 500, 30.0

Name = TypeVar("Name", str, tuple[str, tuple[str, ...]])


class StepRow:
    """One step, stored compactly, since a run may have a million.

    Args:
        step: its number.
        epoch: the epoch it belongs to.
        unix_s: its time.
        values: step metrics by name; NaN is a value, and missing metrics are left out.
        seeds: cells of the seeds recorded in it, by field.
    """

    __slots__ = ("_cells", "_names", "_numbers", "_seeds", "epoch", "step", "unix_s")

    def __init__(
        self,
        step: int,
        epoch: int,
        unix_s: float,
        values: Mapping[str, float],
        seeds: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.step: int = step
        self.epoch: int = epoch
        self.unix_s: float = unix_s
        self._names = _shared(tuple(values))
        self._numbers = array("d", values.values())
        self._seeds = _shared(tuple((seed_id, tuple(cells)) for seed_id, cells in seeds.items()))
        self._cells = array("d", chain.from_iterable(cells.values() for cells in seeds.values()))

    @property
    def values(self) -> dict[str, float]:
        """Step metrics by name."""
        return dict(zip(self._names, self._numbers, strict=True))

    @property
    def seeds(self) -> dict[str, dict[str, float]]:
        """Cells of the seeds recorded in the step, by field."""
        cells = iter(self._cells)
        return {seed_id: dict(zip(fields, cells, strict=False)) for seed_id, fields in self._seeds}


@lru_cache(maxsize=4096)
def _shared(names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Returns one shared tuple for equal tuples, since most steps have the same names."""
    return names


class EarlierAttempt(NamedTuple):
    """An attempt of a rank that was followed by another one.

    Attributes:
        attempt: which start of the run.
        rows: its steps, in the order of their times.
    """

    attempt: int
    rows: tuple[StepRow, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """Steps of one rank, in the order of their times.

    Attributes:
        name: name of the run.
        rank: the process within the run.
        attempt: which start of the run.
        ended: how it ended; empty when it has not ended or this is not known.
        rows: the steps.
        source: identifies the recording uniquely; usable as a file name.
        device: type of the device that trains, such as ``cuda``; empty if it is not known.
        about: what else is known of the run, as pairs of a name and a text: its host, revision, settings, attempts.
        world_size: number of ranks of the run.
        earlier: the attempts before, oldest first, if they are known.
        ranks: a comparison of the run's ranks, if there are several and it is known.
        hours: where the hours of the run went; None if that is not known, as in a black box.
        events: what happened in it, of all its attempts, in the order in which the gateway heard of it.
        events_left_out: how many older events there are besides.
        unread: what could not be read of it; empty if everything could.
        units: units of the user's own metrics, by name.
    """

    name: str
    rank: int
    attempt: int
    ended: str
    rows: tuple[StepRow, ...]
    source: str
    device: str = ""
    about: tuple[tuple[str, str], ...] = ()
    world_size: int = 1
    earlier: tuple[EarlierAttempt, ...] = ()
    ranks: RunRanks | None = None
    hours: RunHours | None = field(default=None, compare=False)
    events: tuple[ShownEvent, ...] = field(default=(), compare=False)
    events_left_out: int = field(default=0, compare=False)
    unread: str = ""
    units: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """The name of the run, with the rank unless it is 0."""
        return self.name if self.rank == 0 else f"{self.name}, rank {self.rank}"

    def series(self, name: str) -> list[float | None]:
        """Returns a metric's value in each step; None where it is missing."""
        return [row.values.get(name) for row in self.rows]


def of_file(path: Path) -> Recording:
    """Reads a recording from a black box.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    content = black_box.read(path)
    about = content.about
    rows = tuple(
        StepRow(frame.global_step, frame.epoch, frame.time_unix_ns / 1e9, _clean(frame.values()), _seeds_of(frame))
        for frame in content.frames
    )
    events = tuple(
        ShownEvent(
            *(printable(event.name), printable(event.body, _MOST_TEXT), event.time_unix_ns, event.severity, event.step),
            about["attempt"],
        )
        for event in content.events
    )
    source = _clean_text(path.name.removesuffix(black_box.SUFFIX))
    device = str(about.get("device", "")).partition(":")[0]
    name, reason = _clean_text(about["run_id"]), _clean_text(about["reason"])
    return Recording(
        *(name, about["rank"], about["attempt"], reason, rows, source, device),
        about=_about(about),
        events=events,
        unread=_unread(content),
        units=_units(about.get("units")),
        world_size=_world_size(about.get("world_size")),
    )


def _seeds_of(frame: Frame) -> dict[str, dict[str, float]]:
    return _clean_seeds(dict(frame.seeds.rows()))


def _unread(content: black_box.BoxContent) -> str:
    """Returns what could not be read of a black box; empty if everything could."""
    if content.damage:
        more = f", and {len(content.damage) - 1} more" if len(content.damage) > 1 else ""
        return f"The file is damaged, and some steps may be missing ({printable(content.damage[0])}{more})."
    return "The file ends in the middle of a step." if content.is_torn else ""


def _about(head: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Returns what a black box says of the run; anybody may have written the file."""
    device = head.get("hardware") or head.get("device")
    texts = [("experiment", head.get("experiment")), ("host", head.get("host")), ("location", head.get("location"))]
    texts += [("device", device), ("revision", head.get("revision"))]
    settings = head.get("settings")
    if isinstance(settings, dict) and settings:
        texts.append(("settings", ", ".join(f"{name} = {value}" for name, value in sorted(settings.items()))))
    found = [(name, text) for name, text in texts if isinstance(text, str) and text]
    return tuple((name, _clean_text(text)) for name, text in found)


def _units(said: object) -> dict[str, str]:
    """Returns units that a file states."""
    found = said.items() if isinstance(said, dict) else ()
    return {_clean_text(name): _clean_text(unit) for name, unit in found if isinstance(unit, str)}


def _world_size(said: object) -> int:
    """Returns the number of ranks that a file states; 1 if it states something else."""
    return said if type(said) is int and 1 < said < 2**31 else 1


@lru_cache(maxsize=4096)
def _clean_text(text: str) -> str:
    """Returns the text unchanged if a session accepts it as a name or id; otherwise its printable form."""
    return text if is_valid(text) else printable(text)


def _clean(values: Mapping[str, float]) -> dict[str, float]:
    return {_clean_text(name): value for name, value in values.items()}


def _clean_seeds(seeds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {_clean_text(seed_id): _clean(cells) for seed_id, cells in seeds.items()}


def of_gateway(client: TamiyoClient, run_id: str, rank: int) -> Recording:
    """Reads all steps of a rank from a gateway: those of the newest attempt, and of the attempts before.

    Raises:
        GatewayError: the run is unknown, the gateway cannot be reached, or the run is too large.
        ConfigurationError: the rank has no steps.
    """
    found: dict[int, dict[int, StepRow]] = {}
    device = ""
    for packets in _pulled(client, run_id, rank):
        # a later revision replaces an earlier one
        found.setdefault(packets.attempt, {})[packets.state.timestamp_ns] = _row(packets)
        device = packets.state.hardware_context.device_type or device
    if not found:
        raise ConfigurationError(f"run {run_id!r} has no steps of rank {rank}")
    *before, (attempt, rows) = [
        EarlierAttempt(attempt, tuple(row for _, row in sorted(rows.items())))
        for attempt, rows in sorted(found.items())
    ]
    events, left_out = _events(client, run_id, rank)
    of_rank = [run for run in client.runs(run_id) if run.rank == rank]
    mine = next((run for run in of_rank if run.attempt == attempt), None)
    world_size = 1 if mine is None else mine.world_size
    outcome = "" if mine is None else mine.ended or mine.run_ended or ""
    source = black_box.file_stem(run_id, rank, attempt)
    return Recording(
        *(_clean_text(run_id), rank, attempt, _clean_text(outcome), rows, source, device),
        about=tuple((name, _clean_text(text)) for name, text in _known(mine, of_rank)),
        world_size=world_size,
        earlier=tuple(before),
        ranks=_ranks(client, run_id) if world_size > 1 else None,
        hours=_hours(client, run_id),
        events=tuple(events),
        events_left_out=left_out,
        units={} if mine is None else mine.units,
    )


def _hours(client: TamiyoClient, run_id: str) -> RunHours | None:
    """Returns where the hours of the run went; None if the gateway cannot say, as one of an older version."""
    try:
        return client.hours(run_id)
    except GatewayError:
        return None


def _events(client: TamiyoClient, run_id: str, rank: int) -> tuple[deque[ShownEvent], int]:
    """Returns the newest events of a rank, and how many older ones there are; none if the gateway has no events."""
    events: deque[ShownEvent] = deque(maxlen=_MOST_EVENTS)
    count, cursor = 0, ""
    deadline_s = time.monotonic() + _MOST_EVENTS_S
    try:
        while (page := client.events(run_id, cursor, rank=rank, max_events=_AT_ONCE)) and time.monotonic() < deadline_s:
            for event in page:
                name, text = printable(event.name), printable(event.text, _MOST_TEXT)
                step = event.step
                events.append(ShownEvent(name, text, event.time_unix_ns, event.severity, step, event.attempt))
            count, cursor = count + len(page), page.cursor
    except GatewayError:  # it is of an older version, or a tier on Kafka
        pass
    return events, count - len(events)


def _known(mine: RunInfo | None, of_rank: Sequence[RunInfo]) -> Iterator[tuple[str, str]]:
    """Yields what a gateway knows of a writer, as pairs of a name and a text."""
    if mine is None:
        return
    for name in ("experiment", "host", "location", "device", "revision", "settings"):
        if getattr(mine, name):
            yield name, getattr(mine, name)
    before = [run for run in sorted(of_rank, key=lambda run: run.attempt) if run.attempt != mine.attempt]
    if before:
        yield "earlier attempts", "; ".join(map(_attempt, before[-_MOST_ATTEMPTS:]))


def _ranks(client: TamiyoClient, run_id: str) -> RunRanks | None:
    """Returns the gateway's comparison of the ranks; None if it has none."""
    try:
        return client.ranks(run_id)
    except GatewayError:
        return None


def _attempt(run: RunInfo) -> str:
    steps = f"steps {run.first_step} to {run.last_step}" if run.last_step is not None else "no step"
    return f"{steps}, {run.ended or 'end not known'}"


def _pulled(client: TamiyoClient, run_id: str, rank: int) -> Iterator[Packets]:
    """Yields all packets that the gateway has of the run.

    Raises:
        GatewayError: the gateway has more than a report reads.
    """
    steps = numbers = 0
    cursor = None
    deadline_s = time.monotonic() + _MOST_S
    while page := client.pull(run_id, cursor, rank=rank, max_packets=_AT_ONCE, values=True):
        steps += len(page)
        if steps > _MOST_STEPS or time.monotonic() > deadline_s:
            raise GatewayError(f"the gateway goes on giving steps of run {run_id!r}: {steps} by now, and no end")
        for packets in page:
            numbers += len(packets.state.training_metrics) + len(packets.names) + len(packets.values)
            numbers += sum(len(packet.metrics) + len(packet.events) for packet in packets.telemetry)
            if numbers > _MOST_NUMBERS:
                raise GatewayError(f"run {run_id!r} has more numbers than a report takes: {_MOST_NUMBERS}")
            yield packets
        cursor = page.cursor


def names_of(one: Recording, other: Recording) -> tuple[str, str]:
    """Returns names that distinguish two recordings."""
    for names in (
        (one.title, other.title),
        (f"{one.title}, attempt {one.attempt}", f"{other.title}, attempt {other.attempt}"),
        (f"{one.title}, {one.ended}", f"{other.title}, {other.ended}"),
    ):
        if names[0] != names[1]:
            return names
    return f"{one.title}, the first", f"{other.title}, the second"


def _row(packets: Packets) -> StepRow:
    state = packets.state
    values = {_BY_KEY.get(name, name): value for name, value in state.training_metrics.items()}
    values |= dict.fromkeys((packets.names - _NOT_IN_PACKETS) - values.keys(), math.nan)
    values |= packets.values
    seeds: dict[str, dict[str, float]] = {}
    for packet in packets.telemetry:
        for point in packet.metrics:
            if point.name in _FIELDS:
                seeds.setdefault(point.attributes.get("seed_id", ""), {})[_FIELDS[point.name]] = point.value
        for event in packet.events:
            _add_event(event, values, seeds)
    return StepRow(packets.step, state.current_epoch, state.timestamp_ns / 1e9, _clean(values), _clean_seeds(seeds))


def _add_event(event: messages.TelemetryEvent, values: dict[str, float], seeds: dict[str, dict[str, float]]) -> None:
    """Restores what packets carry only as events: values that were not finite, and whether the step raised."""
    if event.description == "step_failed":
        values["esper.step.failed"] = 1.0
    if event.description not in {"loss_nonfinite", "value_nonfinite"}:
        return
    about = event.attributes
    metric = about.get("metric", "")
    try:
        value = float(about.get("value", ""))
    except ValueError:  # not from a gateway of this library
        return
    if "seed_id" in about:
        if metric in _FIELDS:
            seeds.setdefault(about["seed_id"], {})[_FIELDS[metric]] = value
    elif metric in values:
        values[metric] = value
