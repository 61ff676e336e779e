"""Hours at a gateway: phases in any form and order, sums that outlive the steps, and a damaged file."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from wire import encoder

from esper_otel import UnknownRun
from esper_otel.export.phase_points import phase_scope
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.phase_log import Phase
from esper_otel.gateway.core import Core
from esper_otel.gateway.hours import accounts as module
from esper_otel.gateway.hours.file import FILE, AttemptRank, HoursFile, ReceivedPhase
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.decoder import Decoder, decode_plain
from esper_otel.gateway.receive.request import NO_ROOM_FOR_PHASES
from esper_otel.gateway.security import Grant
from esper_otel.gateway.store.base import StoreFull, StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.turns import finished
from esper_otel.hours.account import PhaseTimes
from esper_otel.hours.bar import RunHours
from esper_otel.log import Warnings
from esper_otel.pull.messages import HoursRequest
from esper_otel.schema import METRICS

pytestmark = pytest.mark.own_code

START_NS = 1_800_000_000 * 10**9
CATALOGUE = {metric.name: metric for metric in METRICS}


def frames(first: int, last: int, attempt: int = 1, rank: int = 0) -> list[Frame]:
    """Steps of 8 ms with a wait of 2 ms, each 10 ms after the one before."""
    run, before = Run("run", attempt, rank), 0 if attempt == 1 else 40  # steps before the attempt
    names, numbers = ("input_wait_ms", "step_latency_ms"), (2.0, 8.0)
    return [
        Frame(run, step - before, step, 0, START_NS + (step + 1_000 * attempt) * 10**7, names, numbers, {})
        for step in range(first, last + 1)
    ]


def body(of: Iterable[Frame]) -> list[bytes]:
    from esper_otel.frames.ring import blocks_of

    return [request.body for request in encoder().requests(blocks_of(of))]


def phase(number: int, name: str, end_ms: int, own_ms: float, step: int | None = None, total_ms: float = 0.0) -> Phase:
    end = START_NS + end_ms * 10**6
    total_ms = total_ms or own_ms
    return Phase(number, name, end - round(own_ms * 10**6), end, own_ms, step, total_ms, total_ms if step else 0.0)


def phase_body(*phases: Phase, attempt: int = 1) -> bytes:
    return encoder().alone(Run("run", attempt), phase_scope(phases, CATALOGUE, START_NS))


def hours(core: Core, run_id: str = "run") -> RunHours:
    return asyncio.run(core.run_hours(run_id))


def receive(core: Core, *bodies: bytes) -> None:
    async def run() -> None:
        for each in bodies:
            assert core.receive(each).rejected == 0

    asyncio.run(run())


@pytest.fixture(params=["memory", "file"])
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Core:
    return Core(MemoryStore() if request.param == "memory" else FileStore(tmp_path))


def test_steps_and_phases_make_the_bar(core: Core) -> None:
    """The phase inside a step is taken from it; steps of the second attempt that the first had done are done again."""
    receive(core, *body(frames(1, 50)), phase_body(phase(1, "checkpoint", 10_208, 4.0, step=20)))
    receive(core, *body(frames(41, 60, attempt=2)))
    found = hours(core)
    assert found.run.attempts == 2
    assert found.run.parts["checkpoint"] == pytest.approx(4.0)
    assert found.run.parts["redone"] == pytest.approx(10 * 10.0)
    assert found.run.parts["productive"] == pytest.approx((50 + 10) * 8.0 - 4.0)
    assert found.run.parts["between_attempts"] == pytest.approx((2_041 - 1_051) * 10.0, abs=10.0)
    assert sum(found.run.parts.values()) == pytest.approx(found.run.wall_ms)
    core.close()


def test_phases_may_be_torn_apart_repeated_and_turned_around(core: Core) -> None:
    """A collector may do so, or a trainer that was killed before it knew that they had arrived."""
    whole = phase_body(phase(1, "evaluation", 10_700, 30.0), phase(2, "evaluation", 10_800, 40.0, total_ms=70.0))
    receive(core, *body(frames(1, 50)), whole)
    expected = hours(core)
    message = encoder().alone(Run("run", 1), phase_scope([], CATALOGUE, 0))
    assert message
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    request = ExportMetricsServiceRequest.FromString(whole)
    for metric in reversed(request.resource_metrics[0].scope_metrics[0].metrics):
        points = metric.WhichOneof("data")
        assert points
        for index in (1, 0):
            part = ExportMetricsServiceRequest()
            part.CopyFrom(request)
            scope = part.resource_metrics[0].scope_metrics[0]
            point = getattr(metric, points).data_points[index]
            del scope.metrics[:]
            added = scope.metrics.add()
            added.CopyFrom(metric)
            data = getattr(added, points)
            del data.data_points[:]
            data.data_points.append(point)
            receive(core, part.SerializeToString())
            assert hours(core) == expected
    core.close()
    torn = Core(MemoryStore())
    receive(torn, *body(frames(1, 50)))
    for metric in request.resource_metrics[0].scope_metrics[0].metrics:
        part = ExportMetricsServiceRequest()
        part.CopyFrom(request)
        scope = part.resource_metrics[0].scope_metrics[0]
        del scope.metrics[:]
        scope.metrics.append(metric)
        receive(torn, part.SerializeToString())
    assert hours(torn) == expected
    torn.close()


def test_both_decoders_read_phases_and_make_no_step_of_them() -> None:
    """Values that no phase can have are left out."""
    content = phase_body(phase(1, "checkpoint", 100, 5.0, step=7), phase(2, "säve", 200, 6.0))
    fast, plain = Decoder().decode(content), decode_plain(content)
    assert sorted(fast.phases) == sorted(plain.phases)
    assert (fast.blocks, fast.points, fast.rejected) == ((), 12, {})
    [first, second] = sorted(module.received_phases(fast.phases), key=lambda each: each.phase.number or 0)
    assert first.writer == second.writer == AttemptRank(0, 1)
    assert first.phase == PhaseTimes("checkpoint", START_NS + 100 * 10**6, 5.0, 5.0, 5.0, 5.0, 1, 7)
    assert second.phase == PhaseTimes("säve", START_NS + 200 * 10**6, 6.0, 0.0, 6.0, 6.0, 2, None)
    bad = [point._replace(value=value) for point in fast.phases for value in (-1.0, float("nan"), 1e300)]
    assert module.received_phases(bad) == []


def test_a_restart_reads_the_steps_that_are_stored(tmp_path: Path) -> None:
    core = Core(FileStore(tmp_path))
    receive(core, *body(frames(1, 300)), phase_body(phase(1, "evaluation", 14_000, 30.0)))
    before = hours(core)
    core._store.close()  # as a kill would: nothing is stored in addition
    again = Core(FileStore(tmp_path))
    assert hours(again) == before
    receive(again, *body(frames(301, 310)))
    assert hours(again).run.parts["productive"] == pytest.approx(310 * 8.0)
    again.close()


def test_sums_outlive_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store keeps only the newest; steps that were dropped still count, once."""
    monkeypatch.setattr(module, "_STORED_EVERY", 1)
    limits = StoreLimits(steps=100)
    core = Core(FileStore(tmp_path, limits))
    for first in range(1, 1_000, 50):
        receive(core, *body(frames(first, first + 49))[:1])
        for _ in core._hours.tidying():
            pass
    whole = hours(core)
    assert whole.run.parts["productive"] == pytest.approx(1_000 * 8.0)
    core.close()
    again = Core(FileStore(tmp_path, limits))
    assert hours(again) == whole
    again.close()


