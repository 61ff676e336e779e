"""The accounts of the runs at a gateway, kept up to date as steps and phases arrive."""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.frames.frame import GUESSED_STEP, Frame
from esper_otel.frames.numbers import finite
from esper_otel.gateway.hours.file import AttemptRank, HoursFile, ReceivedPhase, StoredAccounts
from esper_otel.gateway.items import Item, Origin, RunState
from esper_otel.gateway.limits import Limits, SharedPlaces
from esper_otel.gateway.receive.request import PhasePoint
from esper_otel.gateway.store.base import Store, StoreFull
from esper_otel.gateway.turns import finished
from esper_otel.hours.account import Account, PhaseTimes, StepTimes, moved
from esper_otel.hours.bar import Bar, PhaseInfo, RunHours, bar_of_run, making_bar
from esper_otel.log import Warnings

_NAMES = ("input_wait_ms", "step_latency_ms", "hook_latency_ms", "kasmina.finalize_ms")
_AT_ONCE, _MOST_SEEDS = 64, 1_000  # steps, and seeds of all of them
_MOST_RUNS, _MOST_IN_MEMORY = 1_000, 10_000  # runs, and processes of all of them together
_IDLE_S = 24 * 3600.0  # of phases without steps
_STORED_EVERY = 1_000  # steps
_FIELDS = {
    "esper.phase_ms": "total_ms",
    "esper.phase.inside_ms": "inside_ms",
    "esper.phase.length_ms": "length_ms",
    "esper.phase.own_ms": "own_ms",
    "esper.phase.number": "number",
    "esper.phase.step": "step",
}
_MOST_PHASES = 1_000  # that are shown
_LONGEST_MS = 1e12  # of a step that is said to have taken longer, the sums would be infinite
_SILENT_S = 120.0  # a time of phases is known to about a minute


class _RunAccounts:
    """The sums over the steps of one run.

    Attributes:
        cursor: how far they were read from the store of steps.
        is_current: whether they contain every step that is stored.
        accounts: the sums by process.
        since: how many steps were added since they were stored.
        changed: the processes whose sums have changed since.
    """

    def __init__(self, stored: StoredAccounts, has_room: Callable[[], bool]) -> None:
        self.cursor, self.accounts = stored
        self.is_current = False
        self.since = 0
        self.changed: dict[AttemptRank, None] = {}
        self._has_room = has_room

    def move(self, count: int) -> None:
        """Moves the cursor past steps that were added as they were stored."""
        life, rank, place = self.cursor.split(":")
        self.cursor = f"{life}:{rank}:{int(place) + count}"

    def add(self, item: Item) -> None:
        """Adds a released step; a correction of a step that was added, or a repeated one, is left out."""
        frame, writer = item.frame, AttemptRank(item.origin.rank, item.origin.attempt)
        account = self.accounts.get(writer)
        if account is None:
            if not self._has_room():
                return
            account = self.accounts[writer] = Account()
        last = account.last
        if last is None or frame.time_unix_ns > last.time_unix_ns:
            account.add_step(step_times(frame))
            self.changed[writer] = None
            self.since += 1


