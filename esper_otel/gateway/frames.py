"""Frames as bytes, for the store: everything that ``Frame`` holds, NaN and absent cells told apart."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict

import numpy as np

from esper_otel.frame import NO_SEEDS, WIDTH, Frame, Run, SeedTable

_LENGTH = struct.Struct("<I")


def frame_to_bytes(frame: Frame) -> bytes:
    """A header in JSON, then the cells of the recorded rows and of the live ones."""
    is_same = frame.live.cells is frame.seeds.cells and frame.live.ids == frame.seeds.ids
    header = {
        "run": asdict(frame.run),
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


def frame_from_bytes(content: bytes) -> Frame:
    """The frame that ``frame_to_bytes`` wrote."""
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + length
    header = json.loads(content[_LENGTH.size : start])
    of_seeds, of_live = header.get("columns", (WIDTH, WIDTH))  # a file of an earlier version has all
    seeds = _table(header["seeds"], of_seeds, content, start)
    live = seeds
    if header["live"] is not None:
        live = _table(header["live"], of_live, content, start + seeds.cells.nbytes)
    return Frame(
        run=Run(**header["run"]),
        sequence=header["sequence"],
        global_step=header["global_step"],
        epoch=header["epoch"],
        time_unix_ns=header["time_unix_ns"],
        names=tuple(header["recorded"]),
        numbers=tuple(header["recorded"].values()),
        context=header["context"],
        seeds=seeds,
        live=live,
        retired=tuple(header["retired"]),
    )


def _table(ids: list[str], columns: int, content: bytes, start: int) -> SeedTable:
    if not ids:
        return NO_SEEDS
    cells = np.frombuffer(content, np.float64, len(ids) * columns, start).reshape(len(ids), columns)
    return SeedTable(tuple(ids), cells)
