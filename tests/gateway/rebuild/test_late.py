"""What comes late: in any order and with any delay, each frame is pulled once in its newest revision, or counted."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame, seed_table
from gateways import pulled
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from test_assembler import HOLD_S, MS, Gateway, living
from wire import bodies

from esper_otel.frames.frame import Frame
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import RunState
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.rebuild import queue
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.rebuild.queue import SkippedNumbers
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.pull.messages import Run

pytestmark = pytest.mark.lengthy


def state(gateway: Gateway) -> RunState:
    (found,) = gateway.assembler.runs(gateway.now_s)
    return found


def test_a_beginning_that_comes_late_is_delivered() -> None:
    """A collector with several consumers sends the second request before the first; a killed one queues again."""
    gateway = Gateway()
    first, second = living(5), living(5, start=6)
    assert gateway.take(b"".join(bodies(second))) == []
    assert [item.frame.sequence for item in gateway.wait(HOLD_S)] == [6, 7, 8, 9, 10]
    assert (state(gateway).missing, state(gateway).unseen, state(gateway).first_step) == (0, 5, 6)
    gateway.wait(1.0)
    items = gateway.take(b"".join(bodies(first)))
    assert [(item.frame.sequence, item.revision) for item in items if item.frame.sequence < 6] == [
        (number, 1) for number in range(1, 6)
    ]
    assert (state(gateway).missing, state(gateway).unseen, state(gateway).first_step) == (0, 0, 1)
    assert gateway.take(b"".join(bodies(first))) == []


def test_a_gateway_that_joins_late_says_nothing_of_what_went_elsewhere() -> None:
    """An earlier gateway had the first million steps; what lies between two that have come is missing."""
    gateway = Gateway()
    gateway.take(*bodies(living(1, start=1_000_001)))
    gateway.wait(HOLD_S)
    assert (state(gateway).missing, state(gateway).unseen) == (0, 1_000_000)
    gateway.take(*bodies(living(1, start=999_001)))
    assert (state(gateway).missing, state(gateway).unseen) == (999, 999_000)


@examples(12)
@given(st.integers(2, 24), st.integers(0, 2**32), st.booleans())
def test_any_order_any_delay_and_any_restart_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, is_patient: bool
) -> None:
    """Requests of some steps each, in any order, some twice; the gateway ends and begins again at any moment."""
    luck = random.Random(seed)
    folder = tmp_path_factory.mktemp("store")
    requests = _cut(living(count, start=luck.choice([1, 1, 1_000])), luck)
    requests += luck.sample(requests, len(requests) // 3)
    luck.shuffle(requests)
    lowest = min(frames[0].sequence for frames in requests)

    async def live() -> None:
        core = Core(FileStore(folder), hold_s=60.0 if is_patient else 0.0)
        core.start()
        came: set[int] = set()
        for frames in requests:
            core.receive(b"".join(bodies(frames)))
            came |= {frame.sequence for frame in frames}
            if luck.random() < 0.3:
                core.close()
                core = Core(FileStore(folder), hold_s=60.0 if is_patient else 0.0)
                core.start()
            if not is_patient:
                pulled, run = await _seen(core)
                assert pulled == came
                assert run.unseen == min(came) - 1
                assert run.missing == max(came) - min(came) + 1 - len(came)
        if is_patient and lowest > 1:  # the numbers before them never come
            core.close()
            core = Core(FileStore(folder), hold_s=0.0)
            core.start()
        pulled, run = await _seen(core)
        core.close()
        assert pulled == {*range(lowest, lowest + count)}
        assert (run.missing, run.unseen, run.incomplete) == (0, lowest - 1, 0)

    asyncio.run(live())


def _cut(frames: list[Frame], luck: random.Random) -> list[list[Frame]]:
    cuts = sorted({0, len(frames), *luck.choices(range(len(frames)), k=len(frames) // 2)})
    return [frames[begin:end] for begin, end in itertools.pairwise(cuts)]


async def _seen(core: Core) -> tuple[set[int], Run]:
    """The numbers of the steps that are pulled, each once in each revision, and what is known of their writer."""
    steps = await pulled(core, RUN.run_id)
    assert all(step.complete for step in steps)
    assert len({(step.step, step.revision) for step in steps}) == len(steps)
    [run] = core.runs().runs
    return {step.step for step in steps}, run


def test_more_steps_than_a_gateway_goes_on_from_do_not_hide_a_hole(tmp_path: Path) -> None:
    """Nor do steps that were corrected last, whose places in the store are the newest."""
    frames = living(600)
    late, others = frames[4:6], frames[2:4] + frames[6:]

    async def live() -> None:
        core = Core(FileStore(tmp_path), hold_s=0.0)
        core.receive(b"".join(bodies(others)))
        core.close()
        core = Core(FileStore(tmp_path), hold_s=0.0)
        assert (core.runs().runs[0].missing, core.runs().runs[0].unseen) == (2, 2)
        core.receive(b"".join(bodies(late)))
        core.close()
        core = Core(FileStore(tmp_path), hold_s=0.0)
        core.receive(b"".join(bodies(frames[:2] + living(1, start=601))))
        pulled, run = await _seen(core)
        assert pulled == {*range(1, 602)}
        assert (run.missing, run.unseen, run.too_late, run.first_step) == (0, 0, 0, 1)
        core.close()

    asyncio.run(live())


def test_a_late_step_that_is_too_old_to_be_put_in_changes_no_other(tmp_path: Path) -> None:
    """What happened to its seeds between it and the steps that are kept is not known any more."""
    quiet = seed_table({})
    frames = [frame._replace(seeds=quiet, live=quiet) for frame in living(400)]
    late = living(1, start=5)

    async def live() -> None:
        core = Core(FileStore(tmp_path), hold_s=0.0)
        core.receive(b"".join(bodies(frames[:4] + frames[5:])))
        core.close()
        core = Core(FileStore(tmp_path), hold_s=0.0)
        core.receive(b"".join(bodies(late)))
        steps = await pulled(core, RUN.run_id)
        assert sorted((step.step, step.revision) for step in steps) == [(number, 1) for number in range(1, 401)]
        core.close()

    asyncio.run(live())


@pytest.mark.parametrize("number", [2**53 - 1, 2**53, 2**63, 2**64 - 2048])
def test_no_number_of_a_frame_stops_the_store(tmp_path: Path, number: int) -> None:
    """Anybody may send one that no database has; others must not notice."""

    async def live() -> None:
        core = Core(FileStore(tmp_path), hold_s=0.0)
        for frame in (*living(1), living(1)[0]._replace(sequence=number, time_unix_ns=TIME_UNIX_NS + 9 * MS)):
            core.receive(b"".join(bodies([frame])))
        core.close()
        core = Core(FileStore(tmp_path), hold_s=0.0)
        core.receive(b"".join(bodies([living(1, start=2)[0]._replace(run=replace(RUN, run_id="another"))])))
        assert len(await pulled(core, "another")) == 1
        assert len(await pulled(core, RUN.run_id)) == 2
        core.close()

    asyncio.run(live())


def test_of_more_holes_than_are_remembered_the_oldest_stay_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes of them is not taken any more, and must not be called delivered."""
    monkeypatch.setattr(queue, "_MOST_RANGES", 3)
    gateway = Gateway()
    gateway.take(b"".join(bodies(living(20)[1::2])))
    gateway.wait(HOLD_S)
    assert (state(gateway).missing, state(gateway).unseen) == (9, 1)
    items = gateway.take(b"".join(bodies(living(20)[0::2])))
    assert [item.frame.sequence for item in items if item.frame.sequence % 2] == [1, 15, 17, 19]
    assert (state(gateway).missing, state(gateway).unseen, state(gateway).too_late) == (6, 0, 6)


