"""The sampler, which runs the probes in threads and provides their fresh readings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from esper_otel.errors import ProbeUnavailable
from esper_otel.log import Warnings, logger
from esper_otel.native import threads
from esper_otel.probes.probe import NotYet, OtherHardware, Probe, names_of

_FRESH_PERIODS = 3
_LONGEST_PAUSE_S = 60.0
_FOREVER_S = float("inf")


class _ProbeResult(NamedTuple):
    """The last result of a probe: readings, or the reason why there are none.

    ``is_elsewhere``: the machine has no such hardware, so that the reason of another probe says more.
    """

    readings: Mapping[str, float]
    at_s: float
    reason: str = ""
    is_failure: bool = False
    is_elsewhere: bool = False
    news: _OneTimeReadings | None = None


class _OneTimeReadings:
    """Readings that are handed out only once."""

    __slots__ = ("is_taken", "readings")

    def __init__(self, readings: Mapping[str, float]) -> None:
        self.readings = readings
        self.is_taken = False


class Sampler:
    """Samples each probe on a thread of its own, so that a probe that hangs does not delay the others.

    A probe that fails is sampled less and less often, down to once a minute, and at the normal rate again when it
    works. Readings older than three periods are left out. Those of a probe with ``once`` are in the first readings
    after each sample and in no others.

    Threads: ``readings`` and ``absent`` may be called from any thread. They take no lock, because a forked child lacks
    the sampler's threads that would release it.

    Args:
        probes: the probes to sample.
        period_s: time between two samples of a probe.
        clock: returns the seconds of a clock that never goes back.
        wait: waits for an event, for at most a number of seconds; returns whether it is set.

    Attributes:
        shown: the newest readings, the same object until the next sample, and until when they may be used as they are.
            The time is in the past while there are readings to hand out once; ``readings`` then hands them out.
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
        self._answers = [_ProbeResult({}, clock(), "not sampled yet") for _ in self._probes]
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
        shown = self.shown
        if now_s < shown[1]:
            return shown[0]
        readings, until_s, news = self._fresh(now_s)
        # Without a lock: a sample that is published between these lines is shown with the next one, within a period.
        if self.shown is shown:
            self.shown = (readings, until_s)
        if not news:
            return readings
        found = dict(readings)
        for each in news:
            each.is_taken = True
            found.update(each.readings)
        return found

    def latest(self) -> dict[str, float]:
        """Returns all fresh readings, those that ``readings`` hands out once included, without taking them."""
        now_s = self._clock()
        fresh = [answer.readings for answer in self._answers if self._is_fresh(answer, now_s)]
        return {name: value for readings in fresh for name, value in readings.items()}

    def absent(self) -> dict[str, str]:
        """Returns the reason for each metric of the probes that has no fresh reading."""
        now_s = self._clock()
        there = self.latest()
        found: dict[str, str] = {}
        for place, probe in enumerate(self._probes):
            for name in names_of(probe):
                if name not in there and not (name in found and self._answers[place].is_elsewhere):
                    found[name] = self._reason(place, now_s)
        return found

    def _reason(self, place: int, now_s: float) -> str:
        began_s, answer, longest_s = self._began_s[place], self._answers[place], _FRESH_PERIODS * self._period_s
        if began_s is not None and now_s - began_s >= longest_s:
            return f"the current sample has taken more than {longest_s:g} s"
        if answer.reason:
            return answer.reason
        return f"the last sample is more than {longest_s:g} s old"

    def _is_fresh(self, answer: _ProbeResult, now_s: float) -> bool:
        return bool(answer.readings) and now_s < answer.at_s + _FRESH_PERIODS * self._period_s

    def _fresh(self, now_s: float) -> tuple[Mapping[str, float], float, list[_OneTimeReadings]]:
        readings: dict[str, float] = {}
        news: list[_OneTimeReadings] = []
        until_s = _FOREVER_S
        for answer in self._answers:
            if not self._is_fresh(answer, now_s):
                continue
            if answer.news is None:
                readings.update(answer.readings)
                until_s = min(until_s, answer.at_s + _FRESH_PERIODS * self._period_s)
            elif not answer.news.is_taken:
                news.append(answer.news)
        return readings, until_s, news

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
                readings, until_s, news = self._fresh(answer.at_s)
                self.shown = (readings, -_FOREVER_S if news else until_s)
            failing_s = max(2 * failing_s, self._period_s) if answer.is_failure else 0.0
            pause_s = min(failing_s, max(_LONGEST_PAUSE_S, self._period_s)) or self._period_s
        try:
            probe.close()
        except Exception as error:  # noqa: BLE001 - a driver may raise anything; the probe is not used any more
            logger.debug("closing the probe of %s: %s: %s", ", ".join(names_of(probe)), type(error).__name__, error)

    def _asked(self, probe: Probe) -> _ProbeResult:
        try:
            readings = dict(probe.sample())
            return _ProbeResult(
                readings, self._clock(), news=_OneTimeReadings(readings) if getattr(probe, "once", False) else None
            )
        except NotYet as error:
            return _ProbeResult({}, self._clock(), str(error))
        except ProbeUnavailable as error:
            is_elsewhere = isinstance(error, OtherHardware)
            return _ProbeResult({}, self._clock(), str(error), is_failure=True, is_elsewhere=is_elsewhere)
        except Exception as error:  # noqa: BLE001 - a driver may raise anything; the thread must go on
            return _ProbeResult({}, self._clock(), f"{type(error).__name__}: {error}; trying again", is_failure=True)

    def _tell(self, probe: Probe, before: _ProbeResult, now: _ProbeResult) -> None:
        names = ", ".join(names_of(probe))
        if now.reason == before.reason:
            return
        if not now.reason:
            logger.info("%s: sampled from now on", names)
        elif before.readings:
            self._warnings.say(names, "%s: absent from now on: %s", names, now.reason)
        else:  # it was never available or still is not: a machine without a GPU is not a fault
            logger.info("%s: absent: %s", names, now.reason)
