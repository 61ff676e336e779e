"""Released frames and the states of writers as records of Kafka.

Every value begins with the version of its form. A reader that meets a newer one says so and does not guess.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.errors import EsperOtelError
from esper_otel.frames.frame import Frame
from esper_otel.frames.records import DamagedRecord, RecordWriter, frames_in
from esper_otel.gateway.items import Item, Origin, Place, RunState
from esper_otel.gateway.kafka.hours import NO_HOURS, WriterHours

VERSION = 1
# A record holds frames of one writer that were released together: at most so many, and of about so many bytes.
MOST_FRAMES, MOST_BYTES = 256, 256 * 1024
# Version, number of frames, numbers of the first of them within the run and within the rank, bytes of the place.
_HEAD = struct.Struct("<BHQQI")
# Revision, whether it is complete, when it was received, how many frames were missed, the loss before it (NaN: none).
_ITEM = struct.Struct("<I?QQd")
_LENGTHS = struct.Struct("<BIII")
# The columns of ``Durations``: the step's number, and the durations.
_DURATION = np.dtype("<f4")
_STEP = np.dtype("<u8")


class UnknownForm(EsperOtelError):
    """A record was written by a newer version of esper_otel, or by something else."""


class NewerForm(UnknownForm):
    """A record was written by a newer version of esper_otel, which others can read: it is waited for, not skipped."""


class FrameWithLoss(NamedTuple):
    """A released frame, and the loss in the packet before it."""

    item: Item
    loss_before: float | None


class FrameBatch(NamedTuple):
    """The frames of one record, all of one writer, in order of release.

    Attributes:
        frames: the frames.
        of_run: the number of the first one among those of its run in this partition, from 1 on.
        of_rank: likewise, among those of its rank.
        place: where the writer stood after the last of them.
    """

    frames: Sequence[FrameWithLoss]
    of_run: int
    of_rank: int
    place: Place

    @property
    def origin(self) -> Origin:
        """The writer."""
        return self.frames[0].item.origin

    def halves(self) -> tuple[FrameBatch, FrameBatch]:
        """Returns it as two batches, for a topic that does not allow a record of its size; it has several frames."""
        middle = len(self.frames) // 2
        second = self._replace(frames=self.frames[middle:], of_run=self.of_run + middle, of_rank=self.of_rank + middle)
        return self._replace(frames=self.frames[:middle]), second


@lru_cache(maxsize=8192)
def key_of(origin: Origin) -> bytes:
    """Returns the key of a writer's records."""
    return json.dumps(list(origin), separators=(",", ":"), ensure_ascii=False).encode()


@lru_cache(maxsize=8192)
def origin_of(key: bytes) -> Origin:
    """Returns the writer that a key names.

    Raises:
        UnknownForm: it is none of ours.
    """
    try:
        run_id, attempt, rank, writer = json.loads(key)
        if not (type(run_id) is type(writer) is str and type(attempt) is type(rank) is int and run_id):
            raise UnknownForm(f"not the key of a writer: {key[:80]!r}")
    except (ValueError, TypeError, RecursionError):
        raise UnknownForm(f"not the key of a writer: {key[:80]!r}") from None
    return Origin(run_id, attempt, rank, writer)


def block_bytes(block: FrameBatch) -> bytes:
    """Returns a block as the value of a record."""
    place = _place_bytes(block.place)
    nan = math.nan
    parts = [_HEAD.pack(VERSION, len(block.frames), block.of_run, block.of_rank, len(place)), place]
    for item, loss in block.frames:
        parts.append(_ITEM.pack(item.revision, item.complete, *item[4:6], nan if loss is None else loss))
    writer = RecordWriter()
    parts += [writer.frame(item.frame) for item, _ in block.frames]
    return b"".join(parts)


def frames_of(value: bytes) -> int:
    """Returns how many frames a record says that it has; 0 if it has another form."""
    if value[:1] != bytes((VERSION,)) or len(value) < _HEAD.size:
        return 0
    return int(_HEAD.unpack_from(value)[1])


