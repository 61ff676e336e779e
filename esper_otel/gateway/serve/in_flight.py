"""Limits work in flight and shares it between owners; at the limit, the owner with the most loses some first."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from esper_otel.gateway.faults import Busy

_LONG_S = 0.001


class RoomShare:
    """A share of a ``Room`` that an owner holds.

    Args:
        room: the room.
        owner: the owner.
        give_way: ends the work that needs the share; called when the share is taken back.

    Attributes:
        since_s: when it began, on the monotonic clock.
    """

    def __init__(self, room: Room, owner: str, give_way: Callable[[], None]) -> None:
        self._room = room
        self.give_way = give_way
        self.owner = owner
        self.size: int = 0
        self.since_s: float = time.monotonic()

    def resize(self, size: int) -> None:
        """Changes the size of the share.

        Raises:
            Busy: the limit is reached, and no other owner holds more.
        """
        self._room.resize(self, size)

    def has_room(self, size: int) -> bool:
        """Changes the size of the share if possible; returns whether it was."""
        try:
            self.resize(size)
        except Busy:
            return False
        return True

    def take_back(self) -> None:
        """Releases the share and ends the work that needs it."""
        self.resize(0)
        self.give_way()


class Room:
    """A limit shared by all owners. When it is reached, the owner with the most loses its oldest share.

    Only an owner with less can take it.

    Threads: that of one event loop.

    Args:
        most: the limit of all shares together.
        what: how messages about a refusal begin, such as "too many pulls".
        safe_s: a share held for a shorter time is not taken back.
    """

    def __init__(self, most: int, what: str, *, safe_s: float = 0.0) -> None:
        self._most = most
        self._what = what
        self._safe_s = safe_s
        self._used = 0
        self._held: dict[str, dict[RoomShare, None]] = {}
        self._sizes: dict[str, int] = {}

    @contextmanager
    def hold(self, owner: str, size: int, give_way: Callable[[], None]) -> Iterator[RoomShare]:
        """Holds a share within the block.

        Raises:
            Busy: see ``RoomShare.resize``.
        """
        holding = RoomShare(self, owner, give_way)
        self.resize(holding, size)
        try:
            yield holding
        finally:
            self.resize(holding, 0)

    def resize(self, holding: RoomShare, size: int) -> None:
        """Changes the size of a share. See ``RoomShare``."""
        owner, more = holding.owner, size - holding.size
        while more > 0 and self._used + more > self._most:
            self._largest(self._sizes.get(owner, 0) + more).take_back()
        holding.size = size
        self._used += more
        of_owner = self._held.setdefault(owner, {})
        of_owner[holding] = None
        self._sizes[owner] = self._sizes.get(owner, 0) + more
        if not size:
            del of_owner[holding]
        if not of_owner:
            del self._held[owner], self._sizes[owner]

    def _largest(self, than: int) -> RoomShare:
        """Returns the oldest share of the owner with the most, if that owner has more than ``than``."""
        owner = max(self._sizes, key=lambda each: self._sizes[each], default=None)
        if owner is not None and self._sizes[owner] > than:
            oldest = next(iter(self._held[owner]))
            if time.monotonic() - oldest.since_s >= self._safe_s:
                return oldest
        raise Busy(f"{self._what} at once")


class Turns:
    """Limits how many tasks run at the same time. Owners take turns, and each may use at most half of the places.

    Threads: that of one event loop.

    Args:
        most: number of places.
        most_waiting: how many tasks may wait for a place.
        patience_s: how long a task may be slow while others wait.
        slowest_s: how long a task may be slow at most.
        pause_s: pause after a turn of more than a millisecond, so that the event loop can handle new requests.
    """

    def __init__(
        self, most: int, most_waiting: int, *, patience_s: float, slowest_s: float, pause_s: float = 0.0
    ) -> None:
        self._most = most
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._slowest_s = slowest_s
        self._pause_s = pause_s
        self._slow: dict[asyncio.Timeout, float] = {}
        self._running: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._count = 0
        self._count_waiting = 0

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Waits for a place and holds it within the block.

        Raises:
            Busy: too many tasks wait.
        """
        if self._may_run(owner) and owner not in self._waiting:
            self._start(owner)
        else:
            await self._wait(owner)
        began_s = time.monotonic()
        try:
            yield
        finally:
            if self._pause_s and self._waiting and time.monotonic() - began_s > _LONG_S:
                asyncio.get_running_loop().call_later(self._pause_s, self._end, owner)
            else:
                self._end(owner)

    @asynccontextmanager
    async def slow(self) -> AsyncIterator[None]:
        """Limits the time of a block, within a turn, whose duration depends on the peer; ends it when it is too slow.

        Raises:
            Busy: the block took too long.
        """
        now_s = asyncio.get_running_loop().time()
        limit = asyncio.timeout_at(now_s + (self._patience_s if self._count_waiting else self._slowest_s))
        try:
            async with limit:
                self._slow[limit] = now_s
                yield
        except TimeoutError:
            raise Busy("the request came too slowly") from None
        finally:
            self._slow.pop(limit, None)

    def _may_run(self, owner: str) -> bool:
        return self._count < self._most and self._running.get(owner, 0) < max(self._most // 2, 1)

    def _start(self, owner: str) -> None:
        self._count += 1
        self._running[owner] = self._running.get(owner, 0) + 1

    def _end(self, owner: str) -> None:
        self._count -= 1
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        for each in list(self._waiting):
            while self._may_run(each) and each in self._waiting and not self._next(each):
                pass

    def _next(self, owner: str) -> bool:
        """Gives a place to the owner's first waiting task, and moves the owner to the end of the queue."""
        waiting = self._waiting.pop(owner)
        self._count_waiting -= 1
        place = waiting.popleft()
        if waiting:
            self._waiting[owner] = waiting
        if place.done():  # its task was cancelled and has not yet handled that
            return False
        place.set_result(None)
        self._start(owner)
        return True

    async def _wait(self, owner: str) -> None:
        if self._count_waiting >= self._most_waiting:
            raise Busy("too many requests at once")
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(place)
        self._count_waiting += 1
        for limit, since_s in self._slow.items():
            if (limit.when() or 0.0) > since_s + self._patience_s:
                limit.reschedule(since_s + self._patience_s)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._end(owner)
            elif place in self._waiting.get(owner, ()):
                self._leave(owner, place)
            raise

    def _leave(self, owner: str, place: asyncio.Future[None]) -> None:
        waiting = self._waiting[owner]
        waiting.remove(place)
        self._count_waiting -= 1
        if not waiting:
            del self._waiting[owner]
