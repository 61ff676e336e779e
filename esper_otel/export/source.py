"""Sources: where an exporter's frames come from, with a cursor that moves when they are settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics
from opentelemetry.sdk.resources import Resource

from esper_otel.export.blocks import COUNTED
from esper_otel.export.encode import Encoder
from esper_otel.export.folder import Folder, abandoned
from esper_otel.export.spool import Spool
from esper_otel.export.streams import Streams
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.records import StoredContext, frames_in
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.schema import METRICS, Metric

_MS = 1_000_000
_MANY = 4_096  # frames that wait
_MOST_MISSING = 2**32  # frames in one gap: a number beyond it is damage, and must not count as so many lost
KILLED = "killed"

# Makes an encoder for a catalogue and for what gives a run's Resource.
EncoderOf = Callable[[Mapping[str, Metric], Callable[[Run], Resource]], Encoder]

# Told of a fault of ours: where it was, and what.
Fault = Callable[[str, Exception], None]


class FrameSource(Protocol):
    """Frames of one session, in order, and what has been said of them.

    Attributes:
        encoder: makes requests of them.
        streams: the series that were sent.
        run: of the last frame delivered.
        beside: requests that say how the run ended, and end its series.
        lost: the word for frames that are gone before they could be sent.
        delivered: frames that the endpoint took.
        has_said_goodbye: whether the end of every series has been sent, or stands beside the frames.
    """

    encoder: Encoder
    streams: Streams
    run: Run | None
    beside: deque[bytes]
    lost: str
    delivered: int
    has_said_goodbye: bool

    def after(self, limit: int) -> tuple[list[Frame], int]:
        """Up to ``limit`` frames that are next, and how many before them are gone; nothing when there is none."""

    def are_last(self, frames: Sequence[Frame]) -> bool:
        """Whether these, which are next, are all that there is."""

    def advance(self, count: int) -> None:
        """So many frames are settled, or gone.

        Raises:
            OSError: that is so, but a disk takes no note of it.
        """


def put_goodbye(source: FrameSource, health: ScopeMetrics | None, time_unix_ns: int, fault: Fault) -> None:
    """Puts beside the frames how the run ended, and the end of every series; a fault of ours in one keeps the other."""
    if source.run is None:
        return
    bodies: list[bytes] = []
    try:
        bodies += source.encoder.stale(source.run, source.streams.all_ended(), time_unix_ns=time_unix_ns, health=health)
    except Exception as error:  # noqa: BLE001 - how the run ended is said all the same
        fault("ending the series", error)
    if not bodies and health is not None:
        bodies.append(source.encoder.alone(source.run, health))
    source.beside.extend(bodies)


class LiveSource:
    """The frames of this session: from the ring, and from the spool when the ring has dropped them."""

    lost = "buffer full"

    def __init__(self, ring: Ring, encoder: Encoder, spool: Spool | None) -> None:
        self.encoder = encoder
        self.streams = Streams()
        self.run: Run | None = None
        self.beside: deque[bytes] = deque()
        self.delivered = 0
        self.has_said_goodbye = False
        self.cursor = 0
        self._ring = ring
        self._spool = spool

    @property
    def waiting(self) -> int:
        """Frames that are not settled."""
        return self._ring.last - self.cursor

    def pack(self, is_over: Callable[[], bool]) -> None:
        """Makes the frames smaller that wait, if they are many: the endpoint is away."""
        if self.waiting > _MANY:
            self._ring.pack(_MANY // 2, is_over)

    def after(self, limit: int) -> tuple[list[Frame], int]:
        """See ``FrameSource.after``."""
        frames, gone = self._ring.after(self.cursor, limit)
        if gone and self._spool is not None:
            spooled = self._spool.after(self.cursor, min(limit, gone))
            if spooled:
                return spooled, spooled[0].sequence - self.cursor - 1
        return frames, gone

    def are_last(self, frames: Sequence[Frame]) -> bool:
        """See ``FrameSource.are_last``."""
        return self.waiting == len(frames)

    def advance(self, count: int) -> None:
        """See ``FrameSource.advance``."""
        cursor = self.cursor + count
        try:
            if self._spool is not None:
                self._spool.acknowledge(cursor)  # before anybody sees it: a process may be killed at any time
        finally:
            self.cursor = cursor  # whatever the disk says: what was delivered is not sent again


class LeftoverSource:
    """The frames that an earlier session has left in its folder of the spool.

    Attributes:
        folder: the folder.
        deleted: frames deleted for want of room.

    Args:
        folder: the folder.
        encoder_of: makes an encoder for what is found in it.
        fault: told of a fault of ours in noting what was delivered before.
    """

    lost = "spool damaged"

    def __init__(self, folder: Folder, encoder_of: EncoderOf, fault: Fault) -> None:
        self.folder = folder
        self._fault = fault
        self.streams = Streams()
        self.run: Run | None = None
        self.beside: deque[bytes] = deque()
        self.delivered = 0
        self.has_said_goodbye = False
        self.deleted = 0
        self._stored = StoredContext()
        self._catalogue = {metric.name: metric for metric in METRICS}
        self._encoder_of = encoder_of
        self.encoder = self._encoder()
        self._names = deque(folder.segments())
        self._reading: Iterator[Frame] = iter(())
        self._frames: deque[Frame] = deque()
        self._cursor = self._last = folder.acknowledged
        self._missing = 0

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(map(self.folder.size, self._names))

    def delete_oldest(self) -> None:
        """Deletes its oldest file, for want of room; the frames in it are counted as ``deleted``."""
        name = self._names.popleft()
        for frame in frames_in(self.folder.read(name), StoredContext()):
            if frame.sequence > self._cursor:
                self.deleted += 1
                self._cursor = frame.sequence
        self.folder.acknowledge(self._cursor)
        self.folder.delete(name)

    def _encoder(self) -> Encoder:
        return self._encoder_of(self._catalogue, self._stored.resources.__getitem__)

    def after(self, limit: int) -> tuple[list[Frame], int]:
        """See ``FrameSource.after``."""
        while len(self._frames) <= limit and self._read():
            pass
        if not self._catalogue.keys() >= self._stored.metrics.keys():
            self._catalogue.update(self._stored.metrics)
            self.encoder = self._encoder()
        frames: list[Frame] = []
        for frame in self._frames:
            if len(frames) == limit or (frames and frame.sequence != frames[-1].sequence + 1):
                break
            frames.append(frame)
        if frames:
            gone = frames[0].sequence - self._cursor - 1
            self._missing += gone
            return frames, gone
        # A frame of which only the beginning is there: the process died, or the file was cut short, in the middle. And
        # frames that cannot be used, of which no gap has told.
        left = max(int(self._stored.is_torn), self._stored.lost - self._missing)
        self._stored.is_torn, self._missing = False, self._stored.lost
        return [], left

    def are_last(self, frames: Sequence[Frame]) -> bool:
        """See ``FrameSource.are_last``."""
        return len(self._frames) == len(frames) and not self._read()

    @property
    def skipped(self) -> int:
        """Records that could not be used."""
        return self._stored.skipped

    def _read(self) -> bool:
        """Takes one more frame from the files; False when all are read."""
        while True:
            for frame in self._reading:
                if self._last < frame.sequence <= self._last + _MOST_MISSING:
                    self._frames.append(frame)
                    self._last = frame.sequence
                    return True
                if frame.sequence <= self.folder.acknowledged:
                    self._note_delivered(frame)
                elif frame.sequence > self._last:
                    self._stored.skipped += 1
                    self._stored.lost += 1
            if not self._names:
                return False
            self._reading = frames_in(self.folder.read(self._names.popleft()), self._stored)

    def _note_delivered(self, frame: Frame) -> None:
        """Of a frame that was delivered before: its series have not ended yet."""
        self.run = frame.run
        try:
            self.streams.note([frame])
            self.streams.settled(frame.sequence)
            self.streams.named((*frame.names, *COUNTED))
        except Exception as error:  # noqa: BLE001 - the frames that were not delivered are to be sent all the same
            self._fault("noting a step sent before", error)

    def advance(self, count: int) -> None:
        """See ``FrameSource.advance``."""
        self._cursor += count
        while self._frames and self._frames[0].sequence <= self._cursor:
            self._frames.popleft()
        self.folder.acknowledge(self._cursor)

    @property
    def outcome(self) -> str:
        """How the run ended, as far as it could say so."""
        return self.folder.outcome or KILLED

    def health(self, time_unix_ns: int) -> ScopeMetrics:
        """How the run ended."""
        ended = {("esper.run.ended", self.outcome): 1.0}
        return self.encoder.health_scope(ended, start_unix_ns=time_unix_ns, time_unix_ns=time_unix_ns)

    def say_goodbye(self) -> None:
        """Puts beside the frames that the run has ended, and how, and the end of every series."""
        self.has_said_goodbye = True
        if self.run is None:
            return
        health, time_unix_ns = None, self.streams.last_unix_ns + _MS
        try:
            health = self.health(time_unix_ns)
        except Exception as error:  # noqa: BLE001 - the series are ended all the same
            self._fault("saying how an earlier run ended", error)
        put_goodbye(self, health, time_unix_ns, self._fault)


def leftovers_in(
    directory: Path, encoder_of: EncoderOf, fault: Fault, *, most_bytes: int, warnings: Warnings
) -> list[LeftoverSource]:
    """What earlier sessions have left in a spool directory, oldest first; ours from now on, and cut to the limit."""
    leftovers = [LeftoverSource(folder, encoder_of, fault) for folder in abandoned(directory, warnings)]
    # Nothing is deleted in a folder that lacks our marker, so it does not count.
    sizes = [leftover.size if leftover.folder.is_marked else 0 for leftover in leftovers]
    while sum(sizes) > most_bytes:
        number = next(number for number, size in enumerate(sizes) if size)
        leftovers[number].delete_oldest()
        sizes[number] = leftovers[number].size
    return leftovers
