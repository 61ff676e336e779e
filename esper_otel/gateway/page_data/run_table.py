"""Run table: a row for each run, made again when the run has changed."""

from __future__ import annotations

import json
import math
import secrets
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.frames.frame import FINE, GUESSED_STEP
from esper_otel.gateway.changes import ChangedRuns
from esper_otel.gateway.items import Origin, RunState, RunStatus
from esper_otel.gateway.store.base import StoredPage
from esper_otel.schema import is_check

LIVE, SILENT, WAITING, NO_STEPS = "live", "silent", "waiting", "no steps"
COMPLETED, ENDED, FAILED, KILLED = "completed", "ended", "failed", "killed"

_SIGNALS = {each.name for each in signal.Signals}
# How often all runs are compared with those that are known, since a run that falls silent or is dropped says nothing.
_ALL_EVERY_S = 5.0
# A writer that has sent nothing for so long is silent, even if the gateway has not run for as long. One that has sent
# something, but no step, lives: it may evaluate or write a checkpoint.
_SILENT_NS = 60 * 10**9
_MOST_ROWS = 1_000
_MOST_ATTEMPTS, _MOST_RANKS = 50, 1_024


class RunSource(Protocol):
    """Where runs are known; see ``core``."""

    changed: ChangedRuns

    def shown_runs(self) -> set[str]:
        """Returns the ids of all runs, also of those without steps."""

    def shown_state(self, run_id: str) -> RunStatus:
        """Returns what is known of a run."""

    def entries(self, run_id: str, cursor: str, most: int, rank: int | None = None) -> StoredPage:
        """Returns the stored entries after a cursor."""

    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank."""


class _TableRow(NamedTuple):
    """A row as text, the version in which it changed, and its state."""

    text: str
    version: int
    state: str


class RunTable:
    """The rows of all runs. Use it only from the event loop.

    Args:
        runs: where they are known.
        clock_ns: returns the time in Unix nanoseconds.
    """

    def __init__(self, runs: RunSource, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._runs = runs
        self._clock_ns = clock_ns
        self._life = secrets.token_hex(4)
        self._version = 0
        self._rows: OrderedDict[str, _TableRow] = OrderedDict()  # the longest unchanged first
        self._gone: OrderedDict[str, int] = OrderedDict()
        self._forgot = 0  # the newest version of which it is not known any more which runs went
        self._compared_s = -math.inf
        self._found: dict[Origin, RunState] = {}

    def refreshing(self) -> Generator[None, None, None]:
        """Makes the rows of runs that have changed again, in parts."""
        changed = self._runs.changed.taken()
        now_s = time.monotonic()
        if changed is None or now_s - self._compared_s > _ALL_EVERY_S:
            known = self._runs.shown_runs()
            self._compared_s = now_s
            for run_id in [run_id for run_id in self._rows if run_id not in known]:
                self._drop(run_id)
            is_new = {run_id for run_id in known if run_id not in self._rows}
            may_be_silent = {run_id for run_id, row in self._rows.items() if row.state in {LIVE, WAITING, NO_STEPS}}
            changed = known if changed is None else {*changed, *is_new, *may_be_silent} & known
        for run_id in sorted(changed):
            self._make(run_id)
            yield

    def answer(self, since: str) -> Generator[None, None, str]:
        """Returns the rows that have changed since a cursor, as JSON."""
        life, _, number = since.partition(":")
        is_known = life == self._life and number.isdecimal() and len(number) < 19 and int(number) >= self._forgot
        after = int(number) if is_known else -1
        texts: list[str] = []
        some: list[str] = []
        newest, has_more = self._version, False
        for run_id in reversed(self._rows):
            if self._rows[run_id].version <= after:
                break
            some.append(run_id)
        yield
        for run_id in reversed(some):
            row = self._rows[run_id]
            if len(texts) >= _MOST_ROWS and row.version > newest:
                has_more = True
                break
            texts.append(row.text)
            newest = row.version if len(texts) >= _MOST_ROWS else newest
            if not len(texts) % 64:
                yield
        if len(texts) < _MOST_ROWS:
            newest = self._version
        gone = [run_id for run_id, version in self._gone.items() if is_known and after < version <= newest]
        head = {
            "cursor": f"{self._life}:{newest}",
            "is_all": not is_known,
            "now_ms": time.time_ns() // 10**6,
            "gone": gone,
            "more": has_more,
        }
        return f'{json.dumps(head)[:-1]}, "runs": [{", ".join(texts)}]}}'

    def _make(self, run_id: str) -> None:
        """Makes a run's row, if it is known and not from a check."""
        if is_check(run_id):  # what has changed may be a check's
            return
        known = self._runs.shown_state(run_id)
        if not known.states:
            return
        row = self._row(run_id, known)
        text = json.dumps(row, allow_nan=False)
        before = self._rows.get(run_id)
        if before is not None and before.text == text:
            return
        self._version += 1
        self._rows[run_id] = _TableRow(text, self._version, row["state"])
        self._rows.move_to_end(run_id)
        self._gone.pop(run_id, None)

    def _drop(self, run_id: str) -> None:
        self._version += 1
        del self._rows[run_id]
        self._gone[run_id] = self._version
        while len(self._gone) > _MOST_ROWS:
            self._forgot = self._gone.popitem(last=False)[1]
        for origin in [origin for origin in self._found if origin.run_id == run_id]:
            del self._found[origin]

    def _row(self, run_id: str, known: RunStatus) -> dict[str, Any]:
        now_ns = self._clock_ns()
        states = [_as_of(now_ns, self._complete(state)) for state in known.states]
        ranks = _newest_of_ranks(states)
        steps = [state.last_step for state in ranks if state.last_step is not None]
        attempts = _attempts(states, known.outcome, now_ns)
        return {
            "run_id": run_id,
            "state": _run_state(states, known.outcome, now_ns),
            "outcome": known.outcome,
            "experiment": _said(state.experiment for state in ranks),
            "host": _said(state.host for state in ranks),
            "device": _said(state.device for state in ranks),
            "revision": _said(state.revision for state in ranks),
            "settings": _said(state.settings for state in ranks),
            "start_ms": _ms(min((state.first_time_unix_ns for state in states if state.first_time_unix_ns), default=0)),
            "last_ms": _ms(max(state.last_time_unix_ns for state in states)),
            "received_ms": _ms(max(state.last_received_unix_ns for state in states)),
            "first_step": min((state.first_step for state in states if state.first_step is not None), default=None),
            "last_step": max(steps, default=None),
            **_value("last_loss", ranks),
            **_value("validation_loss", ranks),
            "steps_stored": known.stored,
            "world_size": max(state.world_size for state in states),
            "missing": sum(state.missing for state in states),
            "incomplete": sum(state.incomplete for state in states),
            "attempts": attempts[-_MOST_ATTEMPTS:],
            "attempt_count": len(attempts),
            "ranks": [
                {
                    "rank": state.origin.rank,
                    "state": state_of(state.ended) if state.ended else _unended(state, now_ns),
                    "outcome": state.ended,
                    "attempt": state.origin.attempt,
                    "last_step": state.last_step,
                    "last_ms": _ms(state.last_time_unix_ns),
                    "missing": state.missing,
                    "unseen": state.unseen,
                    "incomplete": state.incomplete,
                    "host": state.host,
                    "device": state.device,
                    "location": state.location,
                }
                for state in ranks[:_MOST_RANKS]
            ],
            "rank_count": len(ranks),
        }

    def _complete(self, state: RunState) -> RunState:
        """Returns the state with what the store says, if the writer was forgotten after a long silence."""
        if state.last_time_unix_ns or not state.is_silent:
            self._found.pop(state.origin, None)
            return state
        if state.origin not in self._found:
            self._found[state.origin] = self._read(state)
        return self._found[state.origin]

    def _read(self, state: RunState) -> RunState:
        run_id, _, rank, _ = state.origin
        try:
            oldest = self._runs.entries(run_id, "", 1, rank)
            life, last = oldest.cursor.rpartition(":")[0], self._runs.last_number(run_id, rank)
            newest = self._runs.entries(run_id, f"{life}:{max(last - 1, 0)}", 1, rank)
        except (UnknownRun, StaleCursor):
            return state
        found = [entry.item for entry in (*oldest.entries, *newest.entries) if entry.item.origin == state.origin]
        if not found:
            return state
        first, item = found[0], found[-1]
        step = item.frame.global_step
        return RunState(
            state.origin,
            item.frame.run.world_size,
            item.frame.run.experiment,
            first.frame.global_step if first.frame.global_step < GUESSED_STEP else None,
            step if step < GUESSED_STEP else None,
            item.frame.time_unix_ns,
            item.received_unix_ns,
            ended=state.ended,
            resumed=state.resumed,
            first_time_unix_ns=first.frame.time_unix_ns,
            is_silent=True,
            last_loss=item.frame.values().get("loss"),
        )


