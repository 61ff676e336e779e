"""Stores released frames in memory, within limits; they are lost when the gateway ends."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby

from esper_otel.errors import UnknownRun
from esper_otel.frames.frame import Frame, frame_bytes
from esper_otel.frames.numbers import finite
from esper_otel.gateway.items import Item, Origin, Place
from esper_otel.gateway.store.base import (
    EXPIRED_AT_ONCE,
    NewData,
    StoredFrame,
    StoredPage,
    StoreLimits,
    cursor_place,
    cursor_text,
)
from esper_otel.gateway.store.stored_runs import RunStore, StoredRun

_RECALLED = 256  # frames of a writer that are restored
_PIECE = 512  # entries
_FREED_AT_ONCE, _FREED_WHEN_IDLE = 2, 32  # pieces of forgotten runs
_RANGE_BYTES = 150  # of a hole, or of the end of a stream


class _EntryPieces:
    """The entries of a run, or of one of its ranks, at consecutive positions; the oldest are dropped first."""

    def __init__(self) -> None:
        # In pieces, since an entry in the middle of a long deque is found by going through half of it.
        self._pieces: deque[deque[StoredFrame]] = deque()
        self._first = 0  # how many were dropped
        self.last = 0

    def __len__(self) -> int:
        return self.last - self._first

    @property
    def pieces(self) -> list[object]:
        """The entries, in pieces that can be freed one by one."""
        return [*self._pieces]

    def append(self, entry: StoredFrame) -> None:
        """Adds an entry at the next position."""
        if not self.last % _PIECE or not self._pieces:
            self._pieces.append(deque())
        self._pieces[-1].append(entry)
        self.last += 1

    def popleft(self) -> StoredFrame:
        """Drops the oldest entry and returns it."""
        entry = self._pieces[0].popleft()
        if not self._pieces[0]:
            self._pieces.popleft()
        self._first += 1
        return entry

    def __reversed__(self) -> Iterator[StoredFrame]:
        return (entry for piece in reversed(self._pieces) for entry in reversed(piece))

    def after(self, place: int, most: int) -> tuple[list[StoredFrame], int]:
        """Returns up to ``most`` entries after a position, and how many before them were dropped."""
        start = max(place, self._first)
        return [self._at(index) for index in range(start, min(start + most, self.last))], max(self._first - place, 0)

    def _at(self, index: int) -> StoredFrame:
        piece = index // _PIECE - self._first // _PIECE
        return self._pieces[piece][index % _PIECE - (0 if piece else self._first % _PIECE)]


class _MemoryRun(StoredRun):
    """A run with its entries."""

    def __init__(self, tenant: str) -> None:
        super().__init__(secrets.token_hex(4), tenant)
        self.all = _EntryPieces()
        self.ranks: dict[int, _EntryPieces] = {}
        self.sizes: deque[int] = deque()
        self.places: dict[Origin, Place] = {}
        self.place_bytes = 0

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        return super().size + self.place_bytes

    def add(self, item: Item) -> None:
        rank = self.ranks.setdefault(item.origin.rank, _EntryPieces())
        entry = StoredFrame(self.all.last + 1, rank.last + 1, item, self.losses.get(item.origin))
        self.losses[item.origin] = loss_of(item.frame)
        self.counts[item.origin] += 1
        self.all.append(entry)
        rank.append(entry)
        size = frame_bytes(item.frame)
        self.sizes.append(size)
        self.frame_bytes += size

    def drop_oldest(self) -> None:
        self.frame_bytes -= self.sizes.popleft()
        entry = self.all.popleft()
        origin = entry.item.origin
        self.ranks[origin.rank].popleft()
        self.counts[origin] -= 1
        if not self.counts[origin]:
            del self.counts[origin], self.losses[origin]
            self.outcomes.pop(origin, None)
            self.put(origin, None)

    def put(self, origin: Origin, place: Place | None) -> None:
        """Replaces the position of a writer, or drops it."""
        for each, sign in ((self.places.pop(origin, None), -1), (place, 1)):
            if each is not None:
                self.place_bytes += sign * _RANGE_BYTES * (len(each.holes) + len(each.ends))
        if place is not None:
            self.places[origin] = place


class MemoryStore(RunStore[_MemoryRun]):
    """Keeps entries in memory. See ``Store``."""

    def __init__(self, limits: StoreLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(limits, clock)
        self._forgotten: list[object] = []  # freed piece by piece, since freeing very many entries takes long

    def _add(self, new: NewData) -> None:
        now_s = self._clock()
        del self._forgotten[-_FREED_AT_ONCE:]
        for run_id, some in groupby(new.items, lambda item: item.origin.run_id):
            run = self._runs.get(run_id)
            if run is None:
                run = self._runs[run_id] = _MemoryRun(new.tenants.get(run_id, ""))
            run.added_s = now_s
            for item in some:
                run.add(item)
            while run.sizes and (len(run.sizes) > self._limits.steps or run.size > self._limits.run_bytes):
                self._drop(run)
            self._note(run_id, run, has_news=True)
            self._make_room()
        for origin, outcome in new.ended.items():
            run = self._runs.get(origin.run_id)
            if run is not None:
                run.outcomes[origin] = outcome
        for place in new.places:
            run = self._runs.get(place.origin.run_id)
            if run is not None and place.origin in run.counts:
                run.put(place.origin, place)

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Returns the entries after a cursor. See ``Store``."""
        run = self._runs.get(run_id)
        if run is None:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        row = run.all if rank is None else run.ranks.get(rank, _EntryPieces())
        place = cursor_place(cursor, run.life, rank, row.last)
        entries, gap = row.after(place, most)
        last = place + gap + len(entries)
        return StoredPage(entries, cursor_text(run.life, rank, last), gap)

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank. See ``Store``."""
        run = self._runs.get(run_id)
        row = None if run is None else run.ranks.get(rank)
        return 0 if row is None else row.last

    def recalled(self, origin: Origin) -> tuple[list[tuple[Item, bool]], list[Place]]:
        """Returns the newest frames of a writer. See ``Store``."""
        run = self._runs.get(origin.run_id)
        if run is None or origin not in run.counts:
            return [], []
        row, newest = run.ranks[origin.rank], dict[int, Item]()
        for entry in reversed(row):
            if entry.item.origin == origin:
                newest.setdefault(entry.item.frame.time_unix_ns, entry.item)
                if len(newest) > _RECALLED:
                    break
        is_all = len(newest) <= _RECALLED and row.last == len(row)  # no entry was dropped
        items = [newest[time] for time in sorted(newest)]
        places = [run.places[origin]] if origin in run.places else []
        return [(item, is_all and number == 0) for number, item in enumerate(items)], places

    def expire(self) -> list[str]:
        """Drops runs that were idle for too long. See ``Store``."""
        del self._forgotten[-_FREED_WHEN_IDLE:]
        oldest_s = self._clock() - self._limits.idle_s
        gone = [run_id for run_id, run in self._runs.items() if run.added_s < oldest_s][:EXPIRED_AT_ONCE]
        for run_id in gone:
            self._forget(run_id)
        return gone

    def _make_room(self) -> None:
        """Drops entries until all runs together are within the limits."""
        while self._ledger.size > self._limits.all_bytes:
            run_id = self._ledger.largest()
            self._drop(self._runs[run_id])
            self._note(run_id, self._runs[run_id])
        while self._ledger.writers > self._limits.writers:
            run_id, is_only = self._ledger.longest_silent()
            if is_only:
                self._drop(self._runs[run_id])
                self._note(run_id, self._runs[run_id])
            else:
                self._forget(run_id)

    def _note(self, run_id: str, run: _MemoryRun, *, has_news: bool = False) -> None:
        """Updates the ledger for a run; forgets a run without entries."""
        if run.sizes:
            self._ledger.note(run_id, run.tenant, run.size, len(run.counts), has_news=has_news)
        else:
            self._forget(run_id)

    def _forget(self, run_id: str) -> None:
        run = self._runs.pop(run_id)
        self._note_dropped(len(run.sizes))
        for row in (run.all, *run.ranks.values()):
            self._forgotten += row.pieces[1:]
        self._ledger.forget(run_id)

    def _drop(self, run: _MemoryRun) -> None:
        run.drop_oldest()
        self._note_dropped(1)


def loss_of(frame: Frame) -> float | None:
    """Returns the loss in the frame's packet; None when there is none."""
    return finite(frame.last_loss())
