"""Which numbers a packet may carry: finite on the wire, whole and in range where the field is an integer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import FLOAT32_BOUND, Cells
from esper_otel.schema import Stage

UINT32_LIMIT = 2**32
UINT64_LIMIT = 2**64
STAGE_LIMIT = len(Stage)


def finite(value: float | None) -> float | None:
    """The value, if it is there and stays finite when rounded to float32."""
    return value if value is not None and -FLOAT32_BOUND < value < FLOAT32_BOUND else None


def finite_cells(cells: Cells) -> npt.NDArray[np.bool_]:
    """True where a cell stays finite when rounded to float32; a missing cell does not. Same shape."""
    stays: npt.NDArray[np.bool_] = np.abs(cells) < FLOAT32_BOUND
    return stays


def whole(value: float | None, limit: int) -> int | None:
    """The value as an integer, if it is a whole number from 0 to below ``limit``."""
    return int(value) if value is not None and 0 <= value < limit and value == int(value) else None
