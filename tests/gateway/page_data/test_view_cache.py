"""Views: what is read again from the store, what is begun anew, and what is dropped when nobody looks."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from frame_examples import make_frame, seed_table
from page_client import BEGIN_NS, Made, Page, item

from esper_otel.errors import UnknownRun
from esper_otel.frames.frame import GUESSED_STEP
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.page_data import bucket_table, view_cache
from esper_otel.gateway.page_data.answers import seeds
from esper_otel.gateway.page_data.bucket_table import Range
from esper_otel.gateway.page_data.view_cache import TURN_S, Views
from esper_otel.gateway.store.base import Store, StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.turns import in_turns
from esper_otel.schema import Stage

pytestmark = pytest.mark.own_code


def add(store: Store, first: int, last: int, run_id: str = "run", **more: float) -> None:
    steps = range(first, last + 1)
    store.add([item(Made(1, step, BEGIN_NS + step * 10**9, {"loss": 1 / step, **more}), 1, run_id) for step in steps])


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_full_detail_of_a_part_is_read_from_the_store(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of all steps is coarse; what is zoomed into is not, and goes on when further steps arrive."""
    monkeypatch.setattr(bucket_table, "MOST_ROWS", 64)
    store: Store = MemoryStore() if kind == "memory" else FileStore(tmp_path)
    add(store, 1, 2_000)

    async def scenario() -> None:
        page = Page(store)
        await page.ask(most=40)
        assert page.answer["is_thinned"]
        zoomed = Page(store)
        zoomed.views = page.views
        await zoomed.ask(Range(1_990, 2_005), most=40)
        assert zoomed.columns["step"] == [*range(1_990, 2_001)]
        assert zoomed.metrics["loss"]["last"] == [1 / step for step in range(1_990, 2_001)]
        assert not zoomed.answer["is_thinned"]
        add(store, 2_001, 2_010)
        await zoomed.ask(Range(1_990, 2_005), most=40)
        assert zoomed.answer["keep"] == 11
        assert zoomed.columns["step"] == [*range(1_990, 2_006)]

    asyncio.run(scenario())
    store.close()


def test_what_the_store_has_dropped_is_still_shown_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_table, "MOST_ROWS", 64)
    store = MemoryStore(StoreLimits(steps=1_000))
    add(store, 1, 1_000)

    async def scenario() -> None:
        page = Page(store)
        await page.ask(most=50)
        add(store, 1_001, 1_500)
        zoomed = Page(store)
        zoomed.views = page.views
        await zoomed.ask(Range(1, 20), most=50)
        assert zoomed.answer["is_thinned"]
        assert zoomed.metrics["loss"]["max"][0] == 1.0
        late = Page(store)  # nobody has looked before
        await late.ask(most=50)
        assert late.answer["gap"] == 500
        assert (late.answer["read"], late.answer["stored"]) == (1_000, 1_000)
        assert late.columns["first_step"][0] == 501

    asyncio.run(scenario())


def test_a_run_whose_store_began_anew_is_read_from_the_beginning() -> None:
    clock = [0.0]
    store = MemoryStore(StoreLimits(idle_s=10), clock=lambda: clock[0])
    add(store, 1, 30)

    async def scenario() -> None:
        page = Page(store)
        await page.ask()
        clock[0] = 20.0
        assert store.expire() == ["run"]
        with pytest.raises(UnknownRun):
            await page.ask()
        add(store, 1, 5)
        await page.ask()
        assert page.answer["keep"] == 0
        assert page.columns["step"] == [1, 2, 3, 4, 5]

    asyncio.run(scenario())


def test_a_step_that_gets_another_number_is_not_shown_twice() -> None:
    """A plain sender's steps are counted until it says their numbers; steps without any are not on the axis."""
    store = MemoryStore()
    store.add([item(Made(1, step, BEGIN_NS + step, {"loss": 1.0})) for step in (1, 2)])

    async def scenario() -> None:
        page = Page(store)
        await page.ask()
        assert page.columns["step"] == [1, 2]
        for step in (1, 2):
            store.add([item(Made(1, GUESSED_STEP + step, BEGIN_NS + step, {"loss": 1.0}), 2)])
        store.add([item(Made(1, 70, BEGIN_NS + 3, {"loss": 1.0}))])
        await page.ask()
        assert page.columns["step"] == [70]

    asyncio.run(scenario())


def test_views_are_dropped_when_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_cache, "_UNWATCHED_S", 0.02)
    store = MemoryStore()
    add(store, 1, 10)

    async def scenario() -> None:
        known = Views(Core(store))
        await known.view("run", 0)
        assert len(known) == 1
        while len(known):
            await asyncio.sleep(0.01)
        with pytest.raises(UnknownRun):
            await known.view("nobody", 0)
        with pytest.raises(UnknownRun):
            await known.view("run", 1)
        assert len(known) == 0

    asyncio.run(scenario())


def test_many_views_share_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger ones become coarser; all are still there, and nothing is hidden."""
    monkeypatch.setattr(view_cache, "_MOST_CELLS", 20_000)
    monkeypatch.setattr(view_cache, "_FEWEST_ROWS", 64)
    store = MemoryStore()
    for run in range(6):
        add(store, 1, 1_000, f"run-{run}", spike=1.0)
        store.add([item(Made(1, 1_001, BEGIN_NS + 1_001 * 10**9, {"spike": 1e9, "loss": math.nan}), 1, f"run-{run}")])

    async def scenario() -> None:
        known = Views(Core(store))
        for run in range(6):
            page = Page(store, f"run-{run}")
            page.views = known
            await page.ask(most=4_000)
            assert page.metrics["spike"]["max"][-1] == 1e9
            assert [odd[1:] for odd in page.metrics["loss"]["odd"]] == [[1, 0, 0, 1_001]]
        assert len(known) == 6
        assert sum(view.whole.cells for view in known._views.values()) <= 20_000

    asyncio.run(scenario())


def test_seeds_of_a_thousand_are_sent_again_only_when_they_change() -> None:
    """Stages are intervals; a seed that is retired has an end, and one whose stage is not finite is UNKNOWN."""
    store = MemoryStore()

    def stored(step: int, stages: dict[str, float]) -> None:
        live = seed_table({seed: {"stage": stage, "alpha": 0.5} for seed, stage in stages.items()})
        frame = make_frame(sequence=step, global_step=step, time_unix_ns=BEGIN_NS + step * 10**9, seeds=live, live=live)
        store.add([Item(Origin("run", 1, 0), frame, 1, True, 0)])

    stages = {f"seed-{number}": float(Stage.TRAINING) for number in range(1_000)}

    async def ask(known: Views, since: str) -> Any:
        return Page.read(await in_turns(seeds(await known.view("run", 0), since), TURN_S))

    async def scenario() -> None:
        known = Views(Core(store))
        stored(1, stages)
        first = await ask(known, "")
        assert (len(first["seeds"]), first["count"], first["left_out"]) == (1_000, 1_000, 0)
        stored(2, stages)
        stored(3, {**stages, "seed-7": math.nan})
        await ask(known, "")
        stored(4, {seed: stage for seed, stage in stages.items() if seed != "seed-8"})
        last = {seed["id"]: seed for seed in (await ask(known, ""))["seeds"]}
        training = int(Stage.TRAINING)
        assert last["seed-1"]["stages"] == [[1, None, training]]
        assert last["seed-7"]["stages"] == [[1, 2, training], [3, 3, 0], [4, None, training]]
        assert (last["seed-8"]["stages"], last["seed-8"]["retired_step"]) == ([[1, 3, training]], 3)

    asyncio.run(scenario())
