"""The host: a small convolutional network with positions at which seeds can grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from esper_otel.demo.data import CLASSES

CHANNELS = 8
DEPTHS = (1, 2, 3)

# Called after the convolution at a depth with its features, (batch, 8, height, width); returns the features to use.
Grow: TypeAlias = Callable[[int, Tensor], Tensor]


class Host(nn.Module):
    """Three convolutions and a linear layer: images (batch, 1, 8, 8) to logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1 if depth == 1 else CHANNELS, CHANNELS, 3, stride, padding=1), nn.ReLU())
            for depth, stride in zip(DEPTHS, (1, 2, 1), strict=True)
        )
        self.head: nn.Linear = nn.Linear(CHANNELS, CLASSES)
        for layer in self.layers:  # with PyTorch's default weights, the first 50 steps learn nothing
            nn.init.kaiming_normal_(next(layer.parameters()), nonlinearity="relu")

    def forward(self, images: Tensor, grow: Grow) -> Tensor:
        """Returns the logits of the images."""
        return self._onward(DEPTHS, images, grow)

    def behind(self, depth: int, features: Tensor, grow: Grow) -> Tensor:
        """Returns the logits that result if the convolution at that depth returns ``features``."""
        return self._onward(DEPTHS[DEPTHS.index(depth) + 1 :], features, grow)

    def _onward(self, depths: Sequence[int], features: Tensor, grow: Grow) -> Tensor:
        for depth in depths:
            features = grow(depth, self.layers[depth - 1](features))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
