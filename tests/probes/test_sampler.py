"""The sampler: fresh readings, reasons for the others, and nobody who waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from patience import patience

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.probe import NotYet, OtherHardware, Probe
from esper_otel.probes.sampler import Sampler


class Scripted:
    """A probe whose answers are given: readings, or an exception; the last one stays."""

    def __init__(self, name: str, *answers: Mapping[str, float] | Exception, gives: tuple[str, ...] = ()) -> None:
        self.gives = gives or (name,)
        self._answers = list(answers)
        self.samples = self.closed = 0

    def sample(self) -> Mapping[str, float]:
        assert not self.closed
        self.samples += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.closed += 1


class Hanging:
    """A driver that answers only when it is released, after the given number of good answers."""

    gives = ("gpu_util_percent",)

    def __init__(self, good: int = 0) -> None:
        self._good = good
        self.hangs = threading.Event()
        self.release = threading.Event()

    def sample(self) -> Mapping[str, float]:
        if self._good:
            self._good -= 1
        else:
            self.hangs.set()
            self.release.wait(20)
        return {"gpu_util_percent": 1.0}

    def close(self) -> None:
        pass


class Time:
    """A clock that only the sampler's pauses move, for a sampler of one probe; so many samples are taken."""

    def __init__(self, samples: int) -> None:
        self.now_s = 100.0
        self.pauses: list[float] = []
        self._samples = samples

    def wait(self, ending: threading.Event, seconds: float) -> bool:
        if len(self.pauses) == self._samples:
            return True
        self.pauses.append(seconds)
        self.now_s += seconds
        return False


def run_through(probe: Probe, *, samples: int, period_s: float = 1.0) -> tuple[Sampler, Time]:
    """Takes so many samples, each at its own moment of the clock; returns when they are over."""
    moments = Time(samples)
    sampler = Sampler([probe], period_s=period_s, clock=lambda: moments.now_s, wait=moments.wait)
    sampler.start()
    sampler.stop(10.0)
    return sampler, moments


