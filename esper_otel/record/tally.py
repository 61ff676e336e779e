"""Counts, off the training thread, values that are not finite or out of range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from esper_otel.frames.block import Block
from esper_otel.frames.frame import ABSENT_BITS
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.native import threads
from esper_otel.record.names import Names

_EVERY_S = 0.5
_AT_ONCE = 4_096
_TURN_S = 1.0
_GREATEST = np.finfo(np.float64).max


class Tally:
    """Checks the rows of a ring twice a second, and warns at most once a minute about values that are out of range.

    Such values are kept as they are. Threads: any; a row is counted once.

    Args:
        ring: the rows.
        names: which values cannot be negative or above 1.
        warnings: where values that are out of range are reported.
        fault: called with each internal error; it counts and logs the error.

    Attributes:
        nonfinite: values recorded that are NaN or infinite.
        out_of_range: values recorded that are negative but cannot be, and ratios above 1.
    """

    def __init__(self, ring: Ring, names: Names, warnings: Warnings, fault: Callable[[str, Exception], None]) -> None:
        self._ring = ring
        self._names = names
        self._warnings = warnings
        self._fault = fault
        self.nonfinite: int = 0
        self.out_of_range: int = 0
        self._counted = 0
        self._turn = threads().Lock()
        self._ending = threads().Event()
        self._thread: Any = threads().Thread(target=self._work, name="esper-otel-tally", daemon=True)
        ring.dropping = self.catch_up

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end; does not wait for it."""
        self._ending.set()

    def _work(self) -> None:
        while not self._ending.wait(_EVERY_S):
            self.catch_up()

    def catch_up(self) -> None:
        """Counts the rows that have been added since. Never raises; rows that cannot be read are not counted."""
        # A signal handler may call this on the very thread that is in it: it must not wait for ever.
        if self._counted == self._ring.last or not self._turn.acquire(timeout=_TURN_S):
            return
        try:
            while self._counted < self._ring.last:
                block, _ = self._ring.block(self._counted, _AT_ONCE)
                if block is None:
                    break
                self._counted = block.last
                self._count(block)
        except Exception as error:  # noqa: BLE001 - a fault here must not reach the caller, who only asks for counts
            self._counted = self._ring.last
            self._fault("counting values", error)
        finally:
            self._turn.release()

    def _count(self, block: Block) -> None:
        names, values = self._suspects(block)
        if not names:
            return
        odd = ~np.isfinite(values) & (values.view(np.uint64) != ABSENT_BITS)
        self.nonfinite += int(np.count_nonzero(odd))
        for name, outside in self._outside(names, values):
            self.out_of_range += len(outside)
            hint = "; give a share of 1, not a percentage" if name == "accuracy" else ""
            self._warnings.say(f"range {name}", "%s = %g is out of range; kept as given%s", name, outside[0], hint)

    def _suspects(self, block: Block) -> tuple[list[str], Any]:
        """Returns names and columns of recorded values that are not all finite and in range."""
        with np.errstate(invalid="ignore"):  # the least of numbers with a NaN among them is NaN, which is not in range
            least, most = block.values.min(axis=0), block.values.max(axis=0)
            low, high = self._names.lowest(block.names), self._names.highest(block.names)
            is_good = (least >= low.clip(-_GREATEST)) & (most <= high.clip(None, _GREATEST))
        suspects = [column for column in np.flatnonzero(~is_good).tolist() if block.names[column] in block.recorded]
        return [block.names[column] for column in suspects], block.values[:, suspects]

    def _outside(self, names: list[str], values: Any) -> Iterator[tuple[str, Any]]:
        """Yields the values that are out of range, by name."""
        low = values < self._names.lowest(names)
        high = values > self._names.highest(names)
        outside = low | high
        for column in np.flatnonzero(outside.any(axis=0)).tolist():
            yield names[column], values[outside[:, column], column]
