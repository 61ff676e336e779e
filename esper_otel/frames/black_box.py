"""Black box: the last steps of a run in a file, when it goes wrong; ``esper-otel report FILE`` reads it."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.frames.frame import FINE, Frame, Run
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings, announce
from esper_otel.text import printable

if TYPE_CHECKING:
    from esper_otel.settings import EsperSettings

VERSION = 1
SUFFIX = ".esper.jsonl.gz"

_MOST_BYTES = 64 * 1024 * 1024
_MOST_OF_A_NAME = 200  # bytes: file systems take 255, and suffixes follow
_WRITING_S = 1.0
_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_WORDS = {"NaN": math.nan} | {word: number for number, word in _NAMES.items()}

# What a file of ours has at most, for reading.
_MOST_OF_A_LINE = 32 * 1024 * 1024
_MOST_READ = _MOST_BYTES + _MOST_OF_A_LINE
_MOST_FRAMES = 100_000  # what black_box_frames may be
_MOST_BITS = 128
_MOST_PARTS = 1_000_000  # of a line: a step with as many seeds


class BlackBox:
    """Writes the newest frames of a ring to a file. Threads: any.

    Args:
        ring: the frames.
        run: whose they are, as it is known when they are written.
        settings: how many are written at most, and where to.
        about: attributes of the process, of which host and revision are written.
        warnings: says where a file is, and why one could not be written.
    """

    def __init__(
        self,
        ring: Ring,
        run: Callable[[], Run],
        settings: EsperSettings,
        about: Callable[[], Mapping[str, object]],
        warnings: Warnings,
    ) -> None:
        self._ring = ring
        self._settings = settings
        self._about = about
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
                    file.writelines(_lines(self._head(run, reason), frames))
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)  # what a full disk has taken of it
        except Exception as error:  # noqa: BLE001 - the run has ended, or goes on, as it would without us
            self._warnings.say("black box", "the black box could not be written: %s", error)
        else:
            what = f"last {len(frames)} steps are" if len(frames) > 1 else "last step is"
            announce("black box", f"{reason}; the {what} in {path}: esper-otel report {path}")

    def _head(self, run: Run, reason: str) -> dict[str, object]:
        about = self._about()
        return {
            "esper_otel": VERSION,
            "run_id": run.run_id,
            "attempt": run.attempt,
            "rank": run.rank,
            "world_size": run.world_size,
            "experiment": run.experiment,
            "device": run.device_id,
            "reason": reason,
            "written_unix_s": round(time.time(), 3),
            "host": str(about.get("host.name", "")),
            "revision": str(about.get("vcs.ref.head.revision", "")),
            "settings": self._settings.changed(),
        }


def file_stem(run_id: str, *others: object) -> str:
    """A file's name for some steps of a run. Of a long run id only the beginning is in it, of the others everything."""
    ending = "-".join(map(str, others))
    beginning = run_id.encode(errors="replace")[: _MOST_OF_A_NAME - len(ending.encode())].decode(errors="ignore")
    return re.sub(r"[^\w.-]+", "_", f"{beginning}-{ending}")


def _folder_of_ours() -> Path:
    """A folder for temporary files that no other user can have created, and that no other user can read."""
    user = unix.user_id()
    if user is None:  # as on Windows, where each user has a folder for temporary files
        return Path(tempfile.gettempdir()) / "esper-otel"
    folder = Path(tempfile.gettempdir()) / f"esper-otel-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != user:
        raise PermissionError(f"{folder} is not ours; set ESPER_BLACK_BOX_DIR")
    return folder


