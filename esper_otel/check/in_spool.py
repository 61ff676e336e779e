"""Checks the directory of ``ESPER_SPOOL_DIR``: whether a session can keep its steps there until they are taken."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from esper_otel import unix
from esper_otel.check.stages import CheckStage
from esper_otel.errors import ConfigurationError
from esper_otel.export.folder import MARKER, Folder

_LEAST_BYTES = 32 * 1024 * 1024  # of room: the smallest spool that can be set
_MIB, _GIB = 1024**2, 1024**3
_FIX = "give a directory on a local disk of this machine in ESPER_SPOOL_DIR that can be written to"


def in_spool(directory: Path, most_bytes: int) -> CheckStage:
    """Makes a folder as a session would, and removes it. Nothing is left in the directory, and it is not made.

    Args:
        directory: the setting ``spool_dir``.
        most_bytes: the setting ``spool_bytes``.
    """
    path = directory.absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    folder = None
    try:
        unix.demand("ESPER_SPOOL_DIR", "without it, steps wait in memory")
        folder = Path(tempfile.mkdtemp(prefix=".esper-otel-check-", dir=existing))
        Folder.create(folder).remove()
        free_bytes = shutil.disk_usage(folder).free
    except (OSError, ConfigurationError) as error:
        reason = getattr(error, "strerror", None) or error
        return CheckStage("spool", False, f"{existing}: {reason}", _FIX)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    room = f"{free_bytes / _GIB:.1f} GiB are free, of which a spool uses up to {most_bytes / _GIB:.1f} GiB"
    if free_bytes < _LEAST_BYTES:
        return CheckStage("spool", False, f"{path}: only {free_bytes / _MIB:.1f} MiB are free", f"make room, or {_FIX}")
    made = "steps can be kept" if existing == path else f"it does not exist yet and can be made in {existing}"
    there = sum(1 for _ in path.glob(f"*/{MARKER}"))
    left = f"; sessions that run, or have left steps for the next start: {there}" if there else ""
    return CheckStage("spool", True, f"{path}: {made}, {room}{left}")
