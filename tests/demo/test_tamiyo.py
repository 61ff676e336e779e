"""Tamiyo's rules, each on the packet that calls for it."""

from __future__ import annotations

import pytest

from esper_otel import Stage
from esper_otel.demo.pace import Pace
from esper_otel.demo.tamiyo import Action, Tamiyo
from esper_otel.leyline import SystemStatePacket

pytestmark = pytest.mark.own_code

PACE = Pace(between=5, training=4, blending=6, shadowing=2, probation=3, embargo=7, risk_tolerance=0.9)


def _packet(
    step: int, *stages: Stage, risk: float = 0.5, loss: float | None = 1.0, **metrics: float
) -> SystemStatePacket:
    packet = SystemStatePacket(global_step=step, training_metrics=metrics)
    if loss is not None:
        packet.training_metrics["loss"] = loss
    for number, stage in enumerate(stages, start=1):
        seed = packet.seed_states.add(seed_id=f"seed-{number}", stage=int(stage), risk_score=risk)
        seed.metrics.update({"risk_tolerance": 0.9, "alpha_total_steps": 6.0})
        if stage is Stage.BLENDING:
            seed.metrics["alpha_steps"] = min(6.0, step)
    return packet


def _first_command(stage: Stage, *, risk: float = 0.5) -> tuple[int, Action] | None:
    """In which step a seed that stays in its stage gets its first command."""
    tamiyo = Tamiyo(PACE)
    for step in range(1, 20):
        for command in tamiyo.evaluate_step(_packet(step, stage, risk=risk)).commands:
            return step, command.action
    return None


@pytest.mark.parametrize(
    ("stage", "risk", "expected"),
    [
        (Stage.DORMANT, 0.0, (1, Action.GERMINATE)),
        (Stage.GERMINATED, 0.0, (1, Action.TRAIN)),
        (Stage.TRAINING, 0.5, (5, Action.BLEND)),
        (Stage.TRAINING, 0.95, (5, Action.CULL)),
        (Stage.TRAINING, 0.0, (5, Action.CULL)),  # 0 is absent in proto3: nothing was measured
        (Stage.BLENDING, 0.95, (6, Action.SHADOW)),
        (Stage.SHADOWING, 0.95, (3, Action.PROBE)),
        (Stage.PROBATIONARY, 0.5, (4, Action.FOSSILIZE)),
        (Stage.PROBATIONARY, 0.95, (4, Action.CULL)),
        (Stage.FOSSILIZED, 0.95, None),
        (Stage.CULLED, 0.0, (1, Action.EMBARGO)),
        (Stage.EMBARGOED, 0.0, (8, Action.RESET)),
        (Stage.RESETTING, 0.0, (1, Action.REST)),
    ],
)
def test_each_stage_leads_on_when_its_time_and_its_worth_say_so(
    stage: Stage, risk: float, expected: tuple[int, Action] | None
) -> None:
    assert _first_command(stage, risk=risk) == expected


def test_seeds_germinate_one_after_another() -> None:
    """Two that start together could not be told apart by what they do."""
    tamiyo = Tamiyo(PACE)
    first = tamiyo.evaluate_step(_packet(1, Stage.DORMANT, Stage.DORMANT)).commands
    assert [(command.seed_id, command.action) for command in first] == [("seed-1", Action.GERMINATE)]
    assert tamiyo.evaluate_step(_packet(5, Stage.FOSSILIZED, Stage.DORMANT)).commands == ()
    assert tamiyo.evaluate_step(_packet(6, Stage.FOSSILIZED, Stage.DORMANT)).commands[0].seed_id == "seed-2"


def test_a_breach_of_isolation_culls_the_seeds_in_training_at_once() -> None:
    """The packet's count does not say which seed it was, and only one in training can have been it."""
    packet = _packet(1, Stage.TRAINING, Stage.BLENDING, **{"kasmina.isolation.violations": 1.0})
    commands = Tamiyo(PACE).evaluate_step(packet).commands
    assert [(command.seed_id, command.action) for command in commands] == [("seed-1", Action.CULL)]


@pytest.mark.parametrize(
    ("loss", "note"), [(3.0, "the loss jumps: seeds hold"), (None, "there is no finite loss: seeds hold")]
)
def test_seeds_hold_while_the_loss_jumps_or_is_missing(loss: float | None, note: str) -> None:
    tamiyo = Tamiyo(PACE)
    tamiyo.evaluate_step(_packet(1, loss=1.0))
    decision = tamiyo.evaluate_step(_packet(2, Stage.DORMANT, loss=loss))
    assert decision.commands == ()
    assert decision.notes == (note,)


def test_a_slow_hook_is_noted_and_decides_nothing() -> None:
    """A busy machine must not change the run."""
    decision = Tamiyo(PACE).evaluate_step(_packet(1, Stage.DORMANT, hook_latency_ms=80.0, step_latency_ms=200.0))
    assert decision.notes == ("hook_latency_ms was 80, above 50", "step_latency_ms was 200, above 120")
    assert decision.commands[0].action is Action.GERMINATE