def _lines(head: Mapping[str, object], frames: list[Frame]) -> Iterator[str]:
    size, lines = 0, []
    for frame in reversed(frames):  # of very many seeds only the newest steps fit
        line = json.dumps(_row(frame), allow_nan=False) + "\n"
        if len(line) > _MOST_OF_A_LINE:
            break
        lines.append(line)
        size += len(line)
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
        ConfigurationError: it is not a black box, or cannot be read.
    """
    head, *rows = contents(path)
    return head, rows


def contents(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after another. The file may come from anybody: its size and all that is used of it are checked.

    Raises:
        ConfigurationError: it is not a black box, or cannot be read.
    """
    lines = 0
    try:
        with _opened(path) as file:
            for line in _bounded(file):
                lines += 1
                said = json.loads(line.decode())
                yield _checked_head(said) if lines == 1 else _checked_row(said)
    except _LaterFormat:
        raise ConfigurationError(f"{path} was written by a later version of esper_otel") from None
    except OSError as error:
        if error.strerror:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        raise _not_one(path, lines, error) from None
    except (EOFError, zlib.error, ValueError, OverflowError, RecursionError) as error:
        raise _not_one(path, lines, error) from None
    if not lines:
        raise _not_one(path, lines, EOFError("it is empty"))


class _LaterFormat(Exception):
    """The file has another format than this version knows."""


def _not_one(path: Path, lines: int, error: Exception) -> ConfigurationError:
    where = f"line {lines}: " if lines else ""
    why = "it is nested too deeply" if isinstance(error, RecursionError) else printable(error) or type(error).__name__
    return ConfigurationError(f"{path} is not a black box of esper_otel: {where}{why}")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a regular file, unpacked. Opening a pipe does not wait for its writer."""
    descriptor = os.open(path, os.O_RDONLY | unix.AT_ONCE)
    with os.fdopen(descriptor, "rb") as raw:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a plain file")
        if found.st_size > _MOST_READ:
            raise ValueError(f"it has {found.st_size} bytes, more than esper_otel writes")
        with gzip.open(raw, "rb") as file:
            yield cast("IO[bytes]", file)


def _bounded(file: IO[bytes]) -> Iterator[bytes]:
    """The lines, as many and as long as we write them. What a line takes in memory follows from its bytes."""
    size = 0
    for number in range(_MOST_FRAMES + 2):
        line = file.readline(_MOST_OF_A_LINE + 1)
        if not line:
            return
        size += len(line)
        if number > _MOST_FRAMES or len(line) > _MOST_OF_A_LINE or size > _MOST_READ:
            raise ValueError("it holds more than esper_otel writes")
        if line.count(b"{") + line.count(b"[") > _MOST_PARTS:
            raise ValueError("a line has too many parts")
        yield line


def _checked_head(said: object) -> dict[str, Any]:
    head = _mapping(said, "the first line")
    version = _whole(head, "esper_otel")
    if version > VERSION:
        raise _LaterFormat
    if version < VERSION:
        raise ValueError(f"'esper_otel' is {version}")
    numbers = {name: _whole(head, name) for name in ("attempt", "rank")}
    texts = {name: _text(head, name) for name in ("run_id", "reason")}
    return head | numbers | texts


def _checked_row(said: object) -> dict[str, Any]:
    row = _mapping(said, "the line")
    seeds = _mapping(row.get("seeds"), "'seeds'").items()
    return row | {
        "step": _whole(row, "step", 2**64),
        "epoch": _whole(row, "epoch"),
        "time_unix_ns": _whole(row, "time_unix_ns"),
        "values": _numbers(row.get("values"), "'values'"),
        "seeds": {seed_id: _numbers(cells, f"seed {printable(seed_id, 80)!r}") for seed_id, cells in seeds},
    }


def _mapping(said: object, what: str) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise ValueError(f"{what} is not an object with names and values")  # noqa: TRY004 - a fault of the file
    return said


def _whole(said: dict[str, Any], name: str, most: int = 2**63) -> int:
    value = said.get(name)
    if type(value) is not int or not 0 <= value < most:
        raise ValueError(f"{name!r} is {_briefly(value)}, not a whole number from 0 to below 2^{most.bit_length() - 1}")
    return value


def _text(said: dict[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_briefly(value)}, not text")  # noqa: TRY004 - a fault of the file
    return value


def _numbers(said: object, what: str) -> dict[str, float]:
    return {name: _number(value, name) for name, value in _mapping(said, what).items()}


def _number(value: object, name: str) -> float:
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    raise ValueError(f"{printable(name, 80)!r} is {_briefly(value)}, not a number")


def _briefly(value: object) -> str:
    """A value in a message; of a long one only what it is."""
    if value is None:
        return "missing"
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return "a number of too many digits"
    return printable(repr(value), 40)
