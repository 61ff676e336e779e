"""Folder: one session's part of a spool directory. It touches only what this library has made there.

A folder is ours when it has the name that we give, belongs to this user, cannot be written to by others, and holds the
marker file that we wrote. Its files are opened relative to a descriptor of the folder and never through a link, so
nobody can put another folder or file in their place.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esper_otel.log import Warnings

SUFFIX = ".frames"
OUTCOME = "outcome"
MARKER = "esper-otel-spool"
_ACKNOWLEDGED = "acknowledged"
_LOCK = "lock"  # of folders that an earlier version has left; today the marker is locked
_MARKER_TEXT = b"esper_otel spool 1\nSteps that an endpoint has not acknowledged. The next session here sends them.\n"
_SEQUENCE = struct.Struct("<Q")
_MOST_SEQUENCE = 2**63
_PRIVATE = 0o700  # metrics may contain what nobody else on the machine should know
_MOST_BYTES = 1 << 30  # of one file
_MOST_OUTCOME_BYTES = 1_000
_MOST_SHOWN = 3
_MOST_NAME = 80
_NAME = re.compile(r"\d+-\d+-[0-9a-f]+")
_NEW = "new-"
_OUR_FILES = re.compile(rf"{_LOCK}|{_ACKNOWLEDGED}|{OUTCOME}|{MARKER}|\d{{8}}\{SUFFIX}")
_FILE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in place of a file must not stop us

# A POSIX lock belongs to the process and ends when any descriptor of the file is closed, so it cannot separate two
# sessions of one process. These are the folders of this process, by device and inode, each with its claim.
_claims: dict[tuple[int, int], object] = {}


class NotOurs(Exception):
    """A folder that this library did not make, or that others may have changed; the message says why."""


class Folder:
    """One session's part of the spool directory, which one process at a time owns.

    Made by ``create`` and ``adopt``.

    Attributes:
        path: the folder, for messages.
        acknowledged: sequence of the last frame that nobody needs any more.
        is_marked: whether it holds our marker. One without was written by an earlier version: its frames are sent,
            and nothing in it is deleted.
    """

    def __init__(self, path: Path, descriptor: int, lock: int, *, is_marked: bool) -> None:
        self.path = path
        self.is_marked = is_marked
        self._descriptor = descriptor
        self._lock = lock
        try:
            self._state = self._open(_ACKNOWLEDGED, os.O_RDWR | os.O_CREAT)
        except OSError:
            os.close(lock)
            raise
        self._identity = _identity(os.fstat(descriptor))
        noted = os.pread(self._state, _SEQUENCE.size, 0)
        sequence: int = _SEQUENCE.unpack(noted)[0] if len(noted) == _SEQUENCE.size else 0
        self.acknowledged = sequence if sequence < _MOST_SEQUENCE else 0  # a larger one is damage

    @classmethod
    def create(cls, directory: Path) -> Folder:
        """Makes a folder. It gets its name when it is locked and marked, so no other session takes it before.

        Raises:
            OSError: it cannot be made.
        """
        name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"  # names sort by age
        parent = _opened(directory, follow=True)
        try:
            os.mkdir(_NEW + name, _PRIVATE, dir_fd=parent)
            with _claimed(_opened(_NEW + name, parent)) as descriptor:
                lock = _locked(descriptor, MARKER, os.O_CREAT | os.O_EXCL)
                os.write(lock, _MARKER_TEXT)
                os.rename(_NEW + name, name, src_dir_fd=parent, dst_dir_fd=parent)
                return cls(directory / name, descriptor, lock, is_marked=True)
        finally:
            os.close(parent)

    @classmethod
    def adopt(cls, directory: Path, name: str) -> Folder | None:
        """Takes a folder over whose session has ended; None when the session is alive or another process was faster.

        Raises:
            NotOurs: it is not a folder of this user's spool, or others may have changed it.
            OSError: it cannot be read.
        """
        parent = _opened(directory, follow=True)
        try:
            with _claimed(_opened(name, parent)) as descriptor:
                is_marked = _is_marked(descriptor)
                lock = _locked(descriptor, MARKER if is_marked else _LOCK, 0 if is_marked else os.O_CREAT)
                return cls(directory / name, descriptor, lock, is_marked=is_marked)
        except (BlockingIOError, FileNotFoundError):  # its session is alive, or another process removes it
            return None
        finally:
            os.close(parent)

    def acknowledge(self, sequence: int) -> None:
        """Notes that nobody needs the frames up to this one any more."""
        if sequence > self.acknowledged:
            os.pwrite(self._state, _SEQUENCE.pack(sequence), 0)
            self.acknowledged = sequence

    def segments(self) -> list[str]:
        """The names of its files of frames, oldest first."""
        return sorted(name for name in os.listdir(self._descriptor) if name.endswith(SUFFIX) and _is_ours(name))

    def append_to(self, name: str) -> int:
        """A descriptor of a new file that is appended to.

        Raises:
            OSError: it cannot be made, or is there already.
        """
        return self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            OSError: it cannot be read, is not a plain file, or is larger than a file of ours can be.
        """
        file = self._open(name, os.O_RDONLY)
        with os.fdopen(file, "rb") as opened:
            size = os.fstat(file).st_size
            if size > _MOST_BYTES:
                raise OSError(f"{self.path / name} has {size} bytes, more than a file of the spool can have")
            return opened.read(size)

    def size(self, name: str) -> int:
        """A file's bytes; 0 when it is not there."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def delete(self, name: str) -> None:
        """Deletes a file of frames."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def note_outcome(self, outcome: str) -> None:
        """Leaves how the run ended to the session that sends the frames."""
        file = self._open(OUTCOME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(file, outcome.encode(errors="replace")[:_MOST_OUTCOME_BYTES])
        finally:
            os.close(file)

    @property
    def outcome(self) -> str:
        """How the run ended; empty when its session could not say so."""
        with suppress(OSError):
            return self.read(OUTCOME)[:_MOST_OUTCOME_BYTES].decode(errors="replace")
        return ""

    def release(self) -> None:
        """Lets go; what is there stays for the next session."""
        if _claims.pop(self._identity, None) is not None:
            for descriptor in (self._state, self._lock, self._descriptor):
                os.close(descriptor)

    def remove(self) -> None:
        """Deletes the folder and lets go: everything in it has been delivered.

        Of a folder without our marker nothing is deleted. A file in it that is not ours stays, and so does the folder.

        Raises:
            OSError: something of ours cannot be deleted, or something that is not ours is there.
        """
        try:
            if not self.is_marked:
                return
            # Steps first: after a kill in between nothing is sent again. The marker last: the folder can be recognized.
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
        """Opens a file of the folder; only a plain file without other names is ours."""
        file = os.open(name, flags & ~os.O_TRUNC | _FILE_FLAGS, 0o600, dir_fd=self._descriptor)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(file)
            raise OSError(f"{self.path / name} is not a plain file of ours")
        if flags & os.O_TRUNC:
            os.ftruncate(file, 0)
        return file


def abandoned(directory: Path, warnings: Warnings) -> Iterator[Folder]:
    """The folders whose sessions are over, oldest first; each is ours from now on.

    Whatever has another name than a session's folder is the user's and is not looked at. A folder that has such a name
    but cannot be trusted is left alone and named in a warning.
    """
    refused: list[str] = []
    for name in sorted(filter(_NAME.fullmatch, os.listdir(directory))):
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


def _opened(path: Path | str, parent: int | None = None, *, follow: bool = False) -> int:
    """A descriptor of a folder; a link is followed only where the user named it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    return os.open(path, flags, dir_fd=parent)


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


def _locked(descriptor: int, name: str, flags: int) -> int:
    """A locked file of a folder. Not by flock: a forked worker would share that lock and outlive its parent with it.

    Raises:
        BlockingIOError: another process has locked it.
        FileNotFoundError: it is not there, or was deleted by the process that had locked it.
    """
    lock = os.open(name, os.O_RDWR | flags | _FILE_FLAGS, 0o600, dir_fd=descriptor)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # POSIX allows it in place of BlockingIOError
            raise BlockingIOError(*error.args) from error
        if not os.fstat(lock).st_nlink:
            raise FileNotFoundError(name)  # noqa: TRY301 - ends as any failure here
    except BaseException:
        os.close(lock)
        raise
    return lock


def _is_marked(descriptor: int) -> bool:
    """Whether a folder that can be trusted holds our marker.

    Raises:
        NotOurs: others may have made or changed it, or without a marker it holds what we do not write.
    """
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise NotOurs(f"it belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotOurs("others may write to it")
    names = os.listdir(descriptor)
    is_marked = MARKER in names
    if not names:
        raise FileNotFoundError("it is empty: another process is removing it, or has died over that")
    if not is_marked and not any(name.endswith(SUFFIX) for name in names):
        raise NotOurs(f"it has no file {MARKER} and no steps")
    for name in names:
        if not _is_ours(name):
            if not is_marked:
                raise NotOurs(f"it has no file {MARKER}, but a file {name[:_MOST_NAME]!r} that no spool has")
            continue
        with suppress(FileNotFoundError):  # its session is alive and deletes what was acknowledged
            file = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if not stat.S_ISREG(file.st_mode) or file.st_nlink > 1 or file.st_uid != found.st_uid:
                raise NotOurs(f"its {name} is not a plain file of this user")
    if is_marked:
        marker = os.open(MARKER, os.O_RDONLY | _FILE_FLAGS, dir_fd=descriptor)
        try:
            text = os.read(marker, len(_MARKER_TEXT))
        finally:
            os.close(marker)
        if text != _MARKER_TEXT:
            raise NotOurs(f"its {MARKER} is not what this version writes")
    return is_marked
