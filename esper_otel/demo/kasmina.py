"""Kasmina: lets seeds grow in the host, measures their effects, and carries out commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper_otel import Stage, Step
from esper_otel.demo.host import DEPTHS, Host
from esper_otel.demo.pace import Pace
from esper_otel.demo.seed import BLENDED, GROWING, ON_TRIAL, Seed
from esper_otel.demo.tamiyo import Action, Command
from esper_otel.errors import WrongState

# For each action, the stages in which it is allowed and the stage to which it leads.
TRANSITIONS: Mapping[Action, tuple[frozenset[Stage], Stage]] = MappingProxyType(
    {
        Action.GERMINATE: (frozenset({Stage.DORMANT}), Stage.GERMINATED),
        Action.TRAIN: (frozenset({Stage.GERMINATED}), Stage.TRAINING),
        Action.BLEND: (frozenset({Stage.TRAINING}), Stage.BLENDING),
        Action.SHADOW: (frozenset({Stage.BLENDING}), Stage.SHADOWING),
        Action.PROBE: (frozenset({Stage.SHADOWING}), Stage.PROBATIONARY),
        Action.FOSSILIZE: (frozenset({Stage.PROBATIONARY}), Stage.FOSSILIZED),
        Action.CULL: (ON_TRIAL, Stage.CULLED),
        Action.EMBARGO: (frozenset({Stage.CULLED}), Stage.EMBARGOED),
        Action.RESET: (frozenset({Stage.EMBARGOED}), Stage.RESETTING),
        Action.REST: (frozenset({Stage.RESETTING}), Stage.DORMANT),
    }
)

# A larger change of the host's gradient by a seed in training is a breach. There should be no change at all.
LEAK_TOLERANCE = 1e-9

# Times a seed's kernel, like ``now.kernel``.
Kernel = Callable[[str], AbstractContextManager[None]]


@dataclass(slots=True)
class _Meeting:
    """The features at one depth, where host and seeds are combined, in this step.

    Attributes:
        host_side: the features from the host, whose gradient is that of the host.
        blended: the features passed to the next layer.
        seed_sides: for each seed that ran, its input features and the change of the features that it computed.
    """

    host_side: Tensor
    blended: Tensor
    seed_sides: list[tuple[Seed, Tensor, Tensor]] = field(default_factory=list)


class Kasmina:
    """The seeds of a host, taking turns at its depths.

    Args:
        host: the network in which they grow.
        seeds: number of seeds.
        pace: the duration of blending, and the tolerated risk.
        random_seed: random seed for the initial weights.
    """

    def __init__(self, host: Host, *, seeds: int, pace: Pace, random_seed: int) -> None:
        self._host = host
        self._device = next(host.parameters()).device
        self.seeds: tuple[Seed, ...] = tuple(
            Seed(
                f"seed-{number}",
                depth=DEPTHS[(number - 1) % len(DEPTHS)],
                random_seed=random_seed + number,
                blueprint=number - 1,
                alpha_total_steps=pace.blending,
                risk_tolerance=pace.risk_tolerance,
            )
            for number in range(1, seeds + 1)
        )
        self._meetings: dict[int, _Meeting] = {}

    # -- in the forward pass -----------------------------------------------------------------------------

    def growing(self, kernel: Kernel) -> Callable[[int, Tensor], Tensor]:
        """Called by the host after each convolution of a training step; ``kernel`` times each seed."""
        self._meetings = {}
        for seed in self.seeds:
            seed.fallback_used = False
            seed.isolation = seed.gradient_norm = None

        def grow(depth: int, features: Tensor) -> Tensor:
            host_side = features.view_as(features)  # a separate node in the graph, with its own gradient
            host_side.retain_grad()
            meeting = self._meetings[depth] = _Meeting(host_side, host_side)
            for seed in self.seeds:
                if seed.depth == depth and seed.stage in GROWING:
                    self._run(seed, features, meeting, kernel)
            return meeting.blended

        return grow

    @staticmethod
    def _run(seed: Seed, features: Tensor, meeting: _Meeting, kernel: Kernel) -> None:
        if seed.stage is Stage.TRAINING:
            seed_side = features.detach().requires_grad_()
        else:
            seed_side = features.view_as(features)
            seed_side.retain_grad()
        with kernel(seed.seed_id):
            change: Tensor = _network(seed)(seed_side)
        seed.fallback_used = not bool(change.isfinite().all())
        if seed.fallback_used:
            seed.weigh(torch.ones((), device=change.device))
            return
        meeting.seed_sides.append((seed, seed_side, change))
        if seed.stage in BLENDED:
            meeting.blended = meeting.blended + seed.alpha * change

    def grown(self, depth: int, features: Tensor) -> Tensor:
        """Returns the features after the seeds that blend at a depth, unmeasured, for validation and for trials."""
        blended = features
        for seed in self.seeds:
            if seed.depth == depth and seed.stage in BLENDED:
                change = _network(seed)(features)
                blended = blended + seed.alpha * change if bool(change.isfinite().all()) else blended
        return blended

    # -- after the backward pass -------------------------------------------------------------------------

    def measure(self, loss: Tensor, targets: Tensor) -> None:
        """Measures each seed's effect, and the gradients where host and seeds are combined.

        Call it after ``loss.backward()``. A seed in TRAINING gets its gradients here, from the loss that the host would
        have with it.
        """
        loss = loss.detach()
        for depth, meeting in self._meetings.items():
            host_gradient = meeting.host_side.grad
            if host_gradient is None:
                continue
            for seed, seed_side, change in meeting.seed_sides:
                blended = meeting.blended.detach()
                if seed.stage is Stage.TRAINING:
                    with_seed = self._teach(seed, depth, seed_side, blended + change, targets)
                    seed.weigh(with_seed / loss)
                elif seed.stage in ON_TRIAL:
                    with torch.no_grad():
                        without = cross_entropy(
                            self._host.behind(depth, blended - seed.alpha * change, self.grown), targets
                        )
                    seed.weigh(loss / without)
                seed.gradient_norm = _norm([p.grad for p in seed.parameters() if p.grad is not None])
                if seed.stage in ON_TRIAL and seed_side.grad is not None:
                    seed.isolation = (
                        (host_gradient * seed_side.grad).sum(),
                        host_gradient.norm(),
                        seed_side.grad.norm(),
                    )

    def _teach(self, seed: Seed, depth: int, seed_side: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        before = [p.grad.clone() for p in self._host.parameters() if p.grad is not None]
        loss = cross_entropy(self._host.behind(depth, features, self.grown), targets)
        torch.autograd.backward(loss, inputs=[seed_side, *seed.parameters()])
        after = [p.grad for p in self._host.parameters() if p.grad is not None]
        leak = _norm([now - then for now, then in zip(after, before, strict=True)])
        seed.violations = seed.violations + ~(leak <= LEAK_TOLERANCE)  # NaN is a breach too
        return loss.detach()

    def step(self) -> None:
        """Steps the optimizer of every seed that has gradients."""
        for seed in self.seeds:
            if seed.stage in GROWING and seed.optimizer is not None:
                seed.optimizer.step()
                seed.optimizer.zero_grad()

    def record(self, now: Step) -> None:
        """Records each seed's row."""
        for seed in self.seeds:
            now.seed(seed.seed_id, **seed.row())

    # -- commands ----------------------------------------------------------------------------------------

    def apply(self, commands: Iterable[Command]) -> None:
        """Carries out the commands.

        Raises:
            WrongState: a seed is not in a stage in which the action is allowed.
        """
        seeds = {seed.seed_id: seed for seed in self.seeds}
        for command in commands:
            self._change(seeds[command.seed_id], command.action)

    def _change(self, seed: Seed, action: Action) -> None:
        allowed, stage = TRANSITIONS[action]
        if seed.stage not in allowed:
            raise WrongState(f"{seed.seed_id} is {seed.stage.name}: it cannot {action}")
        seed.stage = stage
        if action is Action.GERMINATE:
            seed.germinate(self._device)
        elif action is Action.PROBE:
            seed.risk = None  # to be measured again at full strength
        elif action is Action.CULL:
            seed.alpha_steps = 0
        elif action is Action.RESET:
            seed.network = seed.optimizer = seed.risk = None
            seed.violations = torch.zeros((), device=self._device)
            seed.blueprint += 1

    def finalize_step(self) -> None:
        """Raises alpha by one step in every seed that is BLENDING."""
        for seed in self.seeds:
            if seed.stage is Stage.BLENDING and seed.alpha_steps < seed.alpha_total_steps:
                seed.alpha_steps += 1

    def finalize_epoch(self) -> None:
        """Adds an epoch to the age of every live seed."""
        for seed in self.seeds:
            if seed.network is not None:
                seed.age_epochs += 1


def _network(seed: Seed) -> nn.Module:
    if seed.network is None:
        raise WrongState(f"{seed.seed_id} has not germinated")
    return seed.network


def _norm(gradients: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    return norm