def _newest_of_ranks(states: Iterable[RunState]) -> list[RunState]:
    """Returns the newest state of each rank; of two writers of one attempt, that of the one with the newest step."""
    newest: dict[int, RunState] = {}
    for state in sorted(states, key=lambda state: (state.origin.attempt, state.last_time_unix_ns)):
        newest[state.origin.rank] = state
    return [newest[rank] for rank in sorted(newest)]


def _as_of(now_ns: int, state: RunState) -> RunState:
    """Returns the state; silent if nothing has arrived for long, although the gateway has not run for as long.

    What a process without steps sends besides is rare: when it is silent is in its state.
    """
    is_old = state.last_time_unix_ns and 0 < state.last_received_unix_ns < now_ns - _SILENT_NS
    return replace(state, is_silent=True) if is_old and not state.is_silent else state


def state_of(outcome: str) -> str:
    """Returns the state of what has ended with an outcome."""
    if outcome == "completed":
        return COMPLETED
    if outcome in FINE:  # nothing went wrong as far as is known
        return ENDED
    return KILLED if outcome in _SIGNALS or outcome == "lost" else FAILED


def _unended(state: RunState, now_ns: int) -> str:
    if state.is_silent:
        return SILENT
    if not state.last_time_unix_ns:
        return WAITING
    return NO_STEPS if state.is_without_steps(now_ns, _SILENT_NS) else LIVE


