"""Restarted: what a plain sender has said is known after a restart of the gateway, and what it has not said is not."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from frame_examples import TIME_UNIX_NS, make_frame, seed_table
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from test_assembler import without_point
from test_guessed import EPOCH, POINTS, SEQUENCE, STEP, filtered, resumed
from wire import bodies

from esper_otel.frames.frame import GUESSED_STEP, NO_SEEDS, Run, SeedTable
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item
from esper_otel.gateway.rebuild.history import History
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.schema import SEED_RETIRED

pytestmark = pytest.mark.lengthy

SECOND = 10**9
ALPHA, DEPTH = "kasmina.seed.alpha", "esper.seed.layer_depth"


def said(second: float, *streams: tuple[str, str], ends: bool = False, of_seeds: float = 0.5, **values: float) -> bytes:
    """A request of a plain sender: values, of seeds too, or the ends of these streams; all at one time."""
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add(scope={"name": "a program"}).metrics
    time_unix_ns = TIME_UNIX_NS + round(second * SECOND)
    for name, value in values.items():
        metrics.add(name={"step": STEP}.get(name, name)).gauge.data_points.add(
            time_unix_nano=time_unix_ns, as_double=value
        )
    for name, seed in streams:
        point = metrics.add(name=name).gauge.data_points.add(time_unix_nano=time_unix_ns)
        point.attributes.add(key="seed_id").value.string_value = seed
        if ends:
            point.flags = 1
        else:
            point.as_double = of_seeds
    return request.SerializeToString()


def newest(folder: Path, *requests: bytes | None, run_id: str = "unknown") -> list[Item]:
    """The newest revisions, by time, of a gateway that waits for nothing; None is a restart."""

    async def live() -> list[Item]:
        core = Core(FileStore(folder), hold_s=0.0, linger_s=0.0)
        for request in requests:
            if request is None:
                core.close()
                core = Core(FileStore(folder), hold_s=0.0, linger_s=0.0)
            else:
                core.receive(request)
        found, cursor = dict[int, Item](), ""
        while page := core.entries(run_id, cursor, 1000):
            if not page.entries:
                break
            cursor = page.cursor
            found |= {entry.item.frame.time_unix_ns: entry.item for entry in page.entries}
        core.close()
        return [found[time] for time in sorted(found)]

    return asyncio.run(live())


def test_a_seed_that_came_late_is_not_silent(tmp_path: Path) -> None:
    """Of a step some seeds come in a later request than others: they were seen in it all the same."""
    a, b = (ALPHA, "a"), (ALPHA, "b")
    items = newest(tmp_path, said(0, a), said(1, a), said(1, b), said(2, a), said(3, a))
    assert [item.frame.live.ids for item in items] == [("a",), ("a", "b"), ("a", "b"), ("a", "b")]
    assert [item.frame.retired for item in items] == [()] * 4


def test_a_seed_is_not_silent_because_its_last_value_came_long_before_a_restart(tmp_path: Path) -> None:
    """A gateway goes on from some hundred steps, which may be a few seconds."""
    a, b = (ALPHA, "a"), (ALPHA, "b")
    steps = [said(n / 100, a) for n in range(1, 300)]
    items = newest(tmp_path, said(0, a, b), *steps, None, said(4, a))
    assert items[-1].frame.live.ids == ("a", "b")
    [*_, last] = newest(tmp_path, said(310, a))
    assert (last.frame.live.ids, last.frame.retired) == (("a",), ("b",))


def test_a_seed_that_ends_and_was_silent_is_retired_once(tmp_path: Path) -> None:
    a, b = (ALPHA, "a"), (ALPHA, "b")
    items = newest(tmp_path, said(0, a, b), said(600, b, ends=True), said(600, a))
    assert [item.frame.retired for item in items] == [(), ("b",)]


def test_live_seeds_are_counted_anew_when_some_come_after_a_restart(tmp_path: Path) -> None:
    """The sender has never said how many live: the number of before is not one that it said."""
    a, b = (ALPHA, "a"), (ALPHA, "b")
    items = newest(tmp_path, said(0, a), None, said(1, step=7), said(0, b))
    assert items[0].frame.values()["esper.seeds"] == len(items[0].frame.live.ids) == 2


def test_an_ended_stream_stays_ended_when_an_earlier_step_is_put_right_after_a_restart(tmp_path: Path) -> None:
    a = [(ALPHA, "a"), (DEPTH, "a")]
    before = [said(0, *a), said(1, *a), said(2, a[1], ends=True), said(2, a[0]), said(3, a[0])]
    for restart in ([], [None]):
        folder = tmp_path / str(len(restart))
        items = newest(folder, *before, *restart, said(1, loss=0.25), said(4, a[0]))
        assert [[*dict(item.frame.live.rows())["a"]] for item in items] == [["alpha", "layer_depth"]] * 2 + [
            ["alpha"]
        ] * 3


@pytest.mark.parametrize("is_found", [False, True], ids=["lost before the start", "found by it"])
def test_a_damaged_step_that_retired_a_seed_does_not_bring_it_back(tmp_path: Path, *, is_found: bool) -> None:
    """Nothing but that step says of a plain sender's seed that it has died."""
    a, b = (ALPHA, "a"), (ALPHA, "b")
    died = (SEED_RETIRED.name, "b")
    items = newest(tmp_path, said(0, a, b), said(2, a, died), said(3, a), said(4, a))
    assert [item.frame.retired for item in items] == [(), ("b",), (), ()]
    with sqlite3.connect(tmp_path / "steps.sqlite3") as file:
        if is_found:
            file.execute(
                "UPDATE blocks SET frames = zeroblob(50) WHERE id = (SELECT block FROM items WHERE position = 2)"
            )
        else:
            file.execute("DELETE FROM items WHERE position = 2")
    items = newest(tmp_path, said(0, loss=0.5), said(5, a))
    assert [item.frame.live.ids for item in items] == [("a", "b"), ("a",), ("a",), ("a",)]
    assert [item.frame.retired for item in items] == [(), ("b",), (), ()]