def test_a_run_that_is_dropped_is_forgotten(tmp_path: Path) -> None:
    clock = [0.0]
    core = Core(FileStore(tmp_path, StoreLimits(idle_s=10.0), clock=lambda: clock[0]))
    receive(core, *body(frames(1, 5)), phase_body(phase(1, "evaluation", 14_000, 30.0)))
    assert hours(core).phases
    clock[0] = 100.0
    assert core._store.expire() == ["run"]
    for _ in core._hours.tidying():
        pass
    with pytest.raises(UnknownRun):
        hours(core)
    core.close()


def tidied(core: Core) -> list[str]:
    for _ in core._hours.tidying():
        pass
    return sorted(core._hours._file._senders)


def test_phases_of_a_run_without_steps_stay_for_a_day_and_no_longer(tmp_path: Path) -> None:
    """They may come before its first step; who looks at them does not end them, and neither does a restart."""
    clock = [0.0]
    store = StoreLimits(idle_s=10.0)
    core = Core(FileStore(tmp_path, store, clock=lambda: clock[0]))
    receive(core, phase_body(phase(1, "evaluation", 14_000, 30.0)))
    assert hours(core).phases
    assert tidied(core) == ["run"]
    assert hours(core).phases
    clock[0] = 12 * 3600.0
    assert tidied(core) == ["run"]
    receive(core, phase_body(phase(2, "evaluation", 15_000, 30.0)))
    core.close()
    core = Core(FileStore(tmp_path, store, clock=lambda: clock[0]))
    clock[0] += 23 * 3600.0
    assert tidied(core) == ["run"]
    clock[0] += 2 * 3600.0
    assert tidied(core) == []
    with pytest.raises(UnknownRun):
        hours(core)
    core.close()