def block_of(key: bytes, value: bytes) -> FrameBatch:
    """Returns the block in a record.

    Raises:
        UnknownForm: it has another form.
    """
    _check_version(value)
    origin = origin_of(key)
    try:
        _, count, of_run, of_rank, length = _HEAD.unpack_from(value)
        start = _HEAD.size + length
        place = _place_of(origin, value[_HEAD.size : start])
        of_items = [_ITEM.unpack_from(value, start + number * _ITEM.size) for number in range(count)]
        frames = frames_in(value[start + count * _ITEM.size :])
    except (struct.error, DamagedRecord, ValueError, TypeError, RecursionError) as error:
        raise UnknownForm(f"not a record of frames: {error}") from None
    if len(frames) != count or not count:
        raise UnknownForm(f"not a record of frames: {len(frames)} frames instead of {count}")
    released = [
        FrameWithLoss(Item(origin, frame, revision, complete, received, missed), None if math.isnan(loss) else loss)
        for frame, (revision, complete, received, missed, loss) in zip(frames, of_items, strict=True)
    ]
    return FrameBatch(released, of_run, of_rank, place)


class Counts(NamedTuple):
    """How many frames were released, corrections included.

    Attributes:
        writer: of the writer.
        of_rank: of its rank, in this partition.
        of_run: of its run, in this partition.
    """

    writer: int
    of_rank: int
    of_run: int


class Durations(NamedTuple):
    """Durations of the newest steps of a writer, oldest first, for the comparison of ranks.

    Attributes:
        steps: their numbers, shape (steps,).
        times: in milliseconds, NaN where missing, shape (steps, kinds); see ``gateway.ranks``.
    """

    steps: npt.NDArray[np.uint64]
    times: npt.NDArray[np.float32]


NO_DURATIONS = Durations(np.zeros(0, np.uint64), np.zeros((0, 4), np.float32))


class WriterState(NamedTuple):
    """What is known of a writer, kept under its key in a compacted topic.

    Attributes:
        state: its state, without comparison with other writers.
        place: where it stands.
        newest: its newest frame; None before the first.
        counts: numbers to go on from.
        since: an offset in the topic of frames before which there is no frame of it.
        last: an offset in the topic of frames after which there may be newer ones.
        durations: of its newest steps.
        hours: where its hours went.
    """

    state: RunState
    place: Place
    newest: FrameWithLoss | None
    counts: Counts
    since: int
    last: int
    durations: Durations
    hours: WriterHours = NO_HOURS

    @property
    def is_of_steps(self) -> bool:
        """Whether more is known than phases: a process has phases before its first step."""
        return bool(self.counts.writer or self.state.last_received_unix_ns or self.state.ended is not None)


def state_bytes(known: WriterState) -> bytes:
    """Returns a state as the value of a record."""
    state = {name: value for name, value in asdict(known.state).items() if name != "origin"}
    numbers = {"counts": known.counts, "since": known.since, "last": known.last}
    hours = {"sums": known.hours.sums, "phases": known.hours.phases}
    text = json.dumps({"state": state, **numbers, "hours": hours}, separators=(",", ":")).encode()
    newest = b""
    if known.newest is not None:
        newest = block_bytes(FrameBatch([known.newest], 0, 0, known.place))
    place = _place_bytes(known.place)
    durations = known.durations.steps.astype(_STEP).tobytes() + known.durations.times.astype(_DURATION).tobytes()
    head = _LENGTHS.pack(VERSION, len(text), len(place), len(newest))
    count = struct.pack("<HB", len(known.durations.steps), known.durations.times.shape[1])
    knots = known.hours.knots
    return b"".join((head, text, place, newest, count, durations, struct.pack("<H", len(knots)), knots.tobytes()))


