"""One tenant does not spend another's: places, steps, ends and emergencies are shared by those who send."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_stores import item, steps_of
from wire import body_of

from esper_otel import oona
from esper_otel.gateway.core import Core
from esper_otel.gateway.limits import Crowded, Limits, SharedPlaces
from esper_otel.gateway.ranks import STEPS, Ranks
from esper_otel.gateway.security import Grant, Tokens
from esper_otel.gateway.serve.metrics import prometheus_text
from esper_otel.gateway.store.base import Store, StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.text import printable

pytestmark = pytest.mark.own_code

HONEST, ROGUE = Grant("team-", "run=team-"), Grant("rogue-", "run=rogue-")


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[StoreLimits], Store]:
    return lambda limits: MemoryStore(limits) if request.param == "memory" else FileStore(tmp_path, limits)


def test_a_thousand_runs_of_one_tenant_take_no_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the other's run is new, or was silent for a while."""
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    core = Core(MemoryStore(), limits=Limits(runs=20), hold_s=0.0)
    monkeypatch.setattr(core, "_schedule", lambda _now_s: None)
    core.receive(body_of("team-old"), grant=HONEST)
    for number in range(10):
        now[0] += 30.0
        with pytest.raises(Crowded):
            core.receive(body_of(*(f"rogue-{number}-{each}" for each in range(30))), grant=ROGUE)
    core.receive(body_of("team-old", step=2), grant=HONEST)
    core.receive(body_of("team-new"), grant=HONEST)
    assert {state.origin.run_id for state in core._assembler.runs(now[0])} >= {"team-old", "team-new"}
    assert core.gauges()["writers"] == 20


def test_a_rogues_small_runs_take_no_step_of_an_honest_large_one(make: Callable[[StoreLimits], Store]) -> None:
    store = make(StoreLimits(all_bytes=1_000_000))
    tenants = {"team-a": "team"} | {f"rogue-{number}": "rogue" for number in range(1_000)}
    store.add([item(step, "team-a") for step in range(1, 301)], tenants=tenants)
    honest = store.size
    assert 50_000 < honest < 500_000
    for number in range(1_000):
        store.add([item(1, f"rogue-{number}")], tenants=tenants)
    assert store.size <= 1_000_000
    assert steps_of(store, "team-a", most=1_000) == [*range(1, 301)]
    store.close()


def test_the_tenant_of_a_run_is_known_after_a_restart(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.add([item(1, "team-a")], tenants={"team-a": "team"})
    store.close()
    store = FileStore(tmp_path)
    store.add([item(2, "team-a")], tenants={"team-a": "another"})
    assert store.tenant("team-a") == "team"
    store.close()


def test_how_many_runs_are_stored_is_bounded(make: Callable[[StoreLimits], Store]) -> None:
    """Those that were silent for longest go first; what a step takes does not depend on how many there are."""
    store = make(StoreLimits(writers=50))
    for number in range(200):
        store.add([item(number + 1, "honest"), item(1, f"run-{number}")])
    assert len(store.counts()) == 50
    assert steps_of(store, "honest", most=300) == [*range(1, 201)]
    assert store.use()["stored writers"] == (50, 50)
    store.close()


def test_attempts_without_end_are_bounded_too(make: Callable[[StoreLimits], Store]) -> None:
    store = make(StoreLimits(writers=50))
    for attempt in range(1, 200):
        store.add([item(attempt, "run", attempt=attempt)])
    assert len(store.counts()) == 50
    assert steps_of(store)[-1] == 199
    store.close()


def test_room_is_left_for_those_who_come_later() -> None:
    room = SharedPlaces(100)
    assert sum(room.take("rogue") for _ in range(1_000)) == 50
    assert sum(room.take("honest") for _ in range(1_000)) == 25
    room.give_back("rogue", 50)
    assert room.used == 25


def test_emergencies_are_shared_by_tenants_and_runs() -> None:
    class Source:
        def tenant(self, run_id: str) -> str:
            return run_id[0]

    calls = oona.publisher._EmergencyBudget(Source())  # type: ignore[arg-type] # of a source only this is asked

    def called(run_id: str) -> int:
        count = 0
        while calls.may(run_id, 0) and count < 1_000:
            calls.note(run_id, 1)
            count += 1
        return count

    of_rogue = sum(called(f"rogue-{number}") for number in range(100))
    assert of_rogue == 90
    assert called("honest") >= 15
    assert called("other") >= 1


def test_durations_of_many_runs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper_otel.gateway.ranks._MOST_STEPS", 10 * STEPS)
    ranks = Ranks()
    for number in range(50):
        ranks.note(
            [item(step, f"run-{number}") for step in range(1, 11)] + [item(number + 1, "honest", attempt=number)]
        )
    assert sum(run.size for run in ranks._runs.values()) == ranks._steps <= 10 * STEPS
    assert ranks.view("honest", 10) is not None


def test_metrics_say_how_much_of_each_bound_is_used_and_name_no_run() -> None:
    text = prometheus_text(Core(MemoryStore()))
    assert 'esper_gateway_bound_used{bound="writers"} 0' in text
    assert 'esper_gateway_bound_limit{bound="stored bytes"} 1073741824' in text


def test_tokens_of_one_prefix_are_one_tenant(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a run=team-\nb run=team-\nc\nd\n")
    tokens = Tokens(tmp_path / "tokens", "--send-tokens")
    of = {name: tokens.grant(f"Bearer {name}").tenant for name in "abcd"}
    assert of["a"] == of["b"]
    assert len({*of.values()}) == 3


def test_what_comes_from_outside_is_one_line_of_text() -> None:
    assert printable("a\nrun-fake \x1b[2J\u202e") == r"a\nrun-fake \x1b[2J\u202e"
    assert printable("größe") == "größe"
    assert len(printable("x" * 10_000, 100)) == 100
