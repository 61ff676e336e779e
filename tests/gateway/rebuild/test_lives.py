"""Who lives: right in the newest revision of every step, whatever was late, lost, doubled or restarted on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from frame_examples import TIME_UNIX_NS, make_frame, seed_table
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from properties import examples
from wire import bodies

from esper_otel.frames.digest import dead_among, digest_of
from esper_otel.frames.frame import Frame
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item
from esper_otel.gateway.store.base import Store
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.leyline.packets import packets
from esper_otel.schema import Stage

pytestmark = pytest.mark.lengthy

MS = 1_000_000
SEEDS = "abcdef"
SILENT, RECORDED, RETIRED, BACK = range(4)


@st.composite
def lives(draw: st.DrawFn, *, most: int = 9, actions: Sequence[int] = (SILENT, RECORDED, RETIRED, BACK)) -> list[Frame]:
    """See ``lived``."""
    return lived(draw(st.integers(2, most)), lambda options: draw(st.sampled_from(options)), actions)


def lived(count: int, choose: Callable[[Sequence[Any]], Any], actions: Sequence[int]) -> list[Frame]:
    """Steps of a trainer whose seeds come and go: what is recorded, and, found out with a dict, who lives."""
    alive: dict[str, dict[str, float]] = {}
    frames: list[Frame] = []
    for step in range(1, count + 1):
        done = {seed: choose(actions) for seed in SEEDS}
        retired = [seed for seed in alive if done[seed] in (RETIRED, BACK)]
        for seed in retired:
            del alive[seed]
        rows = {}
        for seed, action in done.items():
            if action in (RECORDED, BACK):
                fields = choose([("alpha",), ("stage", "fallback_used"), ("alpha", "layer_depth")])
                rows[seed] = dict.fromkeys(fields, float(step % 9))
                alive[seed] = {**alive.get(seed, {}), **rows[seed]}
        frames.append(
            make_frame(
                sequence=step,
                global_step=step,
                time_unix_ns=TIME_UNIX_NS + step * MS,
                recorded={"loss": step / 8},
                seeds=seed_table(rows),
                live=seed_table(alive),
                retired=tuple(retired),
            )
        )
    return frames


def halves(frame: Frame) -> list[bytes]:
    """The frame's points in two requests; both have its number."""
    [body] = bodies([frame])
    made = []
    for of_seeds in (True, False):
        half = ExportMetricsServiceRequest.FromString(body)
        metrics = half.resource_metrics[0].scope_metrics[0].metrics
        kept = [
            metric
            for metric in metrics
            if metric.name.startswith("esper.frame.") or bool(metric.gauge.data_points[0].attributes) is of_seeds
        ]
        del metrics[:]
        metrics.extend(kept)
        made.append(half.SerializeToString())
    return made


def pieces(frame: Frame, luck: random.Random) -> list[bytes]:
    """The frame's points in three requests: one may have the frame's number, another how many points there are."""
    [body] = bodies([frame])
    made = [ExportMetricsServiceRequest.FromString(body) for _ in range(3)]
    metrics = [request.resource_metrics[0].scope_metrics[0].metrics for request in made]
    for place in reversed(range(len(metrics[0]))):
        for point in reversed(range(len(metrics[0][place].gauge.data_points))):
            whose = luck.randrange(3)
            for number, each in enumerate(metrics):
                if number != whose:
                    del each[place].gauge.data_points[point]
    return [request.SerializeToString() for request in made]


def received(requests: Iterable[bytes | None], folder: Path | None) -> list[Item]:
    """All that pullers are given by gateways that wait for nothing; None is the end of one, by kill -9."""

    async def live() -> list[Item]:
        items: dict[int, Item] = {}

        def begun() -> tuple[Core, Store]:
            store = MemoryStore() if folder is None else FileStore(folder)
            core = Core(store, hold_s=0.0)
            core.start()
            return core, store

        core, store = begun()
        for request in requests:
            if request is None:
                core.close()
                core, store = begun()
            else:
                core.receive(request)
        found = store.after("digits-7", "", None, 10_000)
        while found.entries:
            for entry in found.entries:
                before = items.get(entry.item.frame.time_unix_ns)
                assert entry.item.revision == (1 if before is None else before.revision + 1)
                items[entry.item.frame.time_unix_ns] = entry.item
            found = store.after("digits-7", found.cursor, None, 10_000)
        core.close()
        return list(items.values())

    return asyncio.run(live())


