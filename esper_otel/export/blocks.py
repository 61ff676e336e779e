"""Completes a block for export: the values that are counted, and how many points each frame is."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.block import Block
from esper_otel.frames.frame import ABSENT, ABSENT_BITS, FLOAT32_BOUND, LAST_LOSS
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE

COUNTED = (
    *("esper.global_step", "esper.epoch", "esper.seeds", "esper.seeds.digest"),
    *(FRAME_SEQUENCE.name, FRAME_POINTS.name),
)


class Points(NamedTuple):
    """A block with all its points.

    Attributes:
        names: names of the step values.
        values: the step values, shape (frames, names), float64.
        there: mask of the values that there are, same shape as ``values``.
        present: mask of the cells that there are, same shape as the block's ``cells``.
        counts: how many points each frame is encoded as, shape (frames,).
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    there: npt.NDArray[np.bool_]
    present: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.int64]


def points_of(block: Block, known: Collection[str]) -> Points:
    """Returns the points of a block. Each row holds the same values as ``Frame.values`` of that frame.

    Args:
        block: the frames.
        known: names of the metrics that may be sent; values with other names are left out.
    """
    columns = [column for column, name in enumerate(block.names) if name in known]
    names = [block.names[column] for column in columns]
    given = block.values[:, columns]
    counted = np.empty((block.rows, len(COUNTED) + 1))
    counted[:, 0] = _last_losses(block)
    counted[:, 1] = block.steps
    counted[:, 2] = block.epochs
    counted[:, 3] = block.lives
    counted[:, 4] = block.digests
    counted[:, 5] = np.arange(block.first, block.first + block.rows)
    kept = [column for column, name in enumerate(names) if name != LAST_LOSS and name not in COUNTED]
    all_names = (*(names[column] for column in kept), LAST_LOSS, *COUNTED)
    values = np.concatenate([given[:, kept], counted], axis=1)
    there = values.view(np.uint64) != ABSENT_BITS
    there[:, -1] = True
    present = block.present
    counts = np.count_nonzero(there, axis=1)
    if block.ids:
        counts += np.count_nonzero(present.reshape(block.rows, -1), axis=1)
    for row, ids in block.retired.items():
        counts[row] += len(ids)
    values[:, -1] = counts
    return Points(all_names, values, there, present, counts)


def _last_losses(block: Block) -> npt.NDArray[np.float64]:
    """Returns the last finite loss of each step: its own, or else the one that is noted in it."""
    noted = _column(block, LAST_LOSS)
    losses = _column(block, "loss")
    return np.where((losses > -FLOAT32_BOUND) & (losses < FLOAT32_BOUND), losses, noted)


def _column(block: Block, name: str) -> npt.NDArray[np.float64]:
    if name in block.names:
        return block.values[:, block.names.index(name)]
    return np.full(block.rows, ABSENT)
