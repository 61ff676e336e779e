"""Seed: a small network that may become part of the host, and its life so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esper_otel import Stage
from esper_otel.demo.host import CHANNELS

LEARNING_RATE = 0.04
TEMPERATURE = 0.2
SMOOTHING = 0.1

GROWING = frozenset({Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED})
BLENDED = GROWING - {Stage.TRAINING}
ON_TRIAL = GROWING - {Stage.FOSSILIZED}


class ChannelGate(nn.Module):
    """Scales each channel by what the whole image says: features to a change of features, of equal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        """The change of the features."""
        change: Tensor = features * torch.tanh(self.scale(features.mean(dim=(2, 3))))[:, :, None, None]
        return change


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
    )


def _mixture() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, 2 * CHANNELS, 1), nn.ReLU(), nn.Conv2d(2 * CHANNELS, CHANNELS, 1))


# What a seed grows from; one that was culled starts over with the next.
BLUEPRINTS: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
    ("gate", ChannelGate),
    ("convolution", _convolution),
    ("mixture", _mixture),
)


@dataclass(slots=True, eq=False)
class Seed:
    """One seed. Kasmina changes it; its numbers are what the step's row says.

    Attributes:
        seed_id: its name in the telemetry.
        depth: of the host's convolution behind which it grows.
        random_seed: its first weights follow from it.
        blueprint: place in ``BLUEPRINTS``, counted on for each new life.
        stage: where it is in its life.
        network: features to a change of the features; None until it germinates.
        alpha_steps: steps of blending done.
        alpha_total_steps: steps that blending takes.
        risk_tolerance: risk above which it is to be culled.
        age_epochs: epochs since it germinated.
        fallback_used: whether the host's features went on alone because the seed's output was not finite.
        violations: steps in which its training touched the host's gradients, since it germinated; 0-d tensor.
        risk: smoothed loss with the seed over loss without it, at most 1; 0-d tensor, None until measured.
        gradient_norm: of its own parameters in this step; 0-d tensor, None when it did not learn.
        isolation: inner product, host's norm and seed's norm of the gradients where they meet; 0-d tensors.
    """

    seed_id: str
    depth: int
    random_seed: int
    blueprint: int
    stage: Stage = Stage.DORMANT
    network: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    alpha_steps: int = 0
    alpha_total_steps: int = 1
    risk_tolerance: float = 1.0
    age_epochs: int = 0
    fallback_used: bool = False
    violations: Tensor = field(default_factory=lambda: torch.zeros(()))
    risk: Tensor | None = None
    gradient_norm: Tensor | None = None
    isolation: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def alpha(self) -> float:
        """Share of the seed in the blend: an S-curve over the steps of blending, exactly 0 and 1 at its ends."""
        low, here, high = (_sigmoid(done) for done in (0.0, self.alpha_steps / self.alpha_total_steps, 1.0))
        return (here - low) / (high - low)

    @property
    def blueprint_name(self) -> str:
        """What it grows from in this life."""
        return BLUEPRINTS[self.blueprint % len(BLUEPRINTS)][0]

    def parameters(self) -> list[nn.Parameter]:
        """Its own parameters; none before it germinates."""
        return [] if self.network is None else list(self.network.parameters())

    def germinate(self, device: torch.device) -> None:
        """Makes the network of its blueprint; the process's random numbers are left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_seed + 1000 * self.blueprint)
            self.network = BLUEPRINTS[self.blueprint % len(BLUEPRINTS)][1]()
        for parameter in list(self.network.parameters())[-2:]:
            nn.init.zeros_(parameter)  # the first change is none: a seed does no harm before it has learnt
        self.network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.age_epochs = 0
        self.violations = torch.zeros((), device=device)
        self.risk = None

    def weigh(self, ratio: Tensor) -> None:
        """Takes one step's loss with the seed over the loss without it; a ratio that is not finite counts as 1."""
        ratio = torch.nan_to_num(ratio.detach(), nan=1.0, posinf=1.0).clamp(max=1.0)
        self.risk = ratio if self.risk is None else torch.lerp(self.risk, ratio, SMOOTHING)

    def row(self) -> dict[str, float | Tensor | None]:
        """The seed's row of this step, by the names of ``now.seed``; None where there is nothing to say."""
        lives = self.network is not None
        dot, host_norm, seed_norm = self.isolation or (None, None, None)
        return {
            "stage": self.stage,
            "alpha": self.alpha,
            "alpha_steps": float(self.alpha_steps) if self.stage is Stage.BLENDING else None,
            "kernel_attached": self.stage in GROWING,
            "isolation_violations": self.violations,
            "fallback_used": self.fallback_used,
            "isolation_dot": dot,
            "isolation_host_norm": host_norm,
            "isolation_seed_norm": seed_norm,
            "learning_rate": LEARNING_RATE if lives else None,
            "layer_depth": float(self.depth),
            "age_epochs": float(self.age_epochs) if lives else None,
            "risk_score": self.risk,
            "gradient_norm": self.gradient_norm,
            "alpha_total_steps": float(self.alpha_total_steps),
            "alpha_temperature": TEMPERATURE,
            "risk_tolerance": self.risk_tolerance,
            "blend_allowed": self.stage in BLENDED,
        }


def _sigmoid(done: float) -> float:
    return 1.0 / (1.0 + math.exp((0.5 - done) / TEMPERATURE))