def test_an_end_that_is_to_come_comes_after_a_restart(tmp_path: Path) -> None:
    a, b = [(ALPHA, "a"), (DEPTH, "a")], (ALPHA, "b")
    before = [said(0, *a, b), said(2, a[1], b, ends=True)]
    for restart in ([], [None], [None, None]):
        folder = tmp_path / str(len(restart))
        items = newest(folder, *before, *restart, said(1, a[0]), *restart, said(2, a[0]), *restart, said(3, a[0]))
        alive = [{seed: [*cells] for seed, cells in item.frame.live.rows()} for item in items]
        both = {"a": ["alpha", "layer_depth"], "b": ["alpha"]}
        assert alive == [both, both, {"a": ["alpha"]}, {"a": ["alpha"]}]
        assert [item.frame.retired for item in items] == [(), (), ("b",), ()]


@pytest.mark.parametrize("restarts", [(), (2,), (3,), (2, 3), (1, 2, 3, 4)])
def test_a_value_from_before_its_seeds_end_does_not_bring_it_back(tmp_path: Path, restarts: tuple[int, ...]) -> None:
    """Nothing of the seed had come when its end came; the gateway is restarted before the end, after it, or both."""
    a, b = (ALPHA, "a"), (ALPHA, "b")
    requests: list[bytes | None] = [said(0, b), said(3, b), said(2, a, ends=True), said(1, a), said(4, b)]
    for place in reversed(restarts):
        requests.insert(place, None)
    items = newest(tmp_path, *requests)
    assert [item.frame.live.ids for item in items] == [("b",), ("b", "a"), ("b",), ("b",)]
    assert [item.frame.retired for item in items] == [(), (), ("a",), ()]


