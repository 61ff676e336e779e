"""Sources of events: this session's journal, and those that earlier sessions left in their folders of the spool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from opentelemetry.sdk.resources import Resource

from esper_otel.export.folder import EVENTS, Folder
from esper_otel.export.journal_file import JournalFile, stored_entries
from esper_otel.frames.block import Block
from esper_otel.frames.event_log import Event, EventLog, checked_event
from esper_otel.frames.frame import Run
from esper_otel.log import Warnings


class EventReading(Protocol):
    """Reads events from frames; ``EventReader`` of the room ``events``.

    Attributes:
        log: where it adds them.
    """

    log: EventLog

    def read(self, blocks: Sequence[Block], first: int, last: int) -> None:
        """Reads the frames with these sequence numbers."""

    def skip(self, block: Block) -> None:
        """Notes where frames end that need not be read."""

    def end(self, outcome: str, time_unix_ns: int, exit_status: int | None = None) -> None:
        """Adds the end of the run."""


# Makes a reader that adds to a journal.
ReaderOf = Callable[[EventLog], EventReading]


class EventSource:
    """The events of one session on their way.

    Args:
        reader: reads events from the session's frames.
        file: keeps them on disk; None without a spool.
        resource: returns the Resource of the session; None while its run is not known for certain.
        folder: the folder to delete when all of them are delivered, of an earlier session.
    """

    def __init__(
        self,
        reader: EventReading,
        file: JournalFile[Event] | None,
        resource: Callable[[], Resource | None],
        folder: Folder | None = None,
    ) -> None:
        self.reader = reader
        self.log: EventLog = reader.log
        self.resource: Callable[[], Resource | None] = resource
        self.folder = folder
        self._file = file
        if file is not None:
            self.log.added = file.write

    def settle(self, run: Run, resource: Resource) -> None:
        """Sets the run that the events are of, also for a later session if this one cannot send them."""
        self.resource = lambda: resource
        if self._file is not None:
            self._file.settle(run, resource)

    def delivered(self, number: int) -> None:
        """Moves past the events up to this number.

        Raises:
            OSError: it could not be written to disk.
        """
        try:
            if self._file is not None:
                self._file.acknowledge(number)
        finally:
            self.log.delivered(number)  # even if the disk fails, so that delivered events are not sent again

    def end(self) -> None:
        """Takes no more events, and leaves the folder alone from now on."""
        self.log.end()
        if self._file is not None:
            self._file.close()


def waiting_in(folder: Folder) -> int:
    """Returns how many events in a folder were not delivered."""
    delivered = folder.acknowledged_entries[EVENTS]
    return len(stored_entries(folder, EVENTS, checked_event, delivered).entries)


def left_in(folder: Folder, reader_of: ReaderOf, warnings: Warnings) -> EventSource | None:
    """Returns the source of the events that an earlier session left in a folder; None if it has noted none."""
    stored = stored_entries(folder, EVENTS, checked_event, 0)
    run, resource = stored.run, stored.resource
    if run is None or resource is None:
        return None
    delivered = folder.acknowledged_entries[EVENTS]
    log = EventLog(stored.start_unix_ns, before=stored.entries, delivered=delivered)

    def run_of() -> Run:
        assert run is not None
        return run

    def resource_of(_run: Run) -> Resource:
        assert resource is not None
        return resource

    file = JournalFile(folder, EVENTS, log, run_of, resource_of, warnings, is_there=True)
    return EventSource(reader_of(log), file, lambda: resource, folder)
