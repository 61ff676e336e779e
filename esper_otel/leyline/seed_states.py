"""The live seeds of a frame as the ``seed_states`` of a SystemStatePacket."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from esper_otel.frames.frame import WIDTH, SeedTable
from esper_otel.frames.numbers import STAGE_LIMIT, UINT32_LIMIT, finite_cells, whole
from esper_otel.leyline import messages
from esper_otel.leyline.stencil import Stencil
from esper_otel.schema import SEED_FIELDS, Stage

# Integer fields change seldom: they are part of a stencil's fixed bytes.
_INTEGERS = ("stage", "layer_depth", "age_epochs")
_SCALARS = ("gradient_norm", "learning_rate", "risk_score")
_IN_MAP = ("alpha", "alpha_steps", "alpha_total_steps", "alpha_temperature", "risk_tolerance", "blend_allowed")

_INTEGER_COLUMNS = np.array([SEED_FIELDS.index(field) for field in _INTEGERS])
_FLOAT_COLUMNS = np.array([SEED_FIELDS.index(field) for field in _SCALARS + _IN_MAP])
_INTEGERS_BYTES = len(_INTEGERS) * np.dtype(np.float64).itemsize

_STAGES_THAT_BLEND = range(Stage.BLENDING, Stage.FOSSILIZED + 1)


def seed_states(live: SeedTable) -> bytes:
    """Returns the seeds as serialized ``SystemStatePacket.seed_states``, to be merged into a packet.

    Cells that are missing, not finite, or not a valid integer for an integer field are left out. ``alpha_steps`` is
    present only in BLENDING. ``blend_allowed`` is the recorded value, or else 1.0 in the stages from BLENDING to
    FOSSILIZED and 0.0 in others; it is absent if the stage is unknown.
    """
    if not live.ids:
        return b""
    cells = live.wide().cells
    stencil = _table_stencil(
        live.ids, cells.take(_INTEGER_COLUMNS, 1).tobytes(), finite_cells(cells.take(_FLOAT_COLUMNS, 1)).tobytes()
    )
    return stencil.filled(cells)


@lru_cache(maxsize=4)
def _table_stencil(ids: tuple[str, ...], integers: bytes, present: bytes) -> Stencil:
    width = len(_FLOAT_COLUMNS)
    rows = [
        _row_stencil(
            seed_id,
            integers[row * _INTEGERS_BYTES : (row + 1) * _INTEGERS_BYTES],
            present[row * width : (row + 1) * width],
        )
        for row, seed_id in enumerate(ids)
    ]
    return Stencil.joined(rows, 4, WIDTH)


@lru_cache(maxsize=4096)
def _row_stencil(seed_id: str, integers: bytes, present: bytes) -> Stencil:
    stage, layer_depth, age_epochs = np.frombuffer(integers).tolist()
    stage = whole(stage, STAGE_LIMIT)
    there = dict(zip(_SCALARS + _IN_MAP, present, strict=True))
    there["alpha_steps"] &= stage == Stage.BLENDING
    implied = {} if stage is None else {"blend_allowed": float(stage in _STAGES_THAT_BLEND)}

    def build(hole: Callable[[int], float]) -> messages.SystemStatePacket:
        packet = messages.SystemStatePacket()
        seed = packet.seed_states.add(
            seed_id=seed_id,
            stage=stage,
            layer_depth=whole(layer_depth, UINT32_LIMIT),
            age_epochs=whole(age_epochs, UINT32_LIMIT),
            **{field: hole(SEED_FIELDS.index(field)) for field in _SCALARS if there[field]},
        )
        for field in _IN_MAP:
            if there[field]:
                seed.metrics[field] = hole(SEED_FIELDS.index(field))
            elif field in implied:
                seed.metrics[field] = implied[field]
        return packet

    return Stencil.of(build, 4)