@pytest.mark.parametrize("content", [b"", b"not a database" * 1_000])
def test_a_damaged_file_is_put_aside_and_steps_are_read_again(tmp_path: Path, content: bytes) -> None:
    core = Core(FileStore(tmp_path))
    receive(core, *body(frames(1, 50)))
    before = hours(core)
    core.close()
    (tmp_path / FILE).write_bytes(content)
    again = Core(FileStore(tmp_path))
    assert hours(again) == before
    again.close()
    assert len([*tmp_path.glob(f"{FILE}.damaged-*")]) == bool(content)


def test_very_many_phases_leave_room_and_keep_their_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper_otel.gateway.hours import file

    monkeypatch.setattr(file, "_MOST_PHASES", 100)
    monkeypatch.setattr(file, "_FEWER", 50)
    kept = HoursFile(None, Limits(), Warnings())
    for number in range(1, 1_000):
        times: Any = PhaseTimes("once" if number == 1 else "often", number, float(number), 0.0, 1.0, 1.0, number, None)
        finished(kept.adding([ReceivedPhase("run", AttemptRank(0, 1), times)]))
    found = [each for _, each in finished(kept.phases("run"))]
    assert 50 <= len(found) <= 101
    assert {each.name: each.total_ms for each in found} == {"once": 1.0, "often": 999.0}
    kept.close()


def test_phases_that_have_totals_are_bounded_and_tried_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name of each rank and attempt once: no phase is older than another of its name."""
    from esper_otel.gateway.hours import file

    for name, most in (("_MOST_PHASES", 100), ("_FEWER", 50), ("_MOST_NEWEST", 300)):
        monkeypatch.setattr(file, name, most)
    kept = HoursFile(None, Limits(), Warnings())
    statements: list[str] = []
    kept._file.connection.set_trace_callback(statements.append)
    for number in range(1_000):
        times = PhaseTimes(f"name {number % 10}", number, 1.0, 0.0, 1.0, 1.0, number, None)
        finished(kept.adding([ReceivedPhase("run", AttemptRank(number // 10 % 10, number // 100), times)]))
    found = finished(kept.phases("run"))
    assert len(found) + kept.dropped_totals == 1_000
    assert 300 <= len(found) <= 350
    assert min(writer.attempt for writer, _ in found) == 6  # the oldest attempts went first
    assert sum("DELETE" in each for each in statements) < 50
    kept.close()


def received(run_id: str, *numbers: int, name: str = "save") -> list[ReceivedPhase]:
    times = [PhaseTimes(name, number, 1.0, 0.0, 1.0, 1.0, number, None) for number in numbers]
    return [ReceivedPhase(run_id, AttemptRank(0, 1), each) for each in times]


def test_a_sender_has_its_share_of_the_phases_also_after_a_restart(tmp_path: Path) -> None:
    """One sender's phases do not fill the disk, nor the room of another; what it had before it keeps."""
    limits = Limits(all_phases=8)
    kept = HoursFile(tmp_path, limits, Warnings())
    assert finished(kept.adding(received("a", *range(1, 7)), "rogue")) == 2
    kept.close()
    kept = HoursFile(tmp_path, limits, Warnings())
    assert finished(kept.adding(received("b", 1), "rogue")) == 1
    assert finished(kept.adding(received("a", 1, 2, 3, 4), "rogue")) == 0  # they come again
    assert finished(kept.adding(received("honest", 1, 2), "honest")) == 0
    assert (kept.places.used, len(finished(kept.phases("a"))), finished(kept.phases("b"))) == (6, 4, [])
    finished(kept.forget("a"))
    assert (kept.places.used, finished(kept.adding(received("b", 1), "rogue"))) == (2, 0)
    kept.close()


def test_phases_of_runs_without_steps_are_abandoned_when_they_are_silent() -> None:
    clock = [1_000.0]
    kept = HoursFile(None, Limits(), Warnings(), lambda: clock[0])
    finished(kept.adding(received("silent", 1)))
    clock[0] += 3_000.0
    finished(kept.adding(received("speaks", 1)))
    clock[0] += 1_000.0
    assert kept.abandoned({"known"}.__contains__, 3_600.0) == ["silent"]
    kept.close()


def test_the_phases_of_a_run_without_steps_survive_a_full_disk() -> None:
    """They once counted as abandoned from then on, and were deleted before their sender came back."""
    clock = [1_000.0]
    kept = HoursFile(None, Limits(), Warnings(), lambda: clock[0])
    finished(kept.adding(received("run", 1)))
    connection = kept._file.connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    clock[0] += 100.0
    with pytest.raises(StoreFull):
        finished(kept.adding(received("run", *range(2, 1_000))))
    assert kept.abandoned(set().__contains__, 3_600.0) == []
    clock[0] += 3_600.0
    assert kept.abandoned(set().__contains__, 3_600.0) == ["run"]
    kept.close()


