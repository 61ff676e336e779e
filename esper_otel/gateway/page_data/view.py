"""View: one rank of a run as the page shows it, read from the store and kept up to date while somebody looks at it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Sequence
from itertools import groupby
from typing import Protocol

from esper_otel.errors import StaleCursor
from esper_otel.frames.frame import GUESSED_STEP
from esper_otel.gateway.items import Origin
from esper_otel.gateway.page_data.bucket_table import DirtyBucket, Range, Table
from esper_otel.gateway.page_data.buckets import StepArrays
from esper_otel.gateway.page_data.metric_columns import MetricColumns
from esper_otel.gateway.page_data.seed_timelines import SeedTimelines
from esper_otel.gateway.page_data.segments import Segments
from esper_otel.gateway.page_data.signals import SignalEpisodes
from esper_otel.gateway.store.base import StoredFrame, StoredPage
from esper_otel.leyline.risk import Rule

# Steps that are fetched at once: as many as are added in about this time, and not so few that it costs much more. Of
# steps with seeds, at least one and as many as have this many cells.
_AT_FIRST, _FEWEST, _MOST_FETCHED, _ADDING_S, _CELLS = 2, 16, 256, 0.002, 20_000
# The detail of at most so many steps is read from the store, and so many details are kept.
_MOST_DETAIL, _MOST_DETAILS = 2**16, 4
_MOST_UNNUMBERED = 100_000

_Reading = Generator[None, None, None]


class Source(Protocol):
    """Where steps are read from."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The risk rules."""

    def entries(self, run_id: str, cursor: str, most: int, rank: int | None = None) -> StoredPage:
        """Returns the stored entries after a cursor.

        Raises:
            UnknownRun, StaleCursor: the run or the cursor cannot be used.
        """

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank; 0 if there is none."""


class View:
    """One rank of a run. Threads: use it only from the event loop, and change it in one task at a time.

    Args:
        source: where its steps are read from.
        run_id: the run.
        rank: the rank.

    Attributes:
        life: an id; a view that was made anew has another one.
        version: grows with each reading that found something new.
        whole: all steps.
        columns: the metrics.
        segments: the parts of the curve.
        seeds: the seeds.
        episodes: the risk signals.
        gap: how many steps were dropped by the store before the first one that was read.
        used_s: when it was last asked for.
    """

    def __init__(self, source: Source, run_id: str, rank: int) -> None:
        self._source = source
        self._run_id = run_id
        self._rank = rank
        self.used_s: float = time.monotonic()
        self._unnumbered: set[tuple[Origin, int]] = set()
        self._begin()

    def _begin(self) -> None:
        self.life: str = secrets.token_hex(4)
        self.version: int = 0
        self.whole: Table = Table(Range())
        self.columns: MetricColumns = MetricColumns()
        self.segments: Segments = Segments()
        self.seeds: SeedTimelines = SeedTimelines()
        self.episodes: SignalEpisodes = SignalEpisodes(self._source.rules)
        self.gap: int = 0
        self._details: list[Table] = []
        self._cursor = ""
        self._fetched = _AT_FIRST
        self._is_stale = False
        self._newest_unix_ns: dict[int, int] = {}

    @property
    def cells(self) -> int:
        """For how many values there is memory."""
        return sum(table.cells for table in self._tables)

    @property
    def read(self) -> int:
        """How many entries of the store were read."""
        return max(self._place - self.gap, 0)

    @property
    def stored(self) -> int:
        """How many entries of the rank the store has had since the first one that was read."""
        return max(self._source.last_number(self._run_id, self._rank) - self.gap, self.read)

    @property
    def _place(self) -> int:
        return int(self._cursor.rpartition(":")[2] or 0)

    @property
    def _tables(self) -> list[Table]:
        return [self.whole, *self._details]

    def following(self) -> Generator[bool | None, None, None]:
        """Reads what is new in the store, in parts; it may be left where it yields True.

        Raises:
            UnknownRun: nothing of the run is stored.
        """
        is_new = False
        while True:
            begun_s = time.thread_time()
            try:
                found = self._source.entries(self._run_id, self._cursor, self._fetched, self._rank)
            except StaleCursor:
                self._is_stale = True
                found = StoredPage((), self._cursor, 0)
            if self._is_stale:  # the store began anew, or a step was given another number: what was read is wrong
                self._begin()
                continue
            if not self._cursor:
                self.gap = found.gap
            self._cursor = found.cursor
            if not found.entries:
                break
            if not is_new:
                self.version += 1
                is_new = True
            yield from self._take(found.entries, begun_s)
            yield True
        for table in self._tables:
            if table.dirty:
                self.version += 1
                yield from self._refilling(table)

    def detail(self, wanted: Range, most: int) -> Generator[None, None, Table]:
        """Returns a table for a range of steps that is fine enough for a number of rows, read from the store if needed.

        Args:
            wanted: the range.
            most: how many rows are wanted.
        """
        for table in self._details:
            if table.covers == wanted:
                table.used_s = time.monotonic()
                return table
        steps = self.whole.counted(wanted)
        if steps > min(_MOST_DETAIL, most * self.whole.width // 2):  # it would be thinned as much again
            return self.whole
        where = self.whole.positions(wanted)
        if where is None:
            return self.whole
        table = Table(wanted)
        if not (yield from self._reading(table, where)):
            return self.whole
        table.used_s = time.monotonic()
        self._details.append(table)
        if len(self._details) > _MOST_DETAILS:
            self._details.remove(min(self._details, key=lambda each: each.used_s))
        return table

    def drop_details(self) -> None:
        """Frees the memory of details."""
        self._details.clear()

    # -- reading -----------------------------------------------------------------------------------------

    def _take(self, entries: Sequence[StoredFrame], begun_s: float) -> _Reading:
        """Adds entries that are new, and decides by how long it took since ``begun_s`` how many are fetched next."""
        again = [segment.again_from for segment in self.segments.all]
        for (origin, is_correction), some in groupby(entries, _writer):
            usable = self._usable(list(some), is_correction=is_correction)
            for segment, new, part in self._divided(origin, usable, is_known=False):
                for table in self._tables:
                    table.add(segment, new, self.version, is_correction=is_correction)
                if not is_correction:
                    self._note(segment, new, part)
        self._mark_again(again)
        took_s = time.thread_time() - begun_s
        fewest = max(min(_FEWEST, _CELLS // max(entries[-1].item.frame.live.cells.size, 1)), 1)
        if took_s > _ADDING_S:
            self._fetched = self._fetched // 2
        elif took_s < _ADDING_S / 2:
            self._fetched = 2 * self._fetched
        self._fetched = max(min(self._fetched, _MOST_FETCHED), fewest)
        for table in self._tables:
            while table.is_too_large(len(self.columns.names)):
                yield
                yield from table.coarsening()

    def _usable(self, entries: Sequence[StoredFrame], *, is_correction: bool) -> list[StoredFrame]:
        """Returns the entries whose step numbers are known.

        A number that was counted may turn out to be unknown later. Then all is read again, without such steps.
        """
        for entry in entries if is_correction else ():
            frame = entry.item.frame
            key = entry.item.origin, frame.time_unix_ns
            is_new = frame.global_step >= GUESSED_STEP and key not in self._unnumbered
            if is_new and len(self._unnumbered) < _MOST_UNNUMBERED:
                self._unnumbered.add(key)
                self._is_stale = True
        return [
            entry
            for entry in entries
            if entry.item.frame.global_step < GUESSED_STEP
            and (not self._unnumbered or (entry.item.origin, entry.item.frame.time_unix_ns) not in self._unnumbered)
        ]

    def _note(self, segment: int, new: StepArrays, entries: Sequence[StoredFrame]) -> None:
        """Adds steps to what is told in order of time; late ones are left out there."""
        is_newer = new.times > self._newest_unix_ns.get(segment, 0)
        if not is_newer.any():
            return
        if not is_newer.all():
            new = new.some(is_newer)
            entries = [entry for entry, newer in zip(entries, is_newer.tolist(), strict=True) if newer]
        self._newest_unix_ns[segment] = int(new.times[-1])
        self.seeds.note(segment, [entry.item.frame for entry in entries], self.version)
        self.episodes.note(entries, new, list(self.columns.names), self.version)

    def _divided(
        self, origin: Origin, entries: Sequence[StoredFrame], *, is_known: bool
    ) -> list[tuple[int, StepArrays, Sequence[StoredFrame]]]:
        """Returns entries of one writer by segment: its number, the steps as arrays and the entries."""
        if entries and entries[0].item.revision > 1:  # of several corrections of a step, the last one counts
            newest = {entry.item.frame.time_unix_ns: entry for entry in entries}
            entries = [newest[time_unix_ns] for time_unix_ns in sorted(newest)]
        frames = [entry.item.frame for entry in entries]
        return [
            (
                segment,
                self.columns.steps_of(frames[start:stop], [entry.number for entry in entries[start:stop]]),
                entries[start:stop],
            )
            for segment, start, stop in self.segments.divide(origin, frames, is_known=is_known)
        ]

    def _mark_again(self, before: Sequence[int | None]) -> None:
        """Notes which buckets have changed because their steps are done again."""
        for number, was in enumerate(before):
            now = self.segments.all[number].again_from
            if now == was:
                continue
            first = min(step for step in (was, now) if step is not None)
            for table in self._tables:
                if number < len(table.segments):
                    heads = table.segments[number].heads
                    heads.changed[heads.last_step >= first] = self.version

    def _reading(self, table: Table, where: Range) -> Generator[None, None, bool]:
        """Adds the stored steps at these positions to a new table; returns whether they are all there."""
        is_all = True
        for entries in self._between(where):
            if entries is None:
                is_all = False
                break
            for (origin, is_correction), some in groupby(entries, _writer):
                usable = [
                    entry for entry in some if table.covers.first <= entry.item.frame.global_step <= table.covers.last
                ]
                for segment, new, _ in self._divided(origin, usable, is_known=True):
                    table.add(segment, new, self.version, is_correction=is_correction)
            while table.is_too_large(len(self.columns.names)):
                yield from table.coarsening()
            yield
        if is_all and table.dirty:
            yield from self._refilling(table)
        return is_all

    def _refilling(self, table: Table) -> _Reading:
        """Fills the dirty buckets of a table again from the store; those whose steps were dropped stay as they are."""
        todo = sorted(table.dirty_ranges(), key=lambda each: each[1])
        while todo:
            together, until = [todo.pop(0)], 0
            until = together[0][1].last
            while todo and todo[0][1].first <= until:
                together.append(todo.pop(0))
                until = max(until, together[-1][1].last)
            yield from self._refilling_some(table, {each for each, _ in together}, Range(together[0][1].first, until))
        table.dirty.clear()

    def _refilling_some(self, table: Table, dirty: set[DirtyBucket], where: Range) -> _Reading:
        newest: dict[tuple[Origin, int], StoredFrame] = {}
        width = table.width
        keys = {each.key for each in dirty}
        for entries in self._between(where):
            if entries is None:
                return
            for entry in entries:
                frame = entry.item.frame
                key = (entry.item.origin, frame.time_unix_ns)
                known = newest.get(key)
                if frame.global_step // width in keys and (known is None or known.item.revision <= entry.item.revision):
                    newest[key] = entry
            yield
        by_time = sorted(newest.values(), key=lambda entry: (entry.item.origin, entry.item.frame.time_unix_ns))
        steps: dict[int, list[StepArrays]] = {}
        for origin, some in groupby(by_time, lambda entry: entry.item.origin):
            for segment, new, _ in self._divided(origin, list(some), is_known=True):
                steps.setdefault(segment, []).append(new)
        for each in dirty:
            table.refill(each, steps.get(each.segment, []), self.version)
        yield

    def _between(self, where: Range) -> Generator[Sequence[StoredFrame] | None, None, None]:
        """Yields the entries at these positions, some at a time; None if some of them were dropped."""
        life = self._cursor.rpartition(":")[0]
        place = where.first - 1
        while place < where.last:
            most = min(self._fetched, where.last - place)
            try:
                found = self._source.entries(self._run_id, f"{life}:{place}", most, self._rank)
            except StaleCursor:
                yield None
                return
            if found.gap or not found.entries:
                yield None
                return
            place += len(found.entries)
            yield found.entries


def _writer(entry: StoredFrame) -> tuple[Origin, bool]:
    """Returns who sent an entry, and whether it corrects an earlier one."""
    return entry.item.origin, entry.item.revision > 1
