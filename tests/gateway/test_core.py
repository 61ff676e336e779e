"""Core: what was answered with OK is stored, whatever happens next, and is given once."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame, seed_table
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from patience import cpu_patience
from wire import CATALOGUE, bodies, body_of, counts_of, encoder, end_of

from esper_otel.errors import UnknownRun
from esper_otel.export.phase_points import phase_scope
from esper_otel.frames.frame import NO_SEEDS, VALIDATION_LOSS, Frame
from esper_otel.frames.phase_log import Phase
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.core import Core
from esper_otel.gateway.page_data.run_table import RunTable
from esper_otel.gateway.pages import MadeSteps
from esper_otel.gateway.security import Grant, NotAllowed
from esper_otel.gateway.store.base import StoreFull, StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.turns import finished
from esper_otel.leyline import SystemStatePacket
from esper_otel.pull.messages import PullRequest, Step

pytestmark = pytest.mark.own_code

HOLD_S = 0.3


def history(count: int, first: int = 1) -> list[Frame]:
    return [
        make_frame(
            sequence=step, global_step=step, time_unix_ns=TIME_UNIX_NS + step * 10**6, recorded={"loss": step / 8}
        )
        for step in range(first, first + count)
    ]


def split(body: bytes) -> list[bytes]:
    """A request for each metric."""
    whole = ExportMetricsServiceRequest.FromString(body)
    requests = []
    for metric in whole.resource_metrics[0].scope_metrics[0].metrics:
        part = ExportMetricsServiceRequest()
        part.CopyFrom(whole)
        del part.resource_metrics[0].scope_metrics[0].metrics[:]
        part.resource_metrics[0].scope_metrics[0].metrics.append(metric)
        requests.append(part.SerializeToString())
    return requests


async def pulled(core: Core, run_id: str = RUN.run_id) -> list[Step]:
    response = await core.pull(PullRequest(run_id=run_id, max_packets=1000))
    assert response.gap == 0
    return list(response.steps)


@pytest.mark.parametrize("seed", range(2))
def test_nothing_acknowledged_is_lost_when_the_process_ends_at_any_request(tmp_path: Path, seed: int) -> None:
    """The files as they are at that moment are all that the next life has: a copy stands for kill -9."""
    luck = random.Random(seed)
    requests = [part for body in bodies(history(20)) for part in split(body)]
    for start in range(0, len(requests), 8):  # what a collector does to the order
        batch = requests[start : start + 8]
        luck.shuffle(batch)
        requests[start : start + 8] = batch

    async def live() -> list[Step]:
        life = 0
        core = Core(FileStore(tmp_path / "0"), hold_s=60.0, linger_s=60.0)  # a slow machine has time for every request
        core.start()
        for request in requests:
            core.receive(request)
            if luck.random() < 0.2:
                if luck.random() < 0.3:
                    await asyncio.sleep(0.01)
                life += 1
                shutil.copytree(tmp_path / str(life - 1), tmp_path / str(life))
                core.close()
                core = Core(FileStore(tmp_path / str(life)), hold_s=60.0, linger_s=60.0)
                core.start()
                if luck.random() < 0.5:
                    core.receive(request)  # its sender did not hear the answer
        steps = await pulled(core)
        core.close()
        assert life > 10
        return steps

    steps = asyncio.run(live())
    assert [(step.step, step.complete, step.revision) for step in steps] == [(n, True, 1) for n in range(1, 21)]


def test_others_have_their_turns_while_a_large_page_is_made(no_garbage: None) -> None:
    """A controller is not to wait for somebody who reads a whole run."""

    async def live() -> None:
        core = Core(MemoryStore(), hold_s=HOLD_S)
        core.start()
        for body in bodies(history(400)):
            core.receive(body)
        reading = asyncio.create_task(pulled(core))
        turns_s = []
        while not reading.done():
            began_s = time.thread_time()
            await asyncio.sleep(0)
            turns_s.append(time.thread_time() - began_s)
        assert [step.step for step in reading.result()] == [*range(1, 401)]
        assert len(turns_s) > 12
        assert max(turns_s) < cpu_patience(0.1)
        core.close()

    asyncio.run(live())


@pytest.mark.parametrize("ends", [False, True], ids=["some steps are", "the run is"])
def test_a_page_ends_where_steps_are_dropped_while_it_is_made(ends: bool) -> None:
    """What is missing then is told by the next pull, as ever."""
    now = [0.0]

    async def live() -> None:
        core = Core(MemoryStore(StoreLimits(steps=300, idle_s=5), clock=lambda: now[0]), hold_s=HOLD_S)
        core.start()
        for body in bodies(history(300)):
            core.receive(body)
        reading = asyncio.create_task(core.pull(PullRequest(run_id=RUN.run_id, max_packets=300)))
        await asyncio.sleep(0)
        if ends:
            now[0] = 10.0
            core._store.expire()
        else:
            for body in bodies(history(200, first=301)):
                core.receive(body)
        page = await reading
        assert [step.step for step in page.steps] == [*range(1, 5)]
        following = PullRequest(run_id=RUN.run_id, cursor=page.cursor, max_packets=300)
        if ends:
            with pytest.raises(UnknownRun):
                await core.pull(following)
        else:
            rest = await core.pull(following)
            assert (rest.gap, [step.step for step in rest.steps]) == (196, [*range(201, 501)])
        core.close()

    asyncio.run(live())


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_fails_now_and_then_loses_and_repeats_nothing(tmp_path: Path, seed: int) -> None:
    """Its senders come again with the same request, or with a larger one."""
    luck = random.Random(seed)
    requests = [part for body in bodies(history(20)) for part in split(body)]

    async def live() -> list[Step]:
        store = FileStore(tmp_path)
        core = Core(store, hold_s=60.0)  # a slow machine has time for every request
        core.start()
        failures = 0
        for request in requests:
            while True:
                is_full = luck.random() < 0.4
                store._connection.execute(f"PRAGMA query_only = {'ON' if is_full else 'OFF'}")
                try:
                    core.receive(request)
                    break
                except StoreFull:
                    failures += 1
        store._connection.execute("PRAGMA query_only = OFF")
        assert failures > 5
        assert core.counts["store_failures"] >= failures
        steps = await pulled(core)
        assert core.is_ready
        core.close()
        return steps

    steps = asyncio.run(live())
    assert [(step.step, step.complete, step.revision) for step in steps] == [(n, True, 1) for n in range(1, 21)]


def test_requests_are_kept_no_longer_than_something_of_them_waits(tmp_path: Path) -> None:
    """Also when something always waits: a collector cuts frames in two with each of its batches."""
    parts = [part for body in bodies(history(200)) for part in split(body)]
    shift = len(parts) // 200 // 2

    async def live() -> None:
        store = FileStore(tmp_path)
        core = Core(store, hold_s=5.0)
        core.start()
        most = 0
        size = len(parts) // 200
        core.receive(b"".join(parts[:shift]))  # serialized messages merge by concatenation
        for start in range(shift, len(parts), size):
            core.receive(b"".join(parts[start : start + size]))
            most = max(most, len([*store.bodies()]))
        assert 1 <= most <= 3
        assert [*store.bodies()] == []
        assert len(await pulled(core)) == 200
        core.close()

    asyncio.run(live())


def test_a_run_without_news_is_forgotten_by_itself() -> None:
    """Nobody has to ask."""
    now = [0.0]
    store = MemoryStore(StoreLimits(idle_s=5), clock=lambda: now[0])

    async def live() -> None:
        core = Core(store)
        for body in bodies(history(3)):
            core.receive(body)
        now[0] = 6.0
        core.start()
        assert store.counts() == {}
        assert core.gauges()["dropped_steps"] == 3
        core.close()

    asyncio.run(live())


def test_an_end_is_known_after_a_restart_and_a_silence_is_not_one(tmp_path: Path) -> None:
    async def live() -> None:
        core = Core(FileStore(tmp_path))
        core.start()
        quiet, ended = RUN, replace(RUN, run_id="ended")
        for run in (quiet, ended):
            for frame in history(2):
                for request in encoder().requests(blocks_of([frame._replace(run=run)])):
                    core.receive(request.body)
        end_ns = TIME_UNIX_NS + 10**9
        outcome = {("esper.run.ended", "ValueError"): 1.0}
        core.receive(encoder().health(ended, outcome, start_unix_ns=TIME_UNIX_NS, time_unix_ns=end_ns))
        before = core.runs()
        core.close()
        core = Core(FileStore(tmp_path))
        after = core.runs()
        core.close()
        said = [[(run.run_id, run.ended, run.HasField("ended")) for run in runs.runs] for runs in (before, after)]
        assert said[0] == said[1] == [("digits-7", "", False), ("ended", "ValueError", True)]

    asyncio.run(live())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_end_that_overtakes_the_steps_is_not_lost_by_a_restart(tmp_path: Path, cut: int) -> None:
    """A killed collector queues again, so the last request may come first; it was acknowledged like the others."""
    requests = [request.body for frame in history(4) for request in encoder().requests(blocks_of([frame]))]
    outcome = {("esper.run.ended", "completed"): 1.0}
    times = {"start_unix_ns": TIME_UNIX_NS, "time_unix_ns": TIME_UNIX_NS + 10**9}
    requests = [encoder().health(RUN, outcome, **times), *requests[::-1]]

    async def live() -> None:
        for some in (requests[:cut], requests[cut:], []):
            core = Core(FileStore(tmp_path))
            core.start()
            for body in some:
                core.receive(body)
            said = [(run.ended, run.stored, run.missing) for run in core.runs().runs]
            core.close()
        assert said == [("completed", 4, 0)]
        store = FileStore(tmp_path)
        assert list(store.bodies()) == []  # nothing waits any more
        store.close()

    asyncio.run(live())


def test_an_end_without_a_step_outlives_two_restarts(tmp_path: Path) -> None:
    """The first one took it into memory, and the next request of another run took it out of the file."""
    outcome = {("esper.run.ended", "ValueError"): 1.0}
    end = encoder().health(RUN, outcome, start_unix_ns=TIME_UNIX_NS, time_unix_ns=TIME_UNIX_NS + 10**9)

    async def live() -> None:
        for some in ([end], [body_of("other")], [body_of("other", step=2)], bodies(history(1))):
            core = Core(FileStore(tmp_path))
            core.start()
            for body in some:
                core.receive(body)
            said = {run.run_id: run.ended for run in core.runs().runs}
            core.close()
        assert said[RUN.run_id] == "ValueError"

    asyncio.run(live())


def test_a_step_without_a_seed_comes_at_once_whoever_was_restarted_before(tmp_path: Path) -> None:
    """The step says itself whose life has ended: no marker is waited for, and none is missed."""
    before, after = history(2)
    after = after._replace(seeds=NO_SEEDS, live=NO_SEEDS, retired=("seed-1",))

    async def live() -> None:
        core = Core(FileStore(tmp_path), hold_s=HOLD_S)
        core.start()
        core.receive(bodies([before])[0])
        core.close()
        core = Core(FileStore(tmp_path), hold_s=HOLD_S)
        core.start()
        core.receive(bodies([after])[0])
        steps = await pulled(core)
        assert [(step.step, step.complete, step.revision) for step in steps] == [(1, True, 1), (2, True, 1)]
        assert len(SystemStatePacket.FromString(steps[0].state).seed_states) == 1
        assert len(SystemStatePacket.FromString(steps[1].state).seed_states) == 0
        core.close()

    asyncio.run(live())


def test_old_requests_that_come_again_after_a_restart_change_nothing(tmp_path: Path) -> None:
    """More steps than a gateway goes on from, and ends of seeds that lie before them."""
    frames: list[Frame] = []
    requests: list[bytes] = []
    for frame in history(400):
        seed = f"seed-{1000 - frame.sequence // 50}"  # ids that sort against the order in which they came
        table = seed_table({"seed-z": {"stage": 2.0}, seed: {"stage": 3.0}})
        retired = (f"seed-{1000 - frame.sequence // 50 + 1}",) if frame.sequence % 50 == 0 else ()
        frames.append(frame._replace(seeds=table, live=table, retired=retired))
    for frame in frames:
        for gone in frame.retired:
            streams = [("kasmina.seed.stage", {"seed_id": gone})]
            requests += encoder().stale(RUN, streams, time_unix_ns=frame.time_unix_ns)
        requests += bodies([frame])

    async def live() -> None:
        core = Core(FileStore(tmp_path))
        core.start()
        for request in requests:
            core.receive(request)
        core.close()
        core = Core(FileStore(tmp_path))
        core.start()
        for request in requests:
            core.receive(request)
        steps = await pulled(core)
        assert [(step.step, step.revision) for step in steps] == [(number, 1) for number in range(1, 401)]
        [run] = core.runs().runs
        assert (run.first_step, run.last_step, run.missing, run.incomplete, run.differing) == (1, 400, 0, 0, 0)
        core.close()

    asyncio.run(live())


def test_of_a_request_only_what_waits_is_kept(tmp_path: Path) -> None:
    """A collector cuts inside a frame: the rest of its request is stored as steps."""

    def of_rank(rank: int, step: int) -> bytes:
        run = replace(RUN, rank=rank)
        times = {"sequence": step, "global_step": step, "time_unix_ns": TIME_UNIX_NS + step * 10**6}
        return bodies([make_frame(run=run, **times)])[0]

    async def live() -> None:
        core = Core(FileStore(tmp_path), hold_s=60.0)
        core.start()
        for step in (1, 2):
            core.receive(b"".join(of_rank(rank, step) for rank in range(8)))
        request = ExportMetricsServiceRequest.FromString(of_rank(8, 1))
        (of_scope,) = request.resource_metrics[0].scope_metrics
        rest = ExportMetricsServiceRequest.FromString(request.SerializeToString())
        del of_scope.metrics[3:]
        del rest.resource_metrics[0].scope_metrics[0].metrics[:3]
        cut = request.SerializeToString()
        core.receive(b"".join(of_rank(rank, 3) for rank in range(8)) + cut)
        core.close()
        store = FileStore(tmp_path)
        assert [kept.body for kept in store.bodies()] == [cut]
        store.close()
        core = Core(FileStore(tmp_path), hold_s=60.0)
        core.start()
        core.receive(rest.SerializeToString())
        steps = await pulled(core)
        assert [(step.rank, step.step, step.complete) for step in steps[-1:]] == [(8, 1, True)]
        assert len(steps) == 25
        core.close()

    asyncio.run(live())


def test_a_step_that_two_pullers_make_at_the_same_time_is_counted_once() -> None:
    steps = MadeSteps(1_000)
    for _ in range(10):
        steps.put(("run", "life", 1), bytes(100))
    assert steps.get(("run", "life", 1)) == bytes(100)
    assert steps.used < 500


def test_what_is_known_of_a_writer_is_known_after_a_restart(tmp_path: Path) -> None:
    """Its host, revision, settings, place, device and units, and the newest steps of its ranks.

    One silent for long is silent at once.
    """
    about = {"host.name": "gpu-3", "vcs.ref.head.revision": "0b1c2d3e", "esper.settings": "export_every_s = 5.0"}
    core = Core(FileStore(tmp_path), hold_s=HOLD_S)
    core.start = lambda: None  # type: ignore[method-assign] # nothing runs in an event loop
    steps = history(400)
    steps[7] = make_frame(
        sequence=8, global_step=8, time_unix_ns=steps[7].time_unix_ns, recorded={"loss": 1.0, VALIDATION_LOSS: 0.25}
    )
    steps[8] = make_frame(
        sequence=9, global_step=9, time_unix_ns=steps[8].time_unix_ns, recorded={"loss": 1.0, "accuracy": 0.5}
    )
    for body in bodies(steps):
        request = ExportMetricsServiceRequest.FromString(body)
        [of_run] = request.resource_metrics
        for name, text in {**about, "slurm.job.id": "17", "esper.parallel.tp": "1"}.items():
            of_run.resource.attributes.add(key=name).value.string_value = text
        for metric in of_run.scope_metrics[0].metrics:
            if metric.name == "accuracy":
                metric.name, metric.unit = "my.speed", "m/s"
        core.receive(request.SerializeToString())
    alone = of_run.scope_metrics[0]
    alone.ClearField("metrics")
    alone.scope.name = "esper_otel.device"
    point = alone.metrics.add(name="esper.device.info").gauge.data_points.add(time_unix_nano=TIME_UNIX_NS, as_double=1)
    for name, text in {"hw.type": "gpu", "hw.model": "H200", "hw.id": "GPU-1", "esper.device.id": "cuda:0"}.items():
        point.attributes.add(key=name).value.string_value = text
    core.receive(request.SerializeToString())
    core.close()
    core = Core(FileStore(tmp_path), hold_s=HOLD_S)
    [state] = core.state_of(RUN.run_id).states
    assert (state.host, state.revision, state.settings) == tuple(about.values())
    assert (state.location, state.device) == ("Slurm job 17, tp 1", "H200, cuda:0, GPU-1")
    assert state.units == (("my.speed", "m/s"),)
    recent = core.recent_steps(RUN.run_id)
    assert recent is not None
    assert 400 in recent.steps[0]
    assert 8 not in recent.steps[0]  # long before the newest steps
    assert state.validation_loss == 0.25
    later = [lambda after_s=s: state.last_received_unix_ns + after_s * 10**9 for s in (59, 61)]
    rows = [row_of(RunTable(core, clock_ns)) for clock_ns in later]
    assert [(row["state"], row["host"]) for row in rows] == [("live", "gpu-3"), ("silent", "gpu-3")]
    core.close()


def row_of(table: RunTable) -> Any:
    finished(table.refreshing())
    [row] = json.loads(finished(table.answer("")))["runs"]
    return row


def test_a_token_for_one_run_does_not_send_counts_or_phases_of_another() -> None:
    """They would keep a dead run alive, and change where its hours went."""
    core = Core(MemoryStore())
    other = replace(RUN, run_id="other")
    phase = Phase(1, "evaluation", TIME_UNIX_NS, TIME_UNIX_NS + 10**9, 1e3, None, 1e3, 0.0)
    scope = phase_scope([phase], CATALOGUE, TIME_UNIX_NS)
    for body in (counts_of(other), encoder().alone(other, scope)):
        with pytest.raises(NotAllowed, match="not for run 'other'"):
            core.receive(body, grant=Grant("digits"))
    core.close()


def test_a_run_that_failed_before_its_first_step_makes_no_other_request_be_kept(tmp_path: Path) -> None:
    """Its end waits for a step for ten minutes, and is known after a restart; the others' bytes are of no use."""
    store = FileStore(tmp_path)
    core = Core(store)
    core.receive(end_of(replace(RUN, run_id="early")))
    for body in bodies(history(5)):
        core.receive(body)
    assert len(store.body_sizes()) == 1
    core.close()
    again = Core(FileStore(tmp_path))
    assert again.state_of("early").outcome == "RuntimeError"
    assert again.state_of(RUN.run_id).stored == 5
    again.close()
