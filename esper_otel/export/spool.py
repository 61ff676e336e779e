"""Keeps a session's steps on disk until they are acknowledged, so that they outlive the process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from opentelemetry.sdk.resources import Resource

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.export.folder import SUFFIX, Folder
from esper_otel.frames.block import Block, Chunk
from esper_otel.frames.frame import Run
from esper_otel.frames.records import RecordWriter, StoredContext, chunks_in
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.native import threads
from esper_otel.schema import Metric

SEGMENT_BYTES = 8 * 1024 * 1024
_RETRY_S = 10.0
_PRIVATE = 0o700  # metrics may be confidential


class _SpoolFile(NamedTuple):
    """A complete file: its name, its size, and the sequences of its first and last row."""

    name: str
    size: int
    first: int
    last: int


class Spool:
    """Writes each frame when it is published, and reads back frames that the ring has dropped.

    Once ``write`` has written a frame, it survives the end of the process, since the kernel holds it. A power failure
    can lose data that the kernel has not yet written to disk. While the disk cannot be written, frames are only in the
    ring; they are written later, if the ring still holds them then.

    Threads: ``write`` is called by the publisher, everything else by the exporter.

    Args:
        directory: the spool directory; created if it does not exist.
        ring: the frames.
        catalogue: every metric that frames may have, by name.
        resource_of: returns a run's Resource.
        most_bytes: limit of the size on disk; above it the oldest frames are deleted.
        warnings: where failures are reported.
        rank: the rank of the session, if its run has several.

    Raises:
        ConfigurationError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        ring: Ring,
        catalogue: Mapping[str, Metric],
        resource_of: Callable[[Run], Resource],
        *,
        most_bytes: int,
        warnings: Warnings,
        rank: int | None = None,
    ) -> None:
        self._ring = ring
        self._catalogue = catalogue
        self._resource_of = resource_of
        self._most_bytes = most_bytes
        self._warnings = warnings
        self._process_id = os.getpid()
        self._lock = threads().Lock()
        self._missed = False
        self._file: int | None = None
        self._retry_at_s = 0.0
        self._name = ""
        self._size = self._first = self._last = 0
        self._complete: list[_SpoolFile] = []
        self._number = 0
        self._chunk: Chunk | None = None  # the rows read last, and those of the files that follow
        self._chunks: Iterator[Chunk] = iter(())
        unix.demand("setting spool_dir (or ESPER_SPOOL_DIR)", "without it, steps wait in memory")
        try:
            directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            self._folder = Folder.create(directory, rank)
            self._open()
        except OSError as error:
            raise ConfigurationError(
                f"setting spool_dir (or ESPER_SPOOL_DIR) = {str(directory)!r}: {error.strerror or error}; give a "
                "directory of this machine that can be written to"
            ) from error

    @property
    def folder(self) -> Folder:
        """The session's folder, for what else is kept in it."""
        return self._folder

    @property
    def path(self) -> Path:
        """The session's folder."""
        return self._folder.path

    @property
    def last(self) -> int:
        """The sequence of the last frame written."""
        return self._last

    def write(self) -> None:
        """Writes the row that was just published. Never waits for another thread, never raises."""
        if self._file is None or os.getpid() != self._process_id:
            return
        if not self._lock.acquire(blocking=False):
            self._missed = True
            return
        try:
            chunk = self._ring.chunk_of(self._ring.last)
            if chunk is not None and self._last + 1 == self._ring.last:
                self._write(chunk)
            else:
                self._missed = True
        finally:
            self._lock.release()

    def _write(self, chunk: Chunk) -> bool:
        """Writes the row after the last one written, which this chunk has."""
        is_written = False
        try:
            record = self._writer.row(chunk, self._last + 1 - chunk.first)
            if self._file is None or os.write(self._file, record) != len(record):
                raise OSError("short write: only part of the step was written")  # noqa: TRY301 - handled below
            is_written = True
        except Exception as error:  # noqa: BLE001 - the row is still in the ring; training goes on
            self._warnings.say(
                "spool", "frames cannot be written to %s (%s); they are kept in memory only", self.path, error
            )
        finally:  # also after a Ctrl-C: the next row must not refer to a record that was not written
            if not is_written:
                self._give_up()
        if is_written:
            self._size += len(record)
            self._last += 1
        return is_written

    def _give_up(self) -> None:
        """Closes the segment; ``tend`` starts another one later."""
        file, self._file = self._file, None
        self._retry_at_s = time.monotonic() + _RETRY_S
        if file is not None:
            with suppress(OSError):
                os.ftruncate(file, self._size)  # a partly written frame would be read as damage
            os.close(file)

    def tend(self, *, now: bool = False) -> None:
        """Starts a new segment when due, writes frames that ``write`` missed, and enforces the size limit."""
        is_due = now or time.monotonic() >= self._retry_at_s
        if self._size < SEGMENT_BYTES and not self._missed and not (self._file is None and is_due):
            return
        while True:
            with self._lock:
                self._missed = False
                if self._size >= SEGMENT_BYTES or (self._file is None and is_due):
                    self._renew()
                while self._file is not None and self._last < self._ring.last:
                    chunk = self._ring.chunk_of(self._last + 1)
                    if chunk is not None and self._last + 1 < chunk.first:
                        self._last = chunk.first - 1  # the rows before were dropped first
                    elif chunk is None or not self._write(chunk):
                        break
            is_due = False
            if not self._missed or self._file is None:
                break
        self._shrink()

    def _renew(self) -> None:
        if self._size:
            self._complete.append(_SpoolFile(self._name, self._size, self._first, self._last))
        else:
            self._folder.delete(self._name)
        if self._file is not None:
            os.close(self._file)
            self._file = None
        try:
            self._open()
        except OSError as error:
            self._retry_at_s = time.monotonic() + _RETRY_S
            self._warnings.say("spool", "no new file in %s (%s); frames are kept in memory only", self.path, error)

    def _open(self) -> None:
        self._number += 1
        self._name = f"{self._number:08d}{SUFFIX}"
        self._size = 0
        self._first = self._last + 1
        self._writer = RecordWriter(self._catalogue, self._resource_of)
        self._file = self._folder.append_to(self._name)

    def _shrink(self) -> None:
        while self._complete and self._size + sum(segment.size for segment in self._complete) > self._most_bytes:
            self._folder.delete(self._complete.pop(0).name)

    def after(self, sequence: int, limit: int) -> Block | None:
        """Returns up to ``limit`` consecutive rows: the first ones on disk after ``sequence``."""
        chunk = self._chunk
        if chunk is None or not chunk.first <= sequence + 1 <= chunk.last:
            goes_on = chunk is not None and chunk.last == sequence
            self._chunk = chunk = next(self._chunks, None) if goes_on else None
        if chunk is None:  # further back, or written since the files were read
            self._chunks = self._chunks_after(sequence)
            self._chunk = chunk = next(self._chunks, None)
        if chunk is None:
            return None
        start = max(sequence + 1 - chunk.first, 0)
        return chunk.block(start, min(start + limit, chunk.rows))

    def _chunks_after(self, sequence: int) -> Iterator[Chunk]:
        for segment in [*self._complete, _SpoolFile(self._name, self._size, self._first, self._last)]:
            if segment.last <= sequence:
                continue
            try:
                content = self._folder.read(segment.name)
            except OSError as error:
                self._warnings.say("spool", "%s cannot be read: %s", self.path / segment.name, error)
                continue
            for chunk in chunks_in(content, StoredContext()):
                if chunk.last > sequence:
                    yield chunk
                    sequence = chunk.last

    def acknowledge(self, sequence: int) -> None:
        """Records that frames up to this one are no longer needed, and deletes segments that hold only such frames."""
        self._folder.acknowledge(sequence)
        while self._complete and self._complete[0].last <= sequence:
            self._folder.delete(self._complete.pop(0).name)

    def close(self, outcome: str, *, is_delivered: bool, has_events: bool = False) -> None:
        """Closes the spool: deletes it if all is delivered, otherwise leaves it and the outcome to the next session.

        Args:
            outcome: how the run ended.
            is_delivered: whether all frames and phases are delivered.
            has_events: whether events are not.
        """
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            try:
                if is_delivered and not has_events:
                    self._folder.remove()
                else:
                    try:
                        if is_delivered:
                            self._folder.delete_delivered()
                        self._folder.note_outcome(outcome)
                    finally:
                        self._folder.release()
            except OSError as error:
                self._warnings.say("spool", "%s cannot be closed: %s", self.path, error)
