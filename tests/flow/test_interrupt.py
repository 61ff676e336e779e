"""KeyboardInterrupt in the middle of a step: the session goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

import esper_otel
from esper_otel import Telemetry
from esper_otel.errors import WrongState
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        yield collector


@pytest.fixture
def interrupt_in() -> Iterator[Callable[[float], object]]:
    """Sends this thread a KeyboardInterrupt after so many seconds, as Ctrl-C would; 0 calls it off."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def record(telemetry: Telemetry, number: float) -> None:
    with telemetry.step(epoch=0) as now:
        now.put(loss=number, gradient_norm=2.0)
        now.seed("seed-1", stage=4, alpha=0.5)
        with now.hook():
            pass
    telemetry.record_step({"loss": number}, epoch=0)
    telemetry.seeds(["seed-1", "seed-2"], alpha=[0.25, 0.75])


# One that falls into a callback of the garbage collector (Hypothesis has one) can only be reported by Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_that_is_interrupted_anywhere_is_the_only_one_that_suffers(
    collector: MemoryCollector, interrupt_in: Callable[[float], object]
) -> None:
    """Someone presses Ctrl-C in a notebook and runs the next cell."""
    chance = random.Random(4)
    interrupts = 0
    with esper_otel.start(run_id="interrupted") as telemetry:
        for number in range(300):
            try:
                interrupt_in(chance.uniform(10e-6, 150e-6))
                for _ in range(100):
                    record(telemetry, 1.0)
            except KeyboardInterrupt:
                interrupts += 1
            interrupt_in(0)
            record(telemetry, 2.0 + number)  # the next step is like any other
        frames = [packets.telemetry for packets in telemetry.pull(max_packets=200_000).packets]
        assert telemetry.pull().gap == 0
    assert interrupts > 150
    received = collector.points()
    points = [point for point in received if point.name == "loss" and point.value is not None]
    assert len({point.time_unix_ns for point in points}) == len(points)
    whole = Counter(point.value for point in points if point.value is not None and point.value >= 2.0)
    assert whole == {2.0 + number: 2 for number in range(300)}
    said = {point.attributes.get("seed_id") for point in received if point.name == "kasmina.seed.alpha"}
    assert said == {"seed-1", "seed-2"}
    assert collector.frames_received == telemetry.health()["recorded"] == len(frames)
    assert telemetry.health()["faults"] == 0


def test_a_step_left_open_by_an_interrupt_is_published_when_the_next_opens(collector: MemoryCollector) -> None:
    """The interrupt came between the last line of the step and the first of ``__exit__``."""
    with esper_otel.start(run_id="left") as telemetry:
        step = telemetry.step(epoch=0)
        step.__enter__()  # as after a ``with`` that could not call __exit__: nothing holds the method
        step.put(loss=1.0)
        with telemetry.step(epoch=0) as now:
            now.put(loss=2.0)
        with pytest.raises(WrongState):
            step.put(loss=3.0)
    losses = {point.value for point in collector.points() if point.name == "loss" and point.value is not None}
    assert losses == {1.0, 2.0}
    assert telemetry.health()["failed"] == 1


def test_a_step_inside_a_step_is_a_mistake_and_harms_neither(collector: MemoryCollector) -> None:
    """What looks like a step left open must not be taken for one."""
    with esper_otel.start(run_id="nested") as telemetry:
        with telemetry.step(epoch=0) as outer:
            for _ in range(2):
                with pytest.raises(WrongState, match="still open"), telemetry.step(epoch=0):
                    pass
                with pytest.raises(WrongState, match="inside an open step"):
                    telemetry.record_step({"loss": 3.0}, epoch=0)
            outer.put(loss=1.0)
        telemetry.record_step({"loss": 2.0}, epoch=0)
    losses = [point.value for point in collector.points() if point.name == "loss" and point.value is not None]
    assert losses == [1.0, 2.0]
