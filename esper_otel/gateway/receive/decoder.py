"""Decoder: checks each point of a request once and groups the points into blocks that can become frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import ABSENT_BITS
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.fast import FastDecoder
from esper_otel.gateway.receive.otlp_json import protobuf_of_json
from esper_otel.gateway.receive.plain import plain_columns
from esper_otel.gateway.receive.point_columns import (
    AN_END,
    NOTHING,
    PointColumns,
    RawPoints,
)
from esper_otel.gateway.receive.request import (
    EARLIEST_UNIX_NS,
    INVALID_TEXT,
    LATEST_UNIX_NS,
    NO_SEED,
    NO_TIME,
    NO_VALUE,
    TOO_MANY_ATTRIBUTES,
    TOO_MANY_SETS,
    WRONG_TIME,
    CutFrame,
    DecodedRequest,
    DeviceOfSender,
    Malformed,
    Marker,
    PhasePoint,
    PointBlock,
    PointSender,
    RejectedPoints,
    RequestPart,
    RunEnd,
)
from esper_otel.gateway.receive.template import ResourcePart, Templates, parts_of
from esper_otel.parts.levels import DEVICE, FRAMES, HEALTH, OTHERS, PHASES, SEED, SESSION
from esper_otel.parts.senders import Label
from esper_otel.schema import DEVICE_INFO
from esper_otel.text import printable

__all__ = ["Decoder", "Malformed", "decode_plain"]

# A point takes at least this many bytes, if a template reads it.
_POINT_BYTES = 20
_MOST_DEVICE = 500  # characters

# A verdict is an index into this tuple; 0 means that the point is accepted.
_REASONS = ("", NO_TIME, WRONG_TIME, INVALID_TEXT, TOO_MANY_ATTRIBUTES, NO_SEED, NO_VALUE, TOO_MANY_SETS)


class Decoder:
    """Decodes requests; caches attributes, Resources and templates.

    Threads: not thread-safe; use it from one thread at a time.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._fast = FastDecoder(self._limits)
        self._templates = Templates(self._decode, self._fast.sender)

    def decode(self, body: bytes) -> DecodedRequest:
        """Decodes a serialized ExportMetricsServiceRequest.

        Raises:
            Malformed: the bytes are not such a request.
        """
        parts = parts_of(body) if len(body) <= _POINT_BYTES * self._limits.points else None
        return (self._in_parts(body, parts) if parts else None) or self._decode(body)

    def decode_json(self, body: bytes) -> DecodedRequest:
        """Decodes a request in OTLP's JSON encoding.

        Raises:
            Malformed: the bytes are not such a request.
        """
        return self.decode(protobuf_of_json(body))._replace(parts=())

    def _decode(self, body: bytes) -> DecodedRequest:
        return _judged(*self._fast.columns(body))

    def _in_parts(self, body: bytes, parts: list[ResourcePart]) -> DecodedRequest | None:
        """Decodes with templates what fits them, and the rest in between; None if that is of no use here."""
        of_parts, points = self._templates.blocks(body, parts)
        if 2 * of_parts.count(None) > len(parts):
            return None  # faster as a whole than in many small pieces
        blocks: list[PointBlock] = []
        divided: list[RequestPart] = []
        markers: dict[Marker, None] = {}
        ended: dict[RunEnd, None] = {}
        phases: list[PhasePoint] = []
        cut: dict[CutFrame, None] = {}
        alive: dict[PointSender, None] = {}
        devices: dict[PointSender, DeviceOfSender] = {}
        rejected = RejectedPoints()
        for is_read, some in groupby(zip(parts, of_parts, strict=True), lambda each: each[1] is not None):
            if is_read:
                for part, block in some:
                    if block is not None:
                        blocks.append(block)
                        divided.append(RequestPart(part.start, part.end, block.sender))
                continue
            between = [part for part, _ in some]
            divided.append(RequestPart(between[0].start, between[-1].end, None))
            decoded = self._decode(body[between[0].start : between[-1].end])
            blocks += decoded.blocks
            markers |= dict.fromkeys(decoded.markers)
            ended |= dict.fromkeys(decoded.ended)
            phases += decoded.phases
            cut |= dict.fromkeys(decoded.cut)
            alive |= dict.fromkeys(decoded.alive)
            devices |= {device.sender: device for device in decoded.devices}
            points += decoded.points
            rejected.merge(decoded)
        if points > self._limits.points or _are_mixed(blocks):
            return None
        beside = tuple(markers), tuple(ended)
        return DecodedRequest(
            tuple(blocks),
            *beside,
            points,
            rejected.counts,
            rejected.metrics,
            tuple(divided),
            tuple(cut),
            tuple(phases),
            _without_blocks(alive, blocks),
            tuple(devices.values()),
        )


