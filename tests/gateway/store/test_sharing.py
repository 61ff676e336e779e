"""Room and turns: never more than there is, nothing kept by those who have left, and the one who has most gives way."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.gateway.faults import Busy
from esper_otel.gateway.serve.in_flight import Room, RoomShare, Turns

pytestmark = pytest.mark.own_code

OWNERS = st.sampled_from("abc")


@given(st.lists(st.tuples(OWNERS, st.integers(0, 7), st.integers(0, 12)), max_size=60))
def test_room_is_never_used_up_twice(changes: list[tuple[str, int, int]]) -> None:
    """Whatever is asked for: the sum is bounded, and only one who has more than the asker would have gives way."""
    room = Room(20, "too much")
    held: dict[tuple[str, int], RoomShare] = {}
    with ExitStack() as entered:
        for owner, number, size in changes:
            of_owner = [each.size for each in held.values() if each.owner == owner]
            if (owner, number) not in held:
                held[owner, number] = entered.enter_context(room.hold(owner, 0, lambda: None))
            before = {key: each.size for key, each in held.items()}
            had = held[owner, number].size
            if not held[owner, number].has_room(size):
                assert held[owner, number].size == had
            assert sum(each.size for each in held.values()) <= 20
            for other in {key[0] for key, each in held.items() if each.size < before[key]} - {owner}:
                theirs = sum(count for key, count in before.items() if key[0] == other)
                assert theirs > sum(of_owner) + size - had
    with room.hold("d", 20, lambda: None), pytest.raises(Busy), room.hold("e", 20, lambda: None):
        pass


@given(st.lists(st.tuples(OWNERS, st.integers(0, 3), st.integers(0, 4)), max_size=40))
def test_turns_are_bounded_and_none_is_lost(calls: list[tuple[str, int, int]]) -> None:
    """Those who are cancelled while they wait or work leave their places to others; in the end all are free."""

    async def run() -> None:
        turns = Turns(4, 100, patience_s=9.0, slowest_s=9.0)
        running: list[str] = []

        async def work(owner: str, length: int) -> None:
            async with turns.turn(owner):
                running.append(owner)
                assert len(running) <= 4
                assert running.count(owner) <= 2
                try:
                    for _ in range(length):
                        await asyncio.sleep(0)
                finally:
                    running.remove(owner)

        tasks = []
        for owner, length, cancelled in calls:
            tasks.append(asyncio.create_task(work(owner, length)))
            if cancelled:
                await asyncio.sleep(0)
                tasks[len(tasks) // (cancelled + 1)].cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert error is None or isinstance(error, asyncio.CancelledError)
        assert (turns._count, turns._running, turns._waiting, turns._count_waiting) == (0, {}, {}, 0)

    asyncio.run(run())


def test_one_who_is_slow_gives_way_only_to_others() -> None:
    """Nobody is hurried who has all the places to himself."""

    async def run() -> list[str]:
        turns = Turns(2, 1, patience_s=0.05, slowest_s=9.0)
        ends: list[str] = []

        async def slow(owner: str, length_s: float) -> None:
            try:
                async with turns.turn(owner), turns.slow():
                    await asyncio.sleep(length_s)
                ends.append(f"{owner} done")
            except Busy as error:
                ends.append(f"{owner} {error}")

        await slow("alone", 0.2)
        first = [asyncio.create_task(slow(owner, 5.0)) for owner in "ab"]
        await asyncio.sleep(0.1)
        await asyncio.gather(slow("c", 0.0), slow("d", 0.0), *first)
        return ends

    ends = asyncio.run(run())
    assert ends[0] == "alone done"
    assert ends.count("d too many requests at once") == 1
    assert "c done" in ends
    assert sum("too slowly" in each for each in ends) == 2
