"""Where the hours went, summed up by members that die, and put together by a server: as one gateway says it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from test_shard import Log
from wire import encoder

from esper_otel import UnknownRun
from esper_otel.export.phase_points import phase_scope
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.phase_log import Phase
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.core import Core
from esper_otel.gateway.kafka.hours import HoursOfWriter, WriterHours
from esper_otel.gateway.kafka.states import KnownStates
from esper_otel.gateway.kafka.topic_records import state_bytes, state_of
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.turns import finished
from esper_otel.hours.account import PhaseTimes
from esper_otel.hours.bar import RunHours
from esper_otel.schema import METRICS

pytestmark = pytest.mark.own_code

START_NS = 1_800_000_000 * 10**9
CATALOGUE = {metric.name: metric for metric in METRICS}
RANKS, STEPS = 3, 30


def step_of(rank: int, attempt: int, step: int) -> Frame:
    """A step of 8 ms or so with a wait of 2 ms."""
    numbers = 2.0, 8.0 + rank + (step % 3) / 8
    time_unix_ns = START_NS + (step + 1_000 * attempt) * 2 * 10**7
    sequence = step if attempt == 1 else step - 20
    return Frame(
        Run("run", attempt, rank, RANKS),
        sequence,
        step,
        0,
        time_unix_ns,
        ("input_wait_ms", "step_latency_ms"),
        numbers,
        {},
    )


def phase_request(rank: int, attempt: int, number: int, name: str, step: int | None) -> bytes:
    end = START_NS + ((step or 0) + 1_000 * attempt) * 2 * 10**7 + number * 10**6
    phase = Phase(number, name, end - 4 * 10**6, end, 4.0, step, 4.0 * number, 4.0 * number if step else 0.0)
    return encoder().alone(Run("run", attempt, rank, RANKS), phase_scope([phase], CATALOGUE, START_NS))


def requests(seed: int) -> list[bytes]:
    """Two attempts, the second of which does steps again; phases before, inside and after steps."""
    chance = random.Random(seed)
    made: list[bytes] = []
    for attempt, first in ((1, 1), (2, 21)):
        encoders = [encoder(f"process-{rank}") for rank in range(RANKS)]
        made += [phase_request(rank, attempt, 1, "start_up", None) for rank in range(RANKS)]
        for step in range(first, first + STEPS):
            for rank in range(RANKS):
                made += [each.body for each in encoders[rank].requests(blocks_of([step_of(rank, attempt, step)]))]
                if chance.random() < 0.2:
                    made.append(phase_request(rank, attempt, step, "checkpoint", step))
    return made


def of_one_gateway(bodies: Sequence[bytes]) -> RunHours:
    async def asked() -> RunHours:
        core = Core(MemoryStore())
        for body in bodies:
            core.receive(body)
        found = await core.run_hours("run")
        core.close()
        return found

    return asyncio.run(asked())


def of_a_server(log: Log) -> RunHours:
    known = KnownStates()
    for key, value in log.states.items():
        known.note(0, state_of(key, value))
    return finished(known.hours("run"))[0]


def assert_equal(found: RunHours, expected: RunHours) -> None:
    assert found.phases == expected.phases
    assert found.ranks.keys() == expected.ranks.keys()
    for ours, theirs in (
        (found.run, expected.run),
        *((found.ranks[rank], expected.ranks[rank]) for rank in range(RANKS)),
    ):
        assert ours.parts == pytest.approx(theirs.parts, rel=1e-3)
        assert ours._replace(parts={}) == theirs._replace(parts={})


@pytest.mark.parametrize("seed", range(3))
def test_hours_are_those_of_one_gateway_whenever_members_die(seed: int) -> None:
    """No step and no phase is lost or counted twice; a rank is no run before its first step."""
    log = Log(requests(seed))
    log.work(RANKS, of_all=False, dies=False)
    known = KnownStates()
    for key, value in log.states.items():
        known.note(0, state_of(key, value))
    assert known.run_ids() == set()
    assert set(finished(known.hours("run"))[0].ranks) == set(range(RANKS))
    chance = random.Random(seed)
    while log.read < len(log.requests):
        log.work(chance.randint(0, 9), of_all=chance.random() < 0.3, dies=chance.random() < 0.3)
    log.work(0, of_all=True, dies=False, waits_s=5)
    expected = of_one_gateway(log.requests)
    assert expected.run.parts["redone"] > 0.0
    assert_equal(of_a_server(log), expected)


def test_hours_go_with_their_writers() -> None:
    log = Log(requests(1))
    log.work(len(log.requests), of_all=True, dies=False)
    known = KnownStates()
    states = [state_of(*record) for record in log.states.items()]
    for state in states:
        known.note(0, state)
    for state in states:
        known.forget(0, state.state.origin)
    with pytest.raises(UnknownRun):
        finished(known.hours("run"))
    older = {key: value for key, value in log.states.items() if key}
    assert all(state_bytes(state_of(*record)) == record[1] for record in older.items())


def test_a_long_run_takes_no_more_room() -> None:
    """Its sums up to a step stay right within some percent, most of all near the end, where runs resume."""
    exact: list[float] = []
    hours, chance = HoursOfWriter(), random.Random(1)
    for step in range(1, 30_001):
        frame = step_of(0, 1, step)._replace(numbers=(1.0, 5.0 + chance.random() + step / 3_000))
        hours.add(frame)
        exact.append((exact[-1] if exact else 0.0) + frame.numbers[1])
        if step % 9_000 == 0:  # a takeover
            hours = HoursOfWriter(hours.written())
    written = hours.written()
    assert len(written.knots) < 80
    account = written.account()
    assert account.steps == 30_000
    assert account.sums.rest == pytest.approx(exact[-1])
    for behind in (1, 10, 100, 1_000, 10_000):
        ours, theirs = (each - account.sums.rest for each in (account.up_to(30_000 - behind).rest, exact[-1 - behind]))
        assert ours == pytest.approx(theirs, rel=0.05, abs=6.0)


def test_phases_of_a_writer_are_bounded_and_keep_their_totals() -> None:
    hours = HoursOfWriter()
    hours.add_phase(PhaseTimes("start_up", 1, total_ms=9.0, length_ms=9.0))
    for number in range(1, 1_001):
        hours.add_phase(PhaseTimes("checkpoint", 10 * number, total_ms=2.0 * number))
        hours.add_phase(PhaseTimes("checkpoint", 10 * number, own_ms=2.0))
    phases = hours.written().phases
    assert len(phases) < 70
    assert phases[0].name == "start_up"
    assert phases[-1] == PhaseTimes("checkpoint", 10_000, total_ms=2_000.0, own_ms=2.0)
    again = WriterHours.of({}, hours.written().knots, [list(each) for each in phases])
    assert list(again.phases) == list(phases)
