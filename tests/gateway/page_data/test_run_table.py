"""The table of runs: only what has changed is made and sent again, and every state is shown as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from frame_examples import TIME_UNIX_NS, make_frame

from esper_otel.frames.frame import Run
from esper_otel.gateway.changes import ChangedRuns
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item, Origin, RunState, RunStatus
from esper_otel.gateway.page_data import run_table
from esper_otel.gateway.page_data.run_table import RunTable
from esper_otel.gateway.rebuild.launches import outcomes
from esper_otel.gateway.receive.log_records import EventRecord
from esper_otel.gateway.receive.request import PhasePoint, PointSender
from esper_otel.gateway.store.base import StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.gateway.turns import finished
from esper_otel.schema import new_check_id

pytestmark = pytest.mark.own_code


class Counted(Core):
    """Counts how often it was asked for the state of a run."""

    asked = 0

    def state_of(self, run_id: str) -> RunStatus:
        self.asked += 1
        return super().state_of(run_id)


def publish(core: Core, run_id: str, step: int, attempt: int = 1) -> None:
    time_unix_ns = TIME_UNIX_NS + 10**9 * step + 10**12 * attempt
    frame = make_frame(run=Run(run_id, attempt), sequence=step, global_step=step, time_unix_ns=time_unix_ns)
    core.publish(Item(Origin(run_id, attempt, 0), frame, 1, True, time_unix_ns))


def ask(table: RunTable, since: str = "") -> Any:
    finished(table.refreshing())
    return json.loads(finished(table.answer(since)), parse_constant=pytest.fail)


def test_a_thousand_idle_runs_cost_nothing_and_one_that_goes_on_costs_one_row() -> None:
    core = Counted(MemoryStore())
    for number in range(1_000):
        publish(core, f"run-{number}", 1)
    table = RunTable(core)
    answer = ask(table)
    assert (len(answer["runs"]), answer["is_all"], answer["more"]) == (1_000, True, False)
    core.asked = 0
    for _ in range(10):
        idle = ask(table, answer["cursor"])
        assert (idle["runs"], idle["gone"], idle["is_all"]) == ([], [], False)
    assert core.asked == 0
    publish(core, "run-7", 2)
    changed = ask(table, idle["cursor"])
    assert [(row["run_id"], row["last_step"], row["steps_stored"]) for row in changed["runs"]] == [("run-7", 2, 2)]
    assert core.asked == 1


def test_many_rows_come_in_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_table, "_MOST_ROWS", 10)
    core = Core(MemoryStore())
    for number in range(25):
        publish(core, f"run-{number}", 1)
    table = RunTable(core)
    answer, found = ask(table), []
    while True:
        found += [row["run_id"] for row in answer["runs"]]
        if not answer["more"]:
            break
        answer = ask(table, answer["cursor"])
    assert sorted(found) == sorted(f"run-{number}" for number in range(25))


def test_a_run_that_was_dropped_goes_and_a_check_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_table, "_ALL_EVERY_S", 0.0)
    clock = [0.0]
    core = Core(MemoryStore(StoreLimits(idle_s=10), clock=lambda: clock[0]))
    table = RunTable(core)
    publish(core, "old", 1)
    publish(core, new_check_id(), 1)
    clock[0] = 20.0
    publish(core, "new", 1)
    before = ask(table)
    assert {row["run_id"] for row in before["runs"]} == {"old", "new"}
    core._assembler._runs.expire(1e9)  # both are silent for very long; what is stored of them still is
    assert core._store.expire()
    after = ask(table, before["cursor"])
    assert after["gone"] == ["old"]
    monkeypatch.setattr(run_table, "_ALL_EVERY_S", 1e9)  # not only when all are compared
    publish(core, new_check_id(), 1)
    assert ask(table, after["cursor"])["runs"] == []
    assert [row["run_id"] for row in ask(table)["runs"]] == ["new"]


def test_a_run_that_was_forgotten_is_described_by_its_stored_steps() -> None:
    core = Core(MemoryStore())
    for step in range(1, 6):
        publish(core, "run", step)
    core._store.add([], ended={Origin("run", 1, 0): "completed"})
    core._assembler._runs.expire(1e9)
    assert core._assembler.run_ids() == set()
    (row,) = ask(RunTable(core))["runs"]
    assert (row["first_step"], row["last_step"], row["steps_stored"], row["state"]) == (1, 5, 5, "completed")
    assert row["last_ms"] - row["start_ms"] == 4_000


class Told:
    """A run with these states."""

    def __init__(self, states: Sequence[RunState]) -> None:
        self.changed = ChangedRuns()
        self._states = states

    def shown_runs(self) -> set[str]:
        return {"run"}

    def shown_state(self, run_id: str) -> RunStatus:
        return RunStatus(self._states, 0, outcomes(self._states).get(run_id))

    def entries(self, run_id: str, cursor: str, most: int, rank: int | None = None) -> Any:
        raise NotImplementedError

    def last_number(self, run_id: str, rank: int) -> int:
        raise NotImplementedError


def state(attempt: int = 1, rank: int = 0, last: int | None = 5, **more: Any) -> RunState:
    time_ns = 0 if last is None else TIME_UNIX_NS + last + 1_000 * attempt
    origin = Origin("run", attempt, rank)
    return RunState(origin, 1, "", last and 1, last, time_ns, TIME_UNIX_NS, first_time_unix_ns=time_ns, **more)


@pytest.mark.parametrize(
    ("states", "of_run", "of_attempts"),
    [
        ([state()], "live", ["live"]),
        ([state(last=None)], "waiting", ["waiting"]),
        ([state(is_silent=True)], "silent", ["silent"]),
        ([state(step_received_unix_ns=TIME_UNIX_NS - 61 * 10**9)], "no steps", ["no steps"]),
        ([state(step_received_unix_ns=TIME_UNIX_NS - 59 * 10**9)], "live", ["live"]),
        ([state(ended="completed")], "completed", ["completed"]),
        ([state(ended="exit")], "ended", ["ended"]),
        ([state(ended="interrupted")], "ended", ["ended"]),
        ([state(ended="SystemExit")], "failed", ["failed"]),
        ([state(ended="ValueError")], "failed", ["failed"]),
        ([state(ended="SIGTERM")], "killed", ["killed"]),
        ([state(is_silent=True), state(2)], "live", ["killed", "live"]),
        ([state(last=None), state(2, last=None)], "waiting", ["killed", "waiting"]),  # of events only
        ([state(ended="SIGTERM"), state(2, ended="completed")], "completed", ["killed", "completed"]),
        ([state(), state(rank=1, ended="completed")], "live", ["live"]),
        ([state(is_silent=True), state(rank=1)], "live", ["live"]),
        ([state(is_silent=True), state(rank=1, ended="completed")], "killed", ["killed"]),
        ([state(ended="completed"), state(rank=1, ended="ValueError")], "failed", ["failed"]),
    ],
)
def test_states(states: Sequence[RunState], of_run: str, of_attempts: list[str]) -> None:
    (row,) = ask(RunTable(Told(states), lambda: TIME_UNIX_NS))["runs"]
    assert row["state"] == of_run
    assert [attempt["state"] for attempt in row["attempts"]] == of_attempts


def test_a_run_without_steps_is_listed_with_what_its_events_say(tmp_path: Path) -> None:
    """One that hangs, or has failed, before its first step; a rank that lacks its first step; after a restart, too."""
    core = Core(FileStore(tmp_path), clock_ns=lambda: TIME_UNIX_NS)
    table = RunTable(core, lambda: TIME_UNIX_NS)

    def send(run_id: str, name: str, rank: int = 0, **attributes: str) -> None:
        sender = PointSender(Run(run_id, 1, rank=rank, experiment="digits"), host="node-3")
        event = EventRecord(sender, 1, name, TIME_UNIX_NS, 9, "", None, None, attributes)
        finished(core._events.taking([event], ""))
        core.changed.note([run_id])

    send("hangs", "esper.run.started")
    send("failed", "esper.run.ended", 0, **{"esper.outcome": "ValueError"})
    publish(core, "half", 1)
    send("half", "esper.run.started", rank=1)
    phase = PhasePoint(
        PointSender(Run("saves", 1)), "esper.phase.length_ms", "checkpoint", TIME_UNIX_NS - 61 * 10**9, 5.0
    )
    finished(core._hours.taking([phase], ""))
    core.changed.note(["saves"])
    rows = {row["run_id"]: row for row in ask(table)["runs"]}
    states = {run_id: row["state"] for run_id, row in rows.items()}
    assert states == {"hangs": "waiting", "failed": "failed", "half": "live", "saves": "waiting"}
    assert (rows["hangs"]["host"], rows["hangs"]["experiment"]) == ("node-3", "digits")
    assert rows["failed"]["outcome"] == "ValueError"
    assert [(rank["rank"], rank["state"], rank["last_step"]) for rank in rows["half"]["ranks"]] == [
        *((0, "live", 1), (1, "waiting", None)),
    ]
    assert {row["run_id"] for row in ask(RunTable(core, lambda: TIME_UNIX_NS))["runs"]} == {*rows}
    core.close()
    clock = [1_000.0]
    core = Core(FileStore(tmp_path, clock=lambda: clock[0]), clock_ns=lambda: TIME_UNIX_NS + 3600 * 10**9)
    clock[0] += 1_700.0  # a start may take long
    states = {row["run_id"]: row["state"] for row in ask(RunTable(core))["runs"]}
    assert states == {"hangs": "waiting", "failed": "failed", "half": "waiting", "saves": "silent"}
    clock[0] += 200.0
    states = {row["run_id"]: row["state"] for row in ask(RunTable(core))["runs"]}
    assert states == {"hangs": "silent", "failed": "failed", "half": "silent", "saves": "silent"}
    core.close()


def test_what_has_changed_is_bounded() -> None:
    changed = ChangedRuns()
    changed.note(["a"])
    assert changed.taken() == {"a"}
    assert changed.taken() == set()
    changed.note(map(str, range(30_000)))
    assert changed.taken() is None
    assert changed.taken() == set()


def test_the_table_does_not_hold_up_the_event_loop() -> None:
    """Rows are made one by one, with other tasks in between."""
    core = Core(MemoryStore())
    for number in range(50):
        publish(core, f"run-{number}", 1)
    assert sum(1 for _ in RunTable(core).refreshing()) == 50
