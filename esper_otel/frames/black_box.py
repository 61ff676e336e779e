"""Black box: the last steps of a run in a file, when it goes wrong; ``esper-otel report FILE`` reads it.

The file consists of the records of ``frames/records.py``. The first one is a line of JSON that says which run it is and
why the file was written, so that ``head -n 1 FILE`` shows it.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from esper_otel import unix
from esper_otel._version import __version__
from esper_otel.errors import ConfigurationError
from esper_otel.frames.block import Chunk
from esper_otel.frames.event_log import MOST_NEWEST, Event, checked_event
from esper_otel.frames.frame import FINE, NO_SEEDS, Frame, Run
from esper_otel.frames.records import (
    MAGIC_BYTES,
    MOST_BYTES,
    Damage,
    RecordWriter,
    StoredContext,
    chunks_in,
    is_of_another_version,
)
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings, announce
from esper_otel.schema.who import device_in_words, location_in_words
from esper_otel.text import printable

if TYPE_CHECKING:
    from esper_otel.settings import EsperSettings

SUFFIX = ".esper.steps"

_MOST_ROW_BYTES = 64 * 1024 * 1024
_MOST_OF_A_NAME = 200  # bytes: file systems take 255, and suffixes follow
_WRITING_S = 1.0

# What a file of ours has at most, for reading: its rows, and the names and ids that they refer to.
_MOST_FILE_BYTES = _MOST_ROW_BYTES + MOST_BYTES
_MOST_FRAMES = 100_000  # what black_box_frames may be
_MOST_BITS = 128
_GZIP = b"\x1f\x8b"


class BlackBox:
    """Writes the newest frames of a ring to a file. Threads: any.

    Args:
        ring: the frames.
        run: whose they are, as it is known when they are written.
        settings: how many are written at most, and where to.
        about: attributes of the process and of its device, which say who it is.
        events: the newest events of the session, which are written, too.
        units: units of the user's own metrics, by name.
        warnings: where it is logged that a file could not be written.
    """

    def __init__(
        self,
        ring: Ring,
        run: Callable[[], Run],
        settings: EsperSettings,
        about: Callable[[], Mapping[str, object]],
        events: Callable[[], Sequence[Event]],
        units: Mapping[str, str],
        warnings: Warnings,
    ) -> None:
        self._ring = ring
        self._settings = settings
        self._about = about
        self._events = events
        self._units = units
        self._run = run
        self._frames = settings.black_box_frames
        self._folder = settings.black_box_dir
        self._warnings = warnings
        self._has_alarmed = False
        self._alarm: threading.Thread | None = None

    def loss_is_not_finite(self) -> None:
        """The first such loss of a session: written by a thread, since training goes on."""
        if not self._has_alarmed and self._frames:
            self._has_alarmed = True
            self._alarm = self._started("loss not finite")

    def ended(self, outcome: str) -> None:
        """Writes the file if a session ends by an error; waits a second at most for one that is being written."""
        if self._alarm is not None:
            self._alarm.join(_WRITING_S)
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
            rows = _newest(self._ring, self._frames)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}.new")
            private = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                with os.fdopen(private, "wb") as file:
                    records = RecordWriter()
                    file.write(records.about(self._head(run, reason)))
                    file.writelines(records.row(chunk, row) for chunk, row in rows)
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)  # what a full disk has taken of it
        except Exception as error:  # noqa: BLE001 - the run has ended, or goes on, as it would without us
            self._warnings.say("black box", "the black box could not be written: %s", error)
        else:
            what = f"last {len(rows)} steps are" if len(rows) > 1 else "last step is"
            announce("black box", f"{reason}; the {what} in {path}: esper-otel report {path}")

    def _head(self, run: Run, reason: str) -> dict[str, object]:
        about = self._about()
        return {
            "esper_otel": __version__,
            "run_id": run.run_id,
            "attempt": run.attempt,
            "rank": run.rank,
            "world_size": run.world_size,
            "experiment": run.experiment,
            "device": run.device_id,
            "hardware": device_in_words(about),
            "location": location_in_words(about),
            "reason": reason,
            "written_unix_s": round(time.time(), 3),
            "host": str(about.get("host.name", "")),
            "revision": str(about.get("vcs.ref.head.revision", "")),
            "settings": self._settings.changed(),
            "units": self._units,
            "events": self._events(),
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


def _newest(ring: Ring, count: int) -> list[tuple[Chunk, int]]:
    """Returns the newest rows of a ring, oldest first; of very many seeds only as many rows as a file may have."""
    rows: list[tuple[Chunk, int]] = []
    size, sequence = 0, ring.last
    while len(rows) < count:
        chunk = ring.chunk_of(sequence)
        if chunk is None or sequence < chunk.first:
            break
        size += chunk.row_size(sequence - chunk.first)
        if size > _MOST_ROW_BYTES:
            break
        rows.append((chunk, sequence - chunk.first))
        sequence -= 1
    return rows[::-1]


class BoxContent(NamedTuple):
    """The content of a black box.

    Attributes:
        about: the run, and why the file was written.
        frames: the steps, oldest first. Their live seeds are not known, only how many there are.
        damage: the parts of the file that could not be read.
        is_torn: whether the file ends in the middle of a step.
    """

    about: Mapping[str, Any]
    frames: Sequence[Frame]
    damage: Sequence[Damage]
    is_torn: bool

    @property
    def events(self) -> list[Event]:
        """The newest events, oldest first, without any that esper_otel cannot have written."""
        said = self.about.get("events")
        found: list[Event] = []
        for each in said[:MOST_NEWEST] if isinstance(said, list) else ():
            with suppress(ValueError, TypeError):
                found.append(checked_event(each))
        return found


def read(path: Path) -> BoxContent:
    """Reads a file. It may come from anybody: its size and all that is used of it are checked.

    Raises:
        ConfigurationError: it is not a black box, cannot be read, or was written by another version.
    """
    try:
        content = _content(path)
        beginning = content[:MAGIC_BYTES]
        if is_of_another_version(beginning) or beginning.startswith(_GZIP):
            raise ConfigurationError(
                f"{path} was written by another version of esper_otel: read it with the report of that one"
            )
        stored = StoredContext()
        frames = list(_frames(content, stored))
        return BoxContent(_checked(stored.about), frames, stored.damage, stored.is_torn)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not a black box of esper_otel: {printable(error)}") from None


def _content(path: Path) -> bytes:
    """Reads a regular file of limited size. Opening a pipe does not wait for its writer."""
    descriptor = os.open(path, os.O_RDONLY | unix.AT_ONCE)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a plain file")
        if found.st_size > _MOST_FILE_BYTES:
            raise ValueError(f"it has {found.st_size} bytes, more than esper_otel writes")
        return file.read(found.st_size)


def _frames(content: bytes, stored: StoredContext) -> Iterator[Frame]:
    count = 0
    for chunk in chunks_in(content, stored):
        count += chunk.rows
        if count > _MOST_FRAMES:
            raise ValueError("it holds more than esper_otel writes")
        for row in range(chunk.rows):
            frame = chunk.frame(row, NO_SEEDS)
            yield frame._replace(context={"esper.seeds": float(chunk.live_count(row)), **frame.context})


def _checked(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Checks what must be known of the run."""
    if not about:
        raise ValueError("it does not begin with what it is about")
    for name in ("attempt", "rank"):
        value = about.get(name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{name!r} is {_briefly(value)}, not a whole number from 0 to below 2^63")
    for name in ("run_id", "reason"):
        if not isinstance(about.get(name), str):
            raise ValueError(f"{name!r} is {_briefly(about.get(name))}, not text")  # noqa: TRY004 - a fault of the file
    return about


def _briefly(value: object) -> str:
    """A value in a message; of a long one only what it is."""
    if value is None:
        return "missing"
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return "a number of too many digits"
    return printable(repr(value), 40)
