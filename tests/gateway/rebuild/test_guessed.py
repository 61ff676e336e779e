"""What a frame lacks: one that lost its number, count, step or epoch is never complete under a wrong number."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from properties import examples
from test_assembler import HOLD_S, LINGER_S, MS, Gateway, without_point
from wire import bodies

from esper_otel.frames.frame import GUESSED_STEP, Frame
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.pull.messages import PullRequest

pytestmark = pytest.mark.lengthy

STEP, EPOCH = "esper.global_step", "esper.epoch"
SEQUENCE, POINTS = "esper.frame.sequence", "esper.frame.points"


def resumed(count: int) -> list[Frame]:
    """Steps 1001, 1002, ... of epoch 5: those of an attempt that went on from a checkpoint."""
    return [
        make_frame(sequence=n, global_step=1000 + n, epoch=5, time_unix_ns=TIME_UNIX_NS + n * MS)
        for n in range(1, count + 1)
    ]


def filtered(frames: Iterable[Frame], *names: str, scope: str | None = None) -> list[bytes]:
    """Requests without some metrics, as a filter in a collector leaves them."""
    requests = []
    for body in bodies(frames):
        request = ExportMetricsServiceRequest.FromString(body)
        for of_scope in request.resource_metrics[0].scope_metrics:
            kept = [metric for metric in of_scope.metrics if metric.name not in names]
            del of_scope.metrics[:]
            of_scope.metrics.extend(kept)
            of_scope.scope.name = of_scope.scope.name if scope is None else scope
        requests.append(request.SerializeToString())
    return requests


def some_of(*names: str) -> list[tuple[str, ...]]:
    return [found for size in range(1, len(names) + 1) for found in itertools.combinations(names, size)]


@pytest.mark.parametrize("lost", some_of(STEP, EPOCH, SEQUENCE, POINTS), ids=", ".join)
def test_whatever_a_filter_drops_of_our_frames_none_is_complete_under_a_wrong_number(lost: tuple[str, ...]) -> None:
    gateway = Gateway()
    items = gateway.take(*filtered(resumed(10), *lost))
    items += [item for _ in range(12) for item in gateway.wait(HOLD_S)]
    assert len(items) == 10
    for number, item in enumerate(items, 1):
        is_named = STEP not in lost
        assert item.frame.global_step == (1000 + number if is_named else GUESSED_STEP + item.frame.time_unix_ns)
        # Without both there is no saying whether it is one of an SDK's reader, which has neither.
        assert item.complete == (set(lost) == {SEQUENCE, POINTS})
    run = gateway.assembler.runs(gateway.now_s)[0]
    assert (run.first_step, run.last_step) == ((1001, 1010) if STEP not in lost else (None, None))


def test_a_step_number_that_comes_late_puts_the_frame_right() -> None:
    (whole,) = bodies(resumed(1))
    rest, late = without_point(whole, STEP)
    gateway = Gateway()
    gateway.take(rest)
    (item,) = gateway.wait(HOLD_S)
    assert (item.complete, item.frame.global_step) == (False, GUESSED_STEP + item.frame.time_unix_ns)
    (item,) = gateway.take(late)
    assert (item.complete, item.revision, item.frame.global_step, item.frame.epoch) == (True, 2, 1001, 5)


def test_a_frame_number_that_comes_after_the_release_fills_its_place() -> None:
    """The frame was delivered: its number must not be waited for, nor counted as missing."""
    one, two, three = bodies(resumed(3))
    rest, late = without_point(two, SEQUENCE)
    gateway = Gateway()
    gateway.take(one, rest)
    assert [item.complete for item in gateway.wait(HOLD_S)] == [False]
    (item,) = gateway.take(late)
    assert (item.complete, item.revision, item.frame.sequence) == (True, 2, 2)
    assert [item.frame.sequence for item in gateway.take(three)] == [3]
    gateway.wait(HOLD_S)
    assert gateway.assembler.runs(gateway.now_s)[0].missing == 0


@examples(30)
@given(st.integers(2, 8), st.permutations(range(16)), st.lists(st.sampled_from([0.0, 0.03, 0.06, 1.0]), min_size=16))
def test_no_step_of_a_plain_sender_takes_anothers_number(count: int, order: list[int], waits: list[float]) -> None:
    """Values and steps in requests of their own, in any order: no two frames have one number in one revision."""
    parts: list[bytes] = []
    for body in filtered(resumed(count), SEQUENCE, POINTS, scope="somebody"):
        parts += without_point(body, STEP)
    gateway = Gateway()
    items: list[Item] = []
    for place, wait_s in zip(order, waits, strict=False):
        if place < len(parts):
            items += gateway.take(parts[place]) + gateway.wait(wait_s)
    items += [item for _ in range(2 * count) for item in gateway.wait(HOLD_S)]
    named = [item for item in items if item.frame.global_step > 1000]
    assert len({(item.frame.global_step, item.revision) for item in items}) == len(items)
    for item in named:
        if item.frame.global_step < GUESSED_STEP:
            assert item.frame.global_step == 1000 + (item.frame.time_unix_ns - TIME_UNIX_NS) // MS
        else:
            assert not item.complete
    newest = {item.frame.time_unix_ns: item for item in items}
    assert sorted(item.frame.global_step for item in newest.values()) == [*range(1001, 1001 + count)]
    assert all(item.complete for item in newest.values())


def test_a_plain_sender_that_says_no_steps_has_them_counted() -> None:
    """The first may have its number in a request that is still to come; then it is known that there is none."""
    requests = filtered(resumed(4), STEP, EPOCH, SEQUENCE, POINTS, scope="somebody")
    gateway = Gateway()
    assert gateway.take(requests[0]) + gateway.wait(HOLD_S - 0.01) == []
    items = gateway.wait(0.01)
    for request in requests[1:]:
        items += gateway.take(request) + gateway.wait(LINGER_S)
    assert [(item.frame.global_step, item.complete) for item in items] == [(number, True) for number in range(1, 5)]


def test_a_counted_step_that_comes_late_has_a_number_of_its_own() -> None:
    one, two, three = filtered(resumed(3), STEP, EPOCH, SEQUENCE, POINTS, scope="somebody")
    gateway = Gateway()
    items: list[Item] = []
    for request in (one, three, two):
        items += gateway.take(request) + gateway.wait(HOLD_S)
    assert sorted(item.frame.global_step for item in items if item.revision == 1) == [1, 2, 3]


def test_counted_steps_give_their_numbers_back_when_the_sender_says_its_own() -> None:
    """The first number comes later than anybody waits."""
    one, two, three = filtered(resumed(3), SEQUENCE, POINTS, scope="somebody")
    gateway = Gateway()
    items: list[Item] = []
    for body in (without_point(one, STEP)[0], without_point(two, STEP)[0]):
        items += gateway.take(body) + gateway.wait(HOLD_S)
    assert [(item.frame.global_step, item.complete) for item in items] == [(1, True), (2, True)]
    items += gateway.take(without_point(two, STEP)[1]) + gateway.take(three) + gateway.wait(LINGER_S)
    newest = {item.frame.time_unix_ns: item for item in items}
    said = [(item.frame.global_step, item.complete) for item in newest.values()]
    assert said == [(GUESSED_STEP + TIME_UNIX_NS + MS, False), (1002, True), (1003, True)]


def test_what_a_plain_sender_says_is_known_after_a_restart(tmp_path: Path) -> None:
    """A guess would else take the number that comes next."""
    requests = filtered(resumed(2), SEQUENCE, POINTS, scope="somebody")

    async def live() -> None:
        for body in (requests[0], without_point(requests[1], STEP)[0]):
            core = Core(FileStore(tmp_path), hold_s=0.0, linger_s=0.0)
            core.receive(body)
            core.close()
        core = Core(FileStore(tmp_path))
        steps = (await core.pull(PullRequest(run_id=RUN.run_id))).steps
        first, second = steps
        assert (first.step, first.complete) == (1001, True)
        assert (second.step, second.complete) == (GUESSED_STEP + TIME_UNIX_NS + 2 * MS, False)
        assert STEP in first.names
        assert STEP not in second.names
        core.close()

    asyncio.run(live())


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one request"])
def test_two_frames_at_one_time_are_not_mixed(together: bool) -> None:
    """A processor that cuts times to seconds: the values of one step must not pass for those of another."""
    frames = [frame._replace(time_unix_ns=TIME_UNIX_NS) for frame in resumed(3)]
    for number, frame in enumerate(frames):
        frames[number] = make_frame(
            sequence=frame.sequence, global_step=frame.global_step, epoch=5, recorded={"loss": float(number)}
        )
    gateway = Gateway()
    requests = bodies(frames)
    items = gateway.take(*([b"".join(requests)] if together else requests)) + gateway.wait(HOLD_S)
    assert [(item.frame.global_step, item.frame.values()["loss"]) for item in items] == [(1001, 0.0)]
    assert together or items[0].complete  # where the points of both were sorted into one block, this cannot be known
    assert gateway.assembler.runs(gateway.now_s)[0].differing > 0


def test_times_in_whole_milliseconds_keep_our_frames_apart() -> None:
    """A session's steps are a millisecond apart at least."""
    frames = [frame._replace(time_unix_ns=frame.time_unix_ns // MS * MS) for frame in resumed(5)]
    gateway = Gateway()
    assert [item.complete for item in gateway.take(b"".join(bodies(frames)))] == [True] * 5
