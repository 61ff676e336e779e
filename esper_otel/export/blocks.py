"""Groups consecutive frames with the same metrics and seeds into blocks, whose values are matrices."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import ABSENT_BITS, FLOAT32_BOUND, LAST_LOSS, Frame, SeedTable, alike
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE

_MAX_FRAMES = 1_000
_MAX_ROWS = 4_000  # seed rows in a block; a block copies the seed tables of its frames

COUNTED = (
    *("esper.global_step", "esper.epoch", "esper.seeds", "esper.seeds.digest"),
    *(FRAME_SEQUENCE.name, FRAME_POINTS.name),
)

_Values = npt.NDArray[np.float64]


class Block(NamedTuple):
    """Consecutive frames of one run that record the same metrics and the same seeds.

    Only the first frame of a block may retire seeds.

    Attributes:
        frames: the frames.
        names: names of the step values.
        values: the step values, shape (frames, names), float64.
        ids: ids of the recorded seeds.
        cells: the seeds' cells, shape (frames, seeds, columns), float64; the widest table sets the number of columns.
        present: mask of the cells that have a value, same shape as ``cells``.
        retired: the seeds that were retired before each of the frames.
        points: how many points each frame is encoded as, shape (frames,).
    """

    frames: Sequence[Frame]
    names: tuple[str, ...]
    values: _Values
    ids: tuple[str, ...]
    cells: _Values
    present: npt.NDArray[np.bool_]
    retired: tuple[str, ...]
    points: npt.NDArray[np.int64]


def blocks(frames: Iterable[Frame], known: Collection[str]) -> Iterator[Block]:
    """Yields the frames in blocks, in order. Each row holds the same values as ``Frame.values`` of that frame.

    Args:
        frames: the frames.
        known: names of the metrics that may be sent; values with other names are left out.
    """
    alike: list[Frame] = []
    beside: list[Mapping[str, float]] = []
    key: object = None
    had_loss = False
    names: tuple[str, ...] = ()
    loss_place: int | None = None
    for frame in frames:
        others = _others(frame)
        if frame.names is not names:
            names = frame.names
            loss_place = names.index("loss") if "loss" in names else None
        loss = others.get("loss", FLOAT32_BOUND) if loss_place is None else frame.numbers[loss_place]
        has_loss = -FLOAT32_BOUND < loss < FLOAT32_BOUND  # a finite loss is also the last finite loss
        ids = frame.seeds.ids
        like = (frame.run, names, tuple(others), ids, has_loss, frame.retired)
        if like != key or frame.retired or len(alike) == _MAX_FRAMES or len(alike) * len(ids) > _MAX_ROWS:
            if alike:
                yield _block(alike, beside, known, has_loss=had_loss)
            alike, beside, key, had_loss = [], [], like, has_loss
        alike.append(frame)
        beside.append(others)
    if alike:
        yield _block(alike, beside, known, has_loss=had_loss)


def _others(frame: Frame) -> Mapping[str, float]:
    """Returns the values that the trainer did not record itself: derived values, context, readings of probes."""
    if not frame.context and not frame.probed:
        return frame.derived
    return {**frame.derived, **frame.context, **frame.probed}


def _block(frames: list[Frame], beside: list[Mapping[str, float]], known: Collection[str], *, has_loss: bool) -> Block:
    first = frames[0]
    others = tuple(beside[0])
    there = (*others, *first.names)
    # A recorded value replaces a derived one of the same name.
    place = {name: column for column, name in enumerate(there) if name in known}
    if has_loss:
        place[LAST_LOSS] = place["loss"]
    place.update({name: column for column, name in enumerate(COUNTED, len(there))})
    row = struct.Struct(f"={len(there) + len(COUNTED)}d").pack
    rows = [
        row(*values.values(), *frame.numbers, frame.global_step, frame.epoch, *living, frame.sequence, 0.0)
        for frame, values, living in zip(frames, beside, _living(frames), strict=True)
    ]
    given = np.frombuffer(b"".join(rows)).reshape(len(frames), -1)[:, list(place.values())]
    ids = first.seeds.ids
    points = np.full(len(frames), len(place) + len(first.retired))
    cells = _side_by_side([frame.seeds for frame in frames])
    present = cells.view(np.uint64) != ABSENT_BITS
    if ids:
        points += np.count_nonzero(present.reshape(len(frames), -1), axis=1)
    given[:, [*place].index(FRAME_POINTS.name)] = points
    return Block(frames, tuple(place), given, ids, cells, present, first.retired, points)


def _living(frames: Iterable[Frame]) -> Iterator[tuple[int, int]]:
    """Yields, for each frame, how many seeds are alive after it and the digest of their ids."""
    ids: tuple[str, ...] = ()
    count = digest = 0
    for frame in frames:
        if frame.live.ids is not ids:  # the set of live seeds rarely changes
            ids = frame.live.ids
            count, digest = len(ids), digest_of(ids)
        yield count, digest


def _side_by_side(tables: list[SeedTable]) -> _Values:
    """Stacks the cells of tables with the same seeds into an array of shape (tables, seeds, columns)."""
    all_cells = [table.cells for table in alike(*tables)]
    is_by_field = not all_cells[0].flags.c_contiguous  # stored column by column, as the values were given
    try:
        content = b"".join([(cells.T if is_by_field else cells).data for cells in all_cells])
    except TypeError:  # the tables have different memory layouts, so at least one is not contiguous
        content, is_by_field = b"".join([cells.tobytes() for cells in all_cells]), False
    seeds, columns = all_cells[0].shape
    if is_by_field:
        return np.frombuffer(content).reshape(len(tables), columns, seeds).transpose(0, 2, 1)
    return np.frombuffer(content).reshape(len(tables), seeds, columns)
