"""Lightning: ``Trainer(callbacks=[EsperCallback()])``."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_otel.errors import InvalidValue
from esper_otel.integrations.loop import Loop
from esper_otel.integrations.samples import samples_of
from esper_otel.session.start import start
from esper_otel.session.telemetry import Telemetry, outcome_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from esper_otel.record.values import Scalar
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:  # the same under its older name, for those who have installed that
        Callback = import_module("pytorch_lightning").Callback

VALIDATION = {"loss": "val_loss", "accuracy": "val_acc"}


class EsperCallback(Callback):
    """Records a step for each step of the optimizer: loss, gradient norm, samples/s, input wait, step latency.

    - ``loss`` is what ``training_step`` returns; of accumulated batches the mean. Absent where several steps are made
      in one batch (manual optimization): ``put(loss=...)`` before each of them.
    - ``gradient_norm`` is that of the optimizer's parameters before its step: unscaled, not yet clipped.
      ``optimizer_lr`` is the rate of this step.
    - ``input_wait_ms`` lies between the hooks of two batches: the loader, the move to the device, and what Lightning
      does there; a validation in between is left out.
    - Steps have the numbers of ``trainer.global_step``; a run resumed from a checkpoint goes on with them, and with the
      averages that the checkpoint holds.
    - A copy or a pickle of the callback has no session; it starts one when it trains.

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
        self._begin(None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this object in this process."""
        idle: dict[str, Any] = {
            "telemetry": None,
            "_is_ours": True,
            "_loop": None,
            "_trainer": None,
            "_losses": [],
            "_later": {},
        }
        if self.telemetry is not None and not self._is_ours:
            idle["_arguments"] = {"run_id": self.telemetry.run_id}
        return {**vars(self), **idle}

    def _begin(self, loop: Loop | None, trainer: Any = None) -> None:
        """Nothing of an earlier fit is left."""
        self._loop = loop
        self._trainer = trainer
        self._losses: list[Tensor] = []
        self._later: dict[str, Any] = {}
        self._is_shared = False
        self._steps = 0

    def put(self, **values: Scalar | None) -> None:
        """Records step metrics, from ``training_step``: ``put(loss=loss)``.

        They are those of the optimizer's step that comes next in the batch; without one, of the last step. Outside a
        fit nothing is recorded.

        Raises:
            UnknownMetric: a name that is not declared; the message names the nearest.
            InvalidValue: a value that is not one number.
        """
        if self._loop is None:
            return
        if self._trainer.global_step > self._steps:
            self._later.update(values)
        else:
            self._loop.put(values)

    # -- Lightning's hooks, in the order in which they come ------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """What a test or a validation has loaded is not what the fit goes on from."""
        del trainer, pl_module
        if stage == "fit":
            self._resumed = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the session, one run for all ranks."""
        del pl_module
        self._end("interrupted")  # a fit that was left without a word; else it has ended
        if self.telemetry is None or self._is_ours:
            arguments = {"rank": trainer.global_rank, "world_size": trainer.world_size, **self._arguments}
            if trainer.max_epochs is not None and trainer.max_epochs > 0:
                arguments.setdefault("epochs", trainer.max_epochs)
            self.telemetry = start(**arguments)
        if self._resumed is not None:
            try:
                self.telemetry.load_state_dict(self._resumed)
            except Exception as error:  # noqa: BLE001 - whatever lies there, the training goes on
                logging.getLogger("esper_otel").warning("%s; averages begin anew", error)
            self._resumed = None
        self._begin(Loop(self.telemetry), trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed fit knows its step by now; one that goes on within an epoch has no start of an epoch."""
        del pl_module
        self._steps = trainer.global_step
        self._running.wait()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The first batch of the epoch is asked for."""
        del trainer, pl_module
        self._running.wait()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        del trainer, pl_module, batch_idx
        self._running.batch(samples_of(batch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """The gradients are whole; LBFGS comes here several times in one step."""
        del pl_module
        loop = self._running
        if trainer.global_step > self._steps:  # the step before is over, and the batch is used once more
            self._record(trainer, {})
            self._is_shared = True
            loop.go_on(time.perf_counter())
        groups = optimizer.param_groups
        loop.put({**self._later, "optimizer_lr": groups[0]["lr"]})
        if len(trainer.optimizers) > 1:
            index = next((place for place, each in enumerate(trainer.optimizers) if each is optimizer), None)
            loop.put({"esper.optimizer.index": index})
        self._later = {}
        loop.gradients([parameter for group in groups for parameter in group["params"]])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is over, if the optimizer has stepped."""
        del batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if trainer.global_step > self._steps:
            values: dict[str, Any] = {}
            if self._losses and not self._is_shared:
                total = sum(self._losses[1:], self._losses[0])
                # Lightning has divided each by the number of batches that a step is to have.
                share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                values["loss"] = total if share == len(self._losses) else total * (share / len(self._losses))
            if self._metrics:
                logged = trainer.callback_metrics
                values |= {name: logged[key] for name, key in self._metrics.items() if key in logged}
            self._record(trainer, {**values, **self._later})
            self._losses, self._later = [], {}
        elif self._is_shared:  # its batch belongs to the steps that were made of it
            self._running.forget()
            self._losses = []
        self._is_shared = False
        self._running.wait()

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

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A tuner ends the fit without another word."""
        del trainer, pl_module, stage
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

    def _record(self, trainer: Any, values: Mapping[str, Any]) -> None:
        self._steps = trainer.global_step
        loop = self._running
        loop.stepped()
        loop.put(values)
        loop.end(epoch=trainer.current_epoch, global_step=self._steps)

    def _end(self, outcome: str | None) -> None:
        """Ends the fit that is under way, if any."""
        if self._loop is None:
            return
        self._begin(None)
        if self.telemetry is not None and self._is_ours:
            self.telemetry.close(outcome=outcome)
