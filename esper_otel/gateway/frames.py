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
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    live = b"" if is_same else frame.live.wide().cells.tobytes()
    return b"".join((_LENGTH.pack(len(text)), text, frame.seeds.wide().cells.tobytes(), live))


def frame_from_bytes(content: bytes) -> Frame:
    """The frame that ``frame_to_bytes`` wrote."""
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + length
    header = json.loads(content[_LENGTH.size : start])
    seeds = _table(header["seeds"], content, start)
    live = seeds
    if header["live"] is not None:
        live = _table(header["live"], content, start + seeds.cells.nbytes)
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


def _table(ids: list[str], content: bytes, start: int) -> SeedTable:
    if not ids:
        return NO_SEEDS
    cells = np.frombuffer(content, np.float64, len(ids) * WIDTH, start).reshape(len(ids), WIDTH)
    return SeedTable(tuple(ids), cells)