def test_an_end_older_than_what_is_restored_counts(tmp_path: Path) -> None:
    """Unless its seed has come back: of those it has not seen since, the gateway knows no better."""
    a, b, c = ((ALPHA, seed) for seed in "abc")
    steps = [said(n, b) for n in range(2, 300)]
    ends = said(1, a, c, ends=True)
    items = newest(
        tmp_path, said(0, a, b, c), *steps, said(300, c), None, said(300.5, c), ends, said(301, b), said(0.5, a)
    )
    assert {*items[-1].frame.live.ids} == {"b", "c"}


def late(luck: random.Random) -> tuple[list[Any], list[Any]]:
    """What a plain sender says, as (time, seed, whether its stream ends), in order, and late with restarts between."""
    count = luck.randint(2, 5)
    ordered: list[Any] = [(step, None, False) for step in range(count)]
    ordered += [(step, seed, False) for step in range(count) for seed in "ab" if luck.random() < 0.5]
    ordered += [(luck.randint(0, count) + 0.5, seed, True) for seed in "ab" if luck.random() < 0.7]
    ordered.sort(key=lambda each: each[0])
    first, *others = ordered
    for _ in range(luck.randint(1, 3)):
        others.insert(luck.randint(0, len(others)), others.pop(luck.randrange(len(others))))
    for _ in range(luck.randint(0, 2)):
        others.insert(luck.randint(0, len(others)), None)
    return ordered, [first, *others]


@pytest.mark.parametrize("number", range(30))
def test_ends_and_values_in_any_order_over_restarts_make_the_same_lives(tmp_path: Path, number: int) -> None:
    lives = []
    for name, all_said in zip(("ordered", "late"), late(random.Random(number)), strict=True):
        requests = [
            None
            if each is None
            else said(each[0], (ALPHA, each[1]), ends=each[2])
            if each[1]
            else said(each[0], loss=1.0)
            for each in all_said
        ]
        items = newest(tmp_path / name, *requests)
        lives.append([(item.frame.time_unix_ns, {*item.frame.live.ids}, {*item.frame.retired}) for item in items])
    assert lives[0] == lives[1], late(random.Random(number))


def test_numbers_that_were_counted_before_a_restart_are_given_back(tmp_path: Path) -> None:
    """The sender says its own afterwards, and one of them may be the same."""
    one, two, three = filtered(resumed(3), SEQUENCE, POINTS, EPOCH, scope="somebody")
    first, second = without_point(one, STEP)[0], without_point(two, STEP)[0]
    items = newest(tmp_path, first, second, None, three, run_id="digits-7")
    times = [item.frame.time_unix_ns for item in items]
    assert [item.frame.global_step for item in items] == [*(GUESSED_STEP + time for time in times[:2]), 1003]
    assert [item.complete for item in items] == [False, False, True]


def test_the_last_loss_is_found_out_anew_when_a_loss_comes_after_a_restart(tmp_path: Path) -> None:
    a = (ALPHA, "a")
    items = newest(tmp_path, said(0, a, loss=3.0), said(1, a), said(2, a), None, said(1, loss=2.0))
    assert [item.frame.values()["esper.training.loss"] for item in items] == [3.0, 2.0, 2.0]


