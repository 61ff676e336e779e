"""The open step and the values recorded in it so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esper_otel.frames.frame import SeedTable
from esper_otel.record.seeds import NO_IDS, merged_tables, table_of_rows
from esper_otel.record.values import DeviceValues, Target
from esper_otel.record.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from esper_otel.record.recorder import Recorder


class OpenStep:
    """The values that ``Step`` has recorded. The recorder reads them when the step ends. Threads: one.

    Attributes:
        epoch: the epoch that the step belongs to.
        global_step: the step's number; 0 until it is open.
        time_unix_ns: the step's time, fixed when the scope opened.
    """

    __slots__ = (
        "_failed",
        "_held",
        "_known",
        "_numbered",
        "_recorder",
        "_retired",
        "_retiring",
        "_rows",
        "_started_s",
        "_table",
        "_timings",
        "_values",
        "_waited_ms",
        "_work",
        "epoch",
        "global_step",
        "time_unix_ns",
    )

    _retiring: list[str]  # after the step; from its opening on

    def __init__(self, recorder: Recorder, global_step: int | None, epoch: int, work: int | Work | None) -> None:
        self._recorder = recorder
        self._work = work
        self.epoch: int = epoch
        self._numbered = global_step
        self.global_step: int = 0  # numbered when it opens
        self.time_unix_ns: int = 0
        self._values: dict[str, float] = {}
        self._timings: dict[str, float] = {}
        self._rows: dict[str, bytes] = {}
        # Seeds whose first row in this step needs no checks: all live seeds, as long as the step is open, no seed has
        # been retired in it and no cell is on a device.
        self._known: Mapping[str, int] = NO_IDS
        self._table: SeedTable | None = None
        self._held: DeviceValues | None = None
        self._retired: Sequence[str] = ()  # before the step
        self._waited_ms: float | None = None
        self._failed = False
        self._started_s = 0.0

    def is_in_its_scope(self) -> bool:
        """Whether the ``with`` statement that opened the step is still running."""
        raise NotImplementedError

    def _hold(self, tensors: Mapping[Target, Tensor]) -> None:
        """Keeps values that are still on a device."""
        if self._held is None:
            self._held = DeviceValues()
        self._held.tensors.update(tensors)
        for name in tensors:
            self._values.pop(name, None)  # type: ignore[arg-type] # a seed's cell is not a key of the values
            if isinstance(name, tuple):
                self._known = NO_IDS

    def _add(self, table: SeedTable) -> None:
        """Adds rows of many seeds at once."""
        retiring = self._retiring
        for seed_id in [seed_id for seed_id in retiring if seed_id in table.ids] if retiring else ():
            self._is_born_again(seed_id)
        if self._rows or self._table is not None:
            table = merged_tables(self._all_rows(), table)
            self._rows = {}
        self._table = table

    def _all_rows(self) -> SeedTable:
        """Returns every row recorded so far."""
        if self._table is None:
            return table_of_rows(self._rows)
        return merged_tables(self._table, table_of_rows(self._rows)) if self._rows else self._table

    def _is_born_again(self, seed_id: str) -> None:
        """Ends the old life of a seed before the step: it was retired in this step and is now recorded again."""
        self._retiring.remove(seed_id)
        self._retired = [*self._retired, seed_id]
        self._rows.pop(seed_id, None)
        if self._table is not None and seed_id in self._table.ids:
            kept = [row for row, other in enumerate(self._table.ids) if other != seed_id]
            self._table = SeedTable(tuple(self._table.ids[row] for row in kept), self._table.cells[kept])
