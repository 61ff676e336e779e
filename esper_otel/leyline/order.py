"""The order of seeds: packets list them by id, regardless of how the frame was received."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import Frame, SeedTable


def ordered(frame: Frame) -> Frame:
    """Returns the frame with its seeds sorted by id; the same object if they already are."""
    seeds, live = frame.seeds, frame.live
    if not live.ids:
        return frame
    by_id = _ordered(live)
    if by_id is live and seeds.ids == live.ids:
        return frame
    return frame._replace(live=by_id, seeds=by_id if seeds is live else _ordered(seeds))


def _ordered(table: SeedTable) -> SeedTable:
    order = _order(table.ids)
    return table if order is None else SeedTable(order[0], table.cells[order[1]])


@lru_cache(maxsize=8)
def _order(ids: tuple[str, ...]) -> tuple[tuple[str, ...], npt.NDArray[np.intp]] | None:
    by_id = tuple(sorted(ids))
    if by_id == ids:
        return None
    row = {seed_id: place for place, seed_id in enumerate(ids)}
    return by_id, np.array([row[seed_id] for seed_id in by_id])
