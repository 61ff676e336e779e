"""Blocks of frames as bytes, for the store: everything that ``Frame`` holds, NaN and absent cells told apart.

A block begins with a checksum of the rest, then come the texts of its frames (runs, names, ids of seeds), each once,
and then the frames: a head of fixed size, the values, and the cells of the recorded rows and of the live ones.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from esper_otel.frames.frame import NARROW, NO_SEEDS, WIDTH, Frame, Run, SeedTable, checked_run

MOST_BYTES = 32 * 1024 * 1024  # more than a frame with 20,000 seeds takes
_CHECKSUM = struct.Struct("<I")
_COUNTS = struct.Struct("<II")  # of the texts, and of the frames
_LENGTH = struct.Struct("<I")
# Sequence, step, epoch and time; the texts of the run, the values' names, the context's names, the seeds' ids, the live
# ones' ids and the retired ones; the columns of both tables.
_HEAD = struct.Struct("<4Q6I2B")
_SAME = 2**32 - 1  # in place of the live ids: the live seeds are the recorded ones
_LARGEST_STORED = 2**63 - 1
_FEW_NAMES, _FEW_BYTES = 256, 16 * 1024  # texts that are kept


class DamagedFrame(Exception):
    """Bytes that ``frames_to_bytes`` cannot have written; the message says why."""


def frames_to_bytes(frames: Sequence[Frame]) -> bytes:
    """A block of frames."""
    texts: dict[bytes, int] = {}
    parts: list[bytes] = []

    def place(text: bytes) -> int:
        return texts.setdefault(text, len(texts))

    for frame in frames:
        seeds, live = frame.seeds, frame.live
        is_same = live.cells is seeds.cells and live.ids == seeds.ids
        numbers = (*frame.numbers, *frame.context.values())
        parts.append(
            _HEAD.pack(
                *(frame.sequence, frame.global_step, frame.epoch, frame.time_unix_ns),
                place(_run_text(frame.run)),
                place(_text(frame.names)),
                place(_text(tuple(frame.context))),
                place(_text(seeds.ids)),
                _SAME if is_same else place(_text(live.ids)),
                place(_text(frame.retired)),
                *(seeds.cells.shape[1], live.cells.shape[1]),
            )
        )
        parts.append(struct.pack(f"<{len(numbers)}d", *numbers))
        if seeds.ids:
            parts.append(seeds.cells.tobytes())
        if live.ids and not is_same:
            parts.append(live.cells.tobytes())
    content = b"".join(
        (
            _COUNTS.pack(len(texts), len(frames)),
            *(_LENGTH.pack(len(text)) + text for text in texts),
            *parts,
        )
    )
    return _CHECKSUM.pack(zlib.crc32(content)) + content


@lru_cache(maxsize=4096)
def _run_text(run: Run) -> bytes:
    return json.dumps(asdict(run), separators=(",", ":")).encode()


def _text(names: tuple[str, ...]) -> bytes:
    return _few_text(names) if len(names) <= _FEW_NAMES else _few_text.__wrapped__(names)


@lru_cache(maxsize=256)
def _few_text(names: tuple[str, ...]) -> bytes:
    return json.dumps(names, separators=(",", ":")).encode()


def stored_time(time_unix_ns: int) -> int:
    """The time of a frame as a database has it, whose numbers are smaller."""
    return min(time_unix_ns, _LARGEST_STORED)


def frames_from_bytes(content: bytes) -> list[Frame]:
    """The frames that ``frames_to_bytes`` wrote.

    Raises:
        DamagedFrame: the bytes are something else.
    """
    try:
        return _frames(content)
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise DamagedFrame(f"{type(error).__name__}: {str(error)[:200]}") from None


def _frames(content: bytes) -> list[Frame]:
    if len(content) > MOST_BYTES:
        raise ValueError(f"{len(content)} bytes")
    (checksum,) = _CHECKSUM.unpack_from(content)
    if zlib.crc32(memoryview(content)[_CHECKSUM.size :]) != checksum:
        raise ValueError("the checksum is another")
    count, frames = _COUNTS.unpack_from(content, _CHECKSUM.size)
    position = _CHECKSUM.size + _COUNTS.size
    texts: list[bytes] = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(content, position)
        position += _LENGTH.size + length
        texts.append(content[position - length : position])
    found = []
    for _ in range(frames):
        frame, position = _frame(content, position, texts)
        found.append(frame)
    if position != len(content):
        raise ValueError("there are bytes after its last frame")
    return found


def _frame(content: bytes, position: int, texts: list[bytes]) -> tuple[Frame, int]:
    sequence, step, epoch, time_unix_ns, run, names, context, ids, live, retired, of_seeds, of_live = _HEAD.unpack_from(
        content, position
    )
    position += _HEAD.size
    if sequence >= 2**53:
        raise ValueError(f"{sequence} is not the number of a frame")
    named, also = _names(texts[names]), _names(texts[context])
    numbers = struct.unpack_from(f"<{len(named) + len(also)}d", content, position)
    position += 8 * len(numbers)
    seeds, position = _table(texts[ids], of_seeds, content, position)
    lives = seeds
    if live != _SAME:
        lives, position = _table(texts[live], of_live, content, position)
    frame = Frame(
        run=_run(texts[run]),
        sequence=sequence,
        global_step=step,
        epoch=epoch,
        time_unix_ns=time_unix_ns,
        names=named,
        numbers=numbers[: len(named)],
        context=dict(zip(also, numbers[len(named) :], strict=True)),
        seeds=seeds,
        live=lives,
        retired=_names(texts[retired]),
    )
    return frame, position


@lru_cache(maxsize=4096)
def _run(text: bytes) -> Run:
    said = json.loads(text)
    _check_surrogates(text, said)
    return checked_run(said)


def _names(text: bytes) -> tuple[str, ...]:
    return _few_names(text) if len(text) <= _FEW_BYTES else _few_names.__wrapped__(text)


@lru_cache(maxsize=256)
def _few_names(text: bytes) -> tuple[str, ...]:
    names = json.loads(text)
    if type(names) is not list or not all(type(name) is str for name in names):
        raise ValueError("a name is not a text")
    _check_surrogates(text, names)
    return tuple(names)


def _check_surrogates(text: bytes, said: Any) -> None:
    """Raises ValueError for half a pair of surrogates, which cannot be sent to a puller."""
    if b"\\ud" in text:
        json.dumps(said, ensure_ascii=False).encode()


def _table(text: bytes, columns: int, content: bytes, start: int) -> tuple[SeedTable, int]:
    ids = _names(text)
    if not ids:
        return NO_SEEDS, start
    if columns not in (NARROW, WIDTH):
        raise ValueError(f"{columns} columns")
    cells = np.frombuffer(content, np.float64, len(ids) * columns, start).reshape(len(ids), columns)
    return SeedTable(ids, cells), start + cells.nbytes
