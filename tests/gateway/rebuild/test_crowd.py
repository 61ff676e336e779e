"""A writer too many: what can be taken later is asked for again, and nobody is held up by it for ever."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from gateways import pulled
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
from wire import bodies, body_of

from esper_otel.frames.frame import Run
from esper_otel.gateway.core import Answer, Core
from esper_otel.gateway.faults import fault_of
from esper_otel.gateway.limits import Crowded, Limits
from esper_otel.gateway.rebuild.crowd import Crowd, RequestWriters
from esper_otel.gateway.receive.request import TOO_MANY_RUNS, PointSender
from esper_otel.gateway.store.base import Store
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.log import Warnings

pytestmark = pytest.mark.lengthy


class Small(Core):
    """A gateway with room for two writers, in which time passes by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store | None = None) -> None:
        super().__init__(store or MemoryStore(), limits=Limits(runs=2), hold_s=0.0)
        self.now_s = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)

    def send(self, *run_ids: str, step: int = 1) -> Answer | None:
        """None: it is to come again."""
        try:
            return self.receive(body_of(*run_ids, step=step))
        except Crowded:
            return None

    async def all_pulled(self, run_id: str) -> list[tuple[int, int]]:
        return [(step.step, step.revision) for step in await pulled(self, run_id)]


def test_a_writer_too_many_is_taken_when_another_has_been_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender keeps the data until then: nothing is refused for good."""

    async def live() -> None:
        core = Small(monkeypatch)
        assert core.send("a") == core.send("b") == Answer(0, "")
        for _ in range(10):
            core.now_s += 10
            assert core.send("a", step=2) == Answer(0, "")
            if core.now_s <= 1_060:
                assert core.send("c") is None
        assert core.send("c") == Answer(0, "")
        assert await core.all_pulled("c") == [(1, 1)]
        assert core.rejected == {}
        assert core.counts["requests"] == 13

    asyncio.run(live())


def test_a_request_that_is_sent_again_stores_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' steps are taken the first time: they do not wait for the one too many."""

    async def live() -> None:
        core = Small(monkeypatch)
        assert core.send("a", "b", "c") is None
        assert await core.all_pulled("a") == await core.all_pulled("b") == [(1, 1)]
        assert core.send("a", "b", "c") is None
        assert await core.all_pulled("a") == await core.all_pulled("b") == [(1, 1)]
        [first, second] = core.runs().runs
        assert (first.differing, first.too_late, second.differing, second.too_late) == (0, 0, 0, 0)
        assert core.counts["requests"] == 0

    asyncio.run(live())


def test_a_collectors_requests_are_not_held_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the points of the one too many are refused for good, said and counted, and the others go on."""

    async def live() -> None:
        core = Small(monkeypatch)
        answers = []
        for second in range(70):
            core.now_s = 1_000.0 + second
            answers.append(core.send("a", "b", "c", step=second + 1))
        assert answers[:60] == [None] * 60
        assert all(answer is not None for answer in answers[60:])
        answer = answers[60]
        assert answer is not None
        assert answer.rejected > 0
        assert answer.reason == f"{answer.rejected} too many runs ('c')"
        assert core.rejected[TOO_MANY_RUNS] == 10 * answer.rejected
        assert await core.all_pulled("a") == [(step, 1) for step in range(1, 71)]
        assert core.send("c", step=71) is None  # alone it holds nobody up

    asyncio.run(live())


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_a_writer_that_made_room_and_comes_back_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_on_disk: bool
) -> None:
    """Its last request, which it sends again, is not stored twice; a step that was missing is still taken."""

    async def live() -> None:
        core = Small(monkeypatch, FileStore(tmp_path) if is_on_disk else MemoryStore())
        assert core.send("a") == core.send("a", step=3) == core.send("b") == Answer(0, "")
        for others in (("c", "d"), ("e",)):
            core.now_s += 62.0
            assert [core.send(other) for other in others] == [Answer(0, "")] * len(others)
        assert {run.origin.run_id for run in core._assembler.runs(core.now_s)}.isdisjoint({"a", "b"})
        core.now_s += 62.0
        assert core.send("a", step=3) == core.send("a", step=4) == core.send("a", step=2) == Answer(0, "")
        assert sorted(await core.all_pulled("a")) == [(1, 1), (2, 1), (3, 1), (4, 1)]
        [run] = [run for run in core.runs().runs if run.run_id == "a"]
        assert (run.first_step, run.last_step, run.missing, run.too_late, run.stored) == (1, 4, 0, 0, 4)
        core.close()

    asyncio.run(live())


def test_a_second_process_that_claims_the_same_rank_waits_for_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the numbers of their steps tell the two apart: its step was taken for one too late, and not said."""
    others = {"sequence": 1, "global_step": 7, "time_unix_ns": TIME_UNIX_NS + 10**9}
    [second] = bodies([make_frame(run=replace(RUN, run_id="a"), **others)])

    async def live() -> None:
        core = Small(monkeypatch)
        assert core.send("a") == core.send("b") == Answer(0, "")
        with pytest.raises(Crowded, match=r"'a \(a second process\)'"):
            core.receive(second)
        core.now_s += 59.0
        assert core.send("a", step=2) == Answer(0, "")
        with pytest.raises(Crowded):
            core.receive(second)
        core.now_s += 3.0  # the other run has been silent for a minute
        assert core.receive(second) == Answer(0, "")
        assert sorted(await core.all_pulled("a")) == [(1, 1), (2, 1), (7, 1)]
        assert [run.too_late for run in core.runs().runs if run.run_id == "a"] == [0, 0]

    asyncio.run(live())


def test_who_was_away_is_waited_for_again() -> None:
    crowd = Crowd(60.0)
    others, late = PointSender(Run("a", 0)), PointSender(Run("c", 0))

    def is_waited_for(now_s: float) -> bool:
        request = RequestWriters()
        crowd.note(request, others, now_s, is_taken=True)
        crowd.note(request, late, now_s, is_taken=False)
        return bool(crowd.waiting(request, now_s))

    assert [is_waited_for(now_s) for now_s in (0.0, 59.0, 61.0, 100.0, 161.0, 220.0, 222.0)] == [
        *(True, True, False, False),
        *(True, True, False),
    ]


def test_many_that_are_refused_take_no_memory() -> None:
    crowd = Crowd(60.0)
    request = RequestWriters()
    for number in range(30_000):
        crowd.note(request, PointSender(Run(f"run-{number}", 0)), 1.0, is_taken=False)
    assert len(crowd._refused) == 10_000


def test_the_answer_is_temporary_in_both_protocols() -> None:
    """With the time after which to come again."""
    fault = fault_of(Crowded("no room"), Warnings())
    assert (fault.code, fault.status) == (grpc.StatusCode.UNAVAILABLE, 503)
    info = RetryInfo()
    assert fault.body().details[0].Unpack(info)
    assert info.retry_delay.seconds == fault.retry_s == 5