def _without_blocks(senders: Iterable[PointSender], blocks: Sequence[PointBlock]) -> tuple[PointSender, ...]:
    """Returns the senders that no block is of."""
    of_blocks = {block.sender for block in blocks}
    return tuple(sender for sender in senders if sender not in of_blocks)


def _are_mixed(blocks: list[PointBlock]) -> bool:
    """Returns whether the points of a sender must be sorted by their attributes over several blocks."""
    mixed = {block.sender for block in blocks if block.has_further}
    return bool(mixed) and max(Counter(block.sender for block in blocks if block.sender in mixed).values()) > 1


def decode_plain(body: bytes) -> DecodedRequest:
    """Returns the same as ``Decoder.decode``, but decodes point by point.

    Raises:
        Malformed: the bytes are not a request.
    """
    return _judged(*plain_columns(body, Limits()))


class _Labels(NamedTuple):
    """The labels of a request, in columns."""

    all: list[Label]
    seeds: tuple[str, ...]
    seed: npt.NDArray[np.int64]
    verdict: npt.NDArray[np.uint8]
    further: npt.NDArray[np.int64]

    @classmethod
    def of(cls, labels: list[Label]) -> _Labels:
        seeds = tuple(sorted({label.seed for label in labels if label.seed}))
        place = {"": -1} | {seed: number for number, seed in enumerate(seeds)}
        return cls(
            labels,
            seeds,
            np.array([place[label.seed] for label in labels], np.int64),
            np.array([_REASONS.index(label.fault) for label in labels], np.uint8),
            np.array([label.further for label in labels], np.int64),
        )

    def has_owners(self) -> bool:
        """Returns whether any point's own attributes name its run or rank."""
        return any(label.run_id or label.rank >= 0 for label in self.all)


def _judged(raw: RawPoints, columns: PointColumns) -> DecodedRequest:
    rejected = raw.rejected
    if not raw.metrics:
        return DecodedRequest((), (), (), raw.points, rejected.counts, rejected.metrics)
    labels = _Labels.of(list(raw.labels))
    levels = np.array([metric.level for metric in raw.metrics], np.uint8)
    is_health = np.array([metric.scope in (HEALTH, PHASES, DEVICE) for metric in raw.metrics])
    verdict = _verdict(columns, labels, levels)
    cut: tuple[CutFrame, ...] = ()
    if verdict.any():
        cut = _cut(raw, columns, labels, np.flatnonzero(verdict == _REASONS.index(TOO_MANY_SETS)))
        pairs = columns.metric.astype(np.int64) * len(_REASONS) + verdict
        for pair, count in zip(*(each.tolist() for each in np.unique(pairs, return_counts=True)), strict=True):
            metric, reason = divmod(pair, len(_REASONS))
            if reason:
                rejected.add(_REASONS[reason], raw.metrics[metric].name, count)
    taken = verdict == 0
    is_end = columns.holds == AN_END
    beside = taken & (is_end | (levels == SESSION)[columns.metric] | is_health[columns.metric])
    markers: tuple[Marker, ...] = ()
    ended: tuple[RunEnd, ...] = ()
    phases: tuple[PhasePoint, ...] = ()
    alive: dict[PointSender, None] = {}
    devices: tuple[DeviceOfSender, ...] = ()
    if beside.any():
        places = np.flatnonzero(beside)
        markers, ended, phases, alive = _beside(raw, columns, labels, places)
        devices = _devices(raw, columns, labels, places)
        taken &= ~beside
    if not taken.all():
        columns = PointColumns(*(column[taken] for column in columns))
    blocks = _blocks(raw, columns, labels)
    counts = raw.points, rejected.counts, rejected.metrics
    lives = _without_blocks(alive, blocks)
    return DecodedRequest(blocks, markers, ended, *counts, cut=cut, phases=phases, alive=lives, devices=devices)


