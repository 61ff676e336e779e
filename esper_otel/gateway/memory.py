"""MemoryStore: released frames in memory, bounded; gone when the gateway ends."""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter

from esper_otel.errors import UnknownRun
from esper_otel.frame import LAST_LOSS, Frame
from esper_otel.gateway.items import Item, Origin, Place
from esper_otel.gateway.stored import (
    NOTHING_ENDED,
    Entry,
    Found,
    Kept,
    StoreLimits,
    cursor_place,
    cursor_text,
)
from esper_otel.leyline.numbers import finite
from esper_otel.ring import frame_bytes


class _Row:
    """The entries of a run, or of one of its ranks: places without holes, the oldest dropped first."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.last = 0

    def after(self, place: int, most: int) -> tuple[list[Entry], int]:
        """Up to ``most`` entries after a place, and how many before them were dropped."""
        first = self.last - len(self.entries)
        start = max(place, first)
        # A deque walks to an index in blocks, from the nearer end; to a slice one by one.
        found = [self.entries[index - first] for index in range(start, min(start + most, self.last))]
        return found, max(first - place, 0)


class _Shelf:
    """What is stored of a run."""

    def __init__(self, now_s: float) -> None:
        self.life = secrets.token_hex(4)
        self.all = _Row()
        self.ranks: dict[int, _Row] = {}
        self.sizes: deque[int] = deque()
        self.size = 0
        self.losses: dict[Origin, float | None] = {}
        self.counts: Counter[Origin] = Counter()
        self.outcomes: dict[Origin, str] = {}
        self.added_s = now_s

    def add(self, item: Item, size: int) -> None:
        rank = self.ranks.setdefault(item.origin.rank, _Row())
        self.all.last += 1
        rank.last += 1
        entry = Entry(self.all.last, rank.last, item, self.losses.get(item.origin))
        self.losses[item.origin] = loss_of(item.frame)
        self.counts[item.origin] += 1
        self.all.entries.append(entry)
        rank.entries.append(entry)
        self.sizes.append(size)
        self.size += size

    def drop_oldest(self) -> int:
        size = self.sizes.popleft()
        entry = self.all.entries.popleft()
        self.ranks[entry.item.origin.rank].entries.popleft()
        self.counts[entry.item.origin] -= 1
        self.size -= size
        return size


class MemoryStore:
    """Keeps entries in memory. See ``Store``."""

    def __init__(self, limits: StoreLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or StoreLimits()
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}
        self.dropped = 0
        self.size = 0

    def add(
        self,
        items: Iterable[Item],
        *,
        ended: Mapping[Origin, str] = NOTHING_ENDED,
        places: Iterable[Place] = (),  # noqa: ARG002
        kept: Kept | None = None,  # noqa: ARG002 - bodies are of no use to memory
        first_kept: int | None = None,  # noqa: ARG002
    ) -> None:
        """Stores frames and outcomes. See ``Store``."""
        now_s = self._clock()
        for item in items:
            shelf = self._shelves.get(item.origin.run_id)
            if shelf is None:
                shelf = self._shelves[item.origin.run_id] = _Shelf(now_s)
            shelf.added_s = now_s
            size = frame_bytes(item.frame)
            shelf.add(item, size)
            self.size += size
            while len(shelf.sizes) > self._limits.steps or shelf.size > self._limits.run_bytes:
                self._drop(shelf)
            while self.size > self._limits.all_bytes:
                self._drop(max(self._shelves.values(), key=attrgetter("size")))
        for origin, outcome in ended.items():
            shelf = self._shelves.get(origin.run_id)
            if shelf is not None:
                shelf.outcomes[origin] = outcome

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> Found:
        """Entries after a cursor. See ``Store``."""
        shelf = self._shelves.get(run_id)
        if shelf is None:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        row = shelf.all if rank is None else shelf.ranks.get(rank, _Row())
        place = cursor_place(cursor, shelf.life, rank, row.last)
        entries, gap = row.after(place, most)
        last = place + gap + len(entries)
        return Found(entries, cursor_text(shelf.life, rank, last), gap)

    def counts(self) -> dict[Origin, int]:
        """How many entries each writer has."""
        return {origin: count for shelf in self._shelves.values() for origin, count in shelf.counts.items() if count}

    def outcomes(self) -> dict[Origin, str]:
        """How the runs ended of which something is stored."""
        return {origin: outcome for shelf in self._shelves.values() for origin, outcome in shelf.outcomes.items()}

    def expire(self) -> list[str]:
        """Drops runs that were idle for long."""
        oldest_s = self._clock() - self._limits.idle_s
        gone = [run_id for run_id, shelf in self._shelves.items() if shelf.added_s < oldest_s]
        for run_id in gone:
            shelf = self._shelves.pop(run_id)
            self.size -= shelf.size
            self.dropped += len(shelf.sizes)
        return gone

    def close(self) -> None:
        """Nothing to end."""

    def _drop(self, shelf: _Shelf) -> None:
        self.size -= shelf.drop_oldest()
        self.dropped += 1


def loss_of(frame: Frame) -> float | None:
    """The loss that the frame's packet has; None when there is none."""
    return finite(frame.values().get(LAST_LOSS))