def test_steps_that_a_kill_left_with_old_cells_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that came late was in its own step, and not yet in those after it."""
    first = seed_table({"a": {"alpha": 0.125}, "b": {"alpha": 0.25}})
    second = seed_table({"b": {"alpha": 0.75}})
    after = seed_table({"a": {"alpha": 0.125}, "b": {"alpha": 0.75}})
    run = Run("late", 1)

    def step(number: int, seeds: SeedTable, live: SeedTable) -> bytes:
        times = {"sequence": number, "global_step": number, "time_unix_ns": TIME_UNIX_NS + number * SECOND}
        [body] = bodies([make_frame(run=run, seeds=seeds, live=live, **times)])
        return body

    early, late = without_point(step(2, second, after), ALPHA)
    monkeypatch.setattr(History, "_spend", lambda *_: False)
    items = newest(
        tmp_path, step(1, first, first), early, *(step(n, NO_SEEDS, after) for n in (3, 4)), late, run_id="late"
    )
    assert [alpha_of_b(item) for item in items] == [0.25, 0.75, 0.25, 0.25]
    monkeypatch.undo()
    items = newest(tmp_path, step(5, NO_SEEDS, after), run_id="late")
    assert [alpha_of_b(item) for item in items] == [0.25, 0.75, 0.75, 0.75, 0.75]
    assert [item.revision for item in items] == [1, 2, 2, 2, 1]


def test_steps_that_a_kill_left_without_a_late_seed_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after it say by their digest that there is another seed."""
    first, second = seed_table({"a": {"alpha": 0.125}}), seed_table({"b": {"alpha": 0.75}})
    after = seed_table({"a": {"alpha": 0.125}, "b": {"alpha": 0.75}})

    def step(number: int, seeds: SeedTable, live: SeedTable) -> bytes:
        times = {"sequence": number, "global_step": number, "time_unix_ns": TIME_UNIX_NS + number * SECOND}
        [body] = bodies([make_frame(run=Run("late", 1), seeds=seeds, live=live, **times)])
        return body

    early, late = without_point(step(2, second, after), ALPHA)
    monkeypatch.setattr(History, "_spend", lambda *_: False)
    later = [step(number, NO_SEEDS, after) for number in (3, 4)]
    items = newest(tmp_path, step(1, first, first), early, *later, late, run_id="late")
    assert [item.frame.live.ids for item in items] == [("a",), ("a", "b"), ("a",), ("a",)]
    monkeypatch.undo()
    items = newest(tmp_path, step(5, NO_SEEDS, after), run_id="late")
    assert [item.frame.live.ids for item in items] == [("a",), *[("a", "b")] * 4]
    assert [item.complete for item in items] == [True] * 5


@pytest.mark.parametrize(
    ("later", "late", "cells"),
    [
        ([], said(0, (ALPHA, "late")), {"a": {ALPHA: 0.5, DEPTH: 0.5}, "late": {ALPHA: 0.5}}),
        ([], said(0, (ALPHA, "a"), of_seeds=0.75), {"a": {ALPHA: 0.75, DEPTH: 0.5}}),
        ([(ALPHA, "a")], said(0, (DEPTH, "a"), of_seeds=0.75), {"a": {ALPHA: 0.5, DEPTH: 0.75}}),
    ],
    ids=["a seed", "a cell", "a cell of a seed that is recorded"],
)
def test_steps_of_a_plain_sender_that_a_kill_left_are_made_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    later: list[tuple[str, str]],
    late: bytes,
    cells: dict[str, dict[str, float]],
) -> None:
    """What came late for the first step was in this step, and not yet in those after it."""
    before = [said(0, (ALPHA, "a"), (DEPTH, "a"), loss=1.0), *(said(n, *later, loss=1.0) for n in range(1, 4))]
    monkeypatch.setattr(History, "_spend", lambda *_: False)
    items = newest(tmp_path, *before, late)
    monkeypatch.undo()
    assert [cells_after(item) == cells for item in items] == [True, False, False, False]
    items = newest(tmp_path, said(4, *later, loss=1.0))
    assert [cells_after(item) for item in items] == [cells] * 5
    revisions = [item.revision for item in items]
    items = newest(tmp_path, None)
    assert [item.revision for item in items] == revisions


def cells_after(item: Item) -> dict[str, dict[str, float]]:
    metrics = {"alpha": ALPHA, "layer_depth": DEPTH}
    return {seed: {metrics[name]: cell for name, cell in of_seed.items()} for seed, of_seed in item.frame.live.rows()}


def alpha_of_b(item: Item) -> float | None:
    return dict(item.frame.live.rows())["b"].get("alpha")
