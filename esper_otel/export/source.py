"""Sources of an exporter's frames: this session's ring and spool, and folders that earlier sessions left.

Each source has a cursor, which moves past frames once they are settled: delivered, or counted as dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Protocol

from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics
from opentelemetry.sdk.resources import Resource

from esper_otel.export.blocks import COUNTED
from esper_otel.export.encode import MAX_POINTS, Encoder
from esper_otel.export.event_source import EventSource, ReaderOf, left_in, waiting_in
from esper_otel.export.folder import PHASES, Folder, abandoned
from esper_otel.export.journal_file import JournalFile, stored_entries
from esper_otel.export.spool import Spool
from esper_otel.export.streams import Streams
from esper_otel.frames.block import Block, Chunk
from esper_otel.frames.frame import FINE, KILLED, Run
from esper_otel.frames.phase_log import Phase, PhaseLog, checked_phase
from esper_otel.frames.records import Damage, StoredContext, StoredResource, chunks_in
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.schema import METRICS, Metric

_MS = 1_000_000
_MOST_MISSING = 2**32  # frames in one gap; a larger gap is a damaged number and does not count as lost frames
_PHASES_AT_ONCE = 1_000
_NO_EVENTS = "%d events that an earlier session left in %s are dropped: OTEL_LOGS_EXPORTER does not name otlp"

# Makes an encoder from a catalogue and a function that returns a run's Resource.
EncoderOf = Callable[[Mapping[str, Metric], Callable[[Run], Resource]], Encoder]

# Called with each internal error: where it happened, and the exception.
Fault = Callable[[str, Exception], None]


class FrameSource(Protocol):
    """Frames of one session, in order, and the state of sending them.

    Attributes:
        encoder: encodes the frames as requests.
        streams: the series that were sent.
        run: the run of the last delivered frame.
        beside: requests to send after the frames: how the run ended, and the ends of its series.
        lost: the reason to count for frames that were gone before they could be sent.
        delivered: how many frames the endpoint accepted.
        has_said_goodbye: whether the ends of all series have been sent or are queued in ``beside``.
        sent_unix_ns: the newest time of what was sent, other than health.
        start_unix_ns: when the totals of the phases were 0.
        events: what happens in the run; None if events are not sent, or the session has noted none.
    """

    encoder: Encoder
    streams: Streams
    run: Run | None
    beside: deque[bytes]
    lost: str
    delivered: int
    has_said_goodbye: bool
    sent_unix_ns: int
    start_unix_ns: int
    events: EventSource | None

    def phases(self, until_unix_ns: int | None) -> list[Phase]:
        """Returns phases that wait, oldest first, up to the first that ended after a time; None: all."""

    def phases_delivered(self, number: int) -> None:
        """Moves past the phases up to this number."""

    @property
    def phases_run(self) -> Run | None:
        """The run of the phases."""

    def after(self, limit: int) -> tuple[list[Block], int]:
        """Returns the next frames, and how many frames before them are gone.

        They are consecutive, at most ``limit``, and fewer only at the end, before a gap, or if they have more points
        than one request.
        """

    def are_last(self, blocks: Sequence[Block]) -> bool:
        """Whether these next frames are the last ones of the source."""

    def advance(self, count: int) -> None:
        """Moves the cursor past ``count`` frames, which are settled or gone.

        Raises:
            OSError: the cursor has moved, but its position could not be written to disk.
        """


def _gathered(
    block_after: Callable[[int, int], tuple[Block | None, int]], cursor: int, limit: int
) -> tuple[list[Block], int]:
    """Gathers consecutive blocks, so that what fits into one request is sent in one.

    A collector may reorder requests, and a backend then refuses the older points. Steps are in several blocks if their
    seeds differ much, or at the end of a chunk.

    Args:
        block_after: returns up to a number of frames that follow a cursor, and how many before them are gone.
        cursor: where to begin.
        limit: how many frames at most.

    Returns:
        The blocks, and how many frames before the first one are gone.
    """
    block, gone = block_after(cursor, limit)
    blocks: list[Block] = []
    rows = points = missing = 0
    while block is not None and not missing:
        blocks.append(block)
        rows += block.rows
        if rows >= limit:
            break
        points += block.points
        if points > MAX_POINTS:
            break
        block, missing = block_after(block.last, limit - rows)
    return blocks, gone


def put_goodbye(source: FrameSource, health: Sequence[ScopeMetrics], time_unix_ns: int, fault: Fault) -> None:
    """Queues the outcome of the run and the end of every series. An internal error in one does not affect the other."""
    if source.run is None:
        return
    bodies: list[bytes] = []
    try:
        bodies += source.encoder.stale(source.run, source.streams.all_ended(), time_unix_ns=time_unix_ns, health=health)
    except Exception as error:  # noqa: BLE001 - the outcome of the run is still sent
        fault("ending the series", error)
    if not bodies and health:
        bodies.append(source.encoder.alone(source.run, *health))
    source.beside.extend(bodies)


class LiveSource:
    """The frames of this session: from the ring, and from the spool when the ring has dropped them."""

    lost = "buffer full"

    def __init__(
        self,
        ring: Ring,
        encoder: Encoder,
        spool: Spool | None,
        log: PhaseLog | None = None,
        phase_file: JournalFile[Phase] | None = None,
        run_of: Callable[[], Run | None] = lambda: None,
        events: EventSource | None = None,
    ) -> None:
        self.encoder = encoder
        self.events: EventSource | None = events
        self.sent_unix_ns: int = 0
        self._log = log or PhaseLog()
        self.start_unix_ns: int = self._log.start_unix_ns
        self._phase_file = phase_file
        self._run_of = run_of
        self.streams: Streams = Streams()
        self.run: Run | None = None
        self.beside: deque[bytes] = deque()
        self.delivered: int = 0
        self.has_said_goodbye: bool = False
        self.cursor: int = 0
        self._ring = ring
        self._spool = spool

    @property
    def waiting(self) -> int:
        """How many frames are not settled yet."""
        return self._ring.last - self.cursor

    @property
    def waiting_phases(self) -> int:
        """How many phases are not settled yet."""
        return self._log.count

    def phases(self, until_unix_ns: int | None) -> list[Phase]:
        """See ``FrameSource.phases``."""
        return self._log.waiting(until_unix_ns, _PHASES_AT_ONCE)

    def phases_delivered(self, number: int) -> None:
        """See ``FrameSource.phases_delivered``."""
        try:
            if self._phase_file is not None:
                self._phase_file.acknowledge(number)
        finally:
            self._log.delivered(number)  # even if the disk fails, so that delivered phases are not sent again

    @property
    def phases_run(self) -> Run | None:
        """See ``FrameSource.phases_run``."""
        return self.run or self._run_of()

    def after(self, limit: int) -> tuple[list[Block], int]:
        """See ``FrameSource.after``."""
        return _gathered(self._block, self.cursor, limit)

    def _block(self, cursor: int, limit: int) -> tuple[Block | None, int]:
        block, gone = self._ring.block(cursor, limit)
        if gone and self._spool is not None:
            spooled = self._spool.after(cursor, min(limit, gone))
            if spooled is not None and spooled.first <= cursor + gone:
                return spooled, spooled.first - cursor - 1
        return block, gone

    def are_last(self, blocks: Sequence[Block]) -> bool:
        """See ``FrameSource.are_last``."""
        return self._ring.last == blocks[-1].last

    def advance(self, count: int) -> None:
        """See ``FrameSource.advance``."""
        cursor = self.cursor + count
        try:
            if self._spool is not None:
                self._spool.acknowledge(cursor)  # before the cursor moves, since the process may be killed at any time
        finally:
            self.cursor = cursor  # even if the disk fails, so that delivered frames are not sent again


class LeftoverSource:
    """The frames that an earlier session left in its folder of the spool.

    Attributes:
        folder: the folder.
        deleted: how many frames were deleted to keep to the size limit.

    Args:
        folder: the folder.
        encoder_of: makes an encoder for the metrics found in the folder.
        fault: called with internal errors.
        events: what has happened in the run, if it is to be sent.
    """

    lost = "spool damaged"

    def __init__(self, folder: Folder, encoder_of: EncoderOf, fault: Fault, events: EventSource | None = None) -> None:
        self.folder = folder
        self.events: EventSource | None = events
        self._fault = fault
        self.streams: Streams = Streams()
        self.run: Run | None = None
        self.beside: deque[bytes] = deque()
        self.delivered: int = 0
        self.has_said_goodbye: bool = False
        self.deleted: int = 0
        self._stored = StoredContext()
        self._phases = stored_entries(folder, PHASES, checked_phase, folder.acknowledged_entries[PHASES])
        self._waiting_phases = deque(self._phases.entries)
        if self._phases.run is not None and self._phases.resource is not None:
            resource = self._phases.resource
            self._stored.resources[self._phases.run] = StoredResource(resource.attributes, resource.schema_url)
        self.sent_unix_ns: int = 0
        self.start_unix_ns: int = self._phases.start_unix_ns
        self._catalogue = {metric.name: metric for metric in METRICS}
        self._encoder_of = encoder_of
        self.encoder: Encoder = self._encoder()
        self._names = deque(folder.segments())
        self._reading: Iterator[Chunk] = iter(())
        self._chunks: deque[Chunk] = deque()
        self._delivered = folder.acknowledged  # the last frame that the session that wrote it has delivered
        self._cursor = self._last = self._delivered
        self._missing = 0

    def phases(self, until_unix_ns: int | None) -> list[Phase]:
        """See ``FrameSource.phases``."""
        some = islice(self._waiting_phases, _PHASES_AT_ONCE)
        return list(takewhile(lambda phase: until_unix_ns is None or phase.end_unix_ns <= until_unix_ns, some))

    def phases_delivered(self, number: int) -> None:
        """See ``FrameSource.phases_delivered``."""
        while self._waiting_phases and self._waiting_phases[0].number <= number:
            self._waiting_phases.popleft()
        self.folder.acknowledge_entries(PHASES, number)

    @property
    def phases_run(self) -> Run | None:
        """See ``FrameSource.phases_run``."""
        return self.run or self._phases.run

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        return sum(map(self.folder.size, self._names))

    def delete_oldest(self) -> None:
        """Deletes its oldest file to free space; the unsent frames in it are added to ``deleted``."""
        name = self._names.popleft()
        for chunk in chunks_in(self.folder.read(name), StoredContext()):
            if self._is_next(chunk):
                self.deleted += chunk.last - max(self._cursor, chunk.first - 1)
                self._cursor = self._last = chunk.last
        self.folder.acknowledge(self._cursor)
        self.folder.delete(name)

    def _encoder(self) -> Encoder:
        return self._encoder_of(self._catalogue, lambda run: Resource(*self._stored.resources[run]))

    def after(self, limit: int) -> tuple[list[Block], int]:
        """See ``FrameSource.after``."""
        blocks, gone = _gathered(self._block, self._cursor, limit)
        if not self._catalogue.keys() >= self._stored.metrics.keys():
            self._catalogue.update(self._stored.metrics)
            self.encoder = self._encoder()
        if blocks:
            self._missing += gone
            return blocks, gone
        # Count a truncated frame, left by a process or file that ended in the middle of it. Also count unusable frames
        # that did not show up as a gap between sequence numbers.
        left = max(int(self._stored.is_torn), self._stored.lost - self._missing)
        self._stored.is_torn, self._missing = False, self._stored.lost
        return [], left

    def _block(self, cursor: int, limit: int) -> tuple[Block | None, int]:
        while self._last <= cursor:
            if not self._read():
                return None, 0
        chunk = next(chunk for chunk in self._chunks if chunk.last > cursor)
        start = max(cursor + 1 - chunk.first, 0)
        block = chunk.block(start, min(start + limit, chunk.rows))
        return block, block.first - cursor - 1

    def are_last(self, blocks: Sequence[Block]) -> bool:
        """See ``FrameSource.are_last``."""
        return blocks[-1].last == self._last and not self._read()

    @property
    def skipped(self) -> int:
        """How many records could not be used."""
        return self._stored.skipped

    @property
    def damage(self) -> Sequence[Damage]:
        """The parts of its files that could not be used, up to a limit."""
        return self._stored.damage

    def _is_next(self, chunk: Chunk) -> bool:
        """Whether it has frames that follow those read."""
        return self._last < chunk.last and chunk.first <= self._last + _MOST_MISSING

    def _read(self) -> bool:
        """Reads more frames from the files. Returns False when there are no more."""
        while True:
            for chunk in self._reading:
                if chunk.first <= self._delivered:
                    self._note_delivered(chunk, min(self._delivered + 1 - chunk.first, chunk.rows))
                if self._is_next(chunk):
                    self._chunks.append(chunk)
                    self._last = chunk.last
                    return True
                if chunk.first > self._last:
                    self._stored.skipped += chunk.rows
                    self._stored.lost += chunk.rows
            if not self._names:
                return False
            self._reading = chunks_in(self.folder.read(self._names.popleft()), self._stored)

    def _note_delivered(self, chunk: Chunk, rows: int) -> None:
        """Notes the series of frames that were delivered earlier, since they have not been ended yet."""
        self.run, row = chunk.run, 0
        try:
            while row < rows:
                block = chunk.block(row, rows)
                row += block.rows
                if self.events is not None:
                    self.events.reader.skip(block)
                self.streams.note([block])
                self.streams.settled(block.last)
                self.streams.named((*block.names, *COUNTED))
        except Exception as error:  # noqa: BLE001 - the other frames must still be sent
            self._fault("noting steps sent before", error)

    def advance(self, count: int) -> None:
        """See ``FrameSource.advance``."""
        self._cursor += count
        while self._chunks and self._chunks[0].last <= self._cursor:
            self._chunks.popleft()
        self.folder.acknowledge(self._cursor)

    @property
    def newest_unix_ns(self) -> int:
        """The newest time of what was sent of it; without anything, when it began."""
        return max(self.streams.last_unix_ns, self.sent_unix_ns) or self.start_unix_ns

    @property
    def outcome(self) -> str:
        """How the run ended; "killed" if it stored no outcome."""
        return self.folder.outcome or KILLED

    def health(self, time_unix_ns: int) -> Sequence[ScopeMetrics]:
        """Returns the metric that reports how the run ended."""
        ended = {("esper.run.ended", self.outcome): 1.0}
        return [self.encoder.health_scope(ended, start_unix_ns=time_unix_ns, time_unix_ns=time_unix_ns)]

    def say_goodbye(self) -> None:
        """Queues the outcome of the run and the end of every series."""
        self.has_said_goodbye = True
        is_empty = self.run is None and not self._phases.entries and not self.folder.acknowledged_entries[PHASES]
        self.run = self.phases_run
        if self.run is None or (is_empty and self.outcome in FINE):  # then there is no run for anybody to see
            return
        health: Sequence[ScopeMetrics] = ()
        time_unix_ns = self.newest_unix_ns + _MS
        try:
            health = self.health(time_unix_ns)
        except Exception as error:  # noqa: BLE001 - the series must still be ended
            self._fault("saying how an earlier run ended", error)
        put_goodbye(self, health, time_unix_ns, self._fault)


def leftovers_in(
    directory: Path,
    encoder_of: EncoderOf,
    fault: Fault,
    *,
    most_bytes: int,
    warnings: Warnings,
    reader_of: ReaderOf | None = None,
    rank: int | None = None,
) -> list[LeftoverSource]:
    """Takes over the folders that earlier sessions left in a spool directory, oldest first.

    With ``rank``, those of other ranks are left: their own sessions may be about to start, and what they record must
    not reach a backend before what was left of the same rank.

    The oldest files are deleted until all folders together take at most ``most_bytes``. ``reader_of`` makes readers of
    their events; None if these are not to be sent.
    """
    leftovers = []
    for folder in abandoned(directory, warnings, rank):
        events = None if reader_of is None else left_in(folder, reader_of, warnings)
        leftovers.append(LeftoverSource(folder, encoder_of, fault, events))
        count = 0 if reader_of is not None else waiting_in(folder)
        if count:
            warnings.say("spool events", _NO_EVENTS, count, folder.path)
    sizes = [leftover.size for leftover in leftovers]
    while sum(sizes) > most_bytes:
        number = next(number for number, size in enumerate(sizes) if size)
        leftovers[number].delete_oldest()
        sizes[number] = leftovers[number].size
    return leftovers
