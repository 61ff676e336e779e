"""Black box: the last steps of a run in a file, when it goes wrong; ``esper-otel report FILE`` reads it."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper_otel.errors import ConfigurationError
from esper_otel.frame import FINE, Frame, Run
from esper_otel.log import Warnings, announce
from esper_otel.ring import Ring

if TYPE_CHECKING:
    from esper_otel.settings import EsperSettings

VERSION = 1
SUFFIX = ".esper.jsonl.gz"

_MOST_BYTES = 64 * 1024 * 1024
_MOST_OF_A_NAME = 200  # bytes: file systems take 255, and suffixes follow
_WRITING_S = 1.0
_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}


class BlackBox:
    """Writes the newest frames of a ring to a file. Threads: any.

    Args:
        ring: the frames.
        run: whose they are, as it is known when they are written.
        settings: how many are written at most, and where to.
        warnings: says where a file is, and why one could not be written.
    """

    def __init__(self, ring: Ring, run: Callable[[], Run], settings: EsperSettings, warnings: Warnings) -> None:
        self._ring = ring
        self._run = run
        self._frames = settings.black_box_frames
        self._folder = settings.black_box_dir
        self._warnings = warnings
        self._has_alarmed = False

    def loss_is_not_finite(self) -> None:
        """The first such loss of a session: written by a thread, since training goes on."""
        if not self._has_alarmed and self._frames:
            self._has_alarmed = True
            self._started("loss not finite")

    def ended(self, outcome: str) -> None:
        """The end of a session; written when it went wrong, and waited for a second at most."""
        if outcome not in FINE and self._frames and self._ring.last:
            self._started(outcome).join(_WRITING_S)

    def _started(self, reason: str) -> threading.Thread:
        thread = threading.Thread(target=self._write, args=(reason,), name="esper-otel-black-box", daemon=True)
        thread.start()
        return thread

    def _write(self, reason: str) -> None:
        run = self._run()
        path = Path(f"{file_stem(run.run_id, run.rank, run.attempt, reason)}{SUFFIX}")
        try:
            path = (self._folder or _folder_of_ours()) / path
            frames, _ = self._ring.after(self._ring.last - self._frames, self._frames)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}.new")
            private = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                with os.fdopen(private, "wb") as raw, gzip.open(raw, "wt", encoding="utf-8", compresslevel=1) as file:
                    file.writelines(_lines(run, reason, frames))
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)  # what a full disk has taken of it
        except Exception as error:  # noqa: BLE001 - the run has ended, or goes on, as it would without us
            self._warnings.say("black box", "the black box could not be written: %s", error)
        else:
            announce("black box", f"{reason}; the last {len(frames)} steps are in {path}: esper-otel report {path}")


def file_stem(run_id: str, *others: object) -> str:
    """A file's name for some steps of a run. Of a long run id only the beginning is in it, of the others everything."""
    ending = "-".join(map(str, others))
    beginning = run_id.encode(errors="replace")[: _MOST_OF_A_NAME - len(ending.encode())].decode(errors="ignore")
    return re.sub(r"[^\w.-]+", "_", f"{beginning}-{ending}")


def _folder_of_ours() -> Path:
    """A folder for temporary files that nobody else can have put there, or can look into."""
    folder = Path(tempfile.gettempdir()) / f"esper-otel-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is not ours; set ESPER_BLACK_BOX_DIR")
    return folder


def _lines(run: Run, reason: str, frames: list[Frame]) -> Iterator[str]:
    head = {
        "esper_otel": VERSION,
        "run_id": run.run_id,
        "attempt": run.attempt,
        "rank": run.rank,
        "world_size": run.world_size,
        "experiment": run.experiment,
        "device": run.device_id,
        "reason": reason,
        "written_unix_s": round(time.time(), 3),
    }
    size, lines = 0, []
    for frame in reversed(frames):  # of very many seeds only the newest steps fit
        lines.append(json.dumps(_row(frame), allow_nan=False) + "\n")
        size += len(lines[-1])
        if size > _MOST_BYTES:
            break
    yield json.dumps(head) + "\n"
    yield from reversed(lines)


def _row(frame: Frame) -> dict[str, Any]:
    return {
        "step": frame.global_step,
        "epoch": frame.epoch,
        "time_unix_ns": frame.time_unix_ns,
        "values": _plain(frame.values()),
        "seeds": {seed_id: _plain(cells) for seed_id, cells in frame.seeds.rows()},
        "retired": list(frame.retired),
    }


def _plain(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they are words, since missing is something else."""
    return {name: v if math.isfinite(v) else _NAMES.get(v, "NaN") for name, v in values.items()}


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a file holds: its head, and a row for each step, with NaN and infinity as numbers again.

    Raises:
        ConfigurationError: it is no such file, or cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            head, *rows = (json.loads(line) for line in file)
        if head["esper_otel"] != VERSION:
            raise ConfigurationError(f"{path} was written by a later version of esper_otel")
        for row in rows:
            row["values"] = {name: float(value) for name, value in row["values"].items()}
            row["seeds"] = {
                seed_id: {field: float(value) for field, value in cells.items()}
                for seed_id, cells in row["seeds"].items()
            }
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is no black box of esper_otel: {str(error) or type(error).__name__}"
        ) from None
    return head, rows
