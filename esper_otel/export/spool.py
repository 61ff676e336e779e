"""Spool: a session's frames on disk until they are acknowledged, so that they outlive the process."""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from opentelemetry.sdk.resources import Resource

from esper_otel.errors import ConfigurationError
from esper_otel.export.records import RecordWriter, Stored, frames_in
from esper_otel.frame import Frame, Run
from esper_otel.log import Warnings
from esper_otel.ring import Ring
from esper_otel.schema import Metric

SEGMENT_BYTES = 8 * 1024 * 1024
SUFFIX = ".frames"
OUTCOME = "outcome"
_ACKNOWLEDGED = "acknowledged"
_LOCK = "lock"
_SEQUENCE = struct.Struct("<Q")
_RETRY_S = 10.0
_CATCH_UP = 500
_PRIVATE = 0o700  # metrics may say what nobody else on the machine is to know

# Locks of POSIX are the process's: between two sessions of one process they tell nothing.
_ours: set[Path] = set()


class Folder:
    """One session's part of the spool directory, which one process at a time owns.

    Attributes:
        path: the folder.
        acknowledged: sequence of the last frame that nobody needs any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Not flock: a forked worker would share that lock, and hold it when its parent is long dead.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._state = os.open(path / _ACKNOWLEDGED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._lock)
            raise
        _ours.add(path)
        said = os.pread(self._state, _SEQUENCE.size, 0)
        self.acknowledged: int = _SEQUENCE.unpack(said)[0] if len(said) == _SEQUENCE.size else 0

    def acknowledge(self, sequence: int) -> None:
        """Notes that nobody needs the frames up to this one any more."""
        if sequence > self.acknowledged:
            os.pwrite(self._state, _SEQUENCE.pack(sequence), 0)
            self.acknowledged = sequence

    def segments(self) -> list[Path]:
        """Its files of frames, oldest first."""
        return sorted(self.path.glob(f"*{SUFFIX}"))

    def release(self) -> None:
        """Lets go; what is there stays for the next session."""
        os.close(self._state)
        os.close(self._lock)
        _ours.discard(self.path)

    def remove(self) -> None:
        """Deletes the folder and lets go: everything in it has been delivered."""
        for path in self.path.iterdir():
            path.unlink()
        self.path.rmdir()
        self.release()


def abandoned(directory: Path) -> Iterator[Folder]:
    """The folders whose sessions are over, oldest first; each is ours from now on."""
    for path in sorted(directory.iterdir()):
        if path in _ours or not path.is_dir():
            continue
        try:
            yield Folder(path)
        except OSError:  # its session lives, or somebody else was faster
            continue


class _Segment(NamedTuple):
    """A file that is complete: its path, size, and the sequences of its first and last frame."""

    path: Path
    size: int
    first: int
    last: int


class Spool:
    """Writes each frame when it is published, and gives back those that the ring has dropped.

    A frame that ``write`` was called for outlives the process: it is in the kernel's hands. A power cut may take
    what the kernel had not written out yet. While the disk takes nothing, frames are only in the ring; they are
    written when the disk does again, if the ring still has them.

    Threads: ``write`` belongs to the publisher, the rest to the exporter.

    Args:
        directory: where the spool is; made when it is not there.
        ring: the frames.
        catalogue: every metric that frames may have, by name.
        resource_of: gives a run's Resource.
        most_bytes: on disk; beyond them the oldest frames are deleted.
        warnings: where failures are reported.

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
    ) -> None:
        self._ring = ring
        self._catalogue = catalogue
        self._resource_of = resource_of
        self._most_bytes = most_bytes
        self._warnings = warnings
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._missed = False
        self._file: int | None = None
        self._retry_at_s = 0.0
        self._path = Path()
        self._size = self._first = self._last = 0
        self._complete: list[_Segment] = []
        self._number = 0
        self._reading: tuple[int, Iterator[Frame]] = (0, iter(()))
        try:
            directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            # Names sort by age.
            path = directory / f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
            path.mkdir(mode=_PRIVATE)
            self._folder = Folder(path)
            self._open()
        except OSError as error:
            raise ConfigurationError(
                f"setting spool_dir (or ESPER_SPOOL_DIR) = {str(directory)!r}: {error.strerror or error}; give a "
                "directory of this machine that can be written to"
            ) from error

    @property
    def path(self) -> Path:
        """The session's folder."""
        return self._folder.path

    @property
    def last(self) -> int:
        """Sequence of the last frame written."""
        return self._last

    def write(self, frame: Frame) -> None:
        """Writes the frame that was just published. Never waits for another thread, never raises."""
        if self._file is None or os.getpid() != self._process_id:
            return
        if not self._lock.acquire(blocking=False):
            self._missed = True
            return
        try:
            if frame.sequence == self._last + 1:
                self._write(frame)
            else:
                self._missed = True
        finally:
            self._lock.release()

    def _write(self, frame: Frame) -> bool:
        is_written = False
        try:
            record = self._writer.record(frame)
            if self._file is None or os.write(self._file, record) != len(record):
                raise OSError("the disk took a part of a frame")  # noqa: TRY301 - handled like the disk's own words
            is_written = True
        except Exception as error:  # noqa: BLE001 - the frame is still in the ring; training goes on
            self._warnings.say(
                "spool", "frames cannot be written to %s (%s); they are kept in memory only", self.path, error
            )
        finally:  # whatever came between, a Ctrl-C included: the next frame must not refer to what is not there
            if not is_written:
                self._give_up()
        if is_written:
            self._size += len(record)
            self._last = frame.sequence
        return is_written

    def _give_up(self) -> None:
        """Ends the segment; ``tend`` begins another later."""
        file, self._file = self._file, None
        self._retry_at_s = time.monotonic() + _RETRY_S
        if file is not None:
            with suppress(OSError):
                os.ftruncate(file, self._size)  # what was written of the frame would count as damage
            os.close(file)

    def tend(self, *, now: bool = False) -> None:
        """Begins a new segment when one is due, writes what ``write`` could not, keeps to the limit of the disk."""
        is_due = now or time.monotonic() >= self._retry_at_s
        if self._size < SEGMENT_BYTES and not self._missed and not (self._file is None and is_due):
            return
        while True:
            with self._lock:
                self._missed = False
                if self._size >= SEGMENT_BYTES or (self._file is None and is_due):
                    self._renew()
                while self._file is not None and self._last < self._ring.last:
                    frames, gone = self._ring.after(self._last, _CATCH_UP)
                    if not frames:
                        break
                    self._last += gone
                    if not all(map(self._write, frames)):
                        break
            is_due = False
            if not self._missed or self._file is None:
                break
        self._shrink()

    def _renew(self) -> None:
        if self._size:
            self._complete.append(_Segment(self._path, self._size, self._first, self._last))
        else:
            self._path.unlink(missing_ok=True)
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
        self._path = self._folder.path / f"{self._number:08d}{SUFFIX}"
        self._size = 0
        self._first = self._last + 1
        self._writer = RecordWriter(self._catalogue, self._resource_of)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _shrink(self) -> None:
        while self._complete and self._size + sum(segment.size for segment in self._complete) > self._most_bytes:
            self._delete(self._complete.pop(0))

    @staticmethod
    def _delete(segment: _Segment) -> None:
        segment.path.unlink(missing_ok=True)

    def after(self, sequence: int, limit: int) -> list[Frame]:
        """Up to ``limit`` frames without holes, the first of those on disk that follow ``sequence``."""
        following, frames_left = self._reading
        if following != sequence + 1:
            frames_left = self._frames_from(sequence + 1)
        frames: list[Frame] = []
        for frame in frames_left:
            if frame.sequence <= sequence:
                continue
            if frames and frame.sequence != frames[-1].sequence + 1:
                frames_left = self._frames_from(frames[-1].sequence + 1)
                break
            frames.append(frame)
            if len(frames) == limit:
                break
        self._reading = (frames[-1].sequence + 1 if frames else 0, frames_left)
        return frames

    def _frames_from(self, sequence: int) -> Iterator[Frame]:
        for segment in [*self._complete, _Segment(self._path, self._size, self._first, self._last)]:
            if segment.last < sequence:
                continue
            try:
                content = segment.path.read_bytes()
            except OSError as error:
                self._warnings.say("spool", "%s cannot be read: %s", segment.path, error)
                continue
            for frame in frames_in(content, Stored()):
                if frame.sequence >= sequence:
                    yield frame
                    sequence = frame.sequence + 1

    def acknowledge(self, sequence: int) -> None:
        """Frames up to this one are not needed any more; whole segments of them are deleted."""
        self._folder.acknowledge(sequence)
        while self._complete and self._complete[0].last <= sequence:
            self._delete(self._complete.pop(0))

    def close(self, outcome: str, *, is_delivered: bool) -> None:
        """Ends the session's spool: deletes it, or leaves it to the next session with how the run ended."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            try:
                if is_delivered:
                    self._folder.remove()
                else:
                    (self._folder.path / OUTCOME).write_text(outcome, encoding="utf-8")
                    self._folder.release()
            except OSError as error:
                self._warnings.say("spool", "%s cannot be closed: %s", self.path, error)
