"""Blocks: consecutive steps as rows of preallocated memory, and as arrays for those who read many at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from mmap import mmap
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import ABSENT, ABSENT_BITS, NARROW, NO_READINGS, NO_SEEDS, Frame, Run, SeedTable
from esper_otel.frames.layout import HEAD, HEAD_WORDS, NUMBERS, NUMBERS_PLACE, WHOLE, Layout
from esper_otel.frames.row_memory import RowMemory

# Cells of a block's array at most, for each cell that was recorded, and in addition to these.
_CELLS_FOR_EACH = 4
_FEW_CELLS = 40_000
_MOST_CELLS = 400_000  # where there is more than one row

_NO_IDS = ((), NARROW)
_MOST_KNOWN_IDS = 64

# Memory of a chunk's objects in addition to its rows, in bytes, measured on Python 3.11 with tracemalloc: a chunk with
# its lists, dicts and the headers of its buffers; a layout with its struct, dict and arrays, and for each of its names;
# a tuple of ids; a place in a list.
_CHUNK_BYTES = 3_000
_LAYOUT_BYTES = 1_200
_NAME_BYTES = 80
_IDS_BYTES = 100
_PLACE_BYTES = 8

Recorded: TypeAlias = tuple[tuple[str, ...], npt.NDArray[np.float64]]
_Columns: TypeAlias = tuple[tuple[str, ...], npt.NDArray[np.float64], tuple[str, ...], npt.NDArray[np.float64]]


class Chunk:
    """Memory for consecutive rows of one run. One writer; readers use the rows that it had when they looked.

    Rows may have different layouts and seeds. A row is the beginning (``HEAD``), the values of its layout, and the
    cells of its seeds, all of them doubles or as long as one. The chunk has seed ids, layouts and retired seeds.

    Args:
        run: the run of all its rows.
        first: sequence number of the first row.
        capacity: its size in bytes, rounded up to whole doubles; at least that of the first row.
        live: the live seeds before the first row.
        memory: memory to use again, of this capacity; None for new memory.

    Attributes:
        rows: how many rows it has.
        end: how many bytes they take.
        layouts: by their number in this chunk.
        seeds: ids of the seeds recorded in a step, by their number; number 0 is no seeds.
        widths: how many columns the cells of these seeds have.
        retired: the seeds that were retired before a row, by the row.
        memory: its memory.
    """

    __slots__ = (
        "__weakref__",
        "_numbers",
        "_offsets",
        "_other_bytes",
        "buffer",
        "capacity",
        "end",
        "first",
        "layouts",
        "live",
        "memory",
        "offsets",
        "retired",
        "rows",
        "run",
        "seeds",
        "widths",
    )

    def __init__(
        self, run: Run, first: int, capacity: int, live: SeedTable = NO_SEEDS, memory: RowMemory | None = None
    ) -> None:
        self.run: Run = run
        self.first: int = first
        self.capacity: int = -(-capacity // 8) * 8
        self.live: SeedTable = live
        self.memory: RowMemory = memory or RowMemory(self.capacity, self.capacity // HEAD.size)
        self.buffer: bytearray | mmap = self.memory.content
        self._offsets = self.memory.offsets
        self.offsets: memoryview[int] = memoryview(self._offsets).cast("I")
        self.rows: int = 0
        self.end: int = 0
        self.layouts: list[Layout] = []
        self.seeds: list[tuple[str, ...]] = [()]
        self.widths: list[int] = [NARROW]
        self.retired: dict[int, tuple[str, ...]] = {}
        self._numbers: dict[tuple[tuple[str, ...], int], int] = {_NO_IDS: 0}
        self._other_bytes = _CHUNK_BYTES + live.cells.nbytes

    @property
    def size(self) -> int:
        """How many bytes it holds on to; memory that no row has used yet does not count."""
        return self.end + 4 * self.rows + self._other_bytes

    @property
    def last(self) -> int:
        """Sequence number of the last row."""
        return self.first + self.rows - 1

    def learn(self, layout: Layout) -> None:
        """Gives a layout its number in this chunk."""
        is_new = layout.chunk is None  # counted once, where it was first used
        number = len(self.layouts)
        self.layouts.append(layout)
        self._other_bytes += _PLACE_BYTES + (_LAYOUT_BYTES + _NAME_BYTES * layout.width if is_new else 0)
        layout.number = number
        layout.chunk = self  # the last thing: an interrupt before it has no effect

    def forget_layouts(self) -> None:
        """Lets the layouts used here last forget this chunk: they are kept for later steps, and would keep it alive."""
        for layout in self.layouts:
            if layout.chunk is self:
                layout.chunk = None

    def seeds_number(self, ids: tuple[str, ...], columns: int) -> int:
        """Returns the number of these ids in this chunk."""
        number = len(self.widths) - 1
        if self.seeds[number] is ids and self.widths[number] == columns:  # the newest ones, as in most rows
            return number
        key = (ids, columns)
        if key in self._numbers:
            return self._numbers[key]
        if len(self._numbers) == _MOST_KNOWN_IDS:  # ids that change in every step are not looked for any more
            self._numbers = {_NO_IDS: 0}
        number = len(self.widths)
        self.seeds[number:] = [ids]  # an interrupt may have left ids without a width
        self.widths.append(columns)
        self._other_bytes += _IDS_BYTES + 8 * len(ids)
        self._numbers[key] = number
        return number

    def retire(self, row: int, ids: tuple[str, ...]) -> None:
        """Notes the seeds that are retired before a row."""
        self.retired[row] = ids
        self._other_bytes += _IDS_BYTES + 8 * len(ids)

    def take_back(self, row: int) -> None:
        """Removes the newest row: its writer was interrupted before the ring counted it."""
        self.retired.pop(row, None)
        self.end = self.offsets[row]
        self.rows = row

    def put(self, row: bytes, layout: Layout, seeds: tuple[tuple[str, ...], int], retired: tuple[str, ...]) -> None:
        """Adds a row with the bytes that it had in another chunk; there must be room for it."""
        if retired:
            self.retire(self.rows, retired)
        if layout.chunk is not self:
            self.learn(layout)
        start, self.end = self.end, self.end + len(row)
        self.buffer[start : self.end] = row
        NUMBERS.pack_into(self.buffer, start + NUMBERS_PLACE, layout.number, self.seeds_number(*seeds))
        self.offsets[self.rows] = start
        self.rows += 1

    def frame(self, row: int, live: SeedTable) -> Frame:
        """Returns a view of one row, given the live seeds after it."""
        offset = self.offsets[row]
        *_, number, seeds, _ = HEAD.unpack_from(self.buffer, offset)
        layout = self.layouts[number]
        table = self._table(offset + layout.size, seeds)
        return frame_of(self.run, self.first + row, self.buffer, offset, layout, table, live, self.retired.get(row, ()))

    def live_count(self, row: int) -> int:
        """Returns how many seeds are alive after a row."""
        count: int = HEAD.unpack_from(self.buffer, self.offsets[row])[4]
        return count

    def row_size(self, row: int) -> int:
        """Returns how many bytes a row takes."""
        return (self.offsets[row + 1] if row + 1 < self.rows else self.end) - self.offsets[row]

    def _table(self, offset: int, number: int) -> SeedTable:
        ids, columns = self.seeds[number], self.widths[number]
        return table_of(self.buffer, offset, ids, columns)

    def recorded_seeds(self, row: int) -> tuple[SeedTable, bool]:
        """Returns the seeds recorded in a row, and whether these are all live seeds with all their known cells."""
        offset = self.offsets[row]
        *_, number, seeds, flags = HEAD.unpack_from(self.buffer, offset)
        return self._table(offset + self.layouts[number].size, seeds), bool(flags & WHOLE)

    def block(self, start: int, stop: int) -> Block:
        """Returns rows as arrays: from ``start`` to before ``stop``, or fewer where seeds differ too much in them."""
        return self._uniform(start, stop) or self._mixed(start, stop)

    def recorded(self, start: int, stop: int) -> Iterator[Recorded]:
        """Yields what was recorded in rows from ``start`` to before ``stop``, and not derived, probed or kept.

        Rows with the same names are together: the names, and an array with the rows' values for each of them.
        """
        offsets = np.frombuffer(self._offsets, np.uint32, stop - start, 4 * start)
        place, size = self.offsets[start], self.row_size(start)
        if (np.diff(offsets) == size).all():  # rows of one size, which mostly have one layout, too
            numbers = np.ndarray(stop - start, np.uint32, self.buffer, place + NUMBERS_PLACE, size)
            layout = self.layouts[numbers[0]]
            if (numbers == numbers[0]).all():
                shape = (len(layout.recorded), stop - start)
                first = place + HEAD.size + 8 * layout.bounds[2]
                if layout.recorded:
                    yield layout.recorded, np.ndarray(shape, np.float64, self.buffer, first, (8, size)).copy()
                return
        places = offsets.astype(np.intp) >> 3
        of_layouts = np.frombuffer(self.buffer, np.uint32)[2 * places + 9]
        doubles = np.frombuffer(self.buffer, np.float64)
        for number in np.flatnonzero(np.bincount(of_layouts)).tolist():
            names, first = self.layouts[number].recorded, HEAD_WORDS + self.layouts[number].bounds[2]
            if names:
                columns = np.arange(first, first + len(names))[:, None] + places[of_layouts == number]
                yield names, doubles[columns]

    def _uniform(self, start: int, stop: int) -> Block | None:
        """Returns rows that all have the layout and the seeds of the first one, as views; None if there are others."""
        place = self.offsets[start]
        number, of_seeds = NUMBERS.unpack_from(self.buffer, place + NUMBERS_PLACE)
        layout, ids, width = self.layouts[number], self.seeds[of_seeds], self.widths[of_seeds]
        cells = len(ids) * width
        size = layout.size + 8 * cells
        count = min(stop - start, max(_MOST_CELLS // max(cells, 1), 1))
        places = np.frombuffer(self._offsets, np.uint32, count, 4 * start)
        if not (np.diff(places) == size).all() or place + count * size > len(self.buffer):  # the last may be shorter
            return None
        halves = np.ndarray((count, size // 4), np.uint32, self.buffer, place, (size, 4))
        if not ((halves[:, 9] == number) & (halves[:, 10] == of_seeds)).all():
            return None
        words = np.ndarray((count, size // 8), np.uint64, self.buffer, place, (size, 8))
        words.flags.writeable = halves.flags.writeable = False
        rows = words.view(np.float64)
        values = rows[:, HEAD_WORDS : layout.size // 8]
        if len(layout.columns) < layout.width:  # a name occurs more than once
            values = values[:, layout.columns]
        of_cells = rows[:, layout.size // 8 :].reshape(count, len(ids), width)
        heads = (words[:, 0], words[:, 1], words[:, 2], words[:, 3], halves[:, 8])
        retired = self._retired(start, start + count)
        return Block(self.run, self.first + start, *heads, tuple(layout.places), values, ids, of_cells, retired)

    def _retired(self, start: int, stop: int) -> Mapping[int, tuple[str, ...]]:
        """Returns the seeds that were retired before these rows, by the place among them."""
        if not self.retired:
            return _NONE_RETIRED
        return {row - start: ids for row, ids in self.retired.copy().items() if start <= row < stop}

    def _mixed(self, start: int, stop: int) -> Block:
        """Returns rows that differ, side by side in new arrays."""
        places = np.frombuffer(self._offsets, np.uint32, stop - start, 4 * start).astype(np.intp) >> 3
        halves = np.frombuffer(self.buffer, np.uint32)
        of_seeds = halves[2 * places + 10]
        count, seeds = self._fitting(of_seeds)
        places, of_seeds, of_layouts = places[:count], of_seeds[:count], halves[2 * places[:count] + 9]
        # np.unique would import numpy.ma, in whatever thread this is: a child forked meanwhile could import no more.
        numbers = np.flatnonzero(np.bincount(of_layouts)).tolist()
        words = np.frombuffer(self.buffer, np.uint64)
        columns = self._gathered(words, places, of_layouts, numbers, of_seeds, seeds)
        heads = (words[places], words[places + 1], words[places + 2], words[places + 3], halves[2 * places + 8])
        retired = self._retired(start, start + count)
        return Block(self.run, self.first + start, *heads, *columns, retired)

    def _gathered(
        self,
        words: npt.NDArray[np.uint64],
        places: npt.NDArray[np.intp],
        of_layouts: npt.NDArray[np.uint32],
        numbers: Sequence[int],
        of_seeds: npt.NDArray[np.uint32],
        seeds: Sequence[int],
    ) -> _Columns:
        """Returns names, values, ids and cells of rows that differ.

        Args:
            words: the chunk.
            places: where each row begins in it.
            of_layouts: the number of each row's layout.
            numbers: the different ones among these.
            of_seeds: the number of each row's seed ids.
            seeds: the different ones among these.
        """
        doubles = words.view(np.float64)
        names = tuple(dict.fromkeys(name for number in numbers for name in self.layouts[number].places))
        column = {name: position for position, name in enumerate(names)}
        values = np.full((len(places), len(names)), ABSENT)
        cell_places = places + HEAD_WORDS
        for number in numbers:
            layout, rows = self.layouts[number], np.flatnonzero(of_layouts == number)
            into = [column[name] for name in layout.places]
            values[rows[:, None], into] = doubles[places[rows][:, None] + (HEAD_WORDS + layout.columns)]
            cell_places[rows] += layout.width
        return names, values, *self._cells(doubles, cell_places, of_seeds, seeds)

    def _fitting(self, of_seeds: npt.NDArray[np.uint32]) -> tuple[int, list[int]]:
        """Returns how many rows fit into one block, and the numbers of the seeds recorded in them."""
        changes = [0, *(np.flatnonzero(np.diff(of_seeds)) + 1).tolist(), len(of_seeds)]
        ids: set[str] = set()
        numbers: dict[int, None] = {}
        columns, recorded = NARROW, 0
        for first, end in itertools.pairwise(changes):
            number = int(of_seeds[first])
            if number not in numbers:
                columns, ids = max(columns, self.widths[number]), ids.union(self.seeds[number])
            recorded += (end - first) * len(self.seeds[number]) * self.widths[number]
            if first and end * len(ids) * columns > _CELLS_FOR_EACH * recorded + _FEW_CELLS:
                return first, list(numbers)
            numbers[number] = None
        return min(len(of_seeds), max(_MOST_CELLS // max(len(ids) * columns, 1), 1)), list(numbers)

    def _cells(
        self,
        doubles: npt.NDArray[np.float64],
        places: npt.NDArray[np.intp],
        of_seeds: npt.NDArray[np.uint32],
        numbers: Sequence[int],
    ) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
        tables = [(number, self.seeds[number], self.widths[number]) for number in numbers if number]
        if not tables:
            return (), np.empty((len(places), 0, NARROW))
        ids = tables[0][1]
        if len(tables) > 1:
            ids = tuple(dict.fromkeys(seed_id for _, of_table, _ in tables for seed_id in of_table))
        position = {seed_id: row for row, seed_id in enumerate(ids)}
        cells = np.full((len(places), len(ids), max(columns for *_, columns in tables)), ABSENT)
        for number, of_table, columns in tables:
            rows = np.flatnonzero(of_seeds == number)
            recorded = doubles[places[rows][:, None] + np.arange(len(of_table) * columns)]
            into = [position[seed_id] for seed_id in of_table]
            cells[rows[:, None], into, :columns] = recorded.reshape(len(rows), len(of_table), columns)
        return ids, cells


def frame_of(
    run: Run,
    sequence: int,
    content: bytes | bytearray | mmap,
    offset: int,
    layout: Layout,
    seeds: SeedTable,
    live: SeedTable,
    retired: tuple[str, ...],
) -> Frame:
    """Returns the frame of a row that begins at an offset of some bytes."""
    step, epoch, time_unix_ns, *_ = HEAD.unpack_from(content, offset)
    numbers = np.frombuffer(content, np.float64, layout.width, offset + HEAD.size).tolist()
    context, probed, recorded = layout.bounds
    return Frame(
        run,
        sequence,
        step,
        epoch,
        time_unix_ns,
        layout.recorded,
        tuple(numbers[recorded:]),
        dict(zip(layout.context, numbers[context:probed], strict=True)) if context < probed else NO_READINGS,
        seeds,
        live,
        retired,
        dict(zip(layout.derived, numbers, strict=False)) if context else NO_READINGS,
        dict(zip(layout.probed, numbers[probed:recorded], strict=True)) if probed < recorded else NO_READINGS,
    )


def table_of(content: bytes | bytearray | mmap, offset: int, ids: tuple[str, ...], columns: int) -> SeedTable:
    """Returns the table of seeds whose cells begin at an offset of some bytes."""
    if not ids:
        return NO_SEEDS
    cells = np.frombuffer(content, np.float64, len(ids) * columns, offset)
    if cells.flags.writeable:
        cells.flags.writeable = False
    return SeedTable(ids, cells.reshape(-1, columns))


_NONE_RETIRED: Mapping[int, tuple[str, ...]] = MappingProxyType({})


class Block(NamedTuple):
    """Consecutive steps of one run as arrays with a row for each. A value or cell that a step lacks is ``ABSENT``.

    Attributes:
        run: the run.
        first: sequence number of the first step.
        steps: the steps' numbers, uint64, shape (rows,).
        epochs: their epochs, uint64, shape (rows,).
        times: Unix nanoseconds, uint64, shape (rows,).
        digests: of the seeds alive after each step, uint64, shape (rows,).
        lives: how many seeds are alive after each step, uint32, shape (rows,).
        names: names of all values.
        values: float64, shape (rows, names).
        ids: ids of the recorded seeds.
        cells: their cells, float64, shape (rows, seeds, columns); 10 columns, or 19 if any step has more.
        retired: the seeds whose lives ended before a row, by the row.
    """

    run: Run
    first: int
    steps: npt.NDArray[np.uint64]
    epochs: npt.NDArray[np.uint64]
    times: npt.NDArray[np.uint64]
    digests: npt.NDArray[np.uint64]
    lives: npt.NDArray[np.uint32]
    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    ids: tuple[str, ...]
    cells: npt.NDArray[np.float64]
    retired: Mapping[int, tuple[str, ...]]

    @property
    def rows(self) -> int:
        """How many steps there are."""
        return len(self.times)

    @property
    def last(self) -> int:
        """Sequence number of the last step."""
        return self.first + len(self.times) - 1

    @property
    def points(self) -> int:
        """How many values and cells were recorded."""
        return int(np.count_nonzero(self.values.view(np.uint64) != ABSENT_BITS) + np.count_nonzero(self.present))

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """True where a seed's cell was recorded. Same shape as ``cells``."""
        present: npt.NDArray[np.bool_] = self.cells.view(np.uint64) != ABSENT_BITS
        return present

    def part(self, start: int, stop: int) -> Block:
        """Returns the rows from ``start`` to before ``stop``."""
        some = slice(start, stop)
        retired = self.retired
        if retired:
            retired = {row - start: ids for row, ids in retired.items() if start <= row < stop}
        return Block(
            self.run,
            self.first + start,
            self.steps[some],
            self.epochs[some],
            self.times[some],
            self.digests[some],
            self.lives[some],
            self.names,
            self.values[some],
            self.ids,
            self.cells[some],
            retired,
        )