def _run_state(states: Sequence[RunState], outcome: str | None, now_ns: int) -> str:
    if outcome is not None:
        return state_of(outcome)
    unended = {_unended(state, now_ns) for state in states if state.ended is None}
    return next((each for each in (LIVE, WAITING, NO_STEPS, SILENT) if each in unended), LIVE)


def _attempts(states: Sequence[RunState], outcome: str | None, now_ns: int) -> list[dict[str, Any]]:
    """Returns the attempts of a run, oldest first.

    One without an end that was followed by another was killed, unless it still goes on next to that one, because the
    ranks did not agree on an attempt number.
    """
    by_attempt = sorted(states, key=attrgetter("origin.attempt"))
    newest = [state for state in states if state.origin.attempt == by_attempt[-1].origin.attempt]
    begun_ns = max(state.first_time_unix_ns for state in newest)
    found: list[dict[str, Any]] = []
    for attempt, some in groupby(by_attempt, key=attrgetter("origin.attempt")):
        of_attempt = list(some)
        said = [state.ended for state in of_attempt if state.ended is not None]
        worst = next((each for each in said if each != "completed"), said[0] if said else None)
        goes_on = [state for state in of_attempt if state.ended is None]
        if attempt == newest[0].origin.attempt:
            state = _run_state(of_attempt, outcome, now_ns)
        elif any(not each.is_silent and each.last_time_unix_ns >= max(begun_ns, 1) for each in goes_on):
            state = LIVE
        else:
            state = KILLED if goes_on or worst is None else state_of(worst)
        steps = [each.last_step for each in of_attempt if each.last_step is not None]
        begins = [each.first_time_unix_ns for each in of_attempt if each.first_time_unix_ns]
        found.append(
            {
                "attempt": attempt,
                "number": len(found) + 1,
                "state": state,
                "outcome": worst,
                "start_ms": _ms(min(begins, default=0)),
                "last_ms": _ms(max(each.last_time_unix_ns for each in of_attempt)),
                "first_step": min(
                    (each.first_step for each in of_attempt if each.first_step is not None), default=None
                ),
                "last_step": max(steps, default=None),
                "resumed": any(each.resumed for each in of_attempt),
            }
        )
    return found


def _value(name: str, ranks: Iterable[RunState]) -> dict[str, Any]:
    """Returns a value of the first rank that has it, and its kind if it is not finite."""
    value = next((found for state in ranks if (found := getattr(state, name)) is not None), None)
    return {name: _number(value), f"{name}_is": _odd(value)}


def _said(texts: Any) -> str:
    return next(filter(None, texts), "")


def _ms(time_unix_ns: int) -> int | None:
    return time_unix_ns // 10**6 or None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _odd(value: float | None) -> str:
    """Returns the kind of a loss that is not finite."""
    if value is None or math.isfinite(value):
        return ""
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
