"""Keeps the views of the ranks that somebody looks at, within a limit of memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

from esper_otel.errors import UnknownRun
from esper_otel.gateway.page_data.view import Source, View
from esper_otel.gateway.turns import Turn, in_turns, pause

TURN_S = 0.001  # short, since requests of trainers and controllers may wait for several turns
# How long one request reads what is stored; the next request goes on. Then the page can show how far it is.
_READING_S = 0.2
_UNWATCHED_S = 120.0
# Values of metrics in all views, 36 bytes each, or 56 in those that have values that are not finite.
_MOST_CELLS = 2**22
_FEWEST_ROWS = 1_024
_MOST_VIEWS = 256


class Views:
    """The views of all runs and ranks that somebody looks at. Use it only from the event loop.

    Args:
        source: where steps are read from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._views: dict[tuple[str, int], View] = {}
        self._tidying: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._views)

    async def view(self, run_id: str, rank: int) -> View:
        """Returns the view of a rank, after reading some of what is new in the store.

        Raises:
            UnknownRun: nothing of the rank is stored.
        """
        key = (run_id, rank)
        view = self._views.get(key)
        if view is None:
            if not self._source.last_number(run_id, rank):
                raise UnknownRun(f"no step of rank {rank} of run {run_id!r} is here")
            view = self._views[key] = View(self._source, run_id, rank)
        view.used_s = time.monotonic()
        try:
            await _for_some_time(view.following())
        except UnknownRun:
            del self._views[key]
            raise
        await self._limit(view)
        self._schedule()
        return view

    async def _limit(self, newest: View) -> None:
        """Makes the largest views coarser, or drops those that were not asked for longest, until all fit."""
        while sum(view.cells for view in self._views.values()) > _MOST_CELLS:
            for view in self._views.values():
                if view is not newest:
                    view.drop_details()
            largest = max(self._views.values(), key=lambda view: view.whole.cells)
            if largest.whole.rows <= max(_FEWEST_ROWS, 2 * len(largest.whole.segments)):
                if len(self._views) == 1:
                    return
                self._drop_oldest()
            else:
                await in_turns(largest.whole.coarsening(), TURN_S)
        while len(self._views) > _MOST_VIEWS:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        del self._views[min(self._views, key=lambda key: self._views[key].used_s)]

    def _schedule(self) -> None:
        if self._tidying is None and self._views:
            self._tidying = asyncio.get_running_loop().call_later(_UNWATCHED_S / 4, self._tidy)

    def _tidy(self) -> None:
        """Drops the views that nobody has asked for any more."""
        self._tidying = None
        oldest_s = time.monotonic() - _UNWATCHED_S
        self._views = {key: view for key, view in self._views.items() if view.used_s > oldest_s}
        self._schedule()


async def _for_some_time(reading: Generator[bool | None, None, None]) -> None:
    """Runs a generator in turns, but leaves it after some time, once it yields True."""
    turn, until_s = Turn(TURN_S), time.monotonic() + _READING_S
    for may_leave in reading:
        if turn.is_over:
            if may_leave and time.monotonic() > until_s:
                reading.close()
                return
            await pause()
            turn = Turn(TURN_S)
