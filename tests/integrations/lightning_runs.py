"""Trainings with Lightning, for test_lightning.py: here, so that other tests need not wait until it is imported."""

from __future__ import annotations

import copy
import pickle
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from patience import patience

from esper_otel.integrations.lightning import EsperCallback

lightning: Any = import_module("lightning.pytorch")


class Module(lightning.LightningModule):  # type: ignore[misc]
    """One layer; notes what the optimizer saw."""

    def __init__(self, fails_at: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error or KeyError("in the middle")
        self.layer = torch.nn.Linear(4, 2)
        self.fails_at = fails_at
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fails_at:
            raise self.error
        inputs, targets = batch
        outputs = self.layer(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        self.log("train_acc", (outputs.argmax(1) == targets).float().mean())
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(torch.cat([parameter.grad.flatten() for parameter in self.parameters()]).norm().item())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.layer(inputs), targets))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Two(lightning.LightningModule):  # type: ignore[misc]
    """Two optimizers that step in turn in each batch; notes what each of them saw."""

    def __init__(self, callback: EsperCallback | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)
        self.callback = callback
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        part: Any
        for part, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            loss = torch.nn.functional.cross_entropy(self.second(self.first(inputs)), targets)
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.callback is not None:
                self.callback.put(loss=loss)
            self.losses.append(loss.item())
            self.norms.append(torch.cat([parameter.grad.flatten() for parameter in part.parameters()]).norm().item())
            optimizer.step()
        return loss * 100

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.Adam(self.second.parameters(), lr=0.2)]


class Quasi(Module):
    """Its optimizer computes loss and gradients several times in a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Slow(Two):
    """The work before its second optimizer's step takes long."""

    pause_s = patience(0.01)

    def manual_backward(self, loss: Any) -> None:
        if len(self.losses) % 2:
            time.sleep(self.pause_s)
        super().manual_backward(loss)


class Copies(lightning.Callback):  # type: ignore[misc]
    """Copies a callback of ours and a layer, as a tuner does, in the midst of training."""

    def __init__(self, callback: EsperCallback) -> None:
        self.callback = callback
        self.copied: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *more: Any) -> None:
        if not self.copied:
            self.copied = pickle.loads(pickle.dumps([self.callback, copy.deepcopy(pl_module.layer)]))


def fit(
    callback: EsperCallback | None,
    *,
    epochs: int = 2,
    resume: Path | None = None,
    module: Any = None,
    **more: Any,
) -> Any:
    """Trains 8 batches an epoch; returns the module and the trainer."""
    lightning.seed_everything(0)
    module = (Module if module is None else module)()
    random = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 4, generator=random), torch.randint(0, 2, (64,), generator=random)
    )
    loaders = [torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)]
    trainer = lightning.Trainer(
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [] if callback is None else [callback],
            **more,
        },
    )
    module.loader = loaders[1]
    trainer.fit(module, *loaders, ckpt_path=resume)
    return module, trainer