def state_of(key: bytes, value: bytes) -> WriterState:
    """Returns the state in a record.

    Raises:
        UnknownForm: it has another form.
    """
    _check_version(value)
    origin = origin_of(key)
    try:
        _, of_text, of_place, of_newest = _LENGTHS.unpack_from(value)
        start = _LENGTHS.size
        said: dict[str, Any] = json.loads(value[start : start + of_text])
        start += of_text
        place = _place_of(origin, value[start : start + of_place])
        start += of_place
        newest = block_of(key, value[start : start + of_newest]).frames[0] if of_newest else None
        durations, start = _durations_of(value, start + of_newest)
        known = {name: said["state"][name] for name in RunState.__dataclass_fields__ if name in said["state"]}
        state = RunState(origin, **known)
        counts = Counts(*said["counts"])
        hours = _hours_of(said, value, start)
        return WriterState(state, place, newest, counts, int(said["since"]), int(said["last"]), durations, hours)
    except (struct.error, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise UnknownForm(f"not the state of a writer: {error}") from None


def _durations_of(value: bytes, start: int) -> tuple[Durations, int]:
    count, kinds = struct.unpack_from("<HB", value, start)
    start += 3
    steps = np.frombuffer(value, _STEP, count, start)
    times = np.frombuffer(value, _DURATION, count * kinds, start + steps.nbytes).reshape(count, kinds)
    return Durations(steps, times), start + steps.nbytes + times.nbytes


def _hours_of(said: Mapping[str, Any], value: bytes, start: int) -> WriterHours:
    """Returns the hours in a state; none for one that was written before there were any."""
    if "hours" not in said:
        return NO_HOURS
    (count,) = struct.unpack_from("<H", value, start)
    knots = np.frombuffer(value, "<f8", 4 * count, start + 2).reshape(count, 4).copy()  # else all of it is kept
    return WriterHours.of(said["hours"]["sums"], knots, said["hours"]["phases"])


def _check_version(value: bytes) -> None:
    if value[:1] == bytes((VERSION,)):
        return
    if value and value[0] > VERSION:
        raise NewerForm(f"a newer esper-otel has written it (form {value[0]}; this version reads {VERSION})")
    raise UnknownForm("another program has written it")


def _place_bytes(place: Place) -> bytes:
    return json.dumps(place[1:], separators=(",", ":")).encode()


def _place_of(origin: Origin, text: bytes) -> Place:
    number, lowest, missing, says_step, says_epoch, holes, ends, *about = json.loads(text)
    host, revision, settings, loss, location, device, units = about
    for each in (number, lowest):
        if each is not None and type(each) is not int:
            raise TypeError("not a number")
    return Place(
        origin,
        number,
        lowest,
        int(missing),
        bool(says_step),
        bool(says_epoch),
        tuple((int(first), int(behind)) for first, behind in holes),
        tuple((int(time), str(seed), int(column)) for time, seed, column in ends),
        str(host),
        str(revision),
        str(settings),
        None if loss is None else float(loss),
        str(location),
        str(device),
        tuple((str(name), str(unit)) for name, unit in units),
    )


def merged_state(state: RunState, before: RunState | None) -> RunState:
    """Returns a state with what was counted before a takeover, which an assembler that was restored no longer knows."""
    if before is None:
        return state
    return replace(
        state,
        first_step=state.first_step if before.first_step is None else before.first_step,
        first_time_unix_ns=before.first_time_unix_ns or state.first_time_unix_ns,
        incomplete=max(state.incomplete, before.incomplete),
        differing=state.differing + before.differing,
        too_late=state.too_late + before.too_late,
        host=state.host or before.host,
        revision=state.revision or before.revision,
        device=state.device or before.device,
        units=state.units or before.units,
        ended=state.ended,
        last_received_unix_ns=max(state.last_received_unix_ns, before.last_received_unix_ns),
    )


def size_of(frame: Frame) -> int:
    """Returns about how many bytes a frame takes in a record."""
    return 8 * len(frame.numbers) + frame.seeds.cells.nbytes + frame.live.cells.nbytes
