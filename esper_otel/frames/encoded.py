"""Frames as bytes, for the store: everything that ``Frame`` holds, NaN and absent cells told apart."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from esper_otel.frames.frame import NARROW, NO_SEEDS, WIDTH, Frame, Run, SeedTable, checked_run

MOST_BYTES = 32 * 1024 * 1024  # more than a frame with 20,000 seeds takes
_LENGTH = struct.Struct("<I")
_LARGEST, _LARGEST_STORED = 2**64, 2**63 - 1


class DamagedFrame(Exception):
    """Bytes that ``frame_to_bytes`` cannot have written; the message says why."""


def frame_to_bytes(frame: Frame) -> bytes:
    """A header in JSON, then the cells of the recorded rows and of the live ones."""
    is_same = frame.live.cells is frame.seeds.cells and frame.live.ids == frame.seeds.ids
    header = {
        "run": _fields(frame.run),
        "sequence": frame.sequence,
        "global_step": frame.global_step,
        "epoch": frame.epoch,
        "time_unix_ns": frame.time_unix_ns,
        "recorded": dict(frame.recorded),
        "context": dict(frame.context),
        "seeds": frame.seeds.ids,
        "live": None if is_same else frame.live.ids,
        "retired": frame.retired,
        "columns": (frame.seeds.cells.shape[1], frame.live.cells.shape[1]),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    live = b"" if is_same else frame.live.cells.tobytes()
    return b"".join((_LENGTH.pack(len(text)), text, frame.seeds.cells.tobytes(), live))


@lru_cache(maxsize=4096)
def _fields(run: Run) -> dict[str, Any]:
    """As ``asdict``, which took a third of the time of storing a step."""
    return asdict(run)


def stored_time(time_unix_ns: int) -> int:
    """The time of a frame as a database has it, whose numbers are smaller."""
    return min(time_unix_ns, _LARGEST_STORED)


def time_of(content: bytes) -> int:
    """``stored_time`` of the frame that ``frame_to_bytes`` wrote; 0 of other bytes."""
    try:
        return stored_time(frame_from_bytes(content).time_unix_ns)
    except DamagedFrame:
        return 0


def frame_from_bytes(content: bytes) -> Frame:
    """The frame that ``frame_to_bytes`` wrote.

    Raises:
        DamagedFrame: the bytes are something else.
    """
    try:
        return _frame(content)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFrame(f"{type(error).__name__}: {str(error)[:200]}") from None


def _frame(content: bytes) -> Frame:
    if len(content) > MOST_BYTES:
        raise ValueError(f"{len(content)} bytes")
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + length
    text = content[_LENGTH.size : start]
    header = json.loads(text)
    if b"\\ud" in text:  # half a pair of surrogates cannot be sent to a puller
        json.dumps(header, ensure_ascii=False).encode()
    of_seeds, of_live = header.get("columns", (WIDTH, WIDTH))  # a file of an earlier version has all
    seeds = _table(header["seeds"], of_seeds, content, start)
    live = seeds
    if header["live"] is not None:
        live = _table(header["live"], of_live, content, start + seeds.cells.nbytes)
    return Frame(
        run=checked_run(header["run"]),
        sequence=_whole(header["sequence"], 2**53),
        global_step=_whole(header["global_step"], 2**64),
        epoch=_whole(header["epoch"], 2**64),
        time_unix_ns=_whole(header["time_unix_ns"], 2**64),
        names=tuple(header["recorded"]),
        numbers=tuple(_values(header["recorded"]).values()),
        context=_values(header["context"]),
        seeds=seeds,
        live=live,
        retired=tuple(_texts(header["retired"])),
    )


def _whole(number: Any, limit: int) -> int:
    if type(number) is not int or not 0 <= number < limit:
        raise ValueError(f"{str(number)[:40]} is not a whole number from 0 to below {limit}")
    return number


def _values(values: dict[str, Any]) -> dict[str, float]:
    for value in values.values():
        if type(value) is not float and not (type(value) is int and -_LARGEST < value < _LARGEST):
            raise ValueError("a value is not a number")
    return values


def _texts(texts: list[Any]) -> list[str]:
    if type(texts) is not list or not all(type(text) is str for text in texts):
        raise ValueError("a name is not a text")
    return texts


def _table(ids: list[Any], columns: int, content: bytes, start: int) -> SeedTable:
    if not _texts(ids):
        return NO_SEEDS
    if columns not in (NARROW, WIDTH):
        raise ValueError(f"{str(columns)[:40]} columns")
    cells = np.frombuffer(content, np.float64, len(ids) * columns, start).reshape(len(ids), columns)
    return SeedTable(tuple(ids), cells)
