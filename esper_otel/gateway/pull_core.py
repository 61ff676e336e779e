"""PullCore: answers pullers, the live page and operators, whatever the protocol and the source of the steps."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from esper_otel.errors import UnknownRun
from esper_otel.gateway.changes import ChangedRuns
from esper_otel.gateway.events.event_file import StoredEvent
from esper_otel.gateway.events.run_events import RunEvents, events_message
from esper_otel.gateway.faults import CREDENTIALS, Fault
from esper_otel.gateway.hours.answer import NO_ACCOUNTS, hours_message
from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.gateway.items import RunState, RunStatus
from esper_otel.gateway.pages import (
    FREE,
    Bounds,
    MadeSteps,
    PulledPage,
    forgotten,
    packets_after,
    packets_of,
    page,
    run_message,
    step_of,
)
from esper_otel.gateway.ranks import Ranks, RecentSteps
from esper_otel.gateway.rebuild.launches import outcomes
from esper_otel.gateway.security import BadRequest, Grant, check_puller
from esper_otel.gateway.store.base import Store, StoredFrame, StoredPage
from esper_otel.gateway.turns import at_half_speed, finished
from esper_otel.hours.account import Account
from esper_otel.hours.bar import RunHours
from esper_otel.leyline import messages
from esper_otel.leyline.packets import Page
from esper_otel.leyline.risk import RULES, Rule
from esper_otel.log import Warnings
from esper_otel.oona.publisher import Publisher
from esper_otel.pull.messages import (
    EventsRequest,
    EventsResponse,
    HoursRequest,
    HoursResponse,
    PullRequest,
    PullResponse,
    RanksRequest,
    RanksResponse,
    RunsResponse,
)
from esper_otel.schema import is_check

_MOST_PACKETS = 1000
_USUAL_EVENTS, _MOST_EVENTS = 64, 1000
MOST_WAIT_S = 60.0


class States(Protocol):
    """Where the states of writers are known."""

    def runs(self, now_s: float) -> list[RunState]:
        """Returns the state of each writer."""

    def states_of(self, run_id: str, now_s: float) -> list[RunState]:
        """Returns the state of each known writer of a run."""

    def run_ids(self) -> set[str]:
        """Returns the ids of the runs whose writers are known."""


class PullCore(ABC):
    """Answers pullers, the live page and operators from a store. Where the steps come from, a subclass knows.

    Threads: use it only from the thread of one event loop.

    Args:
        store: the released frames.
        states: where the states of writers are known.
        rules: the risk rules.
        latency_budget_ms: a seed is DEGRADED if its last kernel took longer than this.
        clock_ns: Unix time, in nanoseconds.
    """

    _events: RunEvents  # a subclass knows where they come from

    def __init__(
        self,
        store: Store,
        states: States,
        *,
        rules: tuple[Rule, ...] = RULES,
        latency_budget_ms: float = 10.0,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._states = states
        self._rules = rules
        self._latency_budget_ms = latency_budget_ms
        self._clock_ns = clock_ns
        self._is_ending = False
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._warnings, self._ranks, self._made = Warnings(), Ranks(), MadeSteps()
        self.changed: ChangedRuns = ChangedRuns()
        self.publisher: Publisher | None = None  # publishes on Oona, if configured
        self.notices: Counter[str] = Counter()  # of those whom --notify tells
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # whole requests, by reason
        self.deferred: Counter[str] = Counter()  # likewise
        self.rejected_metrics: Counter[tuple[str, str]] = Counter()
        # The packet classes are built on first use. Build them now, not during a turn of the event loop.
        messages.SystemStatePacket()

    @abstractmethod
    def start(self) -> None:
        """Starts the work that goes on between requests; call it in the event loop."""

    @abstractmethod
    def close(self) -> None:
        """Answers waiting pullers and closes the store."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether requests can be answered."""

    # -- waiting -----------------------------------------------------------------------------------------

    def wake(self, run_ids: Iterable[str]) -> None:
        """Lets pullers that wait for a step of these runs look again."""
        for run_id in run_ids:
            for waiter in self._waiters.pop(run_id, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def _news(self, run_id: str, deadline_s: float) -> bool:
        """Waits until a step of the run is stored; returns False when the deadline has passed."""
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(run_id, set())
        waiters.add(waiter)
        try:
            async with asyncio.timeout(max(deadline_s - time.monotonic(), 0.0)):
                await waiter
        except TimeoutError:
            return False
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(run_id) is waiters:
                del self._waiters[run_id]
        return time.monotonic() < deadline_s

    def end_waiting(self) -> None:
        """Answers every waiting puller, because the gateway is about to stop."""
        self._is_ending = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        self._waiters.clear()

    # -- pulling -----------------------------------------------------------------------------------------

    def runs(self, grant: Grant | None = None, run_id: str = "") -> RunsResponse:
        """Does the same as ``listing``, in one turn."""
        return finished(self.listing(grant, run_id))

    def listing(self, grant: Grant | None = None, run_id: str = "") -> Generator[None, None, RunsResponse]:
        """Returns the known runs that the puller may see: one by name, or all, without runs from a check.

        There may be very many.
        """
        known = {state.origin: state for state in self._states.runs(time.monotonic())}
        yield
        stored, ends = self._store.counts(), self._store.outcomes()
        yield
        origins = sorted({*stored, *known})
        yield
        response = RunsResponse()
        for name, of_run in groupby(origins, key=attrgetter("run_id")):
            is_asked = name == run_id if run_id else not is_check(name)
            if not is_asked or not (grant is None or grant.allows(name)):
                continue
            states = []
            for origin in of_run:
                states.append(known.get(origin) or forgotten(origin, ends.get(origin)))
                yield
            ended = outcomes(states).get(name)
            for state in states:
                response.runs.append(run_message(state, stored.get(state.origin, 0), ended))
                yield
        return response

    def known_runs(self) -> set[str]:
        """Returns the ids of all runs that are known, without runs from a check."""
        return {run_id for run_id in {*self._store.run_ids(), *self._states.run_ids()} if not is_check(run_id)}

    def state_of(self, run_id: str) -> RunStatus:
        """Returns what is known of a run."""
        states = self._states.states_of(run_id, time.monotonic())
        stored, ends = self._store.counts(run_id), self._store.outcomes(run_id)
        known = {state.origin for state in states}
        states += [forgotten(origin, ends.get(origin)) for origin in stored if origin not in known]
        return RunStatus(sorted(states, key=attrgetter("origin")), sum(stored.values()), outcomes(states).get(run_id))

    def shown_runs(self) -> set[str]:
        """Returns the ids of the runs that the page lists: also those of which no step is here."""
        return self.known_runs() | {run_id for run_id in self._early_runs() if not is_check(run_id)}

    def shown_state(self, run_id: str) -> RunStatus:
        """Returns what is known of a run, with the processes that have not come to their first step."""
        known = self.state_of(run_id)
        ranks = {state.origin[1:3] for state in known.states}
        found = self._early_states(run_id, has_steps=bool(ranks))
        early = [state for state in found if state.origin[1:3] not in ranks]
        if not early:
            return known
        states = sorted([*known.states, *early], key=attrgetter("origin"))
        return RunStatus(states, known.stored, outcomes(states).get(run_id))

    def _early_runs(self) -> set[str]:
        """Returns the ids of the runs of which something else than steps is here, also of checks."""
        return set()

    def _early_states(self, run_id: str, *, has_steps: bool) -> list[RunState]:  # noqa: ARG002 - a subclass may know
        """Returns the state of each process of a run, as far as something else than its steps tells it."""
        return []

    async def pull(self, request: PullRequest, grant: Grant | None = None, bounds: Bounds = FREE) -> PullResponse:
        """Does the same as ``pulled``, and returns the page as a message."""
        return PullResponse.FromString((await self.pulled(request, grant, bounds)).body)

    async def pulled(self, request: PullRequest, grant: Grant | None = None, bounds: Bounds = FREE) -> PulledPage:
        """Returns the steps after a cursor; waits up to ``wait_s`` if there is none yet.

        Raises:
            BadRequest, NotAllowed, UnknownRun, StaleCursor: this request cannot be answered.
            Busy: there is no room for an answer.
        """
        check_puller(request.run_id, grant)
        if not 0 <= request.wait_s <= MOST_WAIT_S or request.max_packets > _MOST_PACKETS:
            raise BadRequest(f"max_packets must be at most {_MOST_PACKETS}, wait_s from 0 to {MOST_WAIT_S:g}")
        self._check_shard(request)
        deadline_s = time.monotonic() + request.wait_s
        while True:
            try:
                found = await self._page(request, bounds)
            except UnknownRun:
                if time.monotonic() >= deadline_s:
                    self._check_has_steps(request.run_id)
                    raise
            else:
                if found.steps or found.gap or time.monotonic() >= deadline_s:
                    return found
            if self._is_ending or not await self._news(request.run_id, deadline_s):
                deadline_s = 0.0

    def _check_has_steps(self, run_id: str) -> None:
        """Raises UnknownRun with the outcome of a run that has ended before its first step."""
        outcome = None if is_check(run_id) else outcomes(self._states.states_of(run_id, time.monotonic())).get(run_id)
        if outcome is not None:
            raise UnknownRun(f"run {run_id!r} has ended ({outcome}) before its first step")

    def _check_shard(self, request: PullRequest) -> None:
        """Raises BadRequest for a part of a run: only servers on Kafka have parts."""
        if request.shard or request.shards:
            raise BadRequest("shards are parts of a run on Kafka; this gateway has whole runs: pull by rank instead")

    def _making(self, request: PullRequest) -> tuple[Callable[[StoredFrame], bytes], MadeSteps]:
        """Returns what makes steps for a page, and where they are kept: nowhere with values, which few ask for."""
        made = partial(
            step_of,
            rules=self._rules,
            latency_budget_ms=self._latency_budget_ms,
            with_values=request.with_values,
        )
        return made, MadeSteps(0) if request.with_values else self._made

    async def _page(self, request: PullRequest, bounds: Bounds) -> PulledPage:
        made = self._making(request)
        found = await page(self._store, request, *made, self._clock_ns, bounds)
        self.counts["pulled_steps"] += found.steps
        self.counts["gap_steps"] += found.gap if request.cursor else 0
        return found

    async def packets(self, run_id: str, cursor: str, most: int) -> Page:
        """Returns the steps after a cursor, for a reader in this process; does not wait.

        Raises:
            UnknownRun, StaleCursor: the run or the cursor cannot be used.
        """
        made = partial(packets_of, rules=self._rules, latency_budget_ms=self._latency_budget_ms)
        found = await packets_after(self._store, run_id, cursor, most, made, self._clock_ns)
        self.counts["pulled_steps"] += len(found)
        self.counts["gap_steps"] += found.gap if cursor else 0
        return found

    def entries(self, run_id: str, cursor: str, most: int, rank: int | None = None) -> StoredPage:
        """Returns the stored entries after a cursor: of all ranks, or of one.

        Raises:
            UnknownRun, StaleCursor: the run or the cursor cannot be used.
        """
        return self._store.after(run_id, cursor, rank, most)

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank; 0 if there is none."""
        return self._store.last_number(run_id, rank)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The risk rules."""
        return self._rules

    async def ranks(self, request: RanksRequest, grant: Grant | None = None) -> RanksResponse:
        """Compares a run's ranks.

        Raises:
            BadRequest, NotAllowed, UnknownRun: there is nothing to show.
        """
        check_puller(request.run_id, grant)
        view = await at_half_speed(self._ranks.viewing(request.run_id, request.steps))
        if view is None:
            raise UnknownRun(f"no newest steps of run {request.run_id!r} are here")
        return view

    def recent_steps(self, run_id: str) -> RecentSteps | None:
        """Returns the newest steps of a run's ranks; None if none of them is known."""
        return self._ranks.recent(run_id)

    async def hours(self, request: HoursRequest, grant: Grant | None = None) -> HoursResponse:
        """Says where the hours of a run went.

        Raises:
            BadRequest, NotAllowed, UnknownRun: there is nothing to show.
        """
        check_puller(request.run_id, grant)
        hours, accounts = await at_half_speed(self._accounting(request.run_id))
        return await at_half_speed(hours_message(hours, accounts if request.with_accounts else NO_ACCOUNTS))

    async def run_hours(self, run_id: str) -> RunHours:
        """Does the same, as plain values.

        Raises:
            UnknownRun: nothing of the run is here.
        """
        return (await at_half_speed(self._accounting(run_id)))[0]

    @abstractmethod
    def _accounting(self, run_id: str) -> Generator[None, None, tuple[RunHours, dict[AttemptRank, Account]]]:
        """Returns where the hours of a run went, and the accounts of its processes, in parts."""

    async def events(self, request: EventsRequest, grant: Grant | None = None, bounds: Bounds = FREE) -> EventsResponse:
        """Returns the events after a cursor; waits up to ``wait_s`` if there is none yet.

        Raises:
            BadRequest, NotAllowed, UnknownRun, StaleCursor: this request cannot be answered.
            StoreFull: they cannot be read at present.
        """
        check_puller(request.run_id, grant)
        if not 0 <= request.wait_s <= MOST_WAIT_S or request.max_events > _MOST_EVENTS:
            raise BadRequest(f"max_events must be at most {_MOST_EVENTS}, wait_s from 0 to {MOST_WAIT_S:g}")
        deadline_s = time.monotonic() + request.wait_s
        rank = request.rank if request.HasField("rank") else None
        while True:
            async with bounds.turn():
                found = self._events.after(request.run_id, request.cursor, rank, request.max_events or _USUAL_EVENTS)
                is_over = self._is_ending or time.monotonic() >= deadline_s
                if found is not None and (found.events or is_over):
                    return await at_half_speed(events_message(found))
            if is_over and self._store.holds(request.run_id):
                return EventsResponse(cursor=request.cursor)
            if is_over:
                raise UnknownRun(f"nothing of run {request.run_id!r} is here")
            await self._news(events_of(request.run_id), deadline_s)

    def newest_events(self, run_id: str, rank: int) -> list[StoredEvent]:
        """Returns the newest events of a rank, oldest first."""
        return self._events.newest(run_id, rank)

    def events_mark(self, run_id: str) -> str:
        """Returns a text that changes with each new event of a run; empty if it has none."""
        return self._events.mark(run_id)

    # -- state ------------------------------------------------------------------------------------------

    def note_fault(self, fault: Fault) -> None:
        """Counts a refused request; logs it if the refusal is final, without details on credentials."""
        is_final = fault.retry_s is None
        (self.refused if is_final else self.deferred)[fault.reason] += 1
        if is_final:
            detail = "" if fault.reason in CREDENTIALS else f": {fault.message}"
            self._warnings.say(f"refused {fault.reason}", "a request was refused for good, %s%s", fault.reason, detail)

    def gauges(self) -> Mapping[str, float]:
        """Returns the current values of the gateway's gauges."""
        runs = [run for run in self._states.runs(time.monotonic()) if not is_check(run.origin.run_id)]
        return {
            "runs": len({state.origin.run_id for state in runs}),
            "writers": len(runs),
            "missing_steps": sum(state.missing for state in runs),
            "unseen_steps": sum(state.unseen for state in runs),
            "too_late_steps": sum(state.too_late for state in runs),
            "stored_bytes": self._store.size,
            "dropped_steps": self._store.dropped,
            "waiting_pulls": sum(map(len, self._waiters.values())),
            "missing_events": self._events.missing(),
        }

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns, by name, how much of each limit is used, and the limit."""
        return {
            **self._store.use(),
            **self._events.use(),
            "made step bytes": (float(self._made.used), float(self._made.most)),
        }

    @property
    def refused_events(self) -> Mapping[str, int]:
        """Counts of events that were refused for good, by reason."""
        return self._events.refused

    @property
    def damaged(self) -> Mapping[str, int]:
        """Counts of damaged entries that were removed from the store, by kind."""
        return self._store.damaged

    def tenant(self, run_id: str) -> str:
        """Returns the tenant that owns a run."""
        return self._store.tenant(run_id)


def events_of(run_id: str) -> str:
    """Returns the name under which pullers wait for events of a run; no run has such a name."""
    return f"events\0{run_id}"
