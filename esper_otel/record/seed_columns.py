"""Seeds of a step given as arrays, one per field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric
from esper_otel.frames.frame import ABSENT, COLUMN, NARROW, WIDTH, SeedTable
from esper_otel.record.seeds import checked_seed_id, checked_stage
from esper_otel.schema import SEED_FIELDS

_FLOAT64 = np.dtype(np.float64)
_SPARE_NAMES = 1_000


class SeedColumns:
    """Builds tables from columns. Ids, fields and stages already checked in the last call are not checked again.

    Args:
        is_good: returns whether all cells of a table are present, finite and in range.

    Threads: the recording thread.
    """

    def __init__(self, is_good: Callable[[SeedTable], bool]) -> None:
        self._is_good = is_good
        self._layout = _ColumnLayout((), ())
        self._stages = b""
        self._names: dict[object, str] = {}  # ids that have been checked

    def table(self, ids: Sequence[str], columns: Mapping[str, object]) -> SeedTable:
        """Builds a table from arrays of shape (len(ids),). NaN means that a cell is absent.

        Raises:
            UnknownMetric: seeds do not have such a field.
            InvalidName: an id is invalid or occurs twice.
            InvalidValue: a column has another shape or type, or is on a device other than the CPU.
        """
        if isinstance(ids, str):
            raise InvalidValue("seed ids", f"{ids!r} is one string; give a sequence of strings")
        layout, fields = self._layout, tuple(columns)
        is_known = ids == layout.listed if ids.__class__ is list else tuple(ids) == layout.ids
        if not is_known:
            layout = _ColumnLayout(self._checked(tuple(ids)), fields)
        elif fields != layout.fields:
            layout = _ColumnLayout(layout.ids, fields)
        given = _stacked(columns)
        if given is None or given.shape != layout.shape:
            given = np.empty(layout.shape)
            for row, (field, column) in zip(given, columns.items(), strict=True):
                row[...] = _numbers(field, column, len(layout.ids))
        table = layout.table(given)
        if not self._is_good(table):
            if np.isnan(given, layout.nans).tobytes() != layout.no_nans:
                np.copyto(given, ABSENT, where=layout.nans)
            table = layout.table(given)
        if layout.stage is not None:
            stages = given[layout.stage].tobytes()
            if stages != self._stages:
                for stage in {*given[layout.stage].tolist()}:
                    checked_stage(stage)
                self._stages = stages
        self._layout = layout
        return table

    def _checked(self, ids: tuple[object, ...]) -> tuple[str, ...]:
        """Returns the ids if they are valid and occur once each; those of earlier calls are not checked again."""
        try:
            found = [*map(self._names.get, ids)]
        except TypeError:  # one cannot be hashed
            found = [None] * len(ids)
        for place in [place for place, name in enumerate(found) if name is None]:
            given = ids[place]
            found[place] = name = checked_seed_id(str(given) if isinstance(given, np.str_) else given)
            self._names[name] = name
        names: tuple[str, ...] = tuple(found)  # type: ignore[arg-type] # each is a name by now
        if len({*names}) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidName(f"seed id {twice[0]!r} occurs more than once in one call")
        if len(self._names) > 2 * len(names) + _SPARE_NAMES:
            self._names = dict(zip(names, names, strict=True))
        return names


class _ColumnLayout:
    """The layout shared by calls with the same seeds and fields. In its arrays, each row is a column of the call.

    Attributes:
        ids: the seed ids.
        listed: the same ids as a list, to compare with a list without converting it.
        fields: the fields given, in order.
        shape: the shape of the array of columns.
        nans: a reused buffer that marks the cells that are NaN.
        no_nans: the bytes of ``nans`` when no cell is NaN.
        stage: the row of the stages; None if they are not given.
    """

    __slots__ = ("_absent", "_places", "fields", "ids", "listed", "nans", "no_nans", "shape", "stage")

    def __init__(self, ids: tuple[str, ...], fields: tuple[str, ...]) -> None:
        for field in fields:
            if field not in COLUMN:
                raise UnknownMetric(field, SEED_FIELDS, what="seed field")
        self.ids = ids
        self.listed = list(ids)
        self.fields = fields
        self.shape = (len(fields), len(ids))
        self.nans = np.empty(self.shape, np.bool_)
        self.no_nans = bytes(self.nans.size)
        self.stage = fields.index("stage") if "stage" in fields else None
        self._places = [COLUMN[field] for field in fields]
        width = NARROW if max(self._places, default=0) < NARROW else WIDTH
        # The columns of an empty table, to be filled in; not needed if exactly a narrow table's columns are given.
        self._absent = None if self._places == list(range(NARROW)) else np.full((width, len(ids)), ABSENT)

    def table(self, given: npt.NDArray[np.float64]) -> SeedTable:
        """Builds the table. It may keep a reference to ``given``."""
        if self._absent is not None:
            by_field = self._absent.copy()
            by_field[self._places] = given
            given = by_field
        table: SeedTable = tuple.__new__(SeedTable, (self.ids, given.T))  # skips SeedTable's Python-level constructor
        return table


def _stacked(columns: Mapping[str, object]) -> npt.NDArray[np.float64] | None:
    """Stacks the columns in one call, one per row. Returns None unless all are arrays that stack to float64."""
    arrays = list(columns.values())
    for array in arrays:
        if array.__class__ is not np.ndarray:
            return None
    try:
        stacked = np.array(arrays)
    except (TypeError, ValueError):
        return None
    return stacked if stacked.dtype is _FLOAT64 else None


def _numbers(field: str, column: object, count: int) -> npt.NDArray[np.float64] | float:
    if column is None:
        return ABSENT
    if getattr(column, "is_cuda", False):
        raise InvalidValue(field, "is on a CUDA device; reading it would stall training: copy it to the CPU first")
    if hasattr(column, "detach"):
        column = column.detach()
    try:
        numbers = np.asarray(column)
        if hasattr(column, "mask"):  # a masked array: under the mask, there may be anything
            numbers = np.where(column.mask, ABSENT, numbers)
        if numbers.dtype.kind not in "fiub":
            numbers = np.array([np.nan if item is None else item for item in column], np.float64)  # type: ignore[attr-defined] # TypeError is the answer
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValue(field, f"is not an array of numbers: {error}") from None
    if numbers.shape != (count,):
        raise InvalidValue(field, f"has shape {numbers.shape}; {count} seeds need ({count},)")
    return numbers.astype(np.float64, copy=False)
