"""Phases: each moment counts for the innermost phase or step, whatever is inside what."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import esper_otel
from esper_otel import InvalidName, InvalidValue, Telemetry, WrongState
from esper_otel.frames.journal import entries_in, line_of
from esper_otel.frames.phase_log import MOST_NAMES, Phase, PhaseLog, checked_phase


class Time:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now_ns = 10**18

    def spend(self, milliseconds: float) -> None:
        self.now_ns += round(milliseconds * 1e6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Replaces the clocks of phases, waits and steps."""
    clock = Time()
    fake = SimpleNamespace(
        perf_counter=lambda: (clock.now_ns - 10**18) / 1e9, monotonic=time.monotonic, time_ns=lambda: clock.now_ns
    )
    for module in ("record.phases", "record.step", "record.recorder", "record.timed", "session.telemetry"):
        monkeypatch.setattr(f"esper_otel.{module}.time", fake)
    monkeypatch.setattr("esper_otel.record.clock.Clock.now_ns", lambda _self: clock.now_ns)
    return clock


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch, clock: Time) -> Iterator[Telemetry]:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setattr("esper_otel.session.start._began_unix_ns", lambda: clock.now_ns)
    with esper_otel.start(run_id="phases") as telemetry:
        yield telemetry


def phases(telemetry: Telemetry) -> list[Phase]:
    return telemetry._recorder.phases.log.waiting(None, 10**6)


def own(telemetry: Telemetry) -> dict[str, float]:
    """The time of each name, in whole milliseconds; start-up only if there was any."""
    totals = telemetry._recorder.phases.log.totals()
    return {name: round(total, 3) for name, total in totals.items() if total}


def step(telemetry: Telemetry, clock: Time, milliseconds: float) -> None:
    with telemetry.step(epoch=0):
        clock.spend(milliseconds)


def test_a_phase_has_its_times_its_number_and_its_step(telemetry: Telemetry, clock: Time) -> None:
    step(telemetry, clock, 1)
    with telemetry.phase("checkpoint"):
        clock.spend(30)
    with telemetry.step(epoch=0), telemetry.phase("checkpoint"):
        clock.spend(12)
    first, second = phases(telemetry)
    assert first == Phase(1, "checkpoint", 10**18 + 10**6, 10**18 + 31 * 10**6, 30.0, None, 30.0, 0.0)
    assert second._replace(start_unix_ns=0, end_unix_ns=0) == Phase(2, "checkpoint", 0, 0, 12.0, 2, 42.0, 12.0)


def test_start_up_lasts_until_the_first_step_without_the_phases_in_it(telemetry: Telemetry, clock: Time) -> None:
    clock.spend(500)
    with telemetry.phase("compile"):
        clock.spend(200)
    for _ in telemetry.batches(slow(clock, 70, 1)):  # the wait for the first batch belongs to the step
        step(telemetry, clock, 10)
    assert own(telemetry) == {"compile": 200.0, "start_up": 500.0}
    start_up = phases(telemetry)[1]
    assert (start_up.length_ms, start_up.start_unix_ns) == (700.0, 10**18)


def test_start_up_ends_before_a_step_that_the_trainer_has_measured(telemetry: Telemetry, clock: Time) -> None:
    clock.spend(600)
    telemetry.record_step({"step_latency_ms": 80.0, "input_wait_ms": 20.0}, epoch=0)
    assert own(telemetry) == {"start_up": 500.0}


def slow(clock: Time, milliseconds: float, count: int) -> Iterator[int]:
    for number in range(count):
        clock.spend(milliseconds)
        yield number


def test_nested_phases_do_not_count_twice(telemetry: Telemetry, clock: Time) -> None:
    step(telemetry, clock, 1)
    with telemetry.phase("evaluation"):
        clock.spend(10)
        with telemetry.phase("checkpoint"):
            clock.spend(5)
            with telemetry.phase("checkpoint"):
                clock.spend(2)
        clock.spend(1)
    assert own(telemetry) == {"evaluation": 11.0, "checkpoint": 7.0}
    assert [phase.length_ms for phase in phases(telemetry)] == [2.0, 7.0, 18.0]


def test_steps_and_waits_inside_a_phase_are_not_the_phases(telemetry: Telemetry, clock: Time) -> None:
    step(telemetry, clock, 1)
    with telemetry.phase("epoch"):
        for number in telemetry.batches(slow(clock, 3, 4)):
            with telemetry.step(epoch=0):
                clock.spend(10)
                if number == 2:
                    with telemetry.phase("checkpoint"):
                        clock.spend(5)
            clock.spend(1)
        telemetry.record_step({"step_latency_ms": 40.0}, epoch=0)
        clock.spend(40)
    assert own(telemetry) == {"epoch": 4.0, "checkpoint": 5.0}
    waits = [frame.recorded.get("input_wait_ms") for frame in telemetry._recorder.publisher.ring.after(0, 9)[0]]
    assert waits == [None, *[pytest.approx(3.0)] * 4, None]