class Hours:
    """Where the hours of each run went. Threads: one at a time.

    The sums over steps are made from the store of steps, from where they were read last; they are stored themselves,
    so that they last longer than the steps, of which the store keeps only the newest.

    Args:
        store: the released steps.
        folder: where phases and sums are kept; None keeps them in memory.
        warnings: where faults are reported.
        limits: how much of both there may be.
    """

    def __init__(self, store: Store, folder: Path | None, warnings: Warnings, limits: Limits) -> None:
        self._store = store
        self._warnings = warnings
        self._file = HoursFile(folder, limits, warnings, store.age_s)
        self._runs: OrderedDict[str, _RunAccounts] = OrderedDict()
        self._changed: dict[str, None] = {}
        self._in_memory = 0
        self._places = SharedPlaces(limits.accounts)
        self._summed: dict[
            str, tuple[str, int]
        ] = {}  # of each run, whose share its processes use, and how many they are
        for run_id, count in self._file.account_counts().items():
            self._summed[run_id] = store.tenant(run_id), count
            self._places.restore(*self._summed[run_id])

    def taking(self, points: Sequence[PhasePoint], tenant: str) -> Generator[None, None, int]:
        """Stores the points of phases, in parts; returns for how many phases there was no room.

        Raises:
            StoreFull: not all were stored; the sender may send all of them again.
        """
        phases = yield from joining(points)
        return (yield from self._file.adding(phases, tenant))

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns how much of the room for phases and sums is used, and the limits."""
        both = {"phases": self._file.places, "summed ranks": self._places}
        return {name: (float(places.used), float(places.most)) for name, places in both.items()}

    @property
    def damaged(self) -> int:
        """How many damaged files were put aside."""
        return self._file.damaged

    def _has_room(self, run_id: str) -> bool:
        """Takes the room for the sums over one more process of a run."""
        tenant, count = self._summed.get(run_id) or (self._store.tenant(run_id), 0)
        if not self._places.take(tenant):
            message = "there is no room for the hours of all ranks and attempts of run %s: raise --limit accounts=..."
            self._warnings.say("accounts", message, run_id)
            return False
        self._summed[run_id] = tenant, count + 1
        self._in_memory += 1
        return True

    def note(self, items: Iterable[Item]) -> None:
        """Adds steps that have just been stored; those of a run that is not up to date are read later."""
        for run_id, some in groupby(items, attrgetter("origin.run_id")):
            steps, run = list(some), self._runs.get(run_id)
            self._changed[run_id] = None
            if run is None and _are_few(steps) and sum(self._store.counts(run_id).values()) == len(steps):
                finished(self._read(run_id))  # a new run
            elif run is not None and run.is_current:
                for item in steps:
                    run.add(item)
                run.move(len(steps))

    def reading(self, run_id: str) -> Generator[None, None, RunHours]:
        """Returns where the hours of a run went, in parts, between which further steps may be stored.

        Raises:
            UnknownRun: no step of the run is stored, and no phase.
        """
        return (yield from self.accounting(run_id))[0]

    def accounting(self, run_id: str) -> Generator[None, None, tuple[RunHours, dict[AttemptRank, Account]]]:
        """Does the same, and returns the accounts of its processes, too."""
        accounts = yield from self._read(run_id)
        phases = yield from self._file.phases(run_id)
        if not accounts and not phases:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        known = {}
        for writer, account in list(accounts.items()):
            known[writer] = account.copied()
            yield
        return (yield from summing(known, phases)), known

    def _read(self, run_id: str) -> Generator[None, None, dict[AttemptRank, Account]]:
        """Adds the steps that were stored since the last call."""
        run = self._runs.get(run_id) or (yield from self._begin(run_id))
        if run_id in self._runs:
            self._runs.move_to_end(run_id)
        self._changed.pop(run_id, None)
        while True:
            try:
                page = self._store.after(run_id, run.cursor, None, _AT_ONCE)
            except UnknownRun:
                run.is_current = False
                if not run.accounts and self._runs.get(run_id) is run:  # phases at most, which may come first
                    del self._runs[run_id]
                break
            except StaleCursor:
                run.cursor, run.is_current = "", False
                continue
            run.cursor = page.cursor
            for entry in page.entries:
                run.add(entry.item)
            run.is_current = not page.entries
            yield
            if run.is_current:
                break
        return run.accounts

    def runs_with_phases(self) -> set[str]:
        """Returns the runs of which phases are stored."""
        return self._file.runs_with_phases()

    def states(self, run_id: str, now_s: float) -> list[RunState]:
        """Returns the state of each process that has phases, as far as these tell it: nothing of its steps."""
        silent_s, processes = self._file.processes(run_id)
        return [
            RunState(
                Origin(run_id, process.attempt, process.rank),
                *(1, "", None, None, 0, int((now_s - silent_s) * 1e9)),
                is_silent=silent_s > _SILENT_S,
            )
            for process in processes
        ]

    def _begin(self, run_id: str) -> Generator[None, None, _RunAccounts]:
        """Reads the sums of a run that were stored last; those of other runs make room in memory."""
        stored = (yield from self._file.accounts(run_id)) or StoredAccounts("", {})
        run = self._runs.get(run_id)
        if run is None:  # nobody else has read it meanwhile
            run = self._runs[run_id] = _RunAccounts(stored, lambda: self._has_room(run_id))
            self._in_memory += len(stored.accounts)
        for other_id in list(self._runs) if self._are_too_many() else ():
            other = self._runs.get(other_id)
            if other is None or other is run:
                continue
            if other.since:
                yield from self._putting(other_id, other)
            if not other.since and self._runs.get(other_id) is other:  # nothing came meanwhile, and it could be stored
                self._runs.pop(other_id)
                self._in_memory -= len(other.accounts)
            if not self._are_too_many():
                break
        return run

    def _are_too_many(self) -> bool:
        return len(self._runs) > _MOST_RUNS or self._in_memory > _MOST_IN_MEMORY

    def tidying(self) -> Generator[None, None, None]:
        """Brings the sums of the runs that have changed up to date and stores them; forgets runs that are gone."""
        for run_id in list(self._changed):
            self._changed.pop(run_id, None)
            yield from self._read(run_id)
            run = self._runs.get(run_id)
            if run is not None and run.since >= _STORED_EVERY:
                yield from self._putting(run_id, run)
            yield
        # Of a run without steps, phases may come first.
        gone = [run_id for run_id in {*self._summed, *self._runs} if not self._store.holds(run_id)]
        for run_id in [*gone, *self._file.abandoned(self._store.holds, _IDLE_S)]:
            yield
            if self._store.holds(run_id):
                continue
            run = self._runs.pop(run_id, None)
            self._in_memory -= 0 if run is None else len(run.accounts)
            try:
                yield from self._file.forget(run_id)
            except StoreFull as error:
                self._warnings.say("hours", "%s", error)
                continue
            if run_id in self._summed:
                self._places.give_back(*self._summed.pop(run_id))

    def _putting(self, run_id: str, run: _RunAccounts) -> Generator[None, None, None]:
        """Stores the sums that have changed: as they are now, although further steps may be added in between."""
        cursor, run.since = run.cursor, 0
        changed, run.changed = {writer: run.accounts[writer].copied() for writer in run.changed}, {}
        yield
        texts = []
        for writer, account in changed.items():
            texts.append((writer, json.dumps(account.as_json(), separators=(",", ":"))))
            yield
        try:
            self._file.put_accounts(run_id, cursor, texts)
        except StoreFull as error:
            run.since += len(changed)
            run.changed |= dict.fromkeys(changed)
            self._warnings.say("hours", "%s", error)

    def close(self) -> None:
        """Stores the sums and closes the file."""
        for run_id, run in self._runs.items():
            if run.since:
                finished(self._putting(run_id, run))
        self._file.close()


def _are_few(steps: Sequence[Item]) -> bool:
    """Whether reading these steps again takes a short time."""
    return len(steps) <= _AT_ONCE and sum(len(item.frame.live.ids) for item in steps) <= _MOST_SEEDS


def summing(
    known: dict[AttemptRank, Account], phases: Sequence[tuple[AttemptRank, PhaseTimes]]
) -> Generator[None, None, RunHours]:
    """Makes the bars of a run, in parts.

    Args:
        known: the sums over steps; the phases are added to them.
        phases: the phases of the run.
    """
    for count, (writer, phase) in enumerate(phases):
        known.setdefault(writer, Account()).add_phase(phase)
        if count % _AT_ONCE == 0:
            yield
    ranks: dict[int, Bar] = {}
    for rank, writers in groupby(sorted(known), key=lambda writer: writer.rank):
        ranks[rank] = yield from making_bar([known[writer] for writer in writers])
        yield
    return RunHours(bar_of_run(ranks.values()), ranks, (yield from _newest(phases)))


def _newest(phases: Sequence[tuple[AttemptRank, PhaseTimes]]) -> Generator[None, None, list[PhaseInfo]]:
    """Returns the newest phases of which everything is known, in parts."""
    found: list[PhaseInfo] = []
    for start in range(0, len(phases), _MOST_PHASES):
        found += [
            PhaseInfo(
                phase.name,
                writer.rank,
                writer.attempt,
                moved(phase.end_unix_ns, -phase.length_ms),
                phase.end_unix_ns,
                phase.own_ms or 0.0,
                phase.number or 0,
                phase.step,
            )
            for writer, phase in phases[start : start + _MOST_PHASES]
            if phase.length_ms is not None
        ]
        found = heapq.nlargest(_MOST_PHASES, found, key=attrgetter("end_unix_ns"))
        yield
    return found[::-1]


def received_phases(points: Iterable[PhasePoint]) -> list[ReceivedPhase]:
    """Joins the points of each phase; values that no phase can have are left out."""
    return finished(joining(points))


def joining(points: Iterable[PhasePoint]) -> Generator[None, None, list[ReceivedPhase]]:
    """Does the same, in parts."""
    joined: dict[tuple[str, AttemptRank, str, int], dict[str, float]] = {}
    for count, point in enumerate(points):
        if count % _AT_ONCE == 0:
            yield
        name = _FIELDS.get(point.metric)
        if name is not None and 0.0 <= point.value < 2**53:
            run = point.sender.run
            key = run.run_id, AttemptRank(run.rank, run.attempt), point.phase, point.time_unix_ns
            joined.setdefault(key, {})[name] = point.value
    found = []
    for count, ((run_id, writer, name, ended), numbers) in enumerate(joined.items()):
        if count % _AT_ONCE == 0:
            yield
        found.append(ReceivedPhase(run_id, writer, _phase(name, ended, numbers)))
    return found


def _phase(name: str, end_unix_ns: int, numbers: Mapping[str, float]) -> PhaseTimes:
    number, step = (None if numbers.get(each) is None else int(numbers[each]) for each in ("number", "step"))
    total_ms, inside_ms, length_ms, own_ms = map(numbers.get, ("total_ms", "inside_ms", "length_ms", "own_ms"))
    return PhaseTimes(name, end_unix_ns, total_ms, inside_ms, length_ms, own_ms, number, step)


def step_times(frame: Frame) -> StepTimes:
    """Returns the durations of a step; a missing or senseless one is 0, and an unknown latency None."""
    numbers = frame.numbers
    found = [None if place is None else finite(numbers[place]) for place in _places(frame.names)]
    waited_ms, latency_ms, hook_ms, finalize_ms = (
        None if each is None else min(max(each, 0.0), _LONGEST_MS) for each in found
    )
    step = frame.global_step if frame.global_step < GUESSED_STEP else frame.sequence
    return StepTimes(step, frame.time_unix_ns, waited_ms or 0.0, latency_ms, (hook_ms or 0.0) + (finalize_ms or 0.0))


@lru_cache(maxsize=64)
def _places(names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Returns where the durations are among a frame's values; None for those that it does not have."""
    return tuple(names.index(name) if name in names else None for name in _NAMES)
