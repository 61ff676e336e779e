"""Runs: which writers there are, told apart, bounded, and forgotten when they have been silent for long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from esper_otel.gateway.decoded import Sender
from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.launches import with_resumed
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.track import Track

# A writer from which something came so recently is alive.
_ALIVE_S = 60.0

# Stands for the process of a writer that is known from an earlier life; no text can be equal to it.
_UNCLAIMED = "\0"


class _Rank(NamedTuple):
    run_id: str
    attempt: int
    rank: int


class Runs:
    """The tracks of all writers.

    Two processes that claim one (run, attempt, rank) are two writers: the first one seen has no name, the others
    are named after their instance, host and process. If even these are equal their frames' numbers clash: a
    frame whose number is taken goes to a second writer, ``#2``. No frame is lost then, but which of the two a frame
    belongs to is known only where the numbers tell.

    Args:
        limits: how many there may be, and for how long.
        hold_s: see ``Track``.
        linger_s: see ``Track``.
    """

    def __init__(self, limits: Limits, *, hold_s: float, linger_s: float) -> None:
        self._limits = limits
        self._hold_s = hold_s
        self._linger_s = linger_s
        self._ranks: dict[_Rank, dict[str, Track]] = {}
        self._count = 0

    def __iter__(self) -> Iterator[Track]:
        return (track for writers in self._ranks.values() for track in writers.values())

    def track(self, sender: Sender, now_s: float, *, suffix: str = "") -> Track | None:
        """The track of a sender; None when there are too many."""
        rank = _Rank(sender.run_id, sender.attempt, sender.rank)
        writers = self._ranks.get(rank, {})
        process = f"{sender.process}{suffix}"
        track = writers.get(process)
        if track is None and _UNCLAIMED in writers:
            track = writers[process] = writers.pop(_UNCLAIMED)
        if track is None:
            if self._count >= self._limits.runs and not self._make_room(now_s):
                return None
            track = self._add(Origin(*rank, (process or "unnamed") if writers else ""), process)
        return track

    def restored(self, origin: Origin) -> Track:
        """The track of a writer known from an earlier life; the first one's process is not known any more."""
        process = origin.writer or _UNCLAIMED
        track = self._ranks.get(_Rank(*origin[:3]), {}).get(process)
        return track or self._add(origin, process)

    def _add(self, origin: Origin, process: str) -> Track:
        track = Track(origin, self._limits, hold_s=self._hold_s, linger_s=self._linger_s)
        self._ranks.setdefault(_Rank(*origin[:3]), {})[process] = track
        self._count += 1
        return track

    def twin(self, sender: Sender) -> Track | None:
        """The track of frames of this sender whose numbers clashed."""
        writers = self._ranks.get(_Rank(sender.run_id, sender.attempt, sender.rank), {})
        return writers.get(f"{sender.process}#2")

    def expire(self, now_s: float) -> list[Track]:
        """Forgets writers from which nothing came for long; returns them."""
        return [self._remove(track) for track in list(self) if now_s - track.received_s > self._limits.silent_s]

    def states(self, now_s: float) -> list[RunState]:
        """What is known of each writer."""
        states = []
        for writers in self._ranks.values():
            is_silent = [now_s - track.received_s > _ALIVE_S for track in writers.values()]
            alive = max(is_silent.count(False), 1)
            states += [
                track.state(writers=alive, is_silent=silent)
                for track, silent in zip(writers.values(), is_silent, strict=True)
            ]
        return with_resumed(states)

    def _make_room(self, now_s: float) -> bool:
        """Forgets the writer that has been silent for longest, if it is not alive."""
        oldest = min(self, key=lambda track: track.received_s, default=None)
        if oldest is None or now_s - oldest.received_s <= _ALIVE_S:
            return False
        self._remove(oldest)
        return True

    def _remove(self, track: Track) -> Track:
        origin = track.origin
        rank = _Rank(origin.run_id, origin.attempt, origin.rank)
        writers = self._ranks[rank]
        for process in [process for process, other in writers.items() if other is track]:
            del writers[process]
        self._count -= 1
        if not writers:
            del self._ranks[rank]
        return track