def _cut(raw: RawPoints, columns: PointColumns, labels: _Labels, places: npt.NDArray[np.intp]) -> tuple[CutFrame, ...]:
    """Returns the frames of the points at these places."""
    found: dict[CutFrame, None] = {}
    for place in places.tolist():
        sender = _owner(raw.metrics[columns.metric[place]].sender, labels.all[columns.label[place]])
        found[CutFrame(sender, int(columns.times[place]))] = None
    return tuple(found)


def _verdict(columns: PointColumns, labels: _Labels, levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns, for each point, the index in ``_REASONS`` of the first reason to reject it; 0 if there is none."""
    times = columns.times
    verdict = np.zeros(len(times), np.uint8)
    has_no_value = columns.holds == NOTHING
    if has_no_value.any():
        verdict[has_no_value] = _REASONS.index(NO_VALUE)
    lacks_seed = (levels == SEED)[columns.metric] & (labels.seed < 0)[columns.label]
    if lacks_seed.any():
        verdict[lacks_seed] = _REASONS.index(NO_SEED)
    if labels.verdict.any():
        of_label = labels.verdict[columns.label]
        verdict[of_label > 0] = of_label[of_label > 0]
    outside = (times < EARLIEST_UNIX_NS) | (times >= LATEST_UNIX_NS)
    if outside.any():
        verdict[outside] = _REASONS.index(WRONG_TIME)
        verdict[times == 0] = _REASONS.index(NO_TIME)
    return verdict


def _beside(
    raw: RawPoints, columns: PointColumns, labels: _Labels, places: npt.NDArray[np.intp]
) -> tuple[tuple[Marker, ...], tuple[RunEnd, ...], tuple[PhasePoint, ...], dict[PointSender, None]]:
    """Returns what does not belong to frames: the ends of seeds' streams, the ends of runs, phases, and their senders.

    The stream ends from our own exporter are meant for databases and ignored here: its frames list the live seeds.
    A stream end is no sign of life: a collector that scrapes a trainer makes them when the trainer is gone.
    """
    markers: dict[Marker, None] = {}
    ended: dict[RunEnd, None] = {}
    phases: list[PhasePoint] = []
    alive: dict[PointSender, None] = {}
    for place in places.tolist():
        metric = raw.metrics[columns.metric[place]]
        label = labels.all[columns.label[place]]
        sender = _owner(metric.sender, label)
        if columns.holds[place] == AN_END:
            if label.seed and metric.level == SEED and metric.scope == OTHERS:
                markers[Marker(sender, metric.name, label.seed, int(columns.times[place]))] = None
            continue
        alive[sender] = None
        if metric.name == "esper.run.ended" and columns.values[place] > 0:
            ended[RunEnd(sender, label.outcome)] = None
        elif metric.scope == PHASES and label.phase:
            time_unix_ns, value = int(columns.times[place]), float(columns.values[place])
            phases.append(PhasePoint(sender, metric.name, label.phase, time_unix_ns, value))
    return tuple(markers), tuple(ended), tuple(phases), alive


def _devices(
    raw: RawPoints, columns: PointColumns, labels: _Labels, places: npt.NDArray[np.intp]
) -> tuple[DeviceOfSender, ...]:
    """Returns what the points at these places say of devices; of each sender, the last word counts."""
    is_info = np.array([metric.scope == DEVICE and metric.name == DEVICE_INFO.name for metric in raw.metrics])
    found: dict[PointSender, DeviceOfSender] = {}
    for place in places[is_info[columns.metric[places]] & (columns.holds[places] != AN_END)].tolist():
        label = labels.all[columns.label[place]]
        sender = _owner(raw.metrics[columns.metric[place]].sender, label)
        if label.device:
            found[sender] = DeviceOfSender(sender, printable(label.device, _MOST_DEVICE))
    return tuple(found.values())


def _owner(sender: PointSender, label: Label) -> PointSender:
    """Returns the sender of a point: the point's own attributes override those of its Resource."""
    run = label.run_of(sender.run)
    return sender if run is sender.run else sender._replace(run=run)


def _blocks(raw: RawPoints, columns: PointColumns, labels: _Labels) -> tuple[PointBlock, ...]:
    if not len(columns.times):
        return ()
    name_places: dict[str, int] = {}
    name = np.array([name_places.setdefault(metric.name, len(name_places)) for metric in raw.metrics])
    is_seed = np.array([metric.level == SEED for metric in raw.metrics])[columns.metric]
    said = labels.seed[columns.label]
    seed = np.where(is_seed, said, -1)
    streams = (seed + 1) * len(name_places) + name[columns.metric]
    values = columns.values
    looks_absent = values.view(np.uint64) == ABSENT_BITS
    if looks_absent.any():  # this NaN was sent as a value; it must not look like an empty cell
        values = np.where(looks_absent, np.nan, values)
    owners, owner = _owners(raw, columns, labels)
    # A step metric with a seed id is one part of a total, like a metric with attributes that are unknown here.
    further = labels.further[columns.label] + (~is_seed & (said >= 0))
    is_mixed = further.any()
    names = tuple(name_places)
    ours = np.array([metric.scope == FRAMES for metric in raw.metrics])
    has_others = not ours.all()
    units: dict[PointSender, dict[str, str]] = {}
    for metric in raw.metrics:
        if metric.unit:
            units.setdefault(metric.sender, {})[metric.name] = metric.unit
    all_units = {name: unit for of_sender in units.values() for name, unit in of_sender.items()}
    blocks = []
    for number, sender in enumerate(owners):
        mine = slice(None) if len(owners) == 1 else np.flatnonzero(owner == number)
        times = columns.times[mine]
        if not len(times):
            continue
        # If a stream has two points, the one with the fewest further attributes sorts first and is used.
        order = np.lexsort((further[mine], times)) if is_mixed else np.argsort(times, kind="stable")
        is_ours = bool(ours[columns.metric[mine]].any()) if has_others else True
        points = (streams[mine][order], times[order], values[mine][order])
        has_further = bool(is_mixed and further[mine].any())
        own = units.get(sender, all_units if labels.has_owners() else {})
        blocks.append(PointBlock(sender, names, labels.seeds, *points, is_ours, has_further, units=tuple(own.items())))
    return tuple(blocks)


def _owners(raw: RawPoints, columns: PointColumns, labels: _Labels) -> tuple[list[PointSender], npt.NDArray[np.int64]]:
    """Returns the senders, and for each point the index of its sender."""
    place: dict[PointSender, int] = {}
    if not labels.has_owners():
        of_metric = [place.setdefault(metric.sender, len(place)) for metric in raw.metrics]
        return list(place), np.array(of_metric)[columns.metric]
    pairs = columns.metric.astype(np.int64) * len(labels.all) + columns.label
    distinct, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    of_pair = np.empty(len(distinct), np.int64)
    for number in np.argsort(first).tolist():  # in order of the request, because the decoders number labels differently
        metric, label = divmod(int(distinct[number]), len(labels.all))
        of_pair[number] = place.setdefault(_owner(raw.metrics[metric].sender, labels.all[label]), len(place))
    return list(place), of_pair[inverse]