def test_steps_are_not_lost_when_their_phases_cannot_be_stored(tmp_path: Path) -> None:
    """The sender repeats the request: nothing of it may count as taken before."""
    core = Core(FileStore(tmp_path))
    both = body(frames(1, 3))[0] + phase_body(phase(1, "checkpoint", 100, 5.0))
    with sqlite3.connect(tmp_path / FILE, timeout=0) as other:
        other.execute("BEGIN IMMEDIATE")
        core._hours._file._file.connection.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(StoreFull):
            receive(core, both)
        other.execute("ROLLBACK")
    other.close()
    receive(core, both)
    assert len(core.entries("run", "", 100).entries) == 3
    assert [each.number for each in hours(core).phases] == [1]
    core.close()


def test_phases_without_room_are_refused_in_words_and_their_steps_taken() -> None:
    core = Core(MemoryStore(), limits=Limits(all_phases=2))

    async def take() -> Any:
        return await core.take(
            body(frames(1, 3))[0] + phase_body(phase(1, "checkpoint", 100, 5.0), phase(2, "checkpoint", 200, 5.0)),
            grant=Grant("run", "rogue"),
        )

    assert asyncio.run(take()) == (1, f"1 {NO_ROOM_FOR_PHASES}")
    assert len(core.entries("run", "", 100).entries) == 3
    assert core.use()["phases"] == (1.0, 2.0)
    core.close()


def test_the_sums_of_a_sender_are_bounded_and_written_as_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt of each rank has sums: a sender that gives a new attempt to each request fills no memory."""
    monkeypatch.setattr(module, "_STORED_EVERY", 1)
    core = Core(FileStore(tmp_path), limits=Limits(accounts=6))
    for attempt in range(1, 7):
        receive(core, *body(frames(40 * (attempt > 1) + 1, 40 * (attempt > 1) + 3, attempt=attempt)))
        finished(core._hours.tidying())
    assert core.use()["summed ranks"] == (3.0, 6.0)
    assert hours(core).run.attempts == 3
    before = hours(core)
    written: list[str] = []
    core._hours._file._file.connection.set_trace_callback(written.append)
    receive(core, *body(frames(44, 45, attempt=3)))
    finished(core._hours.tidying())
    assert sum("INTO accounts" in each for each in written) == 1  # of the only attempt that goes on
    core.close()
    again = Core(FileStore(tmp_path), limits=Limits(accounts=6))
    assert hours(again).run.parts["productive"] == pytest.approx(before.run.parts["productive"] + 2 * 8.0)
    assert again.use()["summed ranks"] == (3.0, 6.0)
    again.close()


SUMS = ("[" * 100_000, '{"steps": 1e400}', "7", "x", '{"first": ["x", 0, 0, 0, 0], "last": null, "knots": []}')


@pytest.mark.parametrize(
    ("change", "value"),
    [
        *(("accounts SET account", text) for text in SUMS),
        *(("accounts SET rank", rank) for rank in (1.8e19, -1, 2**31)),
        ("cursors SET cursor", "x"),
    ],
    ids=map(str, range(len(SUMS) + 4)),
)
def test_sums_that_no_gateway_can_have_written_are_read_anew(tmp_path: Path, change: str, value: Any) -> None:
    core = Core(FileStore(tmp_path))
    receive(core, *body(frames(1, 50)))
    before = hours(core)
    core.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(f"UPDATE {change} = ?", (value,))
    connection.close()
    again = Core(FileStore(tmp_path))
    assert hours(again) == before
    assert asyncio.run(again.hours(HoursRequest(run_id="run", with_accounts=True))).ranks[0].rank == 0
    again.close()


@pytest.mark.parametrize("wrong_ms", [1e300, 2.0**52, 1.7e308])
def test_durations_that_cannot_be_make_no_fault_of_the_answer(core: Core, wrong_ms: float) -> None:
    """Anybody may send them: of their own run, the hours are senseless, but they are told."""
    long = [
        frame._replace(numbers=(wrong_ms, wrong_ms), time_unix_ns=frame.time_unix_ns + frame.sequence)
        for frame in frames(1, 3)
    ]
    receive(core, *body(long), phase_body(phase(1, "checkpoint", 100, 5.0)._replace(start_unix_ns=-(2**62))))
    answer = asyncio.run(core.hours(HoursRequest(run_id="run", with_accounts=True)))
    assert all(0.0 <= part.spent_ms < math.inf for part in answer.run.parts)
    assert [phase.number for phase in answer.phases] == [1]
    core.close()
