"""Tamiyo: a small rule-based controller that reads each step's packet and commands the seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from esper_otel import Stage
from esper_otel.demo.pace import Pace

if TYPE_CHECKING:
    from esper_otel.leyline import SeedState, SystemStatePacket

# A loss that exceeds its moving average by more than this share is a spike; seeds wait until it is over.
_SPIKE = 0.75
_SMOOTHING = 0.2
_HOOK_BUDGET_MS = 50.0
_STEP_BUDGET_MS = 120.0


class Action(StrEnum):
    """An action that Tamiyo can command."""

    GERMINATE = "germinate"
    TRAIN = "train"
    BLEND = "blend"
    SHADOW = "shadow"
    PROBE = "probe"
    FOSSILIZE = "fossilize"
    CULL = "cull"
    EMBARGO = "embargo"
    RESET = "reset"
    REST = "rest"


@dataclass(frozen=True, slots=True)
class Command:
    """A command to change one seed, with the reason."""

    seed_id: str
    action: Action
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Tamiyo's decision about one packet.

    Attributes:
        commands: at most one command for each seed; seeds without a command stay as they are.
        notes: Tamiyo's observations: why seeds wait, and what was slow.
    """

    commands: tuple[Command, ...] = ()
    notes: tuple[str, ...] = ()


class Tamiyo:
    """The rules. They use only the packets, and the number of steps since a seed was first seen in its stage.

    Timings are noted but do not influence decisions, so the same random seed gives the same run on a busy machine.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._stages: dict[str, tuple[int, int]] = {}
        self._last_germination: int | None = None
        self._loss_average: float | None = None

    def evaluate_step(self, packet: SystemStatePacket) -> Decision:
        """Returns commands for the seeds in this step's packet."""
        hold = self._hold(packet)
        is_breached = packet.training_metrics.get("kasmina.isolation.violations", 0.0) > 0
        commands = []
        for seed in packet.seed_states:
            verdict = self._verdict(seed, packet.global_step, is_breached=is_breached)
            if verdict is None or (hold and verdict[0] is not Action.CULL):
                continue
            commands.append(Command(seed.seed_id, *verdict))
            if verdict[0] is Action.GERMINATE:
                self._last_germination = packet.global_step
        return Decision(tuple(commands), (*hold, *_late(packet)))

    def _hold(self, packet: SystemStatePacket) -> tuple[str, ...]:
        """Returns the reason why no seed may advance in this step, if there is one."""
        loss = packet.training_metrics.get("loss")
        if loss is None:
            return ("there is no finite loss: seeds hold",)
        average = self._loss_average
        self._loss_average = loss if average is None else average + _SMOOTHING * (loss - average)
        is_spike = average is not None and loss > (1 + _SPIKE) * average
        return ("the loss jumps: seeds hold",) if is_spike else ()

    def _verdict(self, seed: SeedState, step: int, *, is_breached: bool) -> tuple[Action, str] | None:  # noqa: PLR0911 - one return for each rule
        pace = self._pace
        spent = self._steps_in_stage(seed, step)
        match Stage(seed.stage):
            case Stage.DORMANT if self._last_germination is None or step >= self._last_germination + pace.between:
                return Action.GERMINATE, "its turn has come"
            case Stage.GERMINATED:
                return Action.TRAIN, "on detached features of the host"
            case Stage.TRAINING if is_breached:
                return Action.CULL, "a seed in training touched the host's gradients"
            case Stage.TRAINING if spent >= pace.training:
                return self._judged(seed, Action.BLEND)
            case Stage.BLENDING if seed.metrics["alpha_steps"] >= seed.metrics["alpha_total_steps"]:
                return Action.SHADOW, "alpha has reached 1"
            case Stage.SHADOWING if spent >= pace.shadowing:
                return Action.PROBE, "the host has settled"
            case Stage.PROBATIONARY if spent >= pace.probation:
                return self._judged(seed, Action.FOSSILIZE)
            case Stage.CULLED:
                return Action.EMBARGO, "its place is to recover"
            case Stage.EMBARGOED if spent >= pace.embargo:
                return Action.RESET, "it may start over"
            case Stage.RESETTING:
                return Action.REST, "with another blueprint"
        return None

    def _steps_in_stage(self, seed: SeedState, step: int) -> int:
        stage, since = self._stages.get(seed.seed_id, (-1, step))
        if stage != seed.stage:
            self._stages[seed.seed_id] = (seed.stage, since := step)
        return step - since

    @staticmethod
    def _judged(seed: SeedState, passed: Action) -> tuple[Action, str]:
        risk, tolerance = seed.risk_score, seed.metrics["risk_tolerance"]
        reason = f"the loss with it is {risk:.4f} of the loss without it; {tolerance:.4f} is tolerated"
        return (passed if 0.0 < risk <= tolerance else Action.CULL), reason


def _late(packet: SystemStatePacket) -> Iterator[str]:
    metrics = packet.training_metrics
    for name, budget_ms in (("hook_latency_ms", _HOOK_BUDGET_MS), ("step_latency_ms", _STEP_BUDGET_MS)):
        if metrics.get(name, 0.0) > budget_ms:
            yield f"{name} was {metrics[name]:.0f}, above {budget_ms:.0f}"
