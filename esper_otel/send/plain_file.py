"""Plain files that may come from anybody: a pipe does not block, and is not read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from esper_otel import unix

_BINARY = getattr(os, "O_BINARY", 0)  # on Windows


def opened(path: Path, *, follow: bool = True) -> BinaryIO:
    """Opens a plain file for reading.

    Args:
        path: the file.
        follow: whether it may be a link.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    file = os.open(path, os.O_RDONLY | _BINARY | (unix.AT_ONCE if follow else unix.FILE))
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError("it is not a plain file")  # noqa: TRY301 - the descriptor is closed below
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise
