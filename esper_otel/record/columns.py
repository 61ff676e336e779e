"""Columns: a step's seeds given as arrays, one per field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric
from esper_otel.frame import ABSENT, WIDTH, SeedTable
from esper_otel.record.seeds import COLUMN, checked_seed_id, checked_stage
from esper_otel.schema import SEED_FIELDS

_STAGE = COLUMN["stage"]


class Columns:
    """Makes tables of columns; what was good in the last call is not looked at again.

    Threads: the one that records.
    """

    def __init__(self) -> None:
        self._ids: tuple[str, ...] = ()
        self._stages = b""

    def table(self, ids: Sequence[str], columns: Mapping[str, object]) -> SeedTable:
        """A table from arrays of shape (len(ids),), NaN meaning absent.

        Raises:
            UnknownMetric: a field that seeds do not have.
            InvalidName: an id that cannot be one, or that comes twice.
            InvalidValue: a column of another shape or type, or on another device than the CPU.
        """
        if isinstance(ids, str):
            raise InvalidValue("seed ids", f"{ids!r} is one string; give a sequence of strings")
        names = tuple(ids)
        names = self._ids if names == self._ids else _checked_ids(names)
        # One row a field first: whole columns are copied in one go.
        cells = np.full((WIDTH, len(names)), ABSENT)
        for field, column in columns.items():
            place = COLUMN.get(field)
            if place is None:
                raise UnknownMetric(field, SEED_FIELDS, what="seed field")
            if type(column) is np.ndarray and column.dtype.kind in "fiub" and column.shape == (len(names),):
                cells[place] = column
            elif column is not None:
                cells[place] = _numbers(field, column, len(names))
        np.copyto(cells, ABSENT, where=cells != cells)  # noqa: PLR0124 - NaN
        stages = cells[_STAGE].tobytes()
        if stages != self._stages:
            for stage in np.unique(cells[_STAGE]).tolist():
                checked_stage(stage)
        self._ids, self._stages = names, stages
        return SeedTable(names, np.ascontiguousarray(cells.T))


def _checked_ids(ids: tuple[object, ...]) -> tuple[str, ...]:
    names = tuple(checked_seed_id(str(name) if isinstance(name, np.str_) else name) for name in ids)
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidName(f"seed id {twice[0]!r} comes more than once in one call")
    return names


def _numbers(field: str, column: object, count: int) -> npt.NDArray[np.float64]:
    if getattr(column, "is_cuda", False):
        raise InvalidValue(field, "is on a CUDA device; reading it would stall training: copy it to the CPU first")
    if hasattr(column, "detach"):
        column = column.detach()
    try:
        numbers = np.asarray(column)
        if numbers.dtype.kind not in "fiub":
            numbers = np.array([np.nan if item is None else item for item in column], np.float64)  # type: ignore[attr-defined] # TypeError is the answer
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValue(field, f"is not an array of numbers: {error}") from None
    if numbers.shape != (count,):
        raise InvalidValue(field, f"has shape {numbers.shape}; {count} seeds need ({count},)")
    return numbers.astype(np.float64, copy=False)