def test_waiting_for_batches_of_an_evaluation_is_not_input_wait(telemetry: Telemetry, clock: Time) -> None:
    """They are not for the next step."""
    step(telemetry, clock, 1)
    with telemetry.phase("evaluation"):
        for _ in telemetry.batches(slow(clock, 50, 3)):
            clock.spend(1)
    for _ in telemetry.batches(slow(clock, 4, 1)):
        step(telemetry, clock, 1)
    assert own(telemetry) == {"evaluation": 153.0}
    assert telemetry._recorder.publisher.ring.newest().recorded["input_wait_ms"] == pytest.approx(4.0)  # type: ignore[union-attr]


def test_a_phase_inside_a_wait_is_not_part_of_the_wait(telemetry: Telemetry, clock: Time) -> None:
    def batches() -> Iterator[int]:
        clock.spend(5)
        with telemetry.phase("data"):
            clock.spend(60)
        yield 1

    step(telemetry, clock, 1)
    for _ in telemetry.batches(batches()):
        step(telemetry, clock, 1)
    assert own(telemetry) == {"data": 60.0}
    assert telemetry._recorder.publisher.ring.newest().recorded["input_wait_ms"] == pytest.approx(5.0)  # type: ignore[union-attr]


def test_what_another_thread_does_holds_nothing_up(telemetry: Telemetry, clock: Time) -> None:
    def save() -> None:
        with telemetry.phase("checkpoint"):
            clock.spend(25)

    step(telemetry, clock, 1)
    saving = threading.Thread(target=save)
    saving.start()
    saving.join()
    (phase,) = phases(telemetry)
    assert (phase.length_ms, phase.own_ms, phase.total_ms) == (25.0, 0.0, 0.0)


def test_a_decorated_function_may_call_itself(telemetry: Telemetry, clock: Time) -> None:
    @telemetry.phase("evaluation")
    def evaluate(depth: int) -> int:
        clock.spend(2)
        return evaluate(depth - 1) if depth else 7

    step(telemetry, clock, 1)
    assert evaluate(2) == 7
    assert own(telemetry) == {"evaluation": 6.0}


def test_a_decorated_coroutine_function_is_timed_until_it_has_been_awaited(telemetry: Telemetry, clock: Time) -> None:
    @telemetry.phase("checkpoint")
    async def save(path: str) -> str:
        clock.spend(2)
        await asyncio.sleep(0)
        clock.spend(3)
        return path

    step(telemetry, clock, 1)
    assert save.__name__ == "save"
    assert asyncio.run(save("here")) == "here"
    assert own(telemetry) == {"checkpoint": 5.0}


def numbers() -> Iterator[int]:
    yield 1


async def later_numbers() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("function", [numbers, later_numbers])
def test_a_generator_function_cannot_be_decorated(telemetry: Telemetry, function: Callable[[], Any]) -> None:
    with pytest.raises(InvalidValue, match=f"{function.__name__} is a generator function; use `with` inside it"):
        telemetry.phase("data")(function)


def test_a_generator_function_is_left_as_it_is_where_mistakes_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("ESPER_ON_MISTAKE", "warn")
    with esper_otel.start(run_id="spared") as telemetry:
        assert telemetry.phase("data")(numbers) is numbers
        assert telemetry.health()["mistakes"] == 1


def test_a_phase_that_raises_is_recorded_and_one_that_an_interrupt_left_open_ends_with_it(
    telemetry: Telemetry, clock: Time
) -> None:
    step(telemetry, clock, 1)

    @telemetry.phase("evaluation")
    def evaluate() -> None:
        telemetry.phase("data").__enter__()  # its end was never reached
        clock.spend(3)
        raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert own(telemetry) == {"data": 3.0}
    assert [phase.name for phase in phases(telemetry)] == ["data", "evaluation"]


def test_beyond_64_names_further_ones_are_other(telemetry: Telemetry, clock: Time) -> None:
    step(telemetry, clock, 1)
    for number in range(MOST_NAMES + 3):
        with telemetry.phase(f"phase {number}"):
            clock.spend(2)
    names = [phase.name for phase in phases(telemetry)]
    assert names[MOST_NAMES - 1 :] == [f"phase {MOST_NAMES - 1}", "other", "other", "other"]
    assert own(telemetry)["other"] == 6.0


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, "unknown", "\ud800"])
def test_a_wrong_name_is_a_mistake(telemetry: Telemetry, name: str) -> None:
    with pytest.raises(InvalidName):
        telemetry.phase(name)


def test_a_name_is_a_text_and_a_closed_session_has_no_phases(telemetry: Telemetry) -> None:
    with pytest.raises(InvalidValue):
        telemetry.phase(3)  # type: ignore[arg-type]
    telemetry.close()
    with pytest.raises(WrongState):
        telemetry.phase("idle")


def test_mistakes_are_spared_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("ESPER_ON_MISTAKE", "warn")
    with esper_otel.start(run_id="phases") as telemetry:
        with telemetry.phase(""):
            pass
        assert telemetry.health()["mistakes"] == 1
        assert phases(telemetry) == []