def test_a_twins_frames_are_told_apart_though_a_beginning_is_open() -> None:
    """Two processes with one identity: a number below the lowest with a later time is not the first one's beginning."""
    gateway = Gateway()
    gateway.take(*bodies(living(3, start=6)))
    gateway.wait(HOLD_S)
    other = [frame._replace(time_unix_ns=frame.time_unix_ns + 100 * MS + 1) for frame in living(8)]
    gateway.take(*bodies(other))
    gateway.wait(HOLD_S)
    gateway.take(*bodies(living(5)))
    gateway.wait(HOLD_S)
    states = {each.origin.writer: each for each in gateway.assembler.runs(gateway.now_s)}
    assert [(each.missing, each.unseen, each.first_step, each.last_step) for each in states.values()] == [
        (0, 0, 1, 8),
        (0, 0, 1, 8),
    ]


def test_a_twins_whole_frames_are_released_at_once() -> None:
    gateway = Gateway()
    gateway.take(*bodies(living(3)))
    other = bodies([frame._replace(time_unix_ns=frame.time_unix_ns + 1) for frame in living(3)])
    assert [item.frame.sequence for body in other for item in gateway.take(body)] == [1, 2, 3]


def test_a_third_process_with_the_same_identity_is_counted() -> None:
    """There are two writers for one identity; what fits neither must not vanish without a word."""
    gateway = Gateway()
    for number in range(3):
        gateway.take(*bodies([frame._replace(time_unix_ns=frame.time_unix_ns + number) for frame in living(4)]))
    gateway.wait(HOLD_S)
    assert sum(each.too_late for each in gateway.assembler.runs(gateway.now_s)) == 4


def test_a_late_beginning_of_many_steps_takes_no_time() -> None:
    """Each late step is put in between others: those after it are as they were, and are not made again."""
    decoder, assembler = Decoder(), Assembler(Limits(), hold_s=0.0)
    frames = [
        make_frame(
            sequence=n, global_step=n, time_unix_ns=TIME_UNIX_NS + n * MS, seeds=seed_table({}), live=seed_table({})
        )
        for n in range(1, 1501)
    ]
    made = 0
    for part in (frames[500:], frames[:500]):
        assembler.take(decoder.decode(b"".join(bodies(part))), now_s=1.0, received_unix_ns=1)
        made += len(assembler.release(1.0))
    assert made <= 1500 + 500


@examples(50)
@given(st.lists(st.integers(1, 30), unique=True, min_size=1, max_size=30), st.data())
def test_holes_are_those_of_a_set(numbers: list[int], data: st.DataObject) -> None:
    """The slow way: a set of the numbers that have come."""
    holes, came, highest = SkippedNumbers(), set[int](), 0
    for number in numbers:
        if highest and number < highest:
            assert (number in holes) == (number not in came)
            if number in holes:
                before, after = holes.around(number)
                assert before == max((each for each in came if each < number), default=0)
                assert after == min(each for each in came if each > number)
            holes.remove(number)
        elif highest:
            if number > highest + 1:
                holes.add(highest + 1, number)
            highest = number
        else:
            holes.lowest = highest = number
        came.add(number)
        assert holes.lowest == min(came)
        assert holes.unseen == min(came) - 1
        assert holes.count == max(came) - min(came) + 1 - len(came)
        again = SkippedNumbers()
        again.restore(holes.lowest, holes.holes, holes.count)
        asked = data.draw(st.integers(1, highest))
        assert (asked in again) == (asked in holes) == (asked not in came)
