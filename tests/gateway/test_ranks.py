"""Ranks side by side: which one holds the others up, from known durations."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateways import RunningGateway
from programs import until

import esper_otel
from esper_otel import EsperSettings, RunRanks, TamiyoClient, UnknownRun, aio
from esper_otel.frames.frame import GUESSED_STEP, Frame, Run
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.ranks import STEPS, Ranks
from esper_otel.pull.command import _write_ranks
from esper_otel.pull.views import RankInfo, run_ranks

pytestmark = pytest.mark.lengthy

Durations = dict[str, float]


def item(rank: int, step: int, durations: Durations, attempt: int = 1) -> Item:
    run = Run("run", attempt, rank=rank, world_size=4)
    frame = Frame(run, step, step, 0, step * 10**6, tuple(durations), tuple(durations.values()), {})
    return Item(Origin("run", attempt, rank), frame, 1, True, 0)


def view(*by_rank: Durations, steps: int = 10) -> RunRanks:
    """Of ranks of which each step takes the same."""
    ranks = Ranks()
    for step in range(1, steps + 1):
        ranks.note(item(rank, step, durations) for rank, durations in enumerate(by_rank))
    found = ranks.view("run", 0)
    assert found is not None
    return run_ranks(found)


def durations(wait: float, step: float, **more: float) -> Durations:
    return {"input_wait_ms": wait, "step_latency_ms": step, **more}


def test_in_lock_step_the_one_that_waits_for_its_data_is_named() -> None:
    """The others wait for it inside their steps: all cycles are equal."""
    found = view(durations(1, 99), durations(41, 59), durations(2, 98))
    assert (found.slowest_rank, found.slowest_by) == (1, "input_wait_ms")
    assert (found.step_latency_spread_ms, found.input_wait_spread_ms) == (40.0, 40.0)
    assert [(row.rank, row.cycle_ms) for row in found.ranks] == [(0, 100.0), (1, 100.0), (2, 100.0)]
    assert found.world_size == 4


def test_in_lock_step_the_one_whose_hook_is_long_is_named() -> None:
    found = view(durations(1, 99, hook_latency_ms=2), durations(1, 99, hook_latency_ms=30))
    assert (found.slowest_rank, found.slowest_by) == (1, "hook_latency_ms")


def test_without_a_collective_the_one_with_the_longest_cycle_is_named() -> None:
    found = view(durations(1, 50), durations(1, 80))
    assert (found.slowest_rank, found.slowest_by) == (1, "step_latency_ms")


@pytest.mark.parametrize(
    "by_rank", [(durations(1, 99),), (durations(1, 99), durations(2, 98)), (durations(0.1, 2), durations(0.9, 1.2))]
)
def test_nobody_is_named_for_noise(by_rank: tuple[Durations, ...]) -> None:
    """Less than a twentieth of a cycle, less than a millisecond, or nobody to compare with."""
    found = view(*by_rank)
    assert (found.slowest_rank, found.slowest_by) == (None, None)


def test_missing_durations_are_not_zero() -> None:
    """A rank without them is compared with nobody, and a difference takes two."""
    found = view({"loss": 1.0}, durations(5, 10))
    assert found.ranks == (RankInfo(0, None, None, None, None), RankInfo(1, 10.0, 5.0, 15.0, 5.0))
    assert (found.step_latency_spread_ms, found.input_wait_spread_ms) == (None, None)
    assert (found.slowest_rank, found.slowest_by) == (None, None)
    three = view({"loss": 1.0}, durations(41, 59), durations(1, 99))
    assert (three.slowest_rank, three.slowest_by) == (1, "input_wait_ms")
    assert (three.step_latency_spread_ms, three.input_wait_spread_ms) == (40.0, 40.0)


def test_each_time_needs_the_durations_that_it_is_made_from() -> None:
    """Without the step there is no cycle, however long the wait was."""
    found = view({"input_wait_ms": 80.0}, {"step_latency_ms": 10.0}, {"hook_latency_ms": 7.0}, durations(1, 9))
    assert [(row.cycle_ms, row.own_ms) for row in found.ranks] == [(None, 80.0), (10.0, None), (None, 7.0), (10.0, 1.0)]
    assert (found.step_latency_spread_ms, found.input_wait_spread_ms) == (1.0, 79.0)
    assert (found.slowest_rank, found.slowest_by) == (0, "input_wait_ms")


def test_means_are_over_the_steps_that_have_the_duration() -> None:
    """Every second step is measured; what is recorded in some steps only is not stretched to all of them."""
    ranks = Ranks()
    for step in range(1, 11):
        measured = durations(5, 10) if step % 2 else {"loss": 1.0}
        ranks.note([item(0, step, measured), item(1, step, durations(5, 10))])
        ranks.note([item(2, step, durations(5, 10, **({"kasmina.finalize_ms": 5.0} if step == 3 else {})))])
    found = ranks.view("run", 0)
    assert found is not None
    rows = run_ranks(found).ranks
    assert [(row.step_latency_ms, row.input_wait_ms, row.cycle_ms) for row in rows] == [(10.0, 5.0, 15.0)] * 3
    assert [row.own_ms for row in rows] == [5.0, 5.0, 5.5]
    assert run_ranks(found).slowest_rank is None


@pytest.mark.parametrize(
    ("by_rank", "lines"),
    [
        (
            ({"loss": 1.0}, {"loss": 1.0}),
            [
                "rank 0  step none  input wait none  cycle none",
                "rank 1  step none  input wait none  cycle none",
                "spread over the ranks: step none, input wait none",
            ],
        ),
        (
            ({"step_latency_ms": 4.0}, durations(1, 8)),
            [
                "rank 0  step 4.000 ms  input wait none  cycle 4.000 ms",
                "rank 1  step 8.000 ms  input wait 1.000 ms  cycle 9.000 ms  <- the slowest, by step_latency_ms",
                "spread over the ranks: step 4.000 ms, input wait none",
            ],
        ),
    ],
)
def test_what_is_missing_is_printed_as_none(
    by_rank: tuple[Durations, ...], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = view(*by_rank)
    _write_ranks(found, as_json=False)
    assert capsys.readouterr().out.splitlines()[1:] == lines
    _write_ranks(found, as_json=True)
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["cycle_ms"] for row in said["ranks"]] == [row.cycle_ms for row in found.ranks]
    assert said["input_wait_spread_ms"] is None


def test_steps_whose_numbers_were_guessed_are_not_compared() -> None:
    """By such a number no other rank's step could be found; the ranks that have real ones are still compared."""
    ranks = Ranks()
    ranks.note([item(0, GUESSED_STEP + 1, durations(5, 10))])
    alone = ranks.view("run", 0)
    assert alone is not None
    assert (alone.steps, len(alone.ranks), alone.world_size) == (0, 0, 4)
    ranks.note(item(rank, 1, durations(5, 10)) for rank in (1, 2))
    both = ranks.view("run", 0)
    assert both is not None
    assert (both.steps, [row.rank for row in both.ranks]) == (1, [1, 2])


