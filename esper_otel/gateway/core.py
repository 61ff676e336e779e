"""Core: takes requests, puts frames together, stores them and answers pullers; independent of the protocol."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from esper_otel.gateway.events.run_events import RunEvents
from esper_otel.gateway.hours.accounts import Hours
from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.gateway.items import Item, Origin, Place, RunState
from esper_otel.gateway.limits import Crowded, Limits
from esper_otel.gateway.pull_core import PullCore, events_of
from esper_otel.gateway.rebuild.assembler import Acceptance, Assembler
from esper_otel.gateway.receive.inflate import IDENTITY
from esper_otel.gateway.receive.request import (
    NO_ROOM_FOR_PHASES,
    OF_REASONS,
    OTHER_METRICS,
    TOO_MANY_RUNS,
    DecodedRequest,
)
from esper_otel.gateway.receive.request_reader import RequestReader
from esper_otel.gateway.security import Grant, check_runs, check_senders
from esper_otel.gateway.store.base import EXPIRED_AT_ONCE, KeptRequest, Store, StoreFull
from esper_otel.gateway.store.database import DamagedStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.turns import ENDLESS, Turn, finished, in_turns, pause
from esper_otel.hours.account import Account
from esper_otel.hours.bar import RunHours
from esper_otel.leyline.risk import RULES, Rule

_TIDY_EVERY_S, _TIDY_AGAIN_S = 10.0, 0.1
# How long frames are released in a turn. Storing them belongs to the same turn and may take much longer: after a turn
# that was too long, the next one releases fewer frames.
_RELEASING_S, _LEAST_RELEASING_S, _LONG_S = 0.002, 0.0001, 0.008
_RETRY_STORE_S = 1.0
_END_WAITS_S = 600.0
_MOST_REJECTED_METRICS = 100
_MOST_RUNS_NAMED = 3
_MOST_KEPT_BYTES = 256 * 1024 * 1024  # of requests that hold points of waiting frames


class Answer(NamedTuple):
    """The outcome of a request: the number of rejected points and the reason as text; empty if all were accepted."""

    rejected: int
    reason: str


class Core(PullCore):
    """Accepts requests, assembles and stores frames, and serves them to pullers.

    A request is answered once its content is stored: as frames or, in a file store, as the bytes of the request.

    Threads: use it only from the thread of one event loop.

    Args:
        store: where released frames are kept.
        limits: limits on senders.
        hold_s: how long a frame waits for missing points, or for missing frames before it.
        linger_s: how long a frame without a point count waits for further points.
        rules: the risk rules.
        latency_budget_ms: a seed is DEGRADED if its last kernel took longer than this.
        clock_ns: Unix time, in nanoseconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        limits: Limits | None = None,
        hold_s: float = 2.0,
        linger_s: float = 0.05,
        rules: tuple[Rule, ...] = RULES,
        latency_budget_ms: float = 10.0,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._limits = limits or Limits()
        self._assembler = Assembler(limits, hold_s=hold_s, linger_s=linger_s, recall=self._recall)
        super().__init__(store, self._assembler, rules=rules, latency_budget_ms=latency_budget_ms, clock_ns=clock_ns)
        self._reader = RequestReader(limits, self._assembler.prepare)
        self._unsaved: list[Item] = []
        self._ended: dict[Origin, str] = {}
        self._places: dict[Origin, Place] = {}
        self._tenants: dict[str, str] = {}
        self._bodies: deque[tuple[int, float, int]] = deque()
        self._ended_s: dict[Origin, float] = {}
        self._body_bytes = 0
        self._last_body, self._is_restoring = 0, False
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._releasing_s = _RELEASING_S
        self._summing: asyncio.Task[None] | None = None
        self._tidying: asyncio.TimerHandle | None = None
        folder = store.folder if isinstance(store, FileStore) else None
        self._hours = Hours(store, folder, self._warnings, self._limits)
        self._events = RunEvents(folder, self._limits, self.counts, self._warnings, store.age_s)
        if isinstance(store, FileStore):
            try:
                self._restore(store)
            except DamagedStore as error:
                store.begin_anew(error)

    # -- receiving ---------------------------------------------------------------------------------------

    async def take(
        self, body: bytes, *, is_json: bool = False, encoding: str = IDENTITY, grant: Grant | None = None
    ) -> Answer:
        """Accepts a request; its content is stored when this returns. A long request is handled in several turns.

        Raises:
            Malformed, TooLarge: the bytes are not a request, or decoding them would cost too much.
            NotAllowed: the sender may not write to one of the runs.
            StoreFull: the request could not be stored; the sender may retry it.
            Crowded: there is no room for one of its writers; the points of the others are stored. The sender may retry.
        """
        self._save_unsaved()
        async with self._reader.reading(body, is_json=is_json, encoding=encoding) as (content, decoded):
            taking, kept = self._begin(content, decoded, is_json=is_json, grant=grant)
            turn = Turn()
            try:
                while True:
                    next(taking)
                    if turn.is_over:
                        self._schedule(time.monotonic())
                        await pause()
                        turn = Turn()
            except StopIteration as end:
                return self._end(decoded, end.value, kept, turn)
            finally:
                self._schedule(time.monotonic())

    def receive(self, body: bytes, *, is_json: bool = False, grant: Grant | None = None) -> Answer:
        """Does the same as ``take``, in one turn."""
        self._save_unsaved()
        decoded = self._reader.read(body, is_json=is_json)
        taking, kept = self._begin(body, decoded, is_json=is_json, grant=grant)
        try:
            return self._end(decoded, finished(taking), kept, ENDLESS)
        finally:
            self._schedule(time.monotonic())

    async def take_logs(
        self, body: bytes, *, is_json: bool = False, encoding: str = IDENTITY, grant: Grant | None = None
    ) -> Answer:
        """Accepts a request with log records; the events in it are stored when this returns, the others ignored.

        Raises:
            Malformed, TooLarge: the bytes are not a request, or decoding them would cost too much.
            NotAllowed: the sender may not write to one of the runs.
            StoreFull: the request could not be stored; the sender may retry it.
        """
        async with self._reader.reading_logs(body, is_json=is_json, encoding=encoding) as decoded:
            runs = {event.sender.run.run_id for event in decoded.events}
            if grant is not None:
                check_runs(runs, grant)
            try:
                refused = await in_turns(self._events.taking(decoded.events, "" if grant is None else grant.tenant))
            except StoreFull as error:
                self.counts["store_failures"] += 1
                self._warnings.say("store", "%s; senders are asked to retry", error)
                raise
            finally:
                self.changed.note(runs)
                self.wake(map(events_of, runs))
            refused.update(decoded.refused)
            self.counts["log_requests"] += 1
            return Answer(refused.total(), self._events.note(refused, decoded.ignored))

    def _begin(
        self, body: bytes, decoded: DecodedRequest, *, is_json: bool, grant: Grant | None
    ) -> tuple[Generator[None, None, Acceptance], KeptRequest]:
        if grant is not None:
            check_senders(decoded, grant)
        tenant = "" if grant is None else grant.tenant
        received_unix_ns = self._clock_ns()
        taking = self._taking(decoded, received_unix_ns, tenant)
        self.changed.note(block.sender.run.run_id for block in decoded.blocks)
        self.changed.note(end.sender.run.run_id for end in decoded.ended)
        return taking, KeptRequest(0, body, is_json, received_unix_ns, tenant)

    def _taking(self, decoded: DecodedRequest, received_unix_ns: int, tenant: str) -> Generator[None, None, Acceptance]:
        """Stores the phases of a request and gives its points to the assembler, in parts.

        Raises:
            StoreFull: the phases could not be stored; no point was taken.
        """
        left_out = (yield from self._hours.taking(decoded.phases, tenant)) if decoded.phases else 0
        now_s = time.monotonic()
        taken = yield from self._assembler.taking(
            decoded, now_s=now_s, received_unix_ns=received_unix_ns, tenant=tenant
        )
        if not left_out:
            return taken
        rejected = Counter({**taken.rejected, NO_ROOM_FOR_PHASES: left_out})
        return taken._replace(accepted=taken.accepted - left_out, rejected=rejected)

    def _end(self, decoded: DecodedRequest, taken: Acceptance, kept: KeptRequest, turn: Turn) -> Answer:
        """Stores the frames that a request completes, and the request's bytes for frames that still wait."""
        self.changed.note(origin.run_id for origin in taken.alive)
        now_s = time.monotonic()
        few = turn if turn is ENDLESS else Turn(self._releasing_s)
        items = self._assembler.release(now_s, few, of_all=False)
        if self._body_bytes + len(kept.body) > _MOST_KEPT_BYTES:  # once nothing waits, no request must be kept
            items += self._assembler.release_all(now_s, turn)
            self._ended.clear()
        body = decoded.needed(kept.body, self._assembler.waiting())
        self._save(items, kept._replace(number=self._last_body + 1, body=body) if body else None)
        if taken.waits_for:
            runs = ", ".join(map(repr, taken.waits_for[:_MOST_RUNS_NAMED]))
            message = (
                f"there is no room for run {runs} now: {self._limits.runs} ranks are active (--limit runs=...); "
                "one that has been silent for a minute will make room"
            )
            self._warnings.say("crowded", "%s; its sender is asked to retry", message)
            raise Crowded(message)
        self.counts["requests"] += 1
        self.counts["points"] += taken.accepted
        return self._answer(taken.rejected, decoded.metrics, taken.crowded)

    def _answer(
        self, rejected: Mapping[str, int], metrics: Mapping[str, Mapping[str, int]], runs: Sequence[str]
    ) -> Answer:
        """Counts and logs the points that were rejected for good from a request that was otherwise accepted."""
        reason = _reason(rejected, {**metrics, TOO_MANY_RUNS: runs[:_MOST_RUNS_NAMED]})
        if reason:
            self.rejected.update(rejected)
            for pair in ((why, metric) for why, of_reason in metrics.items() for metric in of_reason):
                is_known = pair in self.rejected_metrics or len(self.rejected_metrics) < _MOST_REJECTED_METRICS
                self.rejected_metrics[pair if is_known else (pair[0], OTHER_METRICS)] += metrics[pair[0]][pair[1]]
            named = {OF_REASONS[why] for why in rejected if why in OF_REASONS}
            hints = [f"--limit {name}={getattr(self._limits, name)}" for name in sorted(named)]
            hint = f"; {', '.join(hints)} can be raised" if hints else ""
            self._warnings.say("rejected", "points were rejected: %s%s", reason, hint)
        return Answer(sum(rejected.values()), reason)

    def _save(self, items: list[Item], kept: KeptRequest | None = None) -> None:
        """Stores frames in order. Frames that cannot be stored now are stored with the next ones."""
        self._unsaved += items
        self._ended |= self._assembler.ended()
        self._places |= {place.origin: place for place in self._assembler.places()}
        since_s = self._waits_since()
        while self._bodies and not self._is_restoring and (since_s is None or self._bodies[0][1] < since_s):
            self._body_bytes -= self._bodies.popleft()[2]
        for run_id in {item.origin.run_id for item in items}:
            self._tenants[run_id] = self._assembler.tenant(run_id)
        if since_s is None:
            kept = None
        first_kept = self._bodies[0][0] if self._bodies else None if kept is None else kept.number
        runs = {item.origin.run_id for item in self._unsaved}
        ended = {
            origin: outcome
            for origin, outcome in self._ended.items()
            if origin.run_id in runs or self._store.holds(origin.run_id)
        }
        try:
            self._store.add(
                self._unsaved,
                ended=ended,
                places=self._places.values(),
                tenants=self._tenants,
                kept=kept,
                first_kept=first_kept,
            )
        except StoreFull as error:
            self.counts["store_failures"] += 1
            self._warnings.say("store", "%s; senders are asked to retry", error)
            raise
        if kept is not None:
            self._last_body = kept.number
            self._bodies.append((kept.number, time.monotonic(), len(kept.body)))
            self._body_bytes += len(kept.body)
        saved, self._unsaved, self._places, self._tenants = self._unsaved, [], {}, {}
        self.changed.note(item.origin.run_id for item in saved)
        self.changed.note(origin.run_id for origin in ended)
        self._ended = {origin: outcome for origin, outcome in self._ended.items() if origin not in ended}
        self._note_saved(saved)

    def _note_saved(self, saved: Sequence[Item]) -> None:
        """Counts frames that were stored, and wakes the pullers that wait for them."""
        for what, note in (("comparing ranks", self._ranks.note), ("summing up hours", self._hours.note)):
            try:
                note(saved)
            except Exception as error:  # noqa: BLE001 - the steps are stored: their sender and pullers must hear of it
                self._fault(what, error)
        for item in saved:
            self.counts["steps"] += 1
            self.counts["incomplete_steps"] += not item.complete
            self.counts["corrections"] += item.revision > 1
        self.wake({item.origin.run_id for item in saved})

    def _save_unsaved(self) -> None:
        """Stores frames that earlier requests could not store; while this fails, no request is accepted."""
        if self._unsaved:
            self._save([])

    def _waits_since(self) -> float | None:
        """Returns when the oldest request arrived whose content is not all stored: waiting steps, or the end of a run.

        The end of a run may arrive before all of its steps. It is then stored with the first step, if that arrives
        within ten minutes.
        """
        now_s, since_s = time.monotonic(), self._assembler.since()
        self._ended_s = {origin: self._ended_s.get(origin, now_s) for origin in self._ended}
        for origin, ended_s in list(self._ended_s.items()):
            if now_s - ended_s > _END_WAITS_S:
                del self._ended[origin], self._ended_s[origin]
        return min([*self._ended_s.values(), *([] if since_s is None else [since_s])], default=None)

    def _schedule(self, now_s: float, pause_s: float = 0.0) -> None:
        """Schedules the next release of frames, at the earliest after ``pause_s``."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self._assembler.due()
        if self._unsaved:
            due_s = now_s + _RETRY_STORE_S
        if due_s is not None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(due_s - now_s, pause_s), self._release)

    def _release(self) -> None:
        self._timer = None
        now_s, begun_s = time.monotonic(), time.thread_time()
        try:
            items = self._assembler.release(now_s, Turn(self._releasing_s))
            with suppress(StoreFull):  # counted; tried again
                self._save(items)
        except Exception as error:  # noqa: BLE001 - later frames must still be released
            self._fault("releasing steps", error)
        self._note_releasing(time.thread_time() - begun_s)
        self._schedule(now_s, pause_s=time.monotonic() - now_s)  # leave the others as much time as this has taken

    def _note_releasing(self, took_s: float) -> None:
        """Adapts the next turn to how long this one took."""
        factor = 0.5 if took_s > _LONG_S else 2.0
        self._releasing_s = min(max(self._releasing_s * factor, _LEAST_RELEASING_S), _RELEASING_S)

    def _fault(self, where: str, error: Exception) -> None:
        """Counts and logs an internal fault that no answer can report."""
        self.counts["faults"] += 1
        self._warnings.say(f"fault {where}", "%s failed (%s: %s)", where, type(error).__name__, error, exc_info=error)

    def _restore(self, store: FileStore) -> None:
        """Resumes after a restart: restores the newest stored frames, then the requests that held waiting points."""
        now_s = time.monotonic()
        writers = store.writers(self._limits.runs)
        known = set(writers)
        for item, is_first in store.newest(writers):
            self._restored([(item, is_first)], {}, now_s=now_s, tenant=store.tenant(item.origin.run_id))
            self._ranks.note([item])
        for origin, frame in store.first_frames(writers).items():
            self._restored([], {}, {origin: frame}, now_s=now_s)
        for place in store.places():
            if place.origin in known:
                self._restored([], {}, {}, [place], now_s=now_s)
        self._restored([], {origin: how for origin, how in store.outcomes().items() if origin in known}, now_s=now_s)
        now_s = time.monotonic()  # waiting times count from now, not from the start of the restoring
        self._is_restoring = True  # keep all bodies until every one of them was accepted
        sizes = store.body_sizes()
        self._bodies.extend((number, now_s, size) for number, size in sizes.items())
        self._last_body = max(sizes, default=0)
        for kept in store.bodies():
            self._take_again(store, kept, now_s)
        left = store.body_sizes()
        self._bodies = deque(body for body in self._bodies if body[0] in left)
        self._body_bytes = sum(left.values())
        self._ended_s = dict.fromkeys(self._ended_s, now_s)  # as old as the bodies that they are in
        self._is_restoring = False

    def _take_again(self, store: FileStore, kept: KeptRequest, now_s: float) -> None:
        """Accepts a request kept before the restart; puts it aside if that fails, so that the gateway can start."""
        try:
            decoded = self._reader.read(kept.body, is_json=kept.is_json)
            received_unix_ns = kept.received_unix_ns
            self._assembler.take(decoded, now_s=now_s, received_unix_ns=received_unix_ns, tenant=kept.tenant)
            due_s: float | None = now_s
            while due_s is not None and due_s <= now_s:  # in small portions: it may complete many frames
                items = self._assembler.release(now_s, Turn())
                due_s = self._assembler.due()
                with suppress(StoreFull):  # counted; tried again
                    self._save(items)
        except Exception as error:  # noqa: BLE001 - any error would recur at each start
            self.counts["faults"] += 1
            store.put_aside(kept, f"{type(error).__name__}: {error}")

    def _restored(self, *what: Any, now_s: float, tenant: str = "") -> None:
        """Passes stored state to the assembler; state that it cannot use is counted and skipped."""
        try:
            is_torn = self._store.is_torn if isinstance(self._store, FileStore) else _is_never
            self._assembler.restore(*what, now_s=now_s, tenant=tenant, is_torn=is_torn)
        except Exception as error:  # noqa: BLE001 - as above
            self._fault("going on from a stored step", error)

    def _recall(self, origin: Origin) -> None:
        """Restores a writer that was forgotten because others needed its place, or after a long silence."""
        try:
            items, places = self._store.recalled(origin)
        except Exception as error:  # noqa: BLE001 - the writer's new steps must still be taken
            self._fault("going on from stored steps", error)
            return
        outcome = self._store.outcomes(origin.run_id).get(origin) if items else None
        ended = {} if outcome is None else {origin: outcome}
        if items:
            now_s, tenant = time.monotonic(), self._store.tenant(origin.run_id)
            self._restored(items, ended, {}, places, now_s=now_s, tenant=tenant)

    def start(self) -> None:
        """Starts releasing frames; call it in the event loop."""
        with suppress(StoreFull):  # counted; tried again
            self._save([])
        self._schedule(time.monotonic())
        self._tidy()

    def publish(self, item: Item, *, is_lost: bool = False) -> None:
        """Publishes a frame that did not arrive in a request, or only records it as lost to pullers.

        Raises:
            StoreFull: the frame could not be stored now; it will be stored with the next ones.
        """
        self._assembler.restore([(item, False)], {}, now_s=time.monotonic())
        self._save([] if is_lost else [item])

    def end(self, outcomes: Mapping[Origin, str]) -> None:
        """Records how runs ended whose frames were given to ``publish``."""
        self._assembler.restore([], outcomes, now_s=time.monotonic())

    def _tidy(self) -> None:
        """Drops runs that have been silent for too long, now and every few seconds."""
        self._assembler.runs(time.monotonic())
        gone: list[str] = []
        try:
            gone = self._store.expire()
        except StoreFull as error:
            self._warnings.say("store", "%s; runs that are too old are kept", error)
        for run_id in gone:
            self._warnings.say("expired", "run %s has sent nothing for too long: its steps were dropped", run_id)
        self._events.drop(gone, self._store.holds)
        if self._summing is None:
            self._summing = asyncio.ensure_future(self._sum_up())
        again_s = _TIDY_AGAIN_S if len(gone) >= EXPIRED_AT_ONCE else _TIDY_EVERY_S
        self._tidying = asyncio.get_running_loop().call_later(again_s, self._tidy)

    async def _sum_up(self) -> None:
        """Brings the hours of the runs that have changed up to date, in turns."""
        try:
            await in_turns(self._hours.tidying())
        except Exception as error:  # noqa: BLE001 - they are brought up to date when somebody asks for them
            self._fault("summing up hours", error)
        finally:
            self._summing = None

    def close(self) -> None:
        """Answers waiting pullers and closes the store."""
        if self._timer is not None:
            self._timer.cancel()
        if self._tidying is not None:
            self._tidying.cancel()
        self.end_waiting()
        self._is_closed = True
        if self._summing is not None:
            self._summing.cancel()
        self._reader.close()
        self._hours.close()
        self._events.close()
        self._store.close()

    # -- pulling -----------------------------------------------------------------------------------------

    def _early_runs(self) -> set[str]:
        return {*self._events.run_ids(), *self._hours.runs_with_phases()}

    def _early_states(self, run_id: str, *, has_steps: bool) -> list[RunState]:
        now_s = self._clock_ns() / 1e9
        found = self._events.states(run_id, now_s)
        return found if found or has_steps else self._hours.states(run_id, now_s)

    def _accounting(self, run_id: str) -> Generator[None, None, tuple[RunHours, dict[AttemptRank, Account]]]:
        return self._hours.accounting(run_id)

    # -- state ------------------------------------------------------------------------------------------

    def gauges(self) -> Mapping[str, float]:
        """Returns the current values of the gateway's gauges."""
        return {**super().gauges(), "unsaved_steps": len(self._unsaved)}

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns, by name, how much of each limit is used, and the limit."""
        bodies = {"waiting request bytes": (float(self._body_bytes), float(_MOST_KEPT_BYTES))}
        return {**self._assembler.use(), **self._hours.use(), **bodies, **super().use()}

    @property
    def damaged(self) -> Mapping[str, int]:
        """Counts of damaged entries that were removed from the store, by kind; ``store`` are whole files."""
        found = Counter(super().damaged)
        found["store"] += self._events.damaged + self._hours.damaged
        return found

    @property
    def is_ready(self) -> bool:
        """Whether the last attempt to store frames succeeded."""
        return not self._unsaved


def _is_never(_run_id: str) -> bool:
    return False


def _reason(rejected: Mapping[str, int], whose: Mapping[str, Iterable[str]]) -> str:
    """Describes how many points were rejected, why, and from which metrics or runs."""
    parts = []
    for reason, count in sorted(rejected.items()):
        names = [name if name == OTHER_METRICS else repr(name) for name in whose.get(reason, ()) if name]
        parts.append(f"{count} {reason}" + (f" ({', '.join(names)})" if names else ""))
    return ", ".join(parts)
