"""Frames for tests: one made by hand, and hypothesis strategies for any that a session can publish."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from esper_otel.frames import records
from esper_otel.frames.block import Block, Chunk
from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import ABSENT, ABSENT_BITS, NARROW, NO_SEEDS, WIDTH, Frame, Run, SeedTable
from esper_otel.frames.layout import Layout
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.records import RecordWriter, StoredContext
from esper_otel.frames.ring import Ring
from esper_otel.schema import OWN_STEP, SEED_FIELDS, STEP_METRICS, Stage

RUN = Run("digits-7", 1_790_000_000_000)
TIME_UNIX_NS = 1_790_000_000_000_000_000

# What ``Frame.values`` adds by itself.
_COUNTED = {"esper.global_step", "esper.epoch", "esper.seeds", "esper.seeds.digest"}


def seed_table(rows: Mapping[str, Mapping[str, float]], *, order: Literal["C", "F"] = "C") -> SeedTable:
    """A table from cells by seed id and field, as wide as it needs to be; what is not given is absent."""
    is_narrow = all(field in SEED_FIELDS[:NARROW] for given in rows.values() for field in given)
    cells = np.full((len(rows), NARROW if is_narrow else WIDTH), ABSENT, order=order)
    for row, given in enumerate(rows.values()):
        for field, cell in given.items():
            cells[row, SEED_FIELDS.index(field)] = cell
    cells.flags.writeable = False
    return SeedTable(tuple(rows), cells)


def make_frame(**overrides: Any) -> Frame:
    """Step 1, with a loss of 2.5 and one seed; fields of ``Frame``, or ``recorded``, may be given instead."""
    seeds = seed_table({"seed-1": {"stage": Stage.TRAINING, "alpha": 0.0}})
    fields: dict[str, Any] = {
        "run": RUN,
        "sequence": 1,
        "global_step": 1,
        "epoch": 0,
        "time_unix_ns": TIME_UNIX_NS,
        "context": {},
        "seeds": seeds,
        "live": seeds,
    }
    recorded = overrides.pop("recorded", {"loss": 2.5})
    return Frame(names=tuple(recorded), numbers=tuple(recorded.values()), **fields | overrides)


def with_recorded(frame: Frame, values: Mapping[str, float]) -> Frame:
    """The frame with further values recorded, or other ones."""
    recorded = {**frame.recorded, **values}
    return frame._replace(names=tuple(recorded), numbers=tuple(recorded.values()))


def append(ring: Ring, frame: Frame) -> None:
    """Adds the frame to a ring, as the publisher adds a step. It gets the next sequence number."""
    beside = (frame.derived, frame.context, frame.probed)
    layout = _layout(tuple(frame.derived), tuple(frame.context), tuple(frame.probed), frame.names)
    numbers = (*(value for values in beside for value in values.values()), *frame.numbers)
    head = (frame.run, frame.global_step, frame.epoch, frame.time_unix_ns)
    ring.append(*head, layout, numbers, frame.seeds, frame.live, frame.retired)


@lru_cache(maxsize=64)
def _layout(*names: tuple[str, ...]) -> Layout:
    return Layout(*names)


def records_of(writer: RecordWriter, frames: Sequence[Frame]) -> list[bytes]:
    """The records that a session writes of these frames, whose numbers follow each other."""
    ring = Ring(2**24)
    ring.last = frames[0].sequence - 1 if frames else 0
    for frame in frames:
        append(ring, frame)
    return [writer.row(chunk, row) for chunk in ring._chunks for row in range(chunk.rows)]


def taken_apart(content: bytes) -> list[bytes]:
    """The contents of the records of a file, or of a block of a store."""
    return [content[start:end] for start, end in records._records(content, StoredContext())]


def sealed(contents: Sequence[bytes]) -> bytes:
    """Records with these contents and right checksums: what another program could write."""
    return b"".join(map(records._record, contents))


def block_of(frames: Sequence[Frame]) -> bytes:
    """A block of a gateway's store with these frames."""
    writer = RecordWriter()
    return b"".join(map(writer.frame, frames))


def rows_in(chunk: Chunk) -> list[object]:
    """What the blocks of a chunk say of each of its rows."""
    said: list[object] = []
    while len(said) < chunk.rows:
        said += rows_of(chunk.block(len(said), chunk.rows))
    return said