@pytest.mark.parametrize("apart", [1, 2**20])
@pytest.mark.parametrize("numbers", [([1], [2]), ([1, 2], [3, 4]), ([1, 3, 5], [2, 4]), ([1, 2], [2, 3], [3, 1])])
def test_ranks_without_a_step_in_common_are_not_compared(numbers: tuple[list[int], ...], apart: int) -> None:
    """Before each other, between each other, or each step with another one of them; nobody is named."""
    ranks = Ranks()
    for rank, of_rank in enumerate(numbers):
        ranks.note(item(rank, step * apart, durations(1, 100 * (rank + 1))) for step in of_rank)
    found = ranks.view("run", 0)
    assert found is not None
    assert (found.steps, len(found.ranks), found.world_size) == (0, 0, 4)
    assert run_ranks(found).slowest_rank is None
    ranks.note(item(rank, 9 * apart, durations(1, 100 * (rank + 1))) for rank in range(len(numbers)))
    found = ranks.view("run", 0)
    assert found is not None
    assert (found.steps, found.first_step, len(found.ranks)) == (1, 9 * apart, len(numbers))


def test_only_steps_that_all_have_are_looked_at_and_only_the_newest() -> None:
    """A rank that is behind does not spoil the means; memory is bounded."""
    ranks = Ranks()
    for step in range(1, STEPS + 101):
        ranks.note([item(0, step, durations(1, step))])
    for step in range(1, STEPS + 51):
        ranks.note([item(1, step, durations(1, step))])
    found = ranks.view("run", 0)
    assert found is not None
    assert (found.first_step, found.last_step, found.steps) == (101, STEPS + 50, STEPS - 50)
    newest = ranks.view("run", 10)
    assert newest is not None
    assert (newest.first_step, newest.last_step) == (STEPS + 41, STEPS + 50)


