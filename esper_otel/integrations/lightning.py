"""Callback for PyTorch Lightning: ``Trainer(callbacks=[EsperCallback()])``."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from esper_otel.errors import InvalidValue
from esper_otel.integrations.listening import PatchedMethod, timed
from esper_otel.integrations.loop import Loop
from esper_otel.integrations.samples import samples_of
from esper_otel.record.mistakes import Mistakes, spares_mistakes
from esper_otel.session.start import start
from esper_otel.session.telemetry import Telemetry, check_results, outcome_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from esper_otel.record.values import Scalar
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:  # the same library under its older package name
        Callback = import_module("pytorch_lightning").Callback

__all__ = ["EsperCallback"]

VALIDATION = {"loss": "val_loss", "accuracy": "val_acc"}


def _mistakes_of(callback: EsperCallback) -> Mistakes | None:
    return None if callback.telemetry is None else callback.telemetry.mistakes


class EsperCallback(Callback):
    """Records each optimizer step: loss, gradient norm, samples/s, input wait, step latency.

    - ``loss`` is the value returned by ``training_step``; with gradient accumulation, the mean over the batches. It is
      absent if one batch has several optimizer steps (manual optimization): call ``put(loss=...)`` before each of them.
    - ``gradient_norm`` is the norm over the optimizer's parameters before its step, unscaled and before clipping.
      ``optimizer_lr`` is the learning rate of this step.
    - ``input_wait_ms`` is the time between the hooks of two batches: the loader, the move to the device, and
      Lightning's own work. Time spent in validation and in saving checkpoints is not included.
    - Validations are phases named ``evaluation``, and ``trainer.save_checkpoint``, which Lightning's own checkpoints
      use, is a phase named ``checkpoint``.
    - Steps are numbered by ``trainer.global_step``. A run resumed from a checkpoint continues the numbers, and also
      the averages, which are stored in the checkpoint.
    - A copy or a pickle of the callback has no session; it starts one when it trains.

    Args:
        telemetry: an existing session, which its owner must close. By default, each fit starts a session and closes it.
        metrics: names of values that the module logs, by step metric: ``{"accuracy": "train_acc"}``. An unknown step
            metric raises UnknownMetric when the fit starts.
        validation: names in ``trainer.callback_metrics``, by validation metric (``loss`` and ``accuracy``).
        arguments: passed to ``esper_otel.start``.
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
            raise InvalidValue(next(iter(arguments)), "has no effect with telemetry=: give it to start()")
        self.telemetry = telemetry
        self._is_ours = telemetry is None
        self._metrics = dict(metrics or {})
        self._validation = VALIDATION if validation is None else dict(validation)
        check_results(self._validation)
        self._arguments = arguments
        self._resumed: Mapping[str, Any] | None = None
        self._hook: Any = None
        self._saving: PatchedMethod | None = None
        self._loop: Loop | None = None
        self._begin(None)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the parts that belong to this object in this process."""
        idle: dict[str, Any] = {
            "telemetry": None,
            "_is_ours": True,
            "_loop": None,
            "_trainer": None,
            "_losses": [],
            "_later": {},
            "_hook": None,
            "_saving": None,
        }
        if self.telemetry is not None and not self._is_ours:
            idle["_arguments"] = {"run_id": self.telemetry.run_id}
        return {**vars(self), **idle}

    def _begin(self, loop: Loop | None, trainer: Any = None) -> None:
        """Clears the state of an earlier fit."""
        if self._loop is not None:
            self._loop.parts.close()
        self._loop = loop
        self._trainer = trainer
        self._losses: list[Tensor] = []
        self._later: dict[str, Any] = {}
        self._is_shared = False
        self._steps = 0
        self._stepped_s: float | None = None
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        if self._saving is not None:
            self._saving.end()
        self._saving = None
        if loop is not None:
            self._saving = timed(trainer, "save_checkpoint", loop.phases, "checkpoint")

    @spares_mistakes(_mistakes_of)
    def put(self, **values: Scalar | None) -> None:
        """Records step metrics, from ``training_step``: ``put(loss=loss)``.

        They count for the next optimizer step of the batch or, if there is none, for the last one. Outside a fit the
        call does nothing.

        Raises:
            UnknownMetric: a name is not declared; the message suggests the nearest one.
            InvalidValue: a value is not a single number.
        """
        if self._loop is None:
            return
        if self._trainer.global_step > self._steps:
            self._later.update(self._loop.checked(values))
        else:
            self._loop.put(values)

    # -- Lightning's hooks, in the order of the calls ------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets state from a checkpoint that a test or a validation has loaded: the fit does not continue from it."""
        del trainer, pl_module
        if stage == "fit":
            self._resumed = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the session, one run for all ranks."""
        del pl_module
        self._end("interrupted")  # only if the last fit ended without calling a hook
        if self.telemetry is None or self._is_ours:
            arguments = {"rank": trainer.global_rank, "world_size": trainer.world_size, **self._arguments}
            if trainer.max_epochs is not None and trainer.max_epochs > 0:
                arguments.setdefault("epochs", trainer.max_epochs)
            self.telemetry = start(**arguments)
        if self._resumed is not None:
            try:
                self.telemetry.load_state_dict(self._resumed)
            except Exception as error:  # noqa: BLE001 - bad state in a checkpoint must not stop training
                logging.getLogger("esper_otel").warning("%s; averages start afresh", error)
            self._resumed = None
        self._begin(Loop(self.telemetry), trainer)
        self._metrics = {name: key for name, key in self._metrics.items() if self._running.checked({name: None})}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restores the step number of a resumed fit. A fit resumed within an epoch has no epoch start hook."""
        del pl_module
        self._steps = trainer.global_step
        self._hook = register_optimizer_step_post_hook(self._stepped)
        self._running.wait()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts timing the wait for the epoch's first batch."""
        del trainer, pl_module
        self._running.wait()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Ends the wait for the batch."""
        del trainer, pl_module, batch_idx
        self._running.batch(samples_of(batch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Records the norm of the complete gradients. LBFGS calls this several times in one step."""
        del pl_module
        loop = self._running
        if trainer.global_step > self._steps:  # the previous step is over and the batch is used again
            over_s = time.perf_counter() if self._stepped_s is None else self._stepped_s
            loop.stop_at(over_s)
            self._record(trainer, {})
            self._is_shared = True
            loop.go_on(over_s)
        groups = optimizer.param_groups
        loop.put({**self._later, "optimizer_lr": groups[0]["lr"]})
        if len(trainer.optimizers) > 1:
            index = next((place for place, each in enumerate(trainer.optimizers) if each is optimizer), None)
            loop.put({"esper.optimizer.index": index})
        self._later = {}
        loop.gradients([parameter for group in groups for parameter in group["params"]])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Records the step if the optimizer has stepped."""
        del batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if trainer.global_step > self._steps:
            values: dict[str, Any] = {}
            if self._losses and not self._is_shared:
                total = sum(self._losses[1:], self._losses[0])
                # Lightning has divided each loss by the planned number of batches per step.
                share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                values["loss"] = total if share == len(self._losses) else total * (share / len(self._losses))
            if self._metrics:
                logged = trainer.callback_metrics
                values |= {name: logged[key] for name, key in self._metrics.items() if key in logged}
            self._record(trainer, {**values, **self._later})
            self._losses, self._later = [], {}
        elif self._is_shared:  # the batch belongs to its several steps
            self._running.forget()
            self._losses = []
        self._is_shared = False
        self._running.wait()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the phase ``evaluation``."""
        del trainer, pl_module
        if self._loop is not None:
            self._loop.phases.enter("evaluation", self)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Records the validation's results and restarts timing the wait for the next batch."""
        del pl_module
        if self._loop is not None:
            self._loop.phases.leave(self)
        if trainer.sanity_checking or self.telemetry is None or self._loop is None:
            return
        found = trainer.callback_metrics
        results = {name: found[key] for name, key in self._validation.items() if key in found}
        if results:
            self.telemetry.validation(**results)
        self._loop.wait()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Records the current step as failed and ends the run."""
        del pl_module
        if self._loop is not None:
            self._loop.fail(epoch=trainer.current_epoch, global_step=trainer.global_step + 1)
        self._end(outcome_of(type(exception), exception))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the session of the run."""
        del trainer, pl_module
        self._end(None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the run when a tuner stops the fit, which calls no other hook."""
        del trainer, pl_module, stage
        self._end(None)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns step number and averages for Lightning's checkpoint."""
        return {} if self.telemetry is None else {"telemetry": self.telemetry.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes step number and averages from Lightning's checkpoint."""
        self._resumed = state_dict.get("telemetry")

    # -- the rest ------------------------------------------------------------------------------------------

    @property
    def _running(self) -> Loop:
        assert self._loop is not None
        return self._loop

    def _stepped(self, optimizer: Any, _arguments: Any, _named: Any) -> None:
        """Notes when an optimizer of the trainer has stepped, for which Lightning has no hook."""
        if not torch.compiler.is_compiling() and any(each is optimizer for each in self._trainer.optimizers):
            self._stepped_s = time.perf_counter()

    def _record(self, trainer: Any, values: Mapping[str, Any]) -> None:
        self._steps = trainer.global_step
        loop = self._running
        loop.stepped()
        loop.put(values)
        loop.end(epoch=trainer.current_epoch, global_step=self._steps)

    def _end(self, outcome: str | None) -> None:
        """Ends the current fit, if there is one."""
        if self._loop is None:
            return
        self._loop.phases.leave(self)  # a validation that was interrupted
        self._begin(None)
        if self.telemetry is not None and self._is_ours:
            self.telemetry.close(outcome=outcome)