def test_readers_have_the_totals(telemetry: Telemetry, clock: Time) -> None:
    """So that what scrapes a trainer has them, too."""
    with telemetry.phase("checkpoint"):
        clock.spend(7)
    counts: Any = telemetry._wiring.counts()  # type: ignore[attr-defined]
    assert counts["esper.phase_ms", "checkpoint"] == 7.0


def test_the_log_keeps_the_newest_and_counts_the_others() -> None:
    log = PhaseLog(most=3)
    for number in range(5):
        log.add("idle", number * 10**9, number * 10**9 + 1, 1.0, None)
    assert [phase.number for phase in log.waiting(None, 9)] == [3, 4, 5]
    assert log.dropped == 2
    log.delivered(4)
    assert [phase.number for phase in log.waiting(4 * 10**9 + 1, 9)] == [5]
    assert log.waiting(4 * 10**9, 9) == []


def test_two_phases_of_a_name_never_end_in_one_millisecond() -> None:
    """A database would keep one of the two points."""
    log = PhaseLog()
    for number in range(4):
        log.add("data", 0, number, 1.0, None)
    ends = [phase.end_unix_ns for phase in log.waiting(None, 9)]
    assert [end // 10**6 for end in ends] == [0, 1, 2, 3]
    assert ends[0] == 0


def test_phases_are_read_back_from_lines_and_damage_is_skipped() -> None:
    log = PhaseLog()
    for number in range(4):
        log.add("säve", number * 10**9, number * 10**9 + 5, 0.25, number or None)
    written = log.waiting(None, 9)
    lines = [line_of(phase) for phase in written]
    content = b"{}\n" + lines[0] + b"[1, 2\n" + lines[1] + b'["a", 3, 4]\n' + b"".join(lines[1:]) + lines[3][:20]
    bad = (b"[" * 100_000, b'[9,"a",0,1,1' + b"0" * 400 + b",null,1,1]", b'[9,"a",0,%d,1,null,1,1]' % 2**63)
    content += b"\n" + b"\n".join(bad) + b"\n"
    assert list(entries_in(content, checked_phase, 1)) == written[1:]


def test_the_start_of_the_process_is_known_on_linux() -> None:
    """Of another process, since this one was started long ago."""
    program = "import time; from esper_otel.record.phases import *; print(process_start_unix_ns(time.time_ns()))"
    before = time.time_ns()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert before - 50 * 10**6 < int(done.stdout) < time.time_ns()


@pytest.mark.parametrize("wrong_ms", [float("nan"), float("inf"), -1e9, 1e300])
def test_a_duration_that_cannot_be_costs_neither_its_step_nor_the_totals(
    telemetry: Telemetry, clock: Time, wrong_ms: float
) -> None:
    clock.spend(500)
    telemetry.record_step({"step_latency_ms": wrong_ms}, epoch=0)
    with telemetry.phase("epoch"):
        clock.spend(30)
        telemetry.record_step({"step_latency_ms": wrong_ms}, epoch=0)
    assert own(telemetry) == {"start_up": 500.0, "epoch": 30.0}
    assert telemetry._recorder.publisher.ring.last == 2


def test_one_wrong_own_time_does_not_spoil_the_total() -> None:
    log = PhaseLog()
    for own_ms in (2.0, float("nan"), float("-inf"), -3.0):
        log.add("data", 0, 1, own_ms, None)
    assert log.totals() == {"data": 2.0}


def test_phases_that_are_open_when_another_thread_begins_the_steps_end_as_usual(
    telemetry: Telemetry, clock: Time
) -> None:
    """As if a trainer runs in a thread, and the main thread waits for it."""

    def train() -> None:
        with telemetry.phase("epoch"):
            clock.spend(5)
            step(telemetry, clock, 10)
            clock.spend(3)

    with telemetry.phase("fit"):
        clock.spend(100)
        training = threading.Thread(target=train)
        training.start()
        training.join()
    with telemetry.phase("after"):
        clock.spend(1)
    found = {phase.name: (phase.length_ms, round(phase.own_ms, 3)) for phase in phases(telemetry)}
    assert found["epoch"] == (18.0, 8.0)
    assert found["fit"] == (118.0, 0.0)
    assert found["after"] == (1.0, 0.0)
    assert not telemetry._recorder.phases._open
    assert not telemetry._recorder.phases._beside


def test_a_signal_handler_may_end_a_phase_while_one_is_written(telemetry: Telemetry, clock: Time) -> None:
    """It runs on the thread that writes, at any point: neither blocked, nor with a number that is taken."""
    handled: list[int] = []

    def handle(_number: int, _frame: object) -> None:
        handled.append(1)
        with telemetry.phase("checkpoint"):
            pass

    def write(_phases: Sequence[Phase]) -> None:
        if not handled:
            signal.raise_signal(signal.SIGUSR1)

    step(telemetry, clock, 1)
    telemetry._recorder.phases.log.added = write
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        ending = telemetry._recorder.phases.log._lock
        assert ending.acquire(blocking=False)
        assert ending.acquire(blocking=False), "not reentrant: what follows would block for ever"
        ending.release()
        ending.release()
        with telemetry.phase("data"):
            clock.spend(2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [(phase.number, phase.name) for phase in phases(telemetry)] == [(1, "data"), (2, "checkpoint")]
