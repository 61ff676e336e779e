"""Gap: what a puller does not get is counted, also what has not arrived at this gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from wire import bodies

from esper_otel.gateway.core import Core
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.pull.messages import PullRequest

pytestmark = pytest.mark.own_code

Pages = list[tuple[int, list[int]]]


def steps(*numbers: int, rank: int = 0) -> list[bytes]:
    run = replace(RUN, run_id="moved", rank=rank)
    return bodies(
        make_frame(run=run, sequence=number, global_step=number, time_unix_ns=TIME_UNIX_NS + number * 10**6)
        for number in numbers
    )


async def pages(core: Core, cursor: str = "", rank: int | None = None) -> tuple[Pages, str]:
    """Each page's gap, and the numbers of its steps; and the last cursor."""
    found: Pages = []
    while True:
        request = PullRequest(run_id="moved", cursor=cursor, max_packets=100)
        if rank is not None:
            request.rank = rank
        page = await core.pull(request)
        if not page.steps:
            return found, cursor
        found.append((page.gap, [step.number for step in page.steps]))
        cursor = page.cursor


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Core]:
    """Makes gateways that wait for nothing; on files, each goes on from the one before."""

    def maker() -> Core:
        store = MemoryStore() if request.param == "memory" else FileStore(tmp_path)
        return Core(store, hold_s=0.0)

    return maker


def take(core: Core, requests: Sequence[bytes]) -> None:
    for request in requests:
        assert core.receive(request) == (0, "")


def test_a_run_that_was_elsewhere_meanwhile_has_a_gap(make: Callable[[], Core]) -> None:
    """It went on with ``gap`` 0, over 50 steps that another gateway has."""

    async def scenario() -> None:
        core = make()
        take(core, steps(*range(1, 51)))
        assert (await pages(core))[0] == [(0, [*range(1, 51)])]
        _, cursor = await pages(core)
        take(core, steps(*range(101, 151)))
        expected = [(50, [*range(101, 151)])]
        assert (await pages(core, cursor))[0] == expected
        assert (await pages(core))[0] == [(0, [*range(1, 51)]), *expected]
        if isinstance(core._store, FileStore):
            core.close()
            core = make()
            assert (await pages(core, cursor))[0] == expected
        take(core, steps(151, 153))
        assert (await pages(core, cursor))[0] == [(50, [*range(101, 152)]), (1, [153])]
        core.close()

    asyncio.run(scenario())


def test_a_first_step_that_comes_late_is_missing_until_it_is_delivered(make: Callable[[], Core]) -> None:
    async def scenario() -> None:
        core = make()
        take(core, steps(3, 4))
        take(core, steps(1, rank=1))
        assert sum(run.missing + run.unseen for run in core.runs().runs) == 2
        found, cursor = await pages(core)
        assert found == [(2, [3, 4, 1])]
        assert (await pages(core, rank=1))[0] == [(0, [1])]
        take(core, steps(1))
        assert (await pages(core, cursor))[0] == [(0, [1])]
        assert sum(run.missing + run.unseen for run in core.runs().runs) == 1
        core.close()

    asyncio.run(scenario())