def assert_as_in_the_process(items: Iterable[Item], frames: Sequence[Frame]) -> None:
    """Every step is there, whole, and its packets are those of the process."""
    by_time = sorted(items, key=lambda item: item.frame.time_unix_ns)
    assert [item.frame.global_step for item in by_time] == [frame.global_step for frame in frames]
    for item, frame in zip(by_time, frames, strict=True):
        assert item.complete, frame.global_step
        assert packets(item.frame) == packets(frame)
        assert sorted(item.frame.retired) == sorted(frame.retired)


@examples(12)
@given(lives(), st.data())
def test_late_doubled_and_cut_steps_come_right_over_restarts(
    tmp_path_factory: pytest.TempPathFactory, frames: list[Frame], data: st.DataObject
) -> None:
    """A gateway that waits for nothing releases every step too early; in the end each has its right revision."""
    first, *others = frames
    requests = [half for frame in others for half in halves(frame)]
    requests += data.draw(st.lists(st.sampled_from(requests), max_size=4))
    order: list[bytes | None] = list(data.draw(st.permutations(requests)))
    for place in data.draw(st.lists(st.integers(0, len(order)), max_size=3)):
        order.insert(place, None)
    items = received([*halves(first), *order], tmp_path_factory.mktemp("store"))
    assert_as_in_the_process(items, frames)


@examples(25)
@given(lives(most=5), st.integers(0, 2**32), st.integers(0, 3))
def test_steps_whose_points_come_in_pieces_come_right_over_restarts(
    tmp_path_factory: pytest.TempPathFactory, frames: list[Frame], seed: int, restarts: int
) -> None:
    """What came of a step before the gateway ended counts afterwards, and what did not come does not."""
    luck = random.Random(seed)
    first, *others = [frame._replace(epoch=frame.sequence % 2) for frame in frames]
    requests: list[bytes | None] = [piece for frame in others for piece in pieces(frame, luck)]
    luck.shuffle(requests)
    for _ in range(restarts):
        requests.insert(luck.randrange(len(requests)), None)
    items = received([*bodies([first]), *requests], tmp_path_factory.mktemp("store"))
    assert_as_in_the_process(items, [first, *others])


