"""Manages one session's folder in a spool directory. Only folders and files that this library created are touched.

A folder is accepted as ours if it has the name format that this library uses, belongs to this user, cannot be written
to by others, and contains the marker file. Its files are opened relative to a descriptor of the folder and never
through a link, so nobody can substitute another folder or file.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from esper_otel import unix
from esper_otel.frames.records import MAGIC_BYTES, is_of_another_version
from esper_otel.log import Warnings

SUFFIX = ".frames"
OUTCOME = "outcome"
MARKER = "esper-otel-spool"
RANK = "rank"
PHASES = "phases"
EVENTS = "events"
JOURNALS = (PHASES, EVENTS)  # the order of their numbers in the file of what was acknowledged
_ACKNOWLEDGED = "acknowledged"
_MARKER_TEXT = b"esper_otel spool 1\nSteps that an endpoint has not acknowledged. The next session here sends them.\n"
_SEQUENCE = struct.Struct("<Q")
_MOST_SEQUENCE = 2**63
_PRIVATE = 0o700  # metrics may be confidential
_MOST_BYTES = 1 << 30  # largest size of one file
_MOST_OUTCOME_BYTES = 1_000
_MOST_RANK_BYTES = 20
_MOST_SHOWN = 3
_NAME = re.compile(r"\d+-\d+-[0-9a-f]+")
_NEW = "new-"
_OUR_FILES = re.compile(rf"{_ACKNOWLEDGED}|{OUTCOME}|{MARKER}|{RANK}|({_NEW})?({PHASES}|{EVENTS})|\d{{8}}\{SUFFIX}")

# A POSIX lock belongs to the process and ends when any descriptor of the file is closed, so it cannot separate two
# sessions within one process. This table holds the folders that sessions of this process own, by device and inode.
_claims: dict[tuple[int, int], object] = {}


class NotOurs(Exception):
    """Raised for a folder that this library did not make, or that others may have changed; the message says why."""


class Folder:
    """One session's folder in the spool directory, owned by one process at a time.

    Use ``create`` or ``adopt`` to make an instance.

    Attributes:
        path: the folder's path, for messages.
        acknowledged: sequence of the last frame that is no longer needed.
        acknowledged_entries: number of the last entry of each journal that is no longer needed.
    """

    def __init__(self, path: Path, descriptor: int, lock: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._lock = lock
        try:
            self._state = self._open(_ACKNOWLEDGED, os.O_RDWR | os.O_CREAT)
        except OSError:
            os.close(lock)
            raise
        self._identity = _identity(os.fstat(descriptor))
        self.acknowledged: int = self._noted(0)
        self.acknowledged_entries: dict[str, int] = {
            name: self._noted(place * _SEQUENCE.size) for place, name in enumerate(JOURNALS, 1)
        }

    @classmethod
    def create(cls, directory: Path, rank: int | None = None) -> Folder:
        """Makes a folder. It gets its final name only once it is locked and marked, so no other session can adopt it.

        Args:
            directory: the spool directory.
            rank: that of the session, if its run has several.

        Raises:
            OSError: the folder cannot be made.
        """
        name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"  # names sort by age
        parent = _opened(directory, follow=True)
        try:
            os.mkdir(_NEW + name, _PRIVATE, dir_fd=parent)
            with _claimed(_opened(_NEW + name, parent)) as descriptor:
                lock = _locked(descriptor, MARKER, os.O_CREAT | os.O_EXCL)
                os.write(lock, _MARKER_TEXT)
                if rank is not None:
                    _write(descriptor, RANK, str(rank).encode())
                os.rename(_NEW + name, name, src_dir_fd=parent, dst_dir_fd=parent)
                return cls(directory / name, descriptor, lock)
        finally:
            os.close(parent)

    @classmethod
    def adopt(cls, directory: Path, name: str) -> Folder | None:
        """Takes over a folder whose session has ended. Returns None if the session is alive or another process owns it.

        Raises:
            NotOurs: it is not a folder of this user's spool, or others may have changed it.
            OSError: the folder cannot be read.
        """
        parent = _opened(directory, follow=True)
        try:
            with _claimed(_opened(name, parent)) as descriptor:
                _check(descriptor)
                lock = _locked(descriptor, MARKER)
                return cls(directory / name, descriptor, lock)
        except (BlockingIOError, FileNotFoundError):  # its session is alive, or another process removes it
            return None
        finally:
            os.close(parent)

    def acknowledge(self, sequence: int) -> None:
        """Records that the frames up to this one are no longer needed."""
        if sequence > self.acknowledged:
            os.pwrite(self._state, _SEQUENCE.pack(sequence), 0)
            self.acknowledged = sequence

    def acknowledge_entries(self, name: str, number: int) -> None:
        """Records that the entries of a journal up to this one are no longer needed."""
        if number > self.acknowledged_entries[name]:
            place = (JOURNALS.index(name) + 1) * _SEQUENCE.size
            os.pwrite(self._state, _SEQUENCE.pack(number), place)
            self.acknowledged_entries[name] = number

    def _noted(self, place: int) -> int:
        noted = os.pread(self._state, _SEQUENCE.size, place)
        sequence: int = _SEQUENCE.unpack(noted)[0] if len(noted) == _SEQUENCE.size else 0
        return sequence if sequence < _MOST_SEQUENCE else 0  # a larger one is damage

    def segments(self) -> list[str]:
        """Returns the names of the files that contain frames, oldest first."""
        return sorted(name for name in os.listdir(self._descriptor) if name.endswith(SUFFIX) and _is_ours(name))

    def append_to(self, name: str) -> int:
        """Creates a file and returns a descriptor for appending to it.

        Raises:
            OSError: the file cannot be created, or exists already.
        """
        return self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def renew(self, name: str, content: bytes) -> int:
        """Replaces a file at once, so that a kill leaves the old or the new one; returns a descriptor for appending.

        Raises:
            OSError: the new file cannot be written; the old one stays.
        """
        file = self._open(_NEW + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        try:
            if os.write(file, content) != len(content):
                raise OSError("short write: only part of the new file was written")  # noqa: TRY301 - handled below
            os.rename(_NEW + name, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            os.close(file)
            with suppress(OSError):
                os.unlink(_NEW + name, dir_fd=self._descriptor)
            raise
        return file

    def read(self, name: str) -> bytes:
        """Returns a file's content.

        Raises:
            OSError: the file cannot be read, is not a plain file, or is larger than any file that this library writes.
        """
        file = self._open(name, os.O_RDONLY)
        with os.fdopen(file, "rb") as opened:
            size = os.fstat(file).st_size
            if size > _MOST_BYTES:
                raise OSError(f"{self.path / name} has {size} bytes, more than a file of the spool can have")
            return opened.read(size)

    def size(self, name: str) -> int:
        """Returns a file's size in bytes; 0 when the file does not exist."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def delete(self, name: str) -> None:
        """Deletes a file of frames or phases."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def delete_delivered(self) -> None:
        """Deletes all files of frames and phases, of which everything is delivered: only events wait."""
        for name in (*self.segments(), PHASES):
            self.delete(name)

    def note_outcome(self, outcome: str) -> None:
        """Stores how the run ended, for the later session that sends the frames."""
        file = self._open(OUTCOME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(file, outcome.encode(errors="replace")[:_MOST_OUTCOME_BYTES])
        finally:
            os.close(file)

    @property
    def outcome(self) -> str:
        """How the run ended; empty when its session did not store that."""
        with suppress(OSError):
            return self.read(OUTCOME)[:_MOST_OUTCOME_BYTES].decode(errors="replace")
        return ""

    def release(self) -> None:
        """Gives up ownership of the folder; its files stay for the next session."""
        if _claims.pop(self._identity, None) is not None:
            for descriptor in (self._state, self._lock, self._descriptor):
                os.close(descriptor)

    def remove(self) -> None:
        """Deletes the folder, whose frames have all been delivered, and gives up ownership of it.

        A file that this library did not write is kept, and so is the folder then.

        Raises:
            OSError: a file of this library cannot be deleted, or the folder contains other files.
        """
        try:
            # Steps are deleted first, so that after a kill in between they are not sent again. The marker is deleted
            # last, so that the folder can still be recognized.
            names = filter(_is_ours, os.listdir(self._descriptor))
            for name in sorted(names, key=lambda name: (name == MARKER, not name.endswith(SUFFIX))):
                os.unlink(name, dir_fd=self._descriptor)
            parent = _opened(self.path.parent, follow=True)
            try:
                if _identity(os.stat(self.path.name, dir_fd=parent, follow_symlinks=False)) == self._identity:
                    os.rmdir(self.path.name, dir_fd=parent)
            finally:
                os.close(parent)
        finally:
            self.release()

    def _open(self, name: str, flags: int) -> int:
        """Opens a file of the folder; refuses anything but a plain file without further hard links."""
        file = os.open(name, flags & ~os.O_TRUNC | unix.FILE, 0o600, dir_fd=self._descriptor)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(file)
            raise OSError(f"{self.path / name} is not a plain file of ours")
        if flags & os.O_TRUNC:
            os.ftruncate(file, 0)
        return file


def abandoned(directory: Path, warnings: Warnings, rank: int | None = None) -> Iterator[Folder]:
    """Takes over the folders whose sessions have ended and yields them, oldest first; with ``rank``, no other rank's.

    Anything whose name is not that of a session's folder belongs to the user and is ignored. A folder with such a name
    that cannot be trusted is left alone and named in a warning.
    """
    refused: list[str] = []
    for name in sorted(filter(_NAME.fullmatch, os.listdir(directory))):
        if rank is not None and _rank_of(directory, name) not in {None, rank}:
            continue
        try:
            folder = Folder.adopt(directory, name)
        except (NotOurs, OSError) as error:
            refused.append(f"{name} ({getattr(error, 'strerror', None) or error})")
            continue
        if folder is not None:
            yield folder
    if refused:
        more = f" and {len(refused) - _MOST_SHOWN} more" if len(refused) > _MOST_SHOWN else ""
        warnings.say(
            "spool folders",
            "in ESPER_SPOOL_DIR %s these are left alone and their steps are not sent: %s%s",
            directory,
            ", ".join(refused[:_MOST_SHOWN]),
            more,
        )


def _rank_of(directory: Path, name: str) -> int | None:
    """Returns the rank whose folder this is; None if that is not known. Its session may be alive."""
    with suppress(OSError, ValueError), ExitStack() as closing:
        parent = _opened(directory, follow=True)
        closing.callback(os.close, parent)
        folder = _opened(name, parent)
        closing.callback(os.close, folder)
        return int(_beginning(folder, RANK, _MOST_RANK_BYTES))
    return None


def _write(descriptor: int, name: str, content: bytes) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | unix.FILE, 0o600, dir_fd=descriptor)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def _opened(path: Path | str, parent: int | None = None, *, follow: bool = False) -> int:
    """Returns a descriptor of a folder; links are followed only in a path that the user gave."""
    return os.open(path, os.O_RDONLY | (unix.FOLDER if follow else unix.FOLDER_ITSELF), dir_fd=parent)


@contextmanager
def _claimed(descriptor: int) -> Iterator[int]:
    """Keeps other sessions of this process off a folder; if the block fails, the claim and the descriptor are given up.

    Raises:
        BlockingIOError: another session of this process has it.
    """
    identity, claim = _identity(os.fstat(descriptor)), object()
    try:
        if _claims.setdefault(identity, claim) is not claim:
            raise BlockingIOError("another session of this process has it")  # noqa: TRY301 - ends as any failure here
        yield descriptor
    except BaseException:
        if _claims.get(identity) is claim:
            del _claims[identity]
        os.close(descriptor)
        raise


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_ours(name: str) -> bool:
    return _OUR_FILES.fullmatch(name) is not None


def _locked(descriptor: int, name: str, flags: int = 0) -> int:
    """Opens and locks a file of a folder.

    It does not use flock, since a forked worker would share that lock and could keep it after its parent has ended.

    Raises:
        BlockingIOError: another process has locked the file.
        FileNotFoundError: the file does not exist, or the process that had locked it deleted it.
    """
    lock = os.open(name, os.O_RDWR | flags | unix.FILE, 0o600, dir_fd=descriptor)
    try:
        try:
            unix.lock_for_process(lock)
        except PermissionError as error:  # POSIX allows it in place of BlockingIOError
            raise BlockingIOError(*error.args) from error
        if not os.fstat(lock).st_nlink:
            raise FileNotFoundError(name)  # noqa: TRY301 - ends as any failure here
    except BaseException:
        os.close(lock)
        raise
    return lock


def _check(descriptor: int) -> None:
    """Checks that a folder can be trusted.

    Raises:
        NotOurs: others may have made or changed it, it has no marker, or another version has written its frames.
    """
    found = os.fstat(descriptor)
    if found.st_uid != unix.user_id():
        raise NotOurs(f"it belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotOurs("others may write to it")
    names = os.listdir(descriptor)
    if not names:
        raise FileNotFoundError("it is empty: another process is removing it, or died while removing it")
    if MARKER not in names:
        raise NotOurs(f"it has no file {MARKER}, so this version did not make it")
    for name in filter(_is_ours, names):
        with suppress(FileNotFoundError):  # its session is alive and deletes what was acknowledged
            file = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if not stat.S_ISREG(file.st_mode) or file.st_nlink > 1 or file.st_uid != found.st_uid:
                raise NotOurs(f"its {name} is not a plain file of this user")
            if name.endswith(SUFFIX) and is_of_another_version(_beginning(descriptor, name, MAGIC_BYTES)):
                raise NotOurs(f"another version of esper_otel wrote its {name}: send it with that one, or delete it")
    if _beginning(descriptor, MARKER, len(_MARKER_TEXT)) != _MARKER_TEXT:
        raise NotOurs(f"its {MARKER} is not what this version writes")


def _beginning(descriptor: int, name: str, size: int) -> bytes:
    file = os.open(name, os.O_RDONLY | unix.FILE, dir_fd=descriptor)
    try:
        return os.read(file, size)
    finally:
        os.close(file)
