"""Keeps what could not be read of a store or a spool in a folder of limited size, so that it can be examined."""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from esper_otel import unix

FOLDER = "damaged"
MOST_FILES = 1_000
MOST_BYTES = 64 * 1024 * 1024


class Quarantine:
    """Keeps damaged data in files up to a limit; once the limit is reached, further data is not kept.

    Args:
        folder: the folder of the store, or the spool directory; the data is kept in a folder in it.
    """

    def __init__(self, folder: Path) -> None:
        self.path: Path = folder / FOLDER
        self._files = self._bytes = -1  # not known yet

    def put(self, kind: str, content: bytes) -> str:
        """Writes the content to a new file and returns its name; an empty text when it cannot be kept."""
        try:
            descriptor = self._opened()
        except OSError:
            return ""
        try:
            if self._files < 0:
                self._look(descriptor)
            if self._files >= MOST_FILES or self._bytes + len(content) > MOST_BYTES:
                return ""
            name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{kind}-{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | unix.FILE
            with os.fdopen(os.open(name, flags, 0o600, dir_fd=descriptor), "wb") as file:
                file.write(content)
        except OSError:
            return ""
        finally:
            os.close(descriptor)
        self._files += 1
        self._bytes += len(content)
        return name

    def _opened(self) -> int:
        """Opens the folder, and makes it if needed; raises OSError also when others may write to it."""
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        descriptor = os.open(self.path, os.O_RDONLY | unix.FOLDER_ITSELF)
        found = os.fstat(descriptor)
        if found.st_uid != unix.user_id() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.close(descriptor)
            raise OSError(f"{self.path} belongs to another user, or others can write to it")
        return descriptor

    def _look(self, descriptor: int) -> None:
        """Counts the files of earlier processes."""
        with os.scandir(descriptor) as found:
            sizes = [each.stat(follow_symlinks=False).st_size for each in found]
        self._files, self._bytes = len(sizes), sum(sizes)
