"""Counts, off the training thread, values that are not finite or out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

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
                last, values = self._ring.recorded(self._counted, _AT_ONCE)
                if not last:
                    break
                self._counted = last
                for of_names in values:
                    self._count(*of_names)
        except Exception as error:  # noqa: BLE001 - a fault here must not reach the caller, who only asks for counts
            self._counted = self._ring.last
            self._fault("counting values", error)
        finally:
            self._turn.release()

    def _count(self, names: tuple[str, ...], values: npt.NDArray[np.float64]) -> None:
        """Counts values that were recorded; there is a row for each name."""
        low, high = self._names.lowest(names), self._names.highest(names)
        with np.errstate(invalid="ignore"):  # the least of numbers with a NaN among them is NaN, which is not in range
            least, most = values.min(axis=1), values.max(axis=1)
        is_good = (least >= low.clip(-_GREATEST)) & (most <= high.clip(None, _GREATEST))
        for row in np.flatnonzero(~is_good).tolist():
            name, given = names[row], values[row]
            self.nonfinite += int(given.size - np.count_nonzero(np.isfinite(given)))
            outside = given[(given < low[row]) | (given > high[row])]
            if outside.size:
                self.out_of_range += outside.size
                hint = "; give a share of 1, not a percentage" if name == "accuracy" else ""
                self._warnings.say(f"range {name}", "%s = %g is out of range; kept as given%s", name, outside[0], hint)
