"""Lightning: ``Trainer(callbacks=[EsperCallback()])``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from esper_otel.errors import InvalidValue
from esper_otel.integrations.loop import Loop, samples_of
from esper_otel.session import start
from esper_otel.telemetry import Telemetry, outcome_of

try:
    from lightning.pytorch import Callback
except ImportError:  # the same under its older name, for those who have installed that
    Callback = import_module("pytorch_lightning").Callback  # type: ignore[misc]

VALIDATION = {"loss": "val_loss", "accuracy": "val_acc"}


class EsperCallback(Callback):
    """Records a step for each step of the optimizer: loss, gradient norm, samples/s, input wait, step latency.

    - ``loss`` is what ``training_step`` returns; of accumulated batches the mean.
    - ``gradient_norm`` is that of the module's parameters before the optimizer's step: unscaled, not yet clipped.
    - ``input_wait_ms`` lies between the hooks of two batches: the loader, the move to the device, and what Lightning
      does there; a validation in between is left out.
    - Steps have the numbers of ``trainer.global_step``; a run resumed from a checkpoint goes on with them, and with the
      averages that the checkpoint holds.

    Args:
        telemetry: a session that is there, which its owner closes; else one is started with the fit and ends with it.
        metrics: step metrics of what the module logs: ``{"accuracy": "train_acc"}``.
        validation: what of ``trainer.callback_metrics`` is the validation's ``loss`` and ``accuracy``.
        arguments: as of ``esper_otel.start``.
    """

    def __init__(
        self,
        telemetry: Telemetry | None = None,
        *,
        metrics: Mapping[str, str] | None = None,
        validation: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if telemetry is not None and arguments:
            raise InvalidValue(next(iter(arguments)), "has no effect beside telemetry=: give it to start()")
        self.telemetry = telemetry
        self._is_ours = telemetry is None
        self._metrics = dict(metrics or {})
        self._validation = VALIDATION if validation is None else dict(validation)
        self._arguments = arguments
        self._resumed: Mapping[str, Any] | None = None
        self._loop: Loop | None = None
        self._losses: list[Tensor] = []
        self._steps = 0

    # -- Lightning's hooks, in the order in which they come ------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the session, one run for all ranks."""
        if self.telemetry is None or self._is_ours:
            arguments = {"rank": trainer.global_rank, "world_size": trainer.world_size, **self._arguments}
            if trainer.max_epochs is not None and trainer.max_epochs > 0:
                arguments.setdefault("epochs", trainer.max_epochs)
            self.telemetry = start(**arguments)
        if self._resumed is not None:
            self.telemetry.load_state_dict(self._resumed)
            self._resumed = None
        self._loop = Loop(self.telemetry)
        del pl_module

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The first batch of the epoch is asked for."""
        del pl_module
        self._steps = trainer.global_step
        self._running.wait()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        del trainer, pl_module, batch_idx
        self._running.batch(samples_of(batch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """The gradients are whole."""
        del trainer, optimizer
        self._running.gradients(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is over, if the optimizer has stepped."""
        del batch, batch_idx
        loop = self._running
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        steps = trainer.global_step  # asked for once: Lightning adds it up each time, as it does what was logged
        if steps > self._steps:
            self._steps = steps
            loop.stepped()
            values: dict[str, Any] = {}
            if self._losses:
                total = sum(self._losses[1:], self._losses[0])
                # Lightning has divided each by the number of batches that a step is to have.
                share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                values["loss"] = total if share == len(self._losses) else total * (share / len(self._losses))
                self._losses = []
            if self._metrics:
                logged = trainer.callback_metrics
                values |= {name: logged[key] for name, key in self._metrics.items() if key in logged}
            if len(trainer.optimizers) == 1:
                values["optimizer_lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            loop.put(values)
            loop.end(epoch=trainer.current_epoch, global_step=steps)
        loop.wait()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Notes the validation's results; waiting for the next batch begins now."""
        del pl_module
        if trainer.sanity_checking or self.telemetry is None or self._loop is None:
            return
        found = trainer.callback_metrics
        results = {name: found[key] for name, key in self._validation.items() if key in found}
        if results:
            self.telemetry.validation(**results)
        self._loop.wait()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The step under way is recorded as failed, and the run ends."""
        del pl_module
        if self._loop is not None:
            self._loop.fail(epoch=trainer.current_epoch, global_step=trainer.global_step + 1)
        self._end(outcome_of(type(exception), exception))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The run has ended."""
        del trainer, pl_module
        self._end(None)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint: step number and averages."""
        return {} if self.telemetry is None else {"telemetry": self.telemetry.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self._resumed = state_dict.get("telemetry")

    # -- the rest ------------------------------------------------------------------------------------------

    @property
    def _running(self) -> Loop:
        assert self._loop is not None
        return self._loop

    def _end(self, outcome: str | None) -> None:
        if self.telemetry is not None and self._is_ours:
            self.telemetry.close(outcome=outcome)
        self._loop = None
