"""Several gateways: a run that moves between real ones, one of which is killed, is pulled as if it were at one."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from gateways import RunningGateway, post
from wire import bodies

from esper_otel import TamiyoClient, aio
from esper_otel.errors import ConfigurationError, GatewayUnavailable, StaleCursor, UnknownRun
from esper_otel.hours.bar import RunHours
from esper_otel.leyline.packets import Packets, Page, packets
from esper_otel.leyline.system_state import system_state
from esper_otel.pull.event_infos import EventInfo, EventPage
from esper_otel.pull.position import NumberSet, Position
from esper_otel.pull.several import EVENTS, joined

pytestmark = pytest.mark.lengthy

RUN_ID = "moving"
HOLD = ("--hold", "0.05")
# Pulls once from the gateways at these addresses, after a cursor.
Puller = Callable[..., Page]


def send(gateway: RunningGateway, numbers: Iterable[int], rank: int = 0) -> None:
    run = replace(RUN, run_id=RUN_ID, rank=rank)
    frames = [
        make_frame(run=run, sequence=number, global_step=number, time_unix_ns=TIME_UNIX_NS + number * 10**6)
        for number in numbers
    ]
    for body in bodies(frames):
        assert post(gateway.http, body) == (200, b"")


@pytest.fixture
def pull() -> Puller:
    """Each pull by a client of its own, so that nothing but the cursor is known; in turns by the one for asyncio."""

    def by_client(addresses: Sequence[str], cursor: str | None = None, **arguments: float | None) -> Page:
        with TamiyoClient(",".join(addresses), timeout_s=2.0) as client:
            return client.pull(RUN_ID, cursor, **arguments)  # type: ignore[arg-type]

    def by_aio(addresses: Sequence[str], cursor: str | None = None, **arguments: float | None) -> Page:
        async def once() -> Page:
            async with aio.TamiyoClient(", ".join(addresses), timeout_s=2.0) as client:
                return await client.pull(RUN_ID, cursor, **arguments)  # type: ignore[arg-type]

        return asyncio.run(once())

    clients: Iterator[Puller] = cycle((by_client, by_aio))

    def by_turns(*arguments: object, **named: object) -> Page:
        return next(clients)(*arguments, **named)

    return by_turns


def all_of(
    pull: Puller, addresses: Sequence[str], cursor: str | None = None, *, last: int
) -> tuple[list[int], int, str]:
    """The numbers of all steps, waiting for this one, the sum of the gaps, and the cursor."""
    numbers: list[int] = []
    gap = 0
    while True:
        page = pull(addresses, cursor, max_packets=20, wait_s=0.0 if last in numbers else 30.0)
        cursor = page.cursor
        gap += page.gap
        numbers += [step.number for step in page]
        if not page:
            return numbers, gap, cursor


def test_a_run_that_moves_and_comes_back_is_one_run(pull: Puller) -> None:
    """A pulled with its old cursor gave 101 to 150 with ``gap`` 0, and B did not know the cursor."""
    with RunningGateway(*HOLD) as a, RunningGateway(*HOLD) as b:
        addresses = (a.grpc, b.grpc)
        send(a, range(1, 51))
        numbers, gap, cursor = all_of(pull, addresses, last=50)
        assert (numbers, gap) == ([*range(1, 51)], 0)
        send(b, range(51, 101))
        page = pull(addresses, cursor, max_packets=10, wait_s=20)
        assert [step.number for step in page] == [*range(51, 61)]
        send(a, range(101, 151))
        assert all_of(pull, addresses, page.cursor, last=150)[:2] == ([*range(61, 151)], 0)
        assert all_of(pull, addresses, last=150)[:2] == ([*range(1, 151)], 0)
        assert all_of(pull, addresses, cursor, last=150)[:2] == ([*range(51, 151)], 0)
        with TamiyoClient(a.grpc) as client:
            of_a = client.pull(RUN_ID)
            assert (client.pull(RUN_ID, of_a.cursor).gap, of_a.gap) == (50, 0)
        with TamiyoClient(",".join(addresses)) as client:
            [run] = client.runs()
            assert (run.stored, run.missing, run.unseen) == (150, 0, 0)
            assert client.ended(RUN_ID) is None
            cursor_of_a = client.pull(RUN_ID, rank=0).cursor
        with pytest.raises(StaleCursor):
            pull(addresses, cursor, rank=0)
        assert not pull(addresses, cursor_of_a, rank=0).gap


def test_a_gateway_that_is_killed_leaves_a_gap_until_it_is_back(pull: Puller, tmp_path: Path) -> None:
    with RunningGateway(*HOLD) as a:
        with RunningGateway(*HOLD, "--store", str(tmp_path)) as b:
            addresses = (a.grpc, b.grpc)
            send(a, range(1, 51))
            numbers, gap, cursor = all_of(pull, addresses, last=50)
            send(b, range(51, 101))
            assert [step.number for step in pull(addresses, cursor, max_packets=5)] == [*range(51, 56)]
            b.end(signal.SIGKILL)
        send(a, range(101, 151))
        numbers, gap, cursor = all_of(pull, addresses, cursor, last=150)
        assert (numbers, gap) == ([*range(101, 151)], 50)
        with RunningGateway(*HOLD, "--store", str(tmp_path), "--grpc", b.grpc):
            assert all_of(pull, addresses, cursor, last=100)[:2] == ([*range(51, 101)], 0)


def test_a_gateway_that_lost_its_steps_is_read_anew(pull: Puller) -> None:
    """What it has again is not returned twice, and what nobody has is a gap."""
    with RunningGateway(*HOLD) as b:
        with RunningGateway(*HOLD) as a:
            addresses = (a.grpc, b.grpc)
            send(a, range(1, 51))
            cursor = all_of(pull, addresses, last=50)[2]
            a.end(signal.SIGKILL)
        with RunningGateway(*HOLD, "--grpc", a.grpc) as a:
            send(a, range(45, 61))
            numbers, gap, cursor = all_of(pull, addresses, cursor, last=60)
            assert (numbers, gap) == ([*range(51, 61)], 0)
            send(a, range(64, 66))
            assert all_of(pull, addresses, cursor, last=65)[:2] == ([64, 65], 3)


def test_ranks_at_different_gateways_are_one_run(pull: Puller) -> None:
    with RunningGateway(*HOLD) as a, RunningGateway(*HOLD) as b:
        send(a, range(1, 31))
        send(b, range(1, 31), rank=1)
        page = pull((a.grpc, b.grpc), max_packets=1000)
        assert sorted((step.rank, step.number) for step in page) == [(r, n) for r in (0, 1) for n in range(1, 31)]
        assert [step.state.timestamp_ns for step in page] == sorted(step.state.timestamp_ns for step in page)


def test_hours_are_those_of_all_attempts_wherever_they_went() -> None:
    """By both clients; the second attempt went to the other gateway."""
    with RunningGateway(*HOLD) as a, RunningGateway(*HOLD) as b:
        for gateway, attempt in ((a, 1), (b, 2)):
            run = replace(RUN, run_id=RUN_ID, attempt=attempt)
            for number in range(1, 6):
                time_ns = TIME_UNIX_NS + (attempt * 100 + number) * 10**9
                values = {"step_latency_ms": 1_000.0}
                frame = make_frame(
                    run=run, sequence=number, global_step=number + 5 * attempt, time_unix_ns=time_ns, recorded=values
                )
                for body in bodies([frame]):
                    assert post(gateway.http, body) == (200, b"")

        async def by_aio() -> RunHours:
            async with aio.TamiyoClient(f"{a.grpc},{b.grpc}") as client:
                return await client.hours(RUN_ID)

        with TamiyoClient(f"{a.grpc},{b.grpc}") as client:
            found = client.hours(RUN_ID)
        assert asyncio.run(by_aio()) == found
        assert found.run.attempts == 2
        assert found.run.parts["productive"] == 10_000.0
        assert found.run.parts["between_attempts"] == 95_000.0


def test_a_run_that_no_gateway_has_is_unknown_unless_one_does_not_answer(pull: Puller) -> None:
    with RunningGateway() as a, RunningGateway() as b:
        for _ in range(2):
            with pytest.raises(UnknownRun, match=a.grpc):
                pull((a.grpc, b.grpc))
        b.end()
        for _ in range(2):
            with pytest.raises(GatewayUnavailable, match=b.grpc):
                pull((a.grpc, b.grpc))


def test_an_address_that_is_given_twice_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        TamiyoClient("127.0.0.1:4327,127.0.0.1:4327")


# -- what pages of several gateways become, without gateways -------------------------------------------------


def plain(*steps: int) -> tuple[Packets, ...]:
    """Steps of a sender that numbers none."""
    frames = [make_frame(global_step=step, time_unix_ns=TIME_UNIX_NS + step) for step in steps]
    return tuple(
        Packets(system_state(frame, frame.values()), (), RUN_ID, 1, 0, frame.global_step, 1, True, 0.0, frozenset())
        for frame in frames
    )


def test_a_plain_sender_goes_on_by_its_steps_at_a_gateway_that_is_read_anew() -> None:
    position = Position.of("", None, ("a", "b"))
    first, _ = joined({"a": Page(plain(10, 20, 30), "a:3")}, position, 64, are_all=True)
    assert [step.step for step in first] == [10, 20, 30]
    position = Position.of(first.cursor, None, ("a", "b"))
    position.begin_anew("a")
    second, _ = joined({"a": Page(plain(20, 30, 40, 50), "n:4")}, position, 64, are_all=True)
    assert ([step.step for step in second], second.gap) == ([40, 50], 9)
    third, _ = joined({"a": Page(plain(60), "n:5", gap=2)}, position, 64, are_all=True)
    assert ([step.step for step in third], third.gap) == ([60], 2)


def test_steps_of_a_page_that_was_taken_in_part_come_once() -> None:
    """Those of a plain sender, and corrections, whose numbers are known already."""
    corrected = tuple(replace(step, revision=2) for step in numbered(1, 2, rank=1))
    pages = {"a": Page((*plain(10, 20, 30), *corrected), "a::5"), "b": Page(numbered(1, 2, rank=2), "b::2")}
    position, found = Position.of("", None, ("a", "b")), []
    while len(page := joined(pages, position, 2, are_all=True)[0]):
        found += [(step.rank, step.step, step.revision) for step in page]
        position = Position.of(page.cursor, None, ("a", "b"))
        pages = {address: page for address, page in pages.items() if not position.cursors[address]}
    plain_steps = [(0, 10, 1), (0, 20, 1), (0, 30, 1)]
    assert sorted(found) == [*plain_steps, (1, 1, 2), (1, 2, 2), (2, 1, 1), (2, 2, 1)]


def numbered(*numbers: int, rank: int = 0) -> tuple[Packets, ...]:
    run = replace(RUN, run_id=RUN_ID, rank=rank)
    return tuple(
        packets(make_frame(run=run, sequence=each, global_step=each, time_unix_ns=TIME_UNIX_NS + each))
        for each in numbers
    )


def test_a_cursor_of_a_single_gateway_goes_on_there() -> None:
    """What was pulled before it is not known: it is neither returned again nor counted as missing."""
    position = Position.of("life::50", None, ("a", "b"))
    page = Page(numbered(53, 54), "life::54", gap=2)
    first, _ = joined({"a": page}, position, 64, are_all=True)
    assert ([step.number for step in first], first.gap) == ([53, 54], 2)
    position = Position.of(first.cursor, None, ("a", "b"))
    second, _ = joined({"b": Page(numbered(49, 50, 55, 57), "b::4")}, position, 64, are_all=True)
    assert ([step.number for step in second], second.gap) == ([55], 0)
    third, _ = joined({"b": Page(numbered(49, 50, 55, 57), "b::4")}, position, 64, are_all=True)
    assert ([step.number for step in third], third.gap) == ([57], 1)


def test_missing_steps_are_waited_for_while_another_gateway_has_steps() -> None:
    """And two gateways that both lack some do not wait for each other for ever."""
    position = Position.of("", None, ("a", "b"))
    pages = {"a": Page(numbered(1, 2, 5, 6), "a::4"), "b": Page(numbered(3), "b::1")}
    first, _ = joined(pages, position, 64, are_all=False)
    assert ([step.number for step in first], first.gap) == ([1, 2, 3], 0)
    again = {"a": pages["a"], "b": Page(numbered(4), "b::2")}
    second, _ = joined(again, position, 64, are_all=True)
    assert ([step.number for step in second], second.gap) == ([4, 5, 6], 0)
    lacking = {"a": Page(numbered(9), "a::5"), "b": Page(numbered(9, rank=1), "b::3")}
    third, _ = joined(lacking, position, 64, are_all=True)
    assert (len(third), third.gap) == (1, 2)


def test_numbers_are_kept_as_ranges_within_a_bound() -> None:
    numbers = NumberSet()
    order = [*range(1, 2_000)]
    random.Random(7).shuffle(order)
    for number in order[:60]:
        numbers.add(number)
    assert {number for number in order if number in numbers} == {*order[:60]}
    for number in order[60:]:
        if number not in numbers:
            numbers.add(number)
        assert len(numbers.ranges) <= 100
    assert numbers.ranges == [[1, 1_999]]


def test_a_damaged_cursor_of_several_gateways_is_stale() -> None:
    cursor = Position.of("", None, ("a", "b")).text()
    for text in (cursor[:-4], cursor[:-2] + "zz", "m1:", "m1:!", "m1:eJyLjgUAARUAuQ=="):
        with pytest.raises(StaleCursor):
            Position.of(text, None, ("a", "b"))


def test_events_are_joined_by_their_numbers_which_are_not_in_the_order_of_their_times() -> None:
    """What one gateway lacks the other has; nothing is counted as a gap that comes in the same page."""

    def page(*numbers: int) -> EventPage:
        about = {"attempt": 1, "rank": 0, "process": "", "severity": 9, "text": "", "step": None, "epoch": None}
        return EventPage(
            tuple(
                EventInfo(name="x", number=number, time_unix_ns=100 - number, attributes={}, **about)  # type: ignore[arg-type]
                for number in numbers
            ),
            "life::9",
        )

    position = Position.of("", None, ("a", "b"))
    found, _ = joined({"a": page(1, 2, 4, 5), "b": page(2, 3, 6)}, position, 64, are_all=True, what=EVENTS)
    assert [event.number for event in found] == [1, 2, 3, 4, 5, 6]
    assert found.gap == 0
