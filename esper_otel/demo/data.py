"""The data: 1,797 images of handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
_HELD_OUT = 360
_BRIGHTEST = 16.0


@dataclass(frozen=True, slots=True)
class Digits:
    """Images to train on, in shuffled batches, and images held out for validation.

    Attributes:
        batches: pairs of images (batch, 1, 8, 8), float32 from 0 to 1, and targets (batch,), int64, in a new order
            in each epoch.
        held_out: 360 images and their targets that are not used for training.
    """

    batches: DataLoader[tuple[Tensor, ...]]
    held_out: tuple[Tensor, Tensor]


def load(*, batch_size: int, random_seed: int) -> Digits:
    """Loads the digits. The random seed alone determines the split and the order."""
    from sklearn.datasets import load_digits  # takes two seconds

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(_BRIGHTEST).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(random_seed)
    order = torch.randperm(len(targets), generator=generator)
    held_out, trained = order[:_HELD_OUT], order[_HELD_OUT:]
    batches = DataLoader(
        TensorDataset(images[trained], targets[trained]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )
    return Digits(batches, (images[held_out], targets[held_out]))
