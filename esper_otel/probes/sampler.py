"""Sampler: runs the probes at their own pace and shows what is fresh."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from esper_otel.errors import ProbeUnavailable
from esper_otel.log import logger
from esper_otel.probes.probe import Probe

_FRESH_PERIODS = 3
_LONGEST_PAUSE_S = 60.0
_NONE_YET = "not sampled yet"


class _Sampled(NamedTuple):
    """The last answer of a probe: readings, or the reason why there are none."""

    readings: Mapping[str, float]
    at_s: float
    reason: str


class Sampler:
    """Samples every probe on a thread of its own, so that one that hangs holds up nobody.

    A probe that fails is asked less and less often, at most every minute, and comes back when it heals. A reading
    older than three periods is absent.

    Threads: ``readings`` belongs to the training thread and costs a comparison; ``absent`` may be called from any.

    Args:
        probes: what to sample.
        period_s: time between two samples of a probe.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self, probes: Sequence[Probe], *, period_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probes = tuple(probes)
        self._period_s = period_s
        self._clock = clock
        self._sampled = [_Sampled({}, clock(), _NONE_YET) for _ in self._probes]
        self._shown: tuple[Mapping[str, float], float] = ({}, float("inf"))
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(place,), name="esper-otel-probes", daemon=True)
            for place in range(len(self._probes))
        ]

    def start(self) -> None:
        """Starts sampling, at once."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stops sampling; a probe that hangs longer than ``timeout_s`` is left behind."""
        self._ending.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(deadline_s - time.monotonic(), 0.0))

    def readings(self, now_s: float) -> Mapping[str, float]:
        """The readings that are fresh at ``now_s`` of the clock."""
        readings, until_s = self._shown
        return readings if now_s < until_s else self._show(now_s)

    def absent(self) -> dict[str, str]:
        """Why each metric of the probes that has no fresh reading is absent."""
        shown = self.readings(self._clock())
        return {
            name: sampled.reason or f"the last sample is more than {_FRESH_PERIODS * self._period_s:g} s old"
            for probe, sampled in zip(self._probes, self._sampled, strict=True)
            for name in probe.gives
            if name not in shown
        }

    def _show(self, now_s: float) -> Mapping[str, float]:
        with self._lock:
            readings: dict[str, float] = {}
            until_s = float("inf")
            for sampled in self._sampled:
                stale_at_s = sampled.at_s + _FRESH_PERIODS * self._period_s
                if sampled.readings and now_s < stale_at_s:
                    readings.update(sampled.readings)
                    until_s = min(until_s, stale_at_s)
            self._shown = (readings, until_s)
            return readings

    def _work(self, place: int) -> None:
        pause_s = 0.0
        while not self._ending.wait(pause_s):
            self._sampled[place] = self._sample(self._probes[place], self._sampled[place])
            self._show(self._clock())
            failed = bool(self._sampled[place].reason)
            pause_s = min(max(pause_s, self._period_s / 2) * 2, _LONGEST_PAUSE_S) if failed else self._period_s

    def _sample(self, probe: Probe, before: _Sampled) -> _Sampled:
        try:
            readings, reason = dict(probe.sample()), ""
        except ProbeUnavailable as error:
            readings, reason = {}, str(error)
        except Exception as error:  # noqa: BLE001 - a driver may raise anything; the thread must go on
            readings, reason = {}, f"{type(error).__name__}: {error}"
        if reason and before.readings:
            logger.warning("%s are absent from now on: %s; asking again", ", ".join(probe.gives), reason)
        return _Sampled(readings, self._clock(), reason)