@pytest.mark.parametrize(
    ("order", "count"),
    [
        *(("backwards", 60), ("the second half first", 60), ("any", 60)),
        *(("backwards", 300), ("the second half first", 600), ("any", 300)),
    ],
)
def test_a_long_run_comes_right_over_restarts_in_any_order(tmp_path: Path, order: str, count: int) -> None:
    """More steps lie between those that are next to each other than a gateway goes on from where all are whole."""
    luck = random.Random(count)
    frames = lived(count, luck.choice, [SILENT] * 20 + [RECORDED] * 6 + [RETIRED])
    requests: list[bytes | None] = [body for frame in frames for body in bodies([frame])]
    if order == "backwards":
        requests.reverse()
    elif order == "any":
        luck.shuffle(requests)
    else:
        requests = requests[count // 2 :] + requests[: count // 2]
    requests += luck.choices(requests, k=count // 20)
    for _ in range(3):
        requests.insert(luck.randrange(count), None)
    assert_as_in_the_process(received(requests, tmp_path), frames)


@examples(12)
@given(lives(), st.data())
def test_a_step_marked_complete_is_never_wrong_about_who_lives(frames: list[Frame], data: st.DataObject) -> None:
    """Steps that never come, and a gateway that has forgotten everything: what cannot be known is marked."""
    first, *others = frames
    lost = data.draw(st.sets(st.sampled_from([frame.sequence for frame in others])))
    order: list[bytes | None] = [body for frame in others if frame.sequence not in lost for body in bodies([frame])]
    items = received([*bodies([first]), *data.draw(st.permutations(order))], None)
    by_step = {frame.global_step: frame for frame in frames}
    for item in items:
        frame = by_step[item.frame.global_step]
        if item.complete:
            assert sorted(item.frame.live.ids) == sorted(frame.live.ids)
    assert {item.frame.global_step for item in items} == by_step.keys() - lost


@examples(12)
@given(lives(actions=(RECORDED, RETIRED)), st.data())
def test_steps_that_never_come_leave_no_doubt_where_the_living_are_recorded(
    frames: list[Frame], data: st.DataObject
) -> None:
    """As most trainers do it: the digest says that all who are silent are dead."""
    lost = data.draw(st.sets(st.sampled_from([frame.sequence for frame in frames[1:]])))
    kept = [frame for frame in frames if frame.sequence not in lost]
    items = received(bodies(kept), None)
    assert all(item.complete for item in items)
    assert [sorted(item.frame.live.ids) for item in items] == [sorted(frame.live.ids) for frame in kept]


def test_a_wrong_belief_is_put_right_when_the_missing_step_comes_after_a_restart(tmp_path: Path) -> None:
    """A seed is born in the step that is late, and silent since: nobody can guess that; nor is it guessed."""
    a, b = {"a": {"alpha": 0.25}}, {"b": {"alpha": 0.5}}
    rows = [a, b, a, a]
    frames = [
        make_frame(
            sequence=step,
            global_step=step,
            time_unix_ns=TIME_UNIX_NS + step * MS,
            seeds=seed_table(row),
            live=seed_table(a if step == 1 else a | b),
        )
        for step, row in enumerate(rows, 1)
    ]
    first, late, *others = bodies(frames)
    early = received([first, *others, None], tmp_path)
    assert [(item.frame.global_step, item.complete) for item in early] == [(1, True), (3, False), (4, False)]
    assert early[-1].frame.live.ids == ("a",)
    items = received([late], tmp_path)
    assert_as_in_the_process(items, frames)
    assert max(item.revision for item in items) == 2


@pytest.mark.parametrize("order", ["the stage after a restart", "in pieces"])
def test_steps_of_blending_are_kept_until_their_stage_comes(tmp_path: Path, order: str) -> None:
    """A step says how far its seed has blended; that it blends was said before, in a step that is late."""
    blending = {"a": {"stage": float(Stage.BLENDING), "alpha_steps": 4.0}}
    rows = [({}, {}), (blending, blending), ({"a": {"alpha_steps": 3.0}}, {"a": {**blending["a"], "alpha_steps": 3.0}})]
    frames = [
        make_frame(
            sequence=step,
            global_step=step,
            time_unix_ns=TIME_UNIX_NS + step * MS,
            seeds=seed_table(seeds),
            live=seed_table(live),
        )
        for step, (seeds, live) in enumerate(rows, 1)
    ]
    first, second, third = bodies(frames)
    requests = [third, None, second]
    if order == "in pieces":
        pairs = zip(pieces(frames[2], random.Random(0)), pieces(frames[1], random.Random(0)), strict=True)
        requests = [request for pair in pairs for request in (*pair, None)]
    assert_as_in_the_process(received([first, *requests], tmp_path), frames)


@given(st.lists(st.text(max_size=4), unique=True, max_size=12), st.data())
def test_the_dead_are_found_by_their_digest(seeds: list[str], data: st.DataObject) -> None:
    dead = data.draw(st.lists(st.sampled_from(seeds), unique=True)) if seeds else []
    living = tuple(seed for seed in seeds if seed not in dead)
    digest = digest_of(tuple(seeds)) ^ digest_of(living)
    found = dead_among(seeds, len(dead), digest)
    assert found is not None
    assert sorted(found) == sorted(dead)
    assert digest_of(tuple(reversed(living))) == digest_of(living) < 2**48
    for wrong in (len(dead) + 1, len(dead) - 1):
        assert dead_among(seeds, wrong, digest) is None
    assert dead_among(seeds, len(dead), digest ^ digest_of(("of somebody else",))) is None


@pytest.mark.parametrize("dead", [0, 1, 2, 50, 2_998, 2_999, 3_000])
def test_a_few_dead_or_a_few_living_are_found_among_many(dead: int) -> None:
    seeds = [f"seed-{number}" for number in range(3_000)]
    gone = seeds[-dead:] if dead else []
    if dead == 50:  # too many for a search: the likeliest are right, or nobody is
        assert dead_among(seeds, dead, digest_of(tuple(gone))) is None
        seeds = gone + seeds[:-dead]
    found = dead_among(seeds, dead, digest_of(tuple(gone)))
    assert found is not None
    assert sorted(found) == sorted(gone)
