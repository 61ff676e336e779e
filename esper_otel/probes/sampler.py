"""The sampler, which runs the probes in threads and provides their fresh readings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from esper_otel.errors import ProbeUnavailable
from esper_otel.log import Warnings, logger
from esper_otel.native import threads
from esper_otel.probes.probe import NotYet, Probe

_FRESH_PERIODS = 3
_LONGEST_PAUSE_S = 60.0
_FOREVER_S = float("inf")


class _Answer(NamedTuple):
    """The last result of a probe: readings, or the reason why there are none."""

    readings: Mapping[str, float]
    at_s: float
    reason: str = ""
    is_failure: bool = False


class Sampler:
    """Samples each probe on a thread of its own, so that a probe that hangs does not delay the others.

    A probe that fails is sampled less and less often, down to once a minute, and at the normal rate again when it
    works. Readings older than three periods are left out.

    Threads: ``readings`` and ``absent`` may be called from any thread. They take no lock, because a forked child lacks
    the sampler's threads that would release it.

    Args:
        probes: the probes to sample.
        period_s: time between two samples of a probe.
        clock: returns the seconds of a clock that never goes back.
        wait: waits for an event, for at most a number of seconds; returns whether it is set.

    Attributes:
        shown: the newest readings, the same object until the next sample, and until when they are fresh.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = lambda event, timeout_s: event.wait(timeout_s),
    ) -> None:
        self._probes = tuple(probes)
        self._period_s = period_s
        self._clock = clock
        self._wait = wait
        self._warnings = Warnings(clock)
        self._answers = [_Answer({}, clock(), "not sampled yet") for _ in self._probes]
        self._began_s: list[float | None] = [None for _ in self._probes]  # start of the sample in progress
        self.shown: tuple[Mapping[str, float], float] = ({}, _FOREVER_S)
        self._publishing = threads().Lock()
        self._ending = threads().Event()
        self._threads = [
            threads().Thread(target=self._work, args=(place,), name="esper-otel-probes", daemon=True)
            for place in range(len(self._probes))
        ]

    def start(self) -> None:
        """Starts the threads, which take their first samples at once."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stops sampling. Waits for a sample in progress, but at most ``timeout_s``."""
        self._ending.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(deadline_s - time.monotonic(), 0.0))

    def readings(self, now_s: float) -> Mapping[str, float]:
        """Returns the readings that are fresh at ``now_s`` of the clock; the same object until the next sample."""
        readings, until_s = self.shown
        return readings if now_s < until_s else self._fresh(now_s)[0]

    def absent(self) -> dict[str, str]:
        """Returns the reason for each metric of the probes that has no fresh reading."""
        now_s = self._clock()
        shown = self.readings(now_s)
        return {
            name: self._reason(place, now_s)
            for place, probe in enumerate(self._probes)
            for name in probe.gives
            if name not in shown
        }

    def _reason(self, place: int, now_s: float) -> str:
        began_s, answer, longest_s = self._began_s[place], self._answers[place], _FRESH_PERIODS * self._period_s
        if began_s is not None and now_s - began_s >= longest_s:
            return f"the current sample has taken more than {longest_s:g} s"
        if answer.reason:
            return answer.reason
        return f"the last sample is more than {longest_s:g} s old"

    def _fresh(self, now_s: float) -> tuple[Mapping[str, float], float]:
        readings: dict[str, float] = {}
        until_s = _FOREVER_S
        for answer in self._answers:
            stale_at_s = answer.at_s + _FRESH_PERIODS * self._period_s
            if answer.readings and now_s < stale_at_s:
                readings.update(answer.readings)
                until_s = min(until_s, stale_at_s)
        return readings, until_s

    # -- on the probes' threads ------------------------------------------------------------------------------

    def _work(self, place: int) -> None:
        probe = self._probes[place]
        pause_s = failing_s = 0.0
        while not self._wait(self._ending, pause_s):
            self._began_s[place] = self._clock()
            answer = self._asked(probe)
            self._tell(probe, self._answers[place], answer)
            with self._publishing:
                self._answers[place] = answer
                self._began_s[place] = None
                self.shown = self._fresh(answer.at_s)
            failing_s = max(2 * failing_s, self._period_s) if answer.is_failure else 0.0
            pause_s = min(failing_s, max(_LONGEST_PAUSE_S, self._period_s)) or self._period_s
        try:
            probe.close()
        except Exception as error:  # noqa: BLE001 - a driver may raise anything; the probe is not used any more
            logger.debug("closing the probe of %s: %s: %s", ", ".join(probe.gives), type(error).__name__, error)

    def _asked(self, probe: Probe) -> _Answer:
        try:
            return _Answer(dict(probe.sample()), self._clock())
        except NotYet as error:
            return _Answer({}, self._clock(), str(error))
        except ProbeUnavailable as error:
            return _Answer({}, self._clock(), str(error), is_failure=True)
        except Exception as error:  # noqa: BLE001 - a driver may raise anything; the thread must go on
            return _Answer({}, self._clock(), f"{type(error).__name__}: {error}; trying again", is_failure=True)

    def _tell(self, probe: Probe, before: _Answer, now: _Answer) -> None:
        names = ", ".join(probe.gives)
        if now.reason == before.reason:
            return
        if not now.reason:
            logger.info("%s: sampled from now on", names)
        elif before.readings:
            self._warnings.say(names, "%s: absent from now on: %s", names, now.reason)
        else:  # it was never available or still is not: a machine without a GPU is not a fault
            logger.info("%s: absent: %s", names, now.reason)
