"""Keeps a session's phases and events in its folder of the spool until they are acknowledged."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple

from opentelemetry.sdk.resources import Resource

from esper_otel.export.folder import Folder
from esper_otel.frames.frame import Run, checked_run
from esper_otel.frames.journal import EntryT, Journal, entries_in, line_of
from esper_otel.log import Warnings

_RENEW_BYTES = 1024 * 1024


class JournalFile(Generic[EntryT]):
    """A file with a line of JSON for each entry, and one for the run before the first entry of it.

    Threads: ``write`` is called with the lock of the journal held, ``acknowledge`` by the thread that sends.

    Args:
        folder: the session's folder.
        name: the file, one of ``JOURNALS``.
        journal: the session's journal.
        run_of: returns the session's run, as it is known now.
        resource_of: returns a run's Resource.
        warnings: where failures are reported.
        is_there: whether the file exists, of an earlier session; what the journal has is then in it.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        journal: Journal[EntryT, Any],
        run_of: Callable[[], Run],
        resource_of: Callable[[Run], Resource],
        warnings: Warnings,
        *,
        is_there: bool = False,
    ) -> None:
        self._folder = folder
        self._name = name
        self._journal = journal
        self._run_of = run_of
        self._resource_of = resource_of
        self._warnings = warnings
        self._file: int | None = None
        self._is_there = is_there
        self._is_closed = False
        self._run: Run | None = None
        self._size = 0
        self._most_bytes = _RENEW_BYTES

    def write(self, entries: Sequence[EntryT]) -> None:
        """Writes new entries; without any, the run alone. Never raises: if the disk fails, they are in the journal."""
        if self._is_closed:  # the folder may be another session's by now
            return
        try:
            run = self._run_of()
            if (self._size > self._most_bytes or self._is_there) and self._renewed(run):
                return
            if self._file is None:
                self._file = self._folder.append_to(self._name)
            lines = b"".join(map(line_of, entries))
            if run is not self._run:
                lines = self._line_of(run) + lines
            if os.write(self._file, lines) != len(lines):
                os.write(self._file, b"\n")  # the next line is not a part of this one
                raise OSError(f"short write: only part of the {self._name} was written")  # noqa: TRY301 - handled below
            self._run, self._size = run, self._size + len(lines)
        except Exception as error:  # noqa: BLE001 - see above
            path = self._folder.path
            self._warnings.say(
                "spool", "%s cannot be written to %s (%s); they are kept in memory", self._name, path, error
            )

    def _renewed(self, run: Run) -> bool:
        """Leaves only what is still needed in the file, the newest entry included; False if the disk is full."""
        content = self._line_of(run) + b"".join(map(line_of, self._journal.to_store()))
        self._most_bytes = max(_RENEW_BYTES, 2 * self._size)  # not again for each entry, if that fails
        try:
            file = self._folder.renew(self._name, content)
        except OSError as error:
            path = self._folder.path
            self._warnings.say("spool", "the file of %s in %s cannot be renewed: %s", self._name, path, error)
            return False
        if self._file is not None:
            os.close(self._file)
        self._is_there = False
        self._file, self._run, self._size = file, run, len(content)
        self._most_bytes = max(_RENEW_BYTES, 2 * self._size)
        return True

    def _line_of(self, run: Run) -> bytes:
        resource = self._resource_of(run)
        said = {
            "start_unix_ns": self._journal.start_unix_ns,
            "run": dataclasses.asdict(run),
            "attributes": dict(resource.attributes),
            "schema_url": resource.schema_url,
        }
        return json.dumps(said, default=str).encode() + b"\n"

    def settle(self, run: Run, resource: Resource) -> None:
        """Writes this run from now on: the file of an earlier session may have it as it was before its first step."""
        self._run_of, self._resource_of = lambda: run, lambda _: resource

    def acknowledge(self, number: int) -> None:
        """Records that entries up to this one are no longer needed."""
        if not self._is_closed:
            self._folder.acknowledge_entries(self._name, number)

    def close(self) -> None:
        """Closes the file; from now on nothing is written to the folder."""
        self._is_closed = True
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


class StoredEntries(NamedTuple, Generic[EntryT]):
    """The entries in a file of a folder, and what they belong to; None if that is not known."""

    entries: Sequence[EntryT]
    run: Run | None = None
    resource: Resource | None = None
    start_unix_ns: int = 0


def stored_entries(folder: Folder, name: str, checked: Callable[[object], EntryT], after: int) -> StoredEntries[EntryT]:
    """Reads the entries in a folder with a number above ``after``; see ``entries_in`` for ``checked``."""
    try:
        content = folder.read(name)
    except OSError:  # none was written
        return StoredEntries[EntryT](())
    stored = StoredEntries(list(entries_in(content, checked, after)))
    for line in content.splitlines():
        if line.startswith(b"{"):
            with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                said = json.loads(line)
                run, resource = checked_run(said["run"]), Resource(said["attributes"], said["schema_url"])
                stored = stored._replace(run=run, resource=resource, start_unix_ns=int(said["start_unix_ns"]))
    return stored
