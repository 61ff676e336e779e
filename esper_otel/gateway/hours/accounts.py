"""The accounts of the runs at a gateway, kept up to date as steps and phases arrive."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.frames.frame import GUESSED_STEP, Frame
from esper_otel.frames.numbers import finite
from esper_otel.gateway.hours.file import AttemptRank, HoursFile, ReceivedPhase, StoredAccounts
from esper_otel.gateway.items import Item, Origin, RunState
from esper_otel.gateway.receive.request import PhasePoint
from esper_otel.gateway.store.base import Store, StoreFull
from esper_otel.gateway.turns import finished
from esper_otel.hours.account import Account, PhaseTimes, StepTimes
from esper_otel.hours.bar import Bar, PhaseInfo, RunHours, bar_of_rank, bar_of_run
from esper_otel.log import Warnings

_NAMES = ("input_wait_ms", "step_latency_ms", "hook_latency_ms", "kasmina.finalize_ms")
_AT_ONCE = 64
_MOST_RUNS = 1_000
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
_SILENT_S = 60.0
_MS = 1_000_000


class _RunAccounts:
    """The sums over the steps of one run.

    Attributes:
        cursor: how far they were read from the store of steps.
        is_current: whether they contain every step that is stored.
        accounts: the sums by process.
        since: how many steps were added since they were stored.
    """

    def __init__(self, stored: StoredAccounts) -> None:
        self.cursor, self.accounts = stored
        self.is_current = False
        self.since = 0

    def move(self, count: int) -> None:
        """Moves the cursor past steps that were added as they were stored."""
        life, rank, place = self.cursor.split(":")
        self.cursor = f"{life}:{rank}:{int(place) + count}"

    def add(self, item: Item) -> None:
        """Adds a released step; a correction of a step that was added, or a repeated one, is left out."""
        origin, frame = item.origin, item.frame
        account = self.accounts.setdefault(AttemptRank(origin.rank, origin.attempt), Account())
        last = account.last
        if last is None or frame.time_unix_ns > last.time_unix_ns:
            account.add_step(step_times(frame))
            self.since += 1


class Hours:
    """Where the hours of each run went. Threads: one at a time.

    The sums over steps are made from the store of steps, from where they were read last; they are stored themselves,
    so that they last longer than the steps, of which the store keeps only the newest.

    Args:
        store: the released steps.
        folder: where phases and sums are kept; None keeps them in memory.
        warnings: where faults are reported.
    """

    def __init__(self, store: Store, folder: Path | None, warnings: Warnings) -> None:
        self._store = store
        self._warnings = warnings
        self._file = HoursFile(folder, warnings)
        self._runs: OrderedDict[str, _RunAccounts] = OrderedDict()
        self._changed: dict[str, None] = {}

    def take(self, points: Iterable[PhasePoint]) -> None:
        """Stores the points of phases.

        Raises:
            StoreFull: nothing was stored; the sender may retry.
        """
        self._file.add(received_phases(points))

    def note(self, items: Iterable[Item]) -> None:
        """Adds steps that have just been stored; those of a run that is not up to date are read later."""
        for run_id, some in groupby(items, attrgetter("origin.run_id")):
            steps, run = list(some), self._runs.get(run_id)
            self._changed[run_id] = None
            if run is None and len(steps) <= _AT_ONCE and sum(self._store.counts(run_id).values()) == len(steps):
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
        phases = self._file.phases(run_id)
        yield
        if not accounts and not phases:
            raise UnknownRun(f"no step of run {run_id!r} is here")
        known = {writer: account.copied() for writer, account in accounts.items()}
        return (yield from summing(known, phases)), known

    def _read(self, run_id: str) -> Generator[None, None, dict[AttemptRank, Account]]:
        """Adds the steps that were stored since the last call."""
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = _RunAccounts(self._file.accounts(run_id) or StoredAccounts("", {}))
            while len(self._runs) > _MOST_RUNS:
                self._put(*self._runs.popitem(last=False))
        self._runs.move_to_end(run_id)
        self._changed.pop(run_id, None)
        while True:
            try:
                page = self._store.after(run_id, run.cursor, None, _AT_ONCE)
            except UnknownRun:
                run.is_current = False
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
        newest: dict[AttemptRank, int] = {}
        for process, phase in self._file.phases(run_id):
            newest[process] = max(phase.end_unix_ns, newest.get(process, 0))
        return [
            RunState(
                Origin(run_id, process.attempt, process.rank),
                *(1, "", None, None, 0, ended_ns),
                is_silent=now_s - ended_ns / 1e9 > _SILENT_S,
            )
            for process, ended_ns in newest.items()
        ]

    def tidying(self) -> Generator[None, None, None]:
        """Brings the sums of the runs that have changed up to date and stores them; forgets runs that are gone."""
        for run_id in list(self._changed):
            self._changed.pop(run_id, None)
            yield from self._read(run_id)
            run = self._runs.get(run_id)
            if run is not None and run.since >= _STORED_EVERY:
                self._put(run_id, run)
            yield
        stored = set(self._store.run_ids())
        gone = [run_id for run_id in {*self._file.run_ids(), *self._runs} - stored if self._is_gone(run_id)]
        for run_id in gone:
            self._runs.pop(run_id, None)
        if gone:
            try:
                self._file.forget(gone)
            except StoreFull as error:
                self._warnings.say("hours", "%s", error)

    def _is_gone(self, run_id: str) -> bool:
        """Whether steps of the run were stored once; of a run without any, phases may come first."""
        return run_id in self._runs or self._file.accounts(run_id) is not None

    def _put(self, run_id: str, run: _RunAccounts) -> None:
        try:
            self._file.put_accounts(run_id, StoredAccounts(run.cursor, run.accounts))
            run.since = 0
        except StoreFull as error:
            self._warnings.say("hours", "%s", error)

    def close(self) -> None:
        """Stores the sums and closes the file."""
        for run_id, run in self._runs.items():
            if run.since:
                self._put(run_id, run)
        self._file.close()


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
        ranks[rank] = bar_of_rank([known[writer] for writer in writers])
        yield
    return RunHours(bar_of_run(ranks.values()), ranks, _infos(phases))


def _infos(phases: Iterable[tuple[AttemptRank, PhaseTimes]]) -> list[PhaseInfo]:
    """Returns the newest phases of which everything is known."""
    found = [
        PhaseInfo(
            phase.name,
            writer.rank,
            writer.attempt,
            phase.end_unix_ns - round(phase.length_ms * _MS),
            phase.end_unix_ns,
            phase.own_ms or 0.0,
            phase.number or 0,
            phase.step,
        )
        for writer, phase in phases
        if phase.length_ms is not None
    ]
    return sorted(found, key=attrgetter("end_unix_ns"))[-_MOST_PHASES:]


def received_phases(points: Iterable[PhasePoint]) -> list[ReceivedPhase]:
    """Joins the points of each phase; values that no phase can have are left out."""
    joined: dict[tuple[str, AttemptRank, str, int], dict[str, float]] = {}
    for point in points:
        name = _FIELDS.get(point.metric)
        if name is not None and 0.0 <= point.value < 2**53:
            run = point.sender.run
            key = run.run_id, AttemptRank(run.rank, run.attempt), point.phase, point.time_unix_ns
            joined.setdefault(key, {})[name] = point.value
    return [
        ReceivedPhase(run_id, writer, _phase(name, ended, numbers))
        for (run_id, writer, name, ended), numbers in joined.items()
    ]


def _phase(name: str, end_unix_ns: int, numbers: Mapping[str, float]) -> PhaseTimes:
    number, step = (None if numbers.get(each) is None else int(numbers[each]) for each in ("number", "step"))
    total_ms, inside_ms, length_ms, own_ms = map(numbers.get, ("total_ms", "inside_ms", "length_ms", "own_ms"))
    return PhaseTimes(name, end_unix_ns, total_ms, inside_ms, length_ms, own_ms, number, step)


def step_times(frame: Frame) -> StepTimes:
    """Returns the durations of a step; a missing or senseless one is 0, and an unknown latency None."""
    numbers = frame.numbers
    found = [None if place is None else finite(numbers[place]) for place in _places(frame.names)]
    waited_ms, latency_ms, hook_ms, finalize_ms = (None if each is None else max(each, 0.0) for each in found)
    step = frame.global_step if frame.global_step < GUESSED_STEP else frame.sequence
    return StepTimes(step, frame.time_unix_ns, waited_ms or 0.0, latency_ms, (hook_ms or 0.0) + (finalize_ms or 0.0))


@lru_cache(maxsize=64)
def _places(names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Returns where the durations are among a frame's values; None for those that it does not have."""
    return tuple(names.index(name) if name in names else None for name in _NAMES)
