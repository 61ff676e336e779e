"""Assembler: rebuilds frames from points that were split, merged, repeated, reordered or interleaved on the way."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple

from esper_otel.frames.frame import Frame
from esper_otel.gateway.items import Item, Origin, Place, RunState
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.rebuild.crowd import Crowd, RequestWriters, second_of
from esper_otel.gateway.rebuild.queue import WaitingFrame
from esper_otel.gateway.rebuild.runs import Runs
from esper_otel.gateway.rebuild.shapes import PartShapes
from esper_otel.gateway.rebuild.track import Track
from esper_otel.gateway.receive.request import TOO_MANY_RUNS, DecodedRequest, PointBlock, PointSender
from esper_otel.gateway.turns import ENDLESS, Turn, finished

NO_FRAMES: Mapping[Origin, Frame] = {}


class Acceptance(NamedTuple):
    """The outcome of a request.

    Attributes:
        accepted: number of accepted points.
        rejected: number of rejected points, by reason.
        crowded: the runs for which there is no room now.
        waits_for: those of them for whose sake the sender should retry the request.
        alive: the writers that have sent something, but no steps.
    """

    accepted: int
    rejected: Mapping[str, int]
    crowded: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    alive: tuple[Origin, ...] = ()


class _WaitingPoints(NamedTuple):
    """Points of a writer that were still waiting after the last release."""

    since_s: float | None
    points: int


class Assembler:
    """Makes frames from the points of many senders.

    Points with the same (run, attempt, rank, time) form a frame. A frame from our exporter states its number and its
    number of points. It is released when it is complete and all frames before it have been released, or after
    ``hold_s`` even if points or earlier frames are missing. Points that arrive later make a new revision; an earlier
    frame that arrives later is released then. A frame from a plain sender is released ``linger_s`` after its last
    point. If a point arrives twice before the release, the first value is used; a changed value after the release
    makes a new revision.

    Threads: not thread-safe, except for ``prepare``; use it from one thread at a time.

    Args:
        limits: limits on senders.
        hold_s: how long a frame waits for points, or for frames before it.
        linger_s: how long a frame without a point count waits for further points.
        recall: called with a writer that is not known; it may restore it.
        shapes: a cache that several assemblers of one thread may share.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        hold_s: float = 2.0,
        linger_s: float = 0.05,
        recall: Callable[[Origin], None] | None = None,
        shapes: PartShapes | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._runs = Runs(self._limits, hold_s=hold_s, linger_s=linger_s, recall=recall)
        self._shapes = shapes or PartShapes()
        self._touched: dict[Track, None] = {}
        self._held: dict[Track, _WaitingPoints] = {}
        self._kept: dict[str, deque[tuple[Track, int, int]]] = {}  # by tenant
        self._kept_bytes: Counter[str] = Counter()
        self._ended: dict[Origin, str] = {}
        self._moved: dict[Track, None] = {}
        self._crowd = Crowd(self._limits.patient_s)
        self._last_tenant = ""  # the tenant whose track last used up a turn

    def take(self, decoded: DecodedRequest, *, now_s: float, received_unix_ns: int, tenant: str = "") -> Acceptance:
        """Adds the content of a request.

        Args:
            decoded: the request.
            now_s: the monotonic clock.
            received_unix_ns: when it arrived.
            tenant: the tenant whose share of the room it uses.

        Returns:
            The outcome. Sending a request again does not change what was accepted the first time.
        """
        return finished(self.taking(decoded, now_s=now_s, received_unix_ns=received_unix_ns, tenant=tenant))

    def limit(self, limits: Limits) -> None:
        """Changes the limits on the memory for all frames; those on writers stay as they are."""
        self._limits = limits

    def prepare(self, block: PointBlock) -> None:
        """Does slow work on a block before it is added; may be called from one other thread."""
        self._shapes.prepare(block)

    def taking(
        self, decoded: DecodedRequest, *, now_s: float, received_unix_ns: int, tenant: str = ""
    ) -> Generator[None, None, Acceptance]:
        """Does the same as ``take``, in parts, between which other requests may be added and frames released."""
        rejected = Counter(decoded.rejected)
        request = RequestWriters(tenant)
        for block in decoded.blocks:
            yield from self._take_block(block, request, now_s, received_unix_ns, rejected)
        for sender, time_unix_ns in decoded.cut:
            yield
            track = self._track(sender, request, now_s)
            if track is not None:
                track.cut(time_unix_ns, now_s)
        for marker in decoded.markers:
            yield
            track = self._track(marker.sender, request, now_s)
            if track is None:
                rejected[TOO_MANY_RUNS] += 1
            elif track.end_stream(marker, now_s):
                self._moved[track] = None
        for sender, outcome in decoded.ended:
            yield
            track = self._track(sender, request, now_s)
            if track is None:
                rejected[TOO_MANY_RUNS] += 1
            else:
                track.note(sender, now_s, received_unix_ns)
                track.end(outcome)
                self._ended[track.origin] = outcome
        alive = yield from self._note_signs_of_life(decoded, now_s, received_unix_ns)
        waits_for = self._crowd.waiting(request, now_s) if rejected[TOO_MANY_RUNS] else ()
        return Acceptance(decoded.points - rejected.total(), +rejected, request.runs, waits_for, tuple(alive))

    def _note_signs_of_life(
        self, decoded: DecodedRequest, now_s: float, received_unix_ns: int
    ) -> Generator[None, None, list[Origin]]:
        """Notes what known writers have sent besides steps, in parts; returns those that have sent no steps."""
        alive: list[Origin] = []
        for sender in decoded.alive:
            yield
            for track in self._runs.known(sender, now_s):
                track.note(sender, now_s, received_unix_ns)
                alive.append(track.origin)
        for sender, device in decoded.devices:
            yield
            for track in self._runs.known(sender, now_s):
                if track.describe(device):
                    self._moved[track] = None
        return alive

    def ended(self) -> dict[Origin, str]:
        """Returns the outcomes of the runs that ended since the last call."""
        ended, self._ended = self._ended, {}
        return ended

    def places(self) -> list[Place]:
        """Returns the positions of the writers whose frames were released since the last call."""
        moved, self._moved = self._moved, {}
        return [track.place() for track in moved]

    def since(self) -> float | None:
        """Returns when the oldest waiting point arrived, on the monotonic clock; None if nothing waits."""
        return min((held.since_s for held in self._held.values() if held.since_s is not None), default=None)

    def waiting(self) -> set[tuple[str, int, int]]:
        """Returns the ranks with waiting points: run id, attempt and rank."""
        return {track.origin[:3] for track, held in self._held.items() if held.since_s is not None}

    def due(self) -> float | None:
        """Returns when ``release`` must be called next, on the monotonic clock; None if nothing waits."""
        if self._touched:
            return 0.0
        return min((track.due_s for track in self._held if track.due_s is not None), default=None)

    def tenant(self, run_id: str) -> str:
        """Returns the tenant that sent the first point of a run."""
        return self._runs.tenant(run_id)

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns, by name, how much of each limit is used, and the limit."""
        waiting = sum(held.points for held in self._held.values())
        return {
            "writers": (len(self._runs), self._limits.runs),
            "stream ends": (self._runs.ends.used, self._runs.ends.most),
            "waiting points": (waiting, self._limits.waiting_points),
            "correctable bytes": (self._kept_bytes.total(), self._limits.kept_bytes),
        }

    def release_all(self, now_s: float, turn: Turn) -> list[Item]:
        """Releases waiting frames, whether they are due or not, until the event loop's turn is over."""
        items: list[Item] = []
        for track in list(self._held):
            if turn.is_over:
                break
            items += self._released(track, now_s, turn, all_now=True)
        return items

    def release(self, now_s: float, turn: Turn = ENDLESS, *, of_all: bool = True) -> list[Item]:
        """Releases the frames that are due, in order within each writer, with corrections of released frames.

        When the event loop's turn is over, the remaining frames are due immediately.

        Args:
            now_s: the monotonic clock.
            turn: the turn of the event loop.
            of_all: whether to look at all writers, or only at those that have sent something since the last call.
        """
        items: list[Item] = []
        for track in self._in_turn(now_s if of_all else None):
            items += self._released(track, now_s, turn)
        while sum(held.points for held in self._held.values()) > self._limits.waiting_points:
            of_tenants = Counter[str]()
            for track, held in self._held.items():
                of_tenants[track.tenant] += held.points
            largest = max(self._held, key=lambda track: (of_tenants[track.tenant], self._held[track].points))
            if turn.is_over:
                self._touched[largest] = None  # so that the next call looks at it again
                break
            items += self._released(largest, now_s, turn, all_now=True)
        return items

    def _in_turn(self, now_s: float | None) -> list[Track]:
        """Returns the tracks to look at, alternating between tenants; the tenant that last used up a turn comes last.

        Args:
            now_s: include tracks that are due by this time; None includes only those that received something.
        """
        touched, self._touched = self._touched, {}
        new = [track for track in touched if track not in self._held]
        due = [track for track in self._held if track in touched or (now_s is not None and track.is_due(now_s))]
        of_tenants: dict[str, list[Track]] = {}
        for track in (*new, *due):
            of_tenants.setdefault(track.tenant, []).append(track)
        if self._last_tenant in of_tenants:
            of_tenants[self._last_tenant] = of_tenants.pop(self._last_tenant)
        return [track for tracks in zip_longest(*of_tenants.values()) for track in tracks if track is not None]

    def runs(self, now_s: float) -> list[RunState]:
        """Returns the state of each writer; writers that have been silent for too long are forgotten."""
        gone = set(self._runs.expire(now_s))
        if gone:
            self._held = {track: held for track, held in self._held.items() if track not in gone}
            self._touched = {track: None for track in self._touched if track not in gone}
            for tenant in {track.tenant for track in gone} & {*self._kept}:
                left = deque(kept for kept in self._kept.pop(tenant) if kept[0] not in gone)
                del self._kept_bytes[tenant]
                if left:
                    self._kept[tenant] = left
                    self._kept_bytes[tenant] = sum(size for _, _, size in left)
        return self._runs.states(now_s)

    def run_ids(self) -> set[str]:
        """Returns the ids of the runs whose writers are known."""
        return self._runs.run_ids()

    def states_of(self, run_id: str, now_s: float) -> list[RunState]:
        """Returns the state of each known writer of a run."""
        return self._runs.states(now_s, run_id)

    def restore(
        self,
        items: Iterable[tuple[Item, bool]],
        ended: Mapping[Origin, str],
        first_frames: Mapping[Origin, Frame] = NO_FRAMES,
        places: Iterable[Place] = (),
        *,
        now_s: float,
        tenant: str = "",
        is_torn: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Restores the state from before a restart of the gateway.

        Args:
            items: the newest revision of the newest frames of each writer, oldest first, each with a flag that is true
                for the writer's very first frame.
            ended: outcomes of their runs.
            first_frames: the oldest frame of each writer.
            places: the positions of the writers.
            now_s: the monotonic clock.
            tenant: the tenant whose share of the room the writers use.
            is_torn: whether stored frames of a run were lost between others.
        """
        for item, is_first in items:
            track = self._runs.restored(item.origin, tenant)
            track.received_s = now_s
            track.restore(item, is_first=is_first, is_torn=is_torn(item.origin.run_id))
            self._keep(track, item.frame.time_unix_ns)
            if track.is_changed:
                self._touched[track] = None  # a kill came before it was made again
        for origin, frame in first_frames.items():
            self._runs.restored(origin).restore_first(frame)
        for place in places:
            self._runs.restored(place.origin).restore_place(place)
        for origin, outcome in ended.items():
            self._runs.restored(origin).end(outcome)

    def _take_block(
        self, block: PointBlock, request: RequestWriters, now_s: float, received_unix_ns: int, rejected: Counter[str]
    ) -> Iterator[None]:
        sender = block.sender
        track = self._track(sender, request, now_s)
        if track is None:
            rejected[TOO_MANY_RUNS] += len(block.times)
            return
        twin = self._runs.twin(sender)
        for time_unix_ns, of_frame in self._shapes.parts(block):
            target, shape = track, of_frame.part.shape
            if twin is not None and not track.knows(time_unix_ns):
                number = of_frame.part.number(shape.sequence)
                if twin.knows(time_unix_ns) or (number is not None and number == twin.next != track.next):
                    target = twin
            self._touched[target] = None
            target.learn(shape, now_s, is_ours=block.is_ours)
            target.learn_units(block.units)
            clash = target.take(time_unix_ns, of_frame, sender, now_s, received_unix_ns, rejected)
            if clash is not None:
                other = track if target is twin else twin
                twin = self._clashed(track, other, sender, time_unix_ns, clash, now_s)
                if twin is None:
                    self._crowd.note(request, second_of(sender), now_s, is_taken=False)
                    rejected[TOO_MANY_RUNS] += len(of_frame.part.numbers)
            yield

    def _clashed(
        self,
        first: Track,
        other: Track | None,
        sender: PointSender,
        time_unix_ns: int,
        waiting: WaitingFrame,
        now_s: float,
    ) -> Track | None:
        """Gives a frame whose number is taken to the sender's other writer; counts a frame that fits neither.

        Returns:
            The sender's second writer; None if there is no room for one.
        """
        target = other or self._runs.track(sender, now_s, tenant=first.tenant, suffix="#2")
        if target is None:
            return None
        self._touched[target] = None
        target.note(sender, now_s, waiting.received_unix_ns)
        if target.put(time_unix_ns, waiting) is not None:
            target.count_too_late()
        return self._runs.twin(sender)

    def _track(self, sender: PointSender, request: RequestWriters, now_s: float) -> Track | None:
        track = self._runs.track(sender, now_s, tenant=request.tenant)
        self._crowd.note(request, sender, now_s, is_taken=track is not None)
        if track is not None:
            self._touched[track] = None
        return track

    def _released(self, track: Track, now_s: float, turn: Turn, *, all_now: bool = False) -> list[Item]:
        was_changed = track.is_changed
        items = track.release(now_s, turn, all_now=all_now)
        if items or was_changed:
            self._moved[track] = None
        if items and track.is_due(now_s):
            self._last_tenant = track.tenant
        for item in items:
            if item.revision == 1:
                self._keep(track, item.frame.time_unix_ns)
        if items or track.due_s is None:
            self._held.pop(track, None)
        if track.due_s is not None:
            self._held[track] = _WaitingPoints(
                track.since_s, track.waiting_points
            )  # after the others, if frames of it were released
        return items

    def _keep(self, track: Track, time_unix_ns: int) -> None:
        """Records a released frame; if memory is short, forgets the oldest frames of the tenant that uses the most."""
        size = track.size_of(time_unix_ns)
        self._kept.setdefault(track.tenant, deque()).append((track, time_unix_ns, size))
        self._kept_bytes[track.tenant] += size
        while self._kept_bytes.total() > self._limits.kept_bytes:
            tenant = max(self._kept_bytes, key=self._kept_bytes.__getitem__)
            oldest, time_unix_ns, size = self._kept[tenant].popleft()
            oldest.forget(time_unix_ns)
            self._kept_bytes[tenant] -= size
