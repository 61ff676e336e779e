"""The sampler: fresh readings, reasons for the others, and nobody who waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.sampler import Sampler


class Scripted:
    """A probe whose answers are given: readings, or an exception; the last one stays."""

    def __init__(self, name: str, *answers: Mapping[str, float] | Exception) -> None:
        self.gives = (name,)
        self._answers = list(answers)
        self.samples = 0

    def sample(self) -> Mapping[str, float]:
        self.samples += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Hanging:
    """A driver that never answers."""

    gives = ("gpu_util_percent",)

    def __init__(self) -> None:
        self.release = threading.Event()

    def sample(self) -> Mapping[str, float]:
        self.release.wait(20)
        return {"gpu_util_percent": 1.0}


def eventually(holds: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return holds()


@pytest.fixture
def running() -> Iterator[Callable[..., Sampler]]:
    started: list[Sampler] = []

    def start(*probes: Scripted | Hanging, period_s: float = 0.01) -> Sampler:
        sampler = Sampler(probes, period_s=period_s)
        started.append(sampler)
        sampler.start()
        return sampler

    yield start
    for sampler in started:
        sampler.stop(5.0)


def test_the_readings_of_all_probes_are_shown_soon_after_the_start(running: Callable[..., Sampler]) -> None:
    """A run of ten seconds has hardware metrics too."""
    sampler = running(Scripted("a", {"a": 1.0}), Scripted("b", {"b": 2.0, "beside": 3.0}), period_s=3600.0)
    assert eventually(lambda: sampler.readings(time.monotonic()) == {"a": 1.0, "b": 2.0, "beside": 3.0})
    assert sampler.absent() == {}


def test_a_reading_older_than_three_periods_is_absent_and_says_so() -> None:
    """A hardware metric that has stopped must not look alive."""
    now = [100.0]
    sampler = Sampler([Scripted("a", {"a": 1.0})], period_s=10.0, clock=lambda: now[0])
    assert sampler.absent() == {"a": "not sampled yet"}
    sampler.start()
    assert eventually(lambda: sampler.readings(100.0) == {"a": 1.0})
    sampler.stop(5.0)
    assert sampler.readings(129.9) == {"a": 1.0}
    now[0] = 130.0
    assert sampler.readings(130.0) == {}
    assert sampler.absent() == {"a": "the last sample is more than 30 s old"}


def test_readings_between_two_samples_are_the_same_object(running: Callable[..., Sampler]) -> None:
    """The training thread asks in every step: it must cost a comparison."""
    sampler = running(Scripted("a", {"a": 1.0}), period_s=3600.0)
    assert eventually(lambda: bool(sampler.readings(time.monotonic())))
    assert sampler.readings(time.monotonic()) is sampler.readings(time.monotonic())


def test_what_is_not_there_is_absent_with_its_reason_and_without_a_warning(
    running: Callable[..., Sampler], caplog: pytest.LogCaptureFixture
) -> None:
    """A laptop without a GPU is no fault."""
    sampler = running(Scripted("gpu_util_percent", ProbeUnavailable("no driver here")))
    assert eventually(lambda: sampler.absent() == {"gpu_util_percent": "no driver here"})
    assert caplog.records == []


def test_a_probe_that_fails_is_told_once_and_comes_back_when_it_heals(
    running: Callable[..., Sampler], caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that is loaded anew in the middle of a run."""
    caplog.set_level(logging.WARNING)
    lost = RuntimeError("GPU is lost")
    sampler = running(Scripted("a", {"a": 1.0}, lost, lost, {"a": 2.0}), period_s=0.02)
    seen: list[str] = []

    def is_well_again() -> bool:
        seen.append(sampler.absent().get("a", ""))
        return sampler.readings(time.monotonic()) == {"a": 2.0}

    assert eventually(is_well_again)
    assert "RuntimeError: GPU is lost" in seen
    assert [record.getMessage() for record in caplog.records] == [
        "a are absent from now on: RuntimeError: GPU is lost; asking again"
    ]


def test_a_probe_that_fails_is_asked_less_and_less_often() -> None:
    """A broken driver call may take seconds of CPU."""
    pauses: list[float] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return len(pauses) > 8

    sampler = Sampler([Scripted("a", ProbeUnavailable("no"))], period_s=1.0)
    sampler._ending = Recorded()
    sampler.start()
    sampler.stop(5.0)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_a_probe_that_hangs_holds_up_neither_the_others_nor_the_end(running: Callable[..., Sampler]) -> None:
    """NVML calls have been seen to take minutes on a sick GPU."""
    hanging = Hanging()
    sampler = running(hanging, Scripted("a", {"a": 1.0}))
    assert eventually(lambda: sampler.readings(time.monotonic()) == {"a": 1.0})
    assert sampler.absent() == {"gpu_util_percent": "not sampled yet"}
    started_s = time.monotonic()
    sampler.stop(0.2)
    assert time.monotonic() - started_s < 2.0
    hanging.release.set()


def test_stopping_before_the_start_and_twice_is_harmless() -> None:
    """close() may come at any time."""
    sampler = Sampler([Scripted("a", {"a": 1.0})], period_s=1.0)
    sampler.stop(0.1)
    sampler.start()
    sampler.stop(5.0)
    sampler.stop(0.1)
