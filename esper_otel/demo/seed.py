"""Seeds: small networks that can become part of the host."""

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
    """Computes a change of the features, of equal shape, by scaling each channel depending on the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: nn.Linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the change of the features."""
        change: Tensor = features * torch.tanh(self.scale(features.mean(dim=(2, 3))))[:, :, None, None]
        return change


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
    )


def _mixture() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, 2 * CHANNELS, 1), nn.ReLU(), nn.Conv2d(2 * CHANNELS, CHANNELS, 1))


# Networks that a seed can grow from. A culled seed starts over with the next one.
BLUEPRINTS: tuple[Callable[[], nn.Module], ...] = (ChannelGate, _convolution, _mixture)


@dataclass(slots=True, eq=False)
class Seed:
    """One seed. Kasmina changes it and records its values in the step's row.

    Attributes:
        seed_id: its id in the telemetry.
        depth: depth of the host's convolution after which it grows.
        random_seed: random seed for its initial weights.
        blueprint: index in ``BLUEPRINTS``, increased with each new life.
        stage: its stage of life.
        network: computes a change of the features; None until it germinates.
        alpha_steps: number of blending steps done.
        alpha_total_steps: number of blending steps in total.
        risk_tolerance: risk above which it is culled.
        age_epochs: epochs since it germinated.
        fallback_used: whether the host's features were used alone because the seed's output was not finite.
        violations: number of steps since germination in which its training changed the host's gradients; 0-d tensor.
        risk: smoothed ratio of the loss with the seed to the loss without it, at most 1; 0-d tensor, None until
            measured.
        gradient_norm: gradient norm of its own parameters in this step; 0-d tensor, None if it did not train.
        isolation: inner product, host's norm and seed's norm of the gradients where they are combined; 0-d tensors.
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
        """The seed's share in the blend: an S-curve over the steps of blending, from exactly 0 to exactly 1."""
        low, here, high = (_sigmoid(done) for done in (0.0, self.alpha_steps / self.alpha_total_steps, 1.0))
        return (here - low) / (high - low)

    def parameters(self) -> list[nn.Parameter]:
        """Its own parameters; none before it germinates."""
        return [] if self.network is None else list(self.network.parameters())

    def germinate(self, device: torch.device) -> None:
        """Creates the network of its blueprint without changing the process's random state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_seed + 1000 * self.blueprint)
            self.network = BLUEPRINTS[self.blueprint % len(BLUEPRINTS)]()
        for parameter in list(self.network.parameters())[-2:]:
            nn.init.zeros_(parameter)  # the initial change is zero, so an untrained seed has no effect
        self.network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.age_epochs = 0
        self.violations = torch.zeros((), device=device)
        self.risk = None

    def weigh(self, ratio: Tensor) -> None:
        """Updates the risk with one step's losses with and without the seed. A ratio that is not finite counts as 1."""
        ratio = torch.nan_to_num(ratio.detach(), nan=1.0, posinf=1.0).clamp(max=1.0)
        self.risk = ratio if self.risk is None else torch.lerp(self.risk, ratio, SMOOTHING)

    def row(self) -> dict[str, float | Tensor | None]:
        """Returns the seed's row of this step by the names of ``now.seed``, with None for unknown values."""
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
