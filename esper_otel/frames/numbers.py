"""Checks of the numbers in packets: finite as float32; for integer fields, whole and in range."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import FLOAT32_BOUND, Cells
from esper_otel.schema import Stage

UINT32_LIMIT = 2**32
UINT64_LIMIT = 2**64
STAGE_LIMIT = len(Stage)


def finite(value: float | None) -> float | None:
    """Returns the value if it is present and still finite when rounded to float32; otherwise None."""
    return value if value is not None and -FLOAT32_BOUND < value < FLOAT32_BOUND else None


def are_finite(values: Collection[float]) -> bool:
    """Returns whether all values are certainly still finite when rounded to float32; False if their sum is not."""
    try:
        return sum(map(abs, values)) < FLOAT32_BOUND  # a NaN or an infinity is in the sum, too
    except OverflowError:
        return False


def finite_cells(cells: Cells) -> npt.NDArray[np.bool_]:
    """Returns an array of the same shape: True where a cell is present and still finite when rounded to float32."""
    stays: npt.NDArray[np.bool_] = np.abs(cells) < FLOAT32_BOUND
    return stays


def whole(value: float | None, limit: int) -> int | None:
    """Returns the value as an integer if it is a whole number of at least 0 and below ``limit``; otherwise None."""
    return int(value) if value is not None and 0 <= value < limit and value == int(value) else None
