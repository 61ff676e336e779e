"""Runs: tells writers apart, limits their number, and forgets those that have been silent for long."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.limits import Limits, SharedPlaces
from esper_otel.gateway.rebuild.launches import with_resumed
from esper_otel.gateway.rebuild.track import Track
from esper_otel.gateway.receive.request import PointSender

# A writer that has sent something within this time is alive.
_ALIVE_S = 60.0

# A placeholder for the process of a writer that was restored after a restart; no process text can be equal to it.
_UNCLAIMED = "\0"


class _RankOfRun(NamedTuple):
    run_id: str
    attempt: int
    rank: int


class Runs:
    """The tracks of all writers.

    Two processes that claim the same (run, attempt, rank) are two writers: the first one seen has an empty name, the
    others are named after their instance, host and process. If these are equal too, the numbers of their frames clash:
    a frame whose number is already taken goes to a second writer, ``#2``. No frame is lost then, but the two writers
    can be told apart only by the numbers.

    Args:
        limits: how many writers there may be, and for how long.
        hold_s: see ``Track``.
        linger_s: see ``Track``.
        recall: called with a writer that is not known; it may restore it.

    Attributes:
        ends: room for future ends of streams.
    """

    def __init__(
        self, limits: Limits, *, hold_s: float, linger_s: float, recall: Callable[[Origin], None] | None = None
    ) -> None:
        self._limits = limits
        self._recall = recall
        self._hold_s = hold_s
        self._linger_s = linger_s
        self._ranks: dict[_RankOfRun, dict[str, Track]] = {}
        self._tenants: dict[str, OrderedDict[Track, None]] = {}  # within each tenant, the longest silent first
        self._of_runs: dict[str, str] = {}
        self._writers_of: Counter[str] = Counter()
        self._ranks_of: dict[str, dict[_RankOfRun, None]] = {}
        self._count = 0
        self.ends: SharedPlaces = SharedPlaces(limits.ends)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Track]:
        return (track for writers in self._ranks.values() for track in writers.values())

    def tenant(self, run_id: str) -> str:
        """Returns the tenant that sent the first point of a run; empty if it is not known."""
        return self._of_runs.get(run_id, "")

    def track(self, sender: PointSender, now_s: float, *, tenant: str = "", suffix: str = "") -> Track | None:
        """Returns the track of a sender; None if there are too many."""
        rank = _RankOfRun(sender.run.run_id, sender.run.attempt, sender.run.rank)
        writers = self._ranks.get(rank, {})
        process = f"{sender.process}{suffix}"
        track = writers.get(process)
        if track is None and _UNCLAIMED in writers:
            track = writers[process] = writers.pop(_UNCLAIMED)
        if track is None:
            if self._count >= self._limits.runs and not self._make_room(tenant, now_s):
                return None
            if not writers and self._recall is not None:
                self._recall(Origin(*rank, ""))
                writers = self._ranks.get(rank, {})
            if _UNCLAIMED in writers:
                track = writers[process] = writers.pop(_UNCLAIMED)
            else:
                track = self._add(Origin(*rank, (process or "unnamed") if writers else ""), process, tenant)
        self._tenants[track.tenant].move_to_end(track)
        return track

    def known(self, sender: PointSender, now_s: float) -> list[Track]:
        """Returns the tracks of a sender that is known, or that is recalled; none if there is no room for that."""
        rank = _RankOfRun(sender.run.run_id, sender.run.attempt, sender.run.rank)
        if rank not in self._ranks and self._recall is not None and self._count < self._limits.runs:
            self._recall(Origin(*rank, ""))
        writers = self._ranks.get(rank, {})
        if not writers.keys() & {sender.process, _UNCLAIMED}:
            return []
        found = self.track(sender, now_s), self.twin(sender)
        return [track for track in found if track is not None]

    def restored(self, origin: Origin, tenant: str = "") -> Track:
        """Returns the track of a writer from before a restart. The process of the first writer is no longer known."""
        process = origin.writer or _UNCLAIMED
        track = self._ranks.get(_RankOfRun(*origin[:3]), {}).get(process)
        return track or self._add(origin, process, tenant)

    def _add(self, origin: Origin, process: str, tenant: str) -> Track:
        times = {"hold_s": self._hold_s, "linger_s": self._linger_s}
        track = Track(origin, self._limits, **times, ends=self.ends, tenant=tenant)
        self._tenants.setdefault(tenant, OrderedDict())[track] = None
        self._of_runs.setdefault(origin.run_id, tenant)
        self._writers_of[origin.run_id] += 1
        rank = _RankOfRun(*origin[:3])
        self._ranks.setdefault(rank, {})[process] = track
        self._ranks_of.setdefault(origin.run_id, {})[rank] = None
        self._count += 1
        return track

    def twin(self, sender: PointSender) -> Track | None:
        """Returns the track for frames of this sender whose numbers clashed."""
        writers = self._ranks.get(_RankOfRun(sender.run.run_id, sender.run.attempt, sender.run.rank), {})
        return writers.get(f"{sender.process}#2")

    def expire(self, now_s: float) -> list[Track]:
        """Forgets writers that have been silent for too long, and returns their tracks."""
        return [self._remove(track) for track in list(self) if now_s - track.received_s > self._limits.silent_s]

    def run_ids(self) -> set[str]:
        """Returns the ids of the runs that have writers."""
        return {*self._ranks_of}

    def states(self, now_s: float, run_id: str | None = None) -> list[RunState]:
        """Returns the state of each writer: of one run, or of all."""
        states = []
        some = self._ranks if run_id is None else self._ranks_of.get(run_id, ())
        for writers in (self._ranks[rank] for rank in some):
            is_silent = [now_s - track.received_s > _ALIVE_S for track in writers.values()]
            alive = max(is_silent.count(False), 1)
            states += [
                track.state(writers=alive, is_silent=silent)
                for track, silent in zip(writers.values(), is_silent, strict=True)
            ]
        return with_resumed(states)

    def _make_room(self, tenant: str, now_s: float) -> bool:
        """Forgets the longest silent writer of the tenant with the most writers.

        If that is the requesting tenant itself, its writer is forgotten only if it is not alive, so that no tenant
        takes places from tenants with fewer writers. Waiting frames of the forgotten writer are still released.
        """
        places = len(self._tenants.get(tenant, ())) + 1
        largest = max(self._tenants, key=lambda each: len(self._tenants[each]), default=tenant)
        whose = largest if len(self._tenants.get(largest, ())) > places else tenant
        oldest = next(iter(self._tenants.get(whose, ())), None)
        if oldest is None or (whose == tenant and now_s - oldest.received_s <= _ALIVE_S):
            return False
        self._remove(oldest)
        return True

    def _remove(self, track: Track) -> Track:
        origin = track.origin
        rank = _RankOfRun(origin.run_id, origin.attempt, origin.rank)
        writers = self._ranks[rank]
        for process in [process for process, other in writers.items() if other is track]:
            del writers[process]
        self._count -= 1
        track.close()
        of_tenant = self._tenants[track.tenant]
        del of_tenant[track]
        if not of_tenant:
            del self._tenants[track.tenant]
        if not writers:
            del self._ranks[rank], self._ranks_of[rank.run_id][rank]
        self._writers_of[rank.run_id] -= 1
        if not self._writers_of[rank.run_id]:
            del self._writers_of[rank.run_id], self._of_runs[rank.run_id], self._ranks_of[rank.run_id]
        return track