def test_a_new_attempt_begins_anew_and_the_old_one_is_over() -> None:
    ranks = Ranks()
    ranks.note([item(0, 1, durations(1, 1)), item(0, 1, durations(7, 1), attempt=2), item(0, 2, durations(9, 9))])
    found = ranks.view("run", 0)
    assert found is not None
    assert (found.attempt, found.steps, found.ranks[0].input_wait_ms) == (2, 1, 7.0)
    assert ranks.view("another", 0) is None


def test_no_rank_is_left_out_of_a_large_run_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many ranks, fewer steps of each are kept; beyond that the longest silent one gives way."""
    ranks = Ranks()
    for step in range(1, 71):
        ranks.note(item(rank, step, durations(1, step + (rank == 4_500))) for rank in range(5_000))
    found = ranks.view("run", 0)
    assert found is not None
    assert ([row.rank for row in found.ranks], found.steps, found.last_step) == ([*range(5_000)], 64, 70)
    assert ranks._steps <= 2**19
    assert found.step_latency_spread_ms == 1.0
    monkeypatch.setattr("esper_otel.gateway.ranks._MOST_OF_A_RUN", 64)
    few = Ranks()
    for step in range(1, 11):
        few.note(item(rank, step, durations(1, step)) for rank in range(9 if step == 10 else 8))
    found = few.view("run", 0)
    assert found is not None
    assert [row.rank for row in found.ranks] == [*range(1, 9)]
    assert few._steps == 64


def test_steps_far_apart_that_come_late_or_again_are_compared_by_their_numbers() -> None:
    """The order of arrival does not matter; a later revision counts."""
    ranks = Ranks()
    numbers = [10**6 * step for step in range(1, 6)]
    ranks.note(item(0, step, durations(1, 10)) for step in numbers)
    ranks.note(item(1, step, durations(1, 20)) for step in reversed(numbers))
    ranks.note([item(1, numbers[2], durations(1, 25)), item(1, 7, durations(1, 99))])
    found = ranks.view("run", 0)
    assert found is not None
    assert (found.steps, found.first_step, found.last_step) == (5, 10**6, 5 * 10**6)
    assert [row.step_latency_ms for row in found.ranks] == [10.0, 21.0]
    assert found.step_latency_spread_ms == 11.0


def test_a_gateway_tells_it_to_both_clients_and_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with RunningGateway() as gateway, TamiyoClient(gateway.grpc) as client:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        for rank in (0, 1):
            settings = EsperSettings(export_every_s=0)
            with esper_otel.start(run_id="run", rank=rank, world_size=2, settings=settings) as telemetry:
                for _ in range(5):
                    telemetry.record_step(durations(1.0 + 20 * rank, 50.0 - 20 * rank), epoch=0)
        # Two starts within one process are two attempts: the newest is rank 1's.
        until("it has come", lambda: len(client.runs()) == 2 and client.ranks("run").ranks[-1].rank == 1)

        async def asked() -> RunRanks:
            async with aio.TamiyoClient(gateway.grpc) as one:
                return await one.ranks("run")

        assert asyncio.run(asked()) == client.ranks("run")
        with pytest.raises(UnknownRun, match="nobody"):
            client.ranks("nobody")
