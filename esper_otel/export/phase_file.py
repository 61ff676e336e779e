"""Keeps a session's phases in its folder of the spool until they are acknowledged."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from opentelemetry.sdk.resources import Resource

from esper_otel.export.folder import PHASES, Folder
from esper_otel.frames.frame import Run, checked_run
from esper_otel.frames.phase_log import Phase, PhaseLog, line_of, phases_in
from esper_otel.log import Warnings

_RENEW_BYTES = 1024 * 1024


class PhaseFile:
    """A file with a line of JSON for each phase, and one for the run before the first phase of it.

    Threads: ``write`` is called with the lock of the log of phases held, ``acknowledge`` by the exporter.

    Args:
        folder: the session's folder.
        log: the session's phases.
        run_of: returns the session's run, as it is known now.
        resource_of: returns a run's Resource.
        warnings: where failures are reported.
    """

    def __init__(
        self,
        folder: Folder,
        log: PhaseLog,
        run_of: Callable[[], Run],
        resource_of: Callable[[Run], Resource],
        warnings: Warnings,
    ) -> None:
        self._folder = folder
        self._log = log
        self._run_of = run_of
        self._resource_of = resource_of
        self._warnings = warnings
        self._file: int | None = None
        self._is_closed = False
        self._run: Run | None = None
        self._size = 0
        self._most_bytes = _RENEW_BYTES

    def write(self, phase: Phase) -> None:
        """Writes a phase that has just ended. Never raises: it is still in the log if the disk cannot be written."""
        if self._is_closed:  # the folder may be another session's by now
            return
        try:
            if self._file is None:
                self._file = self._folder.append_to(PHASES)
            run = self._run_of()
            if self._size > self._most_bytes and self._renewed(run):
                return
            line = line_of(phase) if run is self._run else self._line_of(run) + line_of(phase)
            if os.write(self._file, line) != len(line):
                os.write(self._file, b"\n")  # the next line is not a part of this one
                raise OSError("short write: only part of the phase was written")  # noqa: TRY301 - handled below
            self._run, self._size = run, self._size + len(line)
        except Exception as error:  # noqa: BLE001 - see above
            path = self._folder.path
            self._warnings.say("spool", "phases cannot be written to %s (%s); they are kept in memory", path, error)

    def _renewed(self, run: Run) -> bool:
        """Leaves only the phases that still wait in the file, the newest one among them; False if the disk is full."""
        content = self._line_of(run) + b"".join(map(line_of, self._log.waiting(None, sys.maxsize)))
        self._most_bytes = max(_RENEW_BYTES, 2 * self._size)  # not again for each phase, if that fails
        try:
            file = self._folder.renew(PHASES, content)
        except OSError as error:
            self._warnings.say("spool", "the file of phases in %s cannot be renewed: %s", self._folder.path, error)
            return False
        if self._file is not None:
            os.close(self._file)
        self._file, self._run, self._size = file, run, len(content)
        self._most_bytes = max(_RENEW_BYTES, 2 * self._size)
        return True

    def _line_of(self, run: Run) -> bytes:
        resource = self._resource_of(run)
        said = {
            "start_unix_ns": self._log.start_unix_ns,
            "run": dataclasses.asdict(run),
            "attributes": dict(resource.attributes),
            "schema_url": resource.schema_url,
        }
        return json.dumps(said, default=str).encode() + b"\n"

    def acknowledge(self, number: int) -> None:
        """Records that phases up to this one are no longer needed."""
        if not self._is_closed:
            self._folder.acknowledge_phases(number)

    def close(self) -> None:
        """Closes the file; from now on nothing is written to the folder."""
        self._is_closed = True
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


class StoredPhases(NamedTuple):
    """The phases in a folder that were not acknowledged, and what they belong to; None if that is not known."""

    phases: deque[Phase]
    run: Run | None = None
    resource: Resource | None = None
    start_unix_ns: int = 0


def stored_phases(folder: Folder) -> StoredPhases:
    """Reads the phases in a folder."""
    try:
        content = folder.read(PHASES)
    except OSError:  # no phase was written
        return StoredPhases(deque())
    stored = StoredPhases(deque(phases_in(content, folder.acknowledged_phases)))
    for line in content.splitlines():
        if line.startswith(b"{"):
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                said = json.loads(line)
                run, resource = checked_run(said["run"]), Resource(said["attributes"], said["schema_url"])
                stored = stored._replace(run=run, resource=resource, start_unix_ns=int(said["start_unix_ns"]))
    return stored