def eventually(holds: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 120
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return holds()


@pytest.fixture
def running() -> Iterator[Callable[..., Sampler]]:
    started: list[Sampler] = []

    def start(*probes: Probe, period_s: float = 0.01, clock: Callable[[], float] = time.monotonic) -> Sampler:
        sampler = Sampler(probes, period_s=period_s, clock=clock)
        started.append(sampler)
        sampler.start()
        return sampler

    yield start
    for sampler in started:
        sampler.stop(5.0)


# -- what is shown --------------------------------------------------------------------------------------------


def test_the_readings_of_all_probes_are_shown_soon_after_the_start(running: Callable[..., Sampler]) -> None:
    """A run of ten seconds has hardware metrics too."""
    sampler = running(Scripted("a", {"a": 1.0}), Scripted("b", {"b": 2.0, "beside": 3.0}), period_s=3600.0)
    assert eventually(lambda: sampler.readings(time.monotonic()) == {"a": 1.0, "b": 2.0, "beside": 3.0})
    assert sampler.absent() == {}


def test_a_reading_older_than_three_periods_is_absent_and_says_so(running: Callable[..., Sampler]) -> None:
    """A hardware metric that has stopped must not look alive."""
    now = [100.0]
    unstarted = Sampler([Scripted("a", {"a": 1.0})], period_s=10.0, clock=lambda: now[0])
    assert (unstarted.readings(100.0), unstarted.absent()) == ({}, {"a": "not sampled yet"})
    sampler = running(Scripted("a", {"a": 1.0}), period_s=10.0, clock=lambda: now[0])
    assert eventually(lambda: sampler.readings(100.0) == {"a": 1.0})
    sampler.stop(5.0)
    assert sampler.readings(129.9) == {"a": 1.0}
    now[0] = 130.0
    assert sampler.readings(130.0) == {}
    assert sampler.absent() == {"a": "the last sample is more than 30 s old"}


def test_every_probes_readings_grow_old_by_themselves(running: Callable[..., Sampler]) -> None:
    """One that hangs does not take the fresh ones of the others with it."""
    now = [100.0]
    hanging = Hanging(good=1)
    sampler = running(hanging, Scripted("a", {"a": 1.0}), clock=lambda: now[0])
    try:
        assert hanging.hangs.wait(120)
        assert eventually(lambda: sampler.readings(now[0]) == {"a": 1.0, "gpu_util_percent": 1.0})
        now[0] = 100.04
        assert eventually(lambda: sampler.readings(now[0]) == {"a": 1.0})
    finally:
        hanging.release.set()


def test_readings_between_two_samples_are_the_same_object(running: Callable[..., Sampler]) -> None:
    """The training thread asks in every step: it must cost a comparison."""
    sampler = running(Scripted("a", {"a": 1.0}), period_s=3600.0)
    assert eventually(lambda: bool(sampler.readings(time.monotonic())))
    assert sampler.readings(time.monotonic()) is sampler.readings(time.monotonic())


def test_readings_wait_for_no_lock() -> None:
    """A child forked while a probe's thread published has that lock held for ever; its training must go on."""
    sampler, moments = run_through(Scripted("a", {"a": 1.0}), samples=1)
    with sampler._publishing:
        assert sampler.readings(moments.now_s) == {"a": 1.0}
        moments.now_s += 3.0
        assert sampler.readings(moments.now_s) == {}
        assert sampler.absent() == {"a": "the last sample is more than 3 s old"}


# -- what fails -----------------------------------------------------------------------------------------------


def test_what_is_not_there_is_absent_with_its_reason_and_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A laptop without a GPU is no fault."""
    caplog.set_level(logging.INFO)
    sampler, _ = run_through(Scripted("gpu_util_percent", ProbeUnavailable("no driver here")), samples=4)
    assert sampler.absent() == {"gpu_util_percent": "no driver here"}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "gpu_util_percent: absent: no driver here")
    ]


def test_every_metric_of_a_probe_has_its_reason() -> None:
    """Also those that other probes might give."""
    sampler, _ = run_through(Scripted("", OSError(5, "no bus"), gives=("a", "b")), samples=1)
    reason = "OSError: [Errno 5] no bus; trying again"
    assert sampler.absent() == {"a": reason, "b": reason}


def test_a_probe_that_fails_is_told_once_and_comes_back_when_it_heals(caplog: pytest.LogCaptureFixture) -> None:
    """A driver that is loaded anew in the middle of a run."""
    caplog.set_level(logging.INFO)
    lost = RuntimeError("GPU is lost")
    probe = Scripted("a", {"a": 1.0}, lost, lost, lost, {"a": 2.0})
    sampler, moments = run_through(probe, samples=4)
    assert (sampler.readings(moments.now_s), sampler.absent()) == ({}, {"a": "RuntimeError: GPU is lost; trying again"})
    caplog.clear()

    probe = Scripted("a", {"a": 1.0}, lost, lost, lost, {"a": 2.0})
    sampler, moments = run_through(probe, samples=7)
    assert (sampler.readings(moments.now_s), sampler.absent()) == ({"a": 2.0}, {})
    assert moments.pauses == [0.0, 1.0, 1.0, 2.0, 4.0, 1.0, 1.0]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "a: sampled from now on"),
        ("WARNING", "a: absent from now on: RuntimeError: GPU is lost; trying again"),
        ("INFO", "a: sampled from now on"),
    ]


def test_a_probe_that_comes_and_goes_warns_at_most_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """A flapping driver must not fill the log of a run of days."""
    caplog.set_level(logging.WARNING)
    answers: list[Mapping[str, float] | Exception] = [{"a": 1.0}, RuntimeError("flaps")] * 20
    run_through(Scripted("a", *answers), samples=40)
    assert [record.getMessage() for record in caplog.records] == [
        "a: absent from now on: RuntimeError: flaps; trying again"
    ]


@pytest.mark.parametrize(
    ("period_s", "pauses"),
    [(1.0, [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]), (300.0, [0.0, 300.0, 300.0])],
)
def test_a_probe_that_fails_is_asked_less_and_less_often(period_s: float, pauses: list[float]) -> None:
    """A broken driver call may take seconds of CPU."""
    _, moments = run_through(Scripted("a", ProbeUnavailable("no")), samples=len(pauses), period_s=period_s)
    assert moments.pauses == pauses


def test_what_may_be_there_any_moment_is_asked_for_in_every_period() -> None:
    """A model that takes minutes to load has GPU metrics from its first steps on, not a minute later."""
    sampler, moments = run_through(Scripted("a", NotYet("the training device is not known yet")), samples=20)
    assert moments.pauses == [0.0, *[1.0] * 19]
    assert sampler.absent() == {"a": "the training device is not known yet"}


def test_a_probe_that_hangs_holds_up_neither_the_others_nor_the_end(running: Callable[..., Sampler]) -> None:
    """NVML calls have been seen to take minutes on a sick GPU."""
    now = [100.0]
    hanging, other = Hanging(), Scripted("a", {"a": 1.0})
    sampler = running(hanging, other, clock=lambda: now[0])
    try:
        assert hanging.hangs.wait(120)
        assert eventually(lambda: other.samples >= 3)
        assert sampler.absent() == {"gpu_util_percent": "not sampled yet"}
        now[0] += 0.03
        reason = "the current sample has taken more than 0.03 s"
        assert eventually(lambda: sampler.absent() == {"gpu_util_percent": reason})
        started_s = time.monotonic()
        sampler.stop(0.2)
        assert time.monotonic() - started_s < patience(2.0)
        assert other.closed == 1
    finally:
        hanging.release.set()


# -- how it ends ----------------------------------------------------------------------------------------------


def test_a_probe_gives_back_what_it_holds_after_its_last_sample() -> None:
    """NVML stays initialised as long as somebody has it open."""
    probe = Scripted("a", {"a": 1.0})
    run_through(probe, samples=2)
    assert (probe.samples, probe.closed) == (2, 1)


def test_a_probe_that_cannot_close_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """The driver may be gone by then."""
    caplog.set_level(logging.INFO)

    class Stuck(Scripted):
        def close(self) -> None:
            raise RuntimeError("gone")

    run_through(Stuck("a", {"a": 1.0}), samples=1)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_stopping_before_the_start_and_twice_is_harmless() -> None:
    """close() may come at any time."""
    probe = Scripted("a", {"a": 1.0})
    sampler = Sampler([probe], period_s=1.0)
    sampler.stop(0.1)
    sampler.start()
    sampler.stop(5.0)
    sampler.stop(0.1)
    assert probe.samples == 0


def test_no_thread_is_left_after_many_sessions() -> None:
    """A hyper-parameter search opens and closes hundreds."""
    before = threading.active_count()
    for _ in range(5):
        sampler = Sampler([Scripted("a", {"a": 1.0}), Scripted("b", RuntimeError("no"))], period_s=3600.0)
        sampler.start()
        sampler.stop(5.0)
        assert threading.active_count() == before


def test_readings_of_some_probes_are_handed_out_once(running: Callable[..., Sampler]) -> None:
    """In the first step after each sample, also when another probe samples meanwhile; readers see the latest."""
    usual = Scripted("usual", {"usual": 1.0})
    seldom = Scripted("seldom", *({"seldom": float(number)} for number in range(1, 6)))
    seldom.once = True  # type: ignore[attr-defined]
    sampler = running(usual, seldom, period_s=0.02)
    seen: list[float] = []

    def is_over() -> bool:
        found = sampler.readings(time.monotonic())
        seen.extend(value for name, value in found.items() if name == "seldom")
        if seen and seldom.samples:
            assert sampler.latest().get("seldom", 1.0) in {1.0, 2.0, 3.0, 4.0, 5.0}
        return len(seen) >= 5

    assert eventually(is_over)
    assert seen[:5] == [1.0, 2.0, 3.0, 4.0, 5.0]
    sampler.stop(5.0)
    sampler.readings(time.monotonic())
    assert "seldom" not in sampler.readings(time.monotonic())
    assert sampler.latest() in ({"usual": 1.0, "seldom": 5.0}, {})  # {}: the machine has paused


@pytest.mark.parametrize("turn", [1, -1])
def test_of_two_reasons_the_one_that_knows_is_shown(turn: int, running: Callable[..., Sampler]) -> None:
    probes = [
        Scripted("gpu_util_percent", ProbeUnavailable("the driver is not loaded")),
        Scripted("gpu_util_percent", OtherHardware("not an AMD GPU")),
    ]
    sampler = running(*probes[::turn])
    assert eventually(lambda: sampler.absent() == {"gpu_util_percent": "the driver is not loaded"})
