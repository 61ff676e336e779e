"""The training: real lives of seeds, and the same losses with telemetry and without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from later import needs

from esper_otel import Packets, Stage
from esper_otel.demo.tamiyo import Action, Command, Decision
from esper_otel.leyline import SystemStatePacket

torch = pytest.importorskip("torch")
needs("sklearn")

from esper_otel.demo.kasmina import TRANSITIONS  # noqa: E402 - only where torch is
from esper_otel.demo.receiver import Receiver  # noqa: E402
from esper_otel.demo.training import Plan, Training, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IN_PACKET = ("alpha", "alpha_steps", "alpha_total_steps", "risk_tolerance")


class _NoStep:
    """Takes what a step takes and keeps only what the controller reads."""

    def __init__(self, step: int) -> None:
        self._packet = SystemStatePacket(global_step=step)

    def to(self, device: Any, *tensors: Any) -> Any:
        return tensors

    def put(self, *, loss: Any, **_: Any) -> None:
        self._packet.training_metrics["loss"] = float(loss.detach())

    def gradients(self, *_: Any, **__: Any) -> None:
        pass

    def seed(self, seed_id: str, **row: Any) -> None:
        violations = self._packet.training_metrics["kasmina.isolation.violations"]
        self._packet.training_metrics["kasmina.isolation.violations"] = violations + float(row["isolation_violations"])
        risk = row["risk_score"]
        seed = self._packet.seed_states.add(seed_id=seed_id, stage=int(row["stage"]))
        if risk is not None:
            seed.risk_score = float(risk)
        seed.metrics.update({name: row[name] for name in IN_PACKET if row[name] is not None})

    def state(self) -> SystemStatePacket:
        return self._packet

    def kernel(self, _: str) -> AbstractContextManager[None]:
        return nullcontext()

    hook = tamiyo = apply = finalize = lambda self: nullcontext()


class _NoTelemetry:
    """A trainer's loop with nothing behind it."""

    def __init__(self) -> None:
        self._step = 0

    def batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        return loader

    def step(self, **_: Any) -> AbstractContextManager[_NoStep]:
        self._step += 1
        return nullcontext(_NoStep(self._step))

    def validation(self, **_: Any) -> None:
        pass

    def pull(self) -> Iterator[Packets]:
        return iter(())


def test_the_losses_are_bit_for_bit_those_of_a_run_without_telemetry() -> None:
    """Telemetry watches: it draws no random number and changes no tensor."""
    plan = Plan(steps=40, seeds=3, random_seed=7)
    bare = Training(plan, torch.device("cpu"))
    nothing: Any = _NoTelemetry()
    bare.run(nothing, nothing, lambda _packets, _decision: None)
    result = run(plan, Receiver(), lambda _packets, _decision: None)
    assert result.losses == tuple(loss.item() for loss in bare.losses)


def test_seeds_live_whole_lives_by_commands_alone() -> None:
    """Each change of stage in the pulled packets is one that Tamiyo has commanded, and one that exists."""
    lives: dict[str, list[Stage]] = {}
    commanded: list[Command] = []
    changes: list[tuple[str, Stage, Stage]] = []

    def observe(packets: Packets, decision: Decision) -> None:
        commanded.extend(decision.commands)
        for seed in packets.state.seed_states:
            stage = Stage(seed.stage)
            life = lives.setdefault(seed.seed_id, [Stage.DORMANT])
            if stage is not life[-1]:
                changes.append((seed.seed_id, life[-1], stage))
                life.append(stage)
            assert ("alpha_steps" in seed.metrics) == (stage is Stage.BLENDING)
            if stage in {Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING, Stage.CULLED, Stage.EMBARGOED}:
                assert seed.metrics["alpha"] == 0.0

    result = run(Plan(steps=60, seeds=3, random_seed=7), Receiver(), observe)
    allowed = {(before, after) for froms, after in TRANSITIONS.values() for before in froms}
    assert {(before, after) for _, before, after in changes} <= allowed
    shown = [(command.seed_id, TRANSITIONS[command.action][1]) for command in commanded]
    assert [(seed_id, after) for seed_id, _, after in changes] == shown[: len(changes)]
    visited = {stage for life in lives.values() for stage in life}
    assert {Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED, Stage.CULLED, Stage.EMBARGOED} <= visited
    assert Action.FOSSILIZE in {command.action for command in commanded}
    assert result.steps == 60


def test_the_network_learns_the_digits() -> None:
    """A run of 200 steps reads most of the images that it has never seen."""
    result = run(Plan(steps=200, seeds=3, random_seed=7), Receiver(), lambda _packets, _decision: None)
    assert result.validation is not None
    assert result.validation[1] > 0.85
    assert result.losses[-1] < result.losses[0] / 3
