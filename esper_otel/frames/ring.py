"""Ring: keeps the rows of a session for all readers, bounded by bytes; the oldest are dropped first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from weakref import ReferenceType, ref

from esper_otel.frames.block import Block, Chunk, Recorded
from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import NO_SEEDS, Frame, Run, SeedTable
from esper_otel.frames.layout import WHOLE, Layout
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.row_memory import RowMemory

_LARGEST_CHUNK, _SMALLEST_CHUNK = 1024 * 1024, 16 * 1024
_CHUNKS = 256  # that a ring has at least, when it is full
_UNBOUNDED = 2**62

_first, _size = attrgetter("first"), attrgetter("size")


class Ring:
    """Rows by sequence number. One writer; any number of readers, each with a cursor of its own.

    Threads: ``append`` belongs to the publisher. Every other method may be called from any thread at any time: the
    writer counts a row only once it is complete, and never changes a row that it has counted.

    Ctrl-C may interrupt ``append`` anywhere. Only its last assignment, to ``last``, adds the row: whatever was written
    before it has no effect, and the next ``append`` writes over it.

    Args:
        capacity_bytes: how much memory the rows may hold on to.

    Attributes:
        last: sequence number of the newest row; 0 before the first.
        dropping: called by the writer before it drops rows.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._chunk_bytes = min(max(capacity_bytes // _CHUNKS, _SMALLEST_CHUNK), _LARGEST_CHUNK)
        self._chunks: list[Chunk] = []
        self._chunk: Chunk | None = None  # the newest one, for the writer
        self._dropped: tuple[ReferenceType[Chunk], RowMemory] | None = None  # the newest of the chunks, and its memory
        self.last: int = 0
        self.dropping: Callable[[], None] | None = None
        # The last row that changed the live seeds, these seeds after it, and before it: the latter are still live if
        # the row was not added. Then the digest of these seeds. One object, since they must agree.
        self._live: tuple[int, SeedTable, SeedTable, int] = (0, NO_SEEDS, NO_SEEDS, 0)
        self._replayed: tuple[int, SeedTable] = (0, NO_SEEDS)  # the live seeds after a row that was read

    @property
    def size(self) -> int:
        """How many bytes the rows hold on to."""
        return sum(map(_size, self._chunks))

    @property
    def first(self) -> int:
        """Sequence number of the oldest row kept; ``last + 1`` when there is none."""
        chunks = self._chunks
        return chunks[0].first if chunks else self.last + 1

    def append(
        self,
        run: Run,
        step: int,
        epoch: int,
        time_unix_ns: int,
        layout: Layout,
        numbers: tuple[float, ...],
        seeds: SeedTable = NO_SEEDS,
        live: SeedTable = NO_SEEDS,
        retired: tuple[str, ...] = (),
    ) -> None:
        """Adds the row ``last + 1``; drops the oldest chunks when a new one is needed and the bytes do not fit.

        Args:
            run: the run; compared by identity.
            step: the step's number.
            epoch: its epoch.
            time_unix_ns: its time.
            layout: names of the values.
            numbers: the values, in the order of the layout.
            seeds: the seeds recorded in the step.
            live: the seeds alive after it.
            retired: seeds whose lives ended before it.
        """
        chunk, sequence = self._chunk, self.last + 1
        if chunk is not None and chunk.first + chunk.rows != sequence:
            chunk.take_back(sequence - chunk.first)
        has_seeds = seeds is not NO_SEEDS and bool(seeds.ids)
        size = layout.size + seeds.cells.nbytes if has_seeds else layout.size
        if chunk is None or chunk.end + size > chunk.capacity or chunk.run is not run:
            chunk = self._begin(run, size)
        since, table, before, digest = self._live
        if live is not table:
            if live.ids is not table.ids:
                digest ^= digest_of(_changed(table.ids, live.ids))
            self._live = sequence, live, (before if since == sequence else table), digest
        if layout.chunk is not chunk:
            chunk.learn(layout)
        end, row = chunk.end, chunk.rows
        number = flags = 0
        if has_seeds:
            number = chunk.seeds_number(seeds.ids, seeds.cells.shape[1])
            flags = WHOLE if live.cells is seeds.cells else 0
        head = (chunk.buffer, end, step, epoch, time_unix_ns, digest, len(live.ids), layout.number, number, flags)
        layout.pack_into(*(head + numbers))  # quicker than (*head, *numbers)
        if has_seeds:
            chunk.buffer[end + layout.size : end + size] = seeds.cells.tobytes()
        chunk.offsets[row] = end
        chunk.rows = row + 1  # from here on, there is something to take back after an interrupt
        chunk.end = end + size
        if retired:
            chunk.retire(row, retired)
        self.last = sequence

    def _begin(self, run: Run, size: int) -> Chunk:
        """Begins a chunk in which a row of this size fits."""
        since, live, before, _ = self._live
        capacity = max(self._chunk_bytes, size)
        chunks = [each for each in self._chunks if each.rows]  # without one that an interrupt left empty
        held = sum(map(_size, chunks))
        if self.dropping is not None and held + capacity > self._capacity_bytes:
            self.dropping()
        drop = 0
        while drop < len(chunks) and held + capacity > self._capacity_bytes:
            held -= chunks[drop].size
            drop += 1
        memory = self._free_memory(capacity)
        if drop and chunks[drop - 1].memory.can_be_used_again:
            self._dropped = ref(chunks[drop - 1]), chunks[drop - 1].memory
        chunk = Chunk(run, self.last + 1, capacity, live if since <= self.last else before, memory)
        self._chunk = None  # until the two agree again
        self._chunks = [*chunks[drop:], chunk]  # another list: readers go on with theirs
        for dropped in chunks[:drop]:
            dropped.forget_layouts()
        self._chunk = chunk
        return chunk

    def _free_memory(self, capacity: int) -> RowMemory | None:
        """Returns the memory of a chunk that was dropped, and that no reader has any more."""
        if self._dropped is None:
            return None
        chunk, memory = self._dropped
        self._dropped = None
        return memory if chunk() is None and memory.are_free(capacity) else None

    def chunk_of(self, sequence: int) -> Chunk | None:
        """Returns the chunk with this row, or the oldest chunk if the row is gone; None before the first row."""
        chunks = self._chunks
        if not chunks or chunks[-1].first <= sequence:
            return chunks[-1] if chunks else None
        return chunks[_place(chunks, sequence)]

    def newest(self) -> Frame | None:
        """Returns the newest row."""
        last = self.last  # read before the live seeds, which may become those of a later row
        since, live, before, _ = self._live
        frame = self.row(last, live if since <= last else before) if since <= last + 1 else None
        if frame is None:  # the writer has gone on
            frames, _ = self.after(self.last - 1, 1)
            frame = frames[0] if frames else None
        return frame

    def row(self, sequence: int, live: SeedTable = NO_SEEDS) -> Frame | None:
        """Returns one row, with the given live seeds; None if it is not there."""
        last = self.last  # before the chunks: what is counted is in one of them, or was dropped
        chunk = self.chunk_of(sequence)
        if chunk is None or not chunk.first <= sequence <= last:
            return None
        return chunk.frame(sequence - chunk.first, live)

    def after(self, sequence: int, limit: int) -> tuple[list[Frame], int]:
        """Returns up to ``limit`` rows that follow ``sequence``, and how many between them and it are gone."""
        last = self.last  # before the chunks, as in ``row``
        chunks = self._chunks
        if not chunks:
            return [], 0
        start = max(sequence + 1, chunks[0].first)
        stop = min(start + limit - 1, last)
        frames: list[Frame] = []
        if start > stop:
            return frames, start - (sequence + 1)
        lives: LiveSeeds | None = None
        for chunk in chunks[_place(chunks, start) : _place(chunks, stop) + 1]:
            for row in range(max(start - chunk.first, 0), min(stop + 1 - chunk.first, chunk.rows)):
                lives = self._lives_before(chunk, row) if lives is None else lives
                seeds = _replay(lives, chunk, row)
                frame = chunk.frame(row, lives.table)
                frames.append(frame if seeds is None else frame._replace(live=frame.seeds))
        if lives is not None:
            self._replayed = frames[-1].sequence, frames[-1].live
        return frames, start - (sequence + 1)

    def _lives_before(self, chunk: Chunk, row: int) -> LiveSeeds:
        """Returns the live seeds before a row of a chunk."""
        known, table = self._replayed
        start = known + 1 - chunk.first
        if not 0 <= start <= row:
            start, table = 0, chunk.live
        lives = LiveSeeds()
        lives.begin(table)
        for earlier in range(row - 1, start - 1, -1):
            seeds, is_whole = chunk.recorded_seeds(earlier)
            if is_whole:
                start = earlier + 1
                lives.begin(seeds)
                break
        for earlier in range(start, row):
            _replay(lives, chunk, earlier)
        return lives

    def block(self, sequence: int, limit: int) -> tuple[Block | None, int]:
        """Returns rows that follow ``sequence`` as arrays, and how many between them and it are gone.

        There are at most ``limit`` rows; fewer at the end of a chunk, or where the seeds of steps differ too much.
        """
        last = self.last
        chunk = self.chunk_of(sequence + 1)
        if chunk is None:
            return None, 0
        row = max(sequence + 1 - chunk.first, 0)
        gone = chunk.first + row - (sequence + 1)
        stop = min(row + limit, last + 1 - chunk.first, chunk.rows)
        return (chunk.block(row, stop) if row < stop else None), gone

    def recorded(self, sequence: int, limit: int) -> tuple[int, Iterator[Recorded]]:
        """Returns the number of the last of up to ``limit`` rows that follow ``sequence``, and their recorded values.

        It is 0 if there are none. For the values see ``Chunk.recorded``.
        """
        last = self.last
        chunk = self.chunk_of(sequence + 1)
        row = 0 if chunk is None else max(sequence + 1 - chunk.first, 0)
        stop = 0 if chunk is None else min(row + limit, last + 1 - chunk.first, chunk.rows)
        return (0, iter(())) if chunk is None or row >= stop else (chunk.first + stop - 1, chunk.recorded(row, stop))


def _changed(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the seeds that are alive either before or after, and not both times; new ones stand at the end."""
    count = len(before)
    return after[count:] if after[:count] == before else tuple({*before}.symmetric_difference(after))


def _place(chunks: Sequence[Chunk], sequence: int) -> int:
    """Returns the place of the chunk with this row."""
    return max(bisect_right(chunks, sequence, key=_first) - 1, 0)


def _replay(lives: LiveSeeds, chunk: Chunk, row: int) -> SeedTable | None:
    """Lets live seeds go through a row; returns the recorded seeds if they are all live seeds as they are."""
    retired = chunk.retired.get(row)
    if retired:
        lives.retire(retired)
    seeds, is_whole = chunk.recorded_seeds(row)
    if is_whole:
        lives.begin(seeds)
        return seeds
    if seeds.ids:
        lives.commit(lives.step(seeds))
    return None


def blocks_of(frames: Iterable[Frame]) -> Iterator[Block]:
    """Yields frames that come from elsewhere than recording as blocks, in order.

    A block ends where the run changes or a sequence number is missing.
    """
    layouts: dict[tuple[tuple[str, ...], ...], Layout] = {}
    for alike in _that_follow(frames):
        ring = Ring(_UNBOUNDED)
        run, ring.last = alike[0].run, alike[0].sequence - 1
        for frame in alike:
            others = (frame.derived, frame.context, frame.probed)
            names = (tuple(frame.derived), tuple(frame.context), tuple(frame.probed), frame.names)
            layout = layouts.get(names) or layouts.setdefault(names, Layout(*names))
            numbers = (*(value for values in others for value in values.values()), *frame.numbers)
            head = (run, frame.global_step, frame.epoch, frame.time_unix_ns)
            ring.append(*head, layout, numbers, frame.seeds, frame.live, frame.retired)
        cursor = alike[0].sequence - 1
        while (block := ring.block(cursor, len(alike))[0]) is not None:
            yield block
            cursor = block.last


def _that_follow(frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    """Yields frames of one run without a gap between them."""
    alike: list[Frame] = []
    for frame in frames:
        if alike and (frame.run != alike[0].run or frame.sequence != alike[-1].sequence + 1):
            yield alike
            alike = []
        alike.append(frame)
    if alike:
        yield alike