def rows_of(block: Block) -> list[object]:
    """What a block says of each of its rows."""
    said: list[object] = []
    for row in range(block.rows):
        values = {
            name: struct.pack("<d", value)
            for name, value in zip(block.names, block.values[row].tolist(), strict=True)
            if struct.pack("<d", value) != struct.pack("<Q", ABSENT_BITS)
        }
        cells = dict(SeedTable(block.ids, np.ascontiguousarray(block.cells[row])).rows())
        seeds = {seed_id: repr(sorted(of_seed.items())) for seed_id, of_seed in cells.items() if of_seed}
        head = (block.run, block.first + row, int(block.steps[row]), int(block.epochs[row]), int(block.times[row]))
        living = (int(block.lives[row]), int(block.digests[row]))
        said.append((*head, values, seeds, living, block.retired.get(row, ())))
    return said


def said_by(frame: Frame) -> object:
    """The same of a frame."""
    values = {**frame.derived, **frame.context, **frame.probed, **frame.recorded}
    seeds = {seed_id: repr(sorted(cells.items())) for seed_id, cells in frame.seeds.rows() if cells}
    head = (frame.run, frame.sequence, frame.global_step, frame.epoch, frame.time_unix_ns)
    living = (len(frame.live.ids), digest_of(frame.live.ids))
    packed = {name: struct.pack("<d", value) for name, value in values.items()}
    return (*head, packed, seeds, living, frame.retired)


@st.composite
def lives(draw: st.DrawFn, *, max_size: int = 12) -> list[Frame]:
    """Frames that follow each other in which seeds begin, go on and end as in a session."""
    live = LiveSeeds()
    made = []
    for number in range(1, draw(st.integers(1, max_size)) + 1):
        retired = live.retire(draw(st.lists(st.sampled_from("abcd"), unique=True)))
        rows = draw(st.dictionaries(st.sampled_from("abcd"), _cells(), max_size=4))
        step = live.step(seed_table(rows) if draw(st.booleans()) else NO_SEEDS)
        live.commit(step)
        fixed = {"sequence": number, "run": RUN, "seeds": step.recorded, "live": live.table, "retired": retired}
        made.append(draw(frames(**fixed)))
    return made


def seed_ids() -> st.SearchStrategy[str]:
    """Valid seed ids, short ones."""
    return st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


def numbers() -> st.SearchStrategy[float]:
    """Any double: NaN, infinities, both zeros, subnormal ones."""
    return st.floats() | st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 5e-324])


@st.composite
def _cells(draw: st.DrawFn) -> dict[str, float]:
    cells = draw(st.dictionaries(st.sampled_from(SEED_FIELDS), numbers(), max_size=6))
    if "stage" in cells:
        cells["stage"] = float(draw(st.sampled_from(Stage)))
    if cells.get("stage") != Stage.BLENDING:
        cells.pop("alpha_steps", None)
    return cells


@st.composite
def frames(draw: st.DrawFn, /, **fixed: Any) -> Frame:
    """A frame as a session may publish it; fields of ``Frame`` may be fixed."""
    live = draw(st.dictionaries(seed_ids() | st.sampled_from(["a", "b"]), _cells(), max_size=4))
    recorded = [seed_id for seed_id in live if draw(st.booleans())]
    step_names = st.sampled_from([metric.name for metric in STEP_METRICS])
    own_names = st.sampled_from([metric.name for metric in OWN_STEP if metric.name not in _COUNTED])
    drawn: dict[str, Any] = {
        "sequence": draw(st.integers(1, 2**31)),
        "global_step": draw(st.integers(0, 2**53)),
        "epoch": draw(st.integers(0, 10_000)),
        "time_unix_ns": draw(st.integers(1, 2**63 - 1)),
        "recorded": draw(st.dictionaries(step_names, numbers(), max_size=8)),
        "context": draw(st.dictionaries(own_names, numbers(), max_size=3)),
        "seeds": seed_table({seed_id: live[seed_id] for seed_id in recorded}, order=draw(st.sampled_from("CF"))),
        "live": seed_table(live),
        "retired": tuple(draw(st.lists(seed_ids() | st.sampled_from(["a", "b"]), max_size=2, unique=True))),
    }
    return make_frame(**drawn | fixed)


@st.composite
def histories(draw: st.DrawFn, *, max_size: int = 5) -> list[Frame]:
    """Frames that follow each other, of one rank's attempt; its device becomes known on the way."""
    drawn = draw(st.lists(frames(), max_size=max_size))
    known_from = draw(st.integers(0, max_size))
    on_device = replace(RUN, device_type="cuda", device_id="cuda:0")
    return [
        frame._replace(
            run=on_device if position >= known_from else RUN,
            sequence=position + 1,
            time_unix_ns=TIME_UNIX_NS + position * 1_000_000,
        )
        for position, frame in enumerate(drawn)
    ]
