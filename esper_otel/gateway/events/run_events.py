"""Events: takes the events of runs from requests, and gives them to pullers and the live page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path

from esper_otel.gateway.events.event_file import EventFile, EventfulProcess, StoredEvent, StoredEventPage
from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.log_records import EventRecord
from esper_otel.gateway.store.base import StoreFull
from esper_otel.log import Warnings
from esper_otel.pull.messages import Event, EventsResponse

_AT_ONCE = 100  # stored in one transaction
_MOST_SHOWN = 500  # on the page
_IDLE_S = 24 * 3600.0
# A process says nothing between its start and its first step. After so long without an event, it may be dead.
_LONG_START_S = 1_800.0
_FORGOTTEN_AT_ONCE = 10_000  # deleting more would block the event loop for too long


class RunEvents:
    """The events of runs. Threads: one at a time.

    Args:
        folder: where they are kept; None keeps them in memory.
        limits: how many there may be.
        counts: where events, repeated ones and ignored log records are counted.
        warnings: where faults are reported.
        age_s: see ``Store.age_s``.
        life: see ``EventFile``.

    Attributes:
        refused: events that were refused for good, by reason.
    """

    def __init__(
        self,
        folder: Path | None,
        limits: Limits,
        counts: Counter[str],
        warnings: Warnings,
        age_s: Callable[[], float] = time.monotonic,
        life: str | None = None,
    ) -> None:
        self._counts = counts
        self._warnings = warnings
        self._file = EventFile(folder, limits, warnings, age_s, life)
        self._gone: dict[str, None] = {}
        self.refused: Counter[str] = Counter()

    def taking(self, events: Sequence[EventRecord], tenant: str, first: int = 1) -> Generator[None, None, Counter[str]]:
        """Stores events, in parts, at positions not below ``first``; returns how many were refused, by reason.

        If it ends early, the sender may send all of them again: those that were stored are then left out.

        Raises:
            StoreFull: not all of them were stored.
        """
        refused: Counter[str] = Counter()
        for start in range(0, len(events), _AT_ONCE):
            some = events[start : start + _AT_ONCE]
            added, why = self._file.add(some, tenant, first)
            refused += why
            self._counts["events"] += added
            self._counts["repeated_events"] += len(some) - added - why.total()
            yield
        return refused

    def make_room(self, events: Sequence[EventRecord], is_known: Callable[[str], bool]) -> None:
        """Forgets the oldest runs if there is no room for these events, which their sender cannot send again.

        Raises:
            StoreFull: none was forgotten.
        """
        gone = self._file.make_room(Counter(event.sender.run.run_id for event in events), is_known)
        if gone:
            message = "there is no room for the events of all runs: those of run %s and %d others were dropped"
            self._warnings.say("no room", message, gone[0], len(gone) - 1)

    def note(self, refused: Mapping[str, int], ignored: int) -> str:
        """Counts what was not taken of a request; returns the refused events in words, empty if there are none."""
        self._counts["ignored_log_records"] += ignored
        self.refused.update(refused)
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
        if said:
            self._warnings.say("refused events", "events were refused: %s", said)
        return said

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredEventPage | None:
        """Returns the events after a cursor, of a rank or of all; None if nothing of the run is stored.

        Raises:
            StaleCursor: the cursor cannot be used.
            StoreFull: they cannot be read at present.
        """
        return self._file.after(run_id, cursor, rank, most)

    def newest(self, run_id: str, rank: int) -> list[StoredEvent]:
        """Returns the newest events of a rank, oldest first, for the page."""
        return self._file.newest(run_id, rank, _MOST_SHOWN)

    def mark(self, run_id: str) -> str:
        """Returns a text that changes with each new event of a run; empty if it has none."""
        return self._file.mark(run_id)

    def run_ids(self) -> set[str]:
        """Returns the runs that have events."""
        return self._file.run_ids()

    def states(self, run_id: str, now_s: float) -> list[RunState]:
        """Returns the state of each process that has sent events, as far as these tell it: nothing of its steps."""
        return [_state(run_id, process, now_s) for process in self._file.processes(run_id)]

    @property
    def damaged(self) -> int:
        """How many damaged files were put aside."""
        return self._file.damaged

    def missing(self) -> int:
        """Returns how many events have not arrived although later ones of their rank and attempt have."""
        return self._file.missing()

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns how much of the room for events is used, and the limit."""
        return {"events": (float(self._file.places.used), float(self._file.places.most))}

    def drop(self, gone: Iterable[str], is_known: Callable[[str], bool]) -> None:
        """Forgets runs whose steps were dropped, and those of which there are no steps and no new events for a day.

        If they have very many events, some are forgotten at the next call.

        Args:
            gone: runs whose steps were dropped.
            is_known: whether steps of a run are stored.
        """
        self._gone |= dict.fromkeys([*filter(self._file.count, gone), *self._file.abandoned(is_known, _IDLE_S)])
        some, count = [], 0
        for run_id in self._gone:
            some.append(run_id)
            count += 0 if is_known(run_id) else self._file.count(run_id)
            if count >= _FORGOTTEN_AT_ONCE:
                break
        try:
            self._file.forget(run_id for run_id in some if not is_known(run_id))
        except StoreFull as error:
            self._warnings.say("events", "%s", error)
            return
        for run_id in some:
            del self._gone[run_id]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _state(run_id: str, process: EventfulProcess, now_s: float) -> RunState:
    sender = process.sender
    return RunState(
        Origin(run_id, process.attempt, process.rank),
        1 if sender is None else sender.run.world_size,
        "" if sender is None else sender.run.experiment,
        None,
        None,
        0,
        int((now_s - process.silent_s) * 1e9),
        ended=process.ended,
        is_silent=process.silent_s > _LONG_START_S,
        host="" if sender is None else sender.host,
        revision="" if sender is None else sender.revision,
        settings="" if sender is None else sender.settings,
        location="" if sender is None else sender.location,
    )


def events_message(page: StoredEventPage) -> Generator[None, None, EventsResponse]:
    """Returns a page as the message for pullers, in parts: events may have very many attributes."""
    response = EventsResponse(cursor=page.cursor, gap=page.gap)
    for event in page.events:
        _fill(response.events.add(), event)
        yield
    return response


def _fill(message: Event, event: StoredEvent) -> None:
    message.name, message.text, message.severity = event.name, event.text, event.severity
    message.number, message.time_unix_ns = event.number, event.time_unix_ns
    message.attempt, message.rank, message.process = event.attempt, event.rank, event.process
    if event.step is not None:
        message.step = event.step
    if event.epoch is not None:
        message.epoch = event.epoch
    for name, value in event.attributes.items():
        added = message.attributes.add(name=name)
        if isinstance(value, bool):
            added.is_true = value
        elif isinstance(value, int):
            added.whole = value
        elif isinstance(value, float):
            added.number = value
        else:
            added.text = value
