"""Callback for Hugging Face's Trainer: ``trainer.add_callback(EsperCallback())``."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from esper_otel.errors import InvalidValue
from esper_otel.integrations.listening import PatchedMethod, timed
from esper_otel.integrations.loop import Loop
from esper_otel.integrations.samples import samples_of
from esper_otel.integrations.watch import unwrapped
from esper_otel.session.start import start
from esper_otel.session.telemetry import Telemetry, check_results, outcome_of

__all__ = ["EsperCallback"]

VALIDATION = {"loss": "eval_loss", "accuracy": "eval_accuracy"}
_LOGGER = logging.getLogger("esper_otel")
_STATE_FILE = "esper_otel.json"


class EsperCallback(TrainerCallback):
    """Records each optimizer step: loss, gradient norm, samples/s, input wait, step latency.

    - ``loss`` is the sum of the values that the Trainer's ``training_step`` returns for the batches of a step: this
      rank's part of the loss that the Trainer logs with ``logging_steps=1``. A loss that is not finite is recorded
      unchanged, while the Trainer logs an average instead. ``loss`` is absent if ``training_step`` is not used.
    - ``gradient_norm`` is the norm that the Trainer computes before clipping. If it computes none, the callback does.
    - ``input_wait_ms`` starts when the previous step has ended, with its logging, saving and evaluating. The Trainer
      fetches all batches of a step at once.
    - ``trainer.evaluate`` is a phase named ``evaluation``, and saving a checkpoint one named ``checkpoint``.
    - Steps are numbered by ``state.global_step``. A run resumed from a checkpoint continues the numbers, and also the
      averages, which are stored in the checkpoint's folder as ``esper_otel.json``.
    - A copy or a pickle of the callback has no session; it starts one when it trains.

    Args:
        telemetry: an existing session, which its owner must close. By default, each training starts a session and
            closes it.
        validation: names of the evaluation's metrics, by validation metric (``loss`` and ``accuracy``).
        arguments: passed to ``esper_otel.start``.
    """

    def __init__(
        self, telemetry: Telemetry | None = None, *, validation: Mapping[str, str] | None = None, **arguments: Any
    ) -> None:
        if telemetry is not None and arguments:
            raise InvalidValue(next(iter(arguments)), "has no effect with telemetry=: give it to start()")
        self.telemetry = telemetry
        self._is_ours = telemetry is None
        self._validation = VALIDATION if validation is None else dict(validation)
        check_results(self._validation)
        self._arguments = arguments
        self._unfinished: str | None = None
        self._loop: Loop | None = None
        self._begin(None)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the parts that belong to this object in this process."""
        idle: dict[str, Any] = {"telemetry": None, "_is_ours": True, "_loop": None, "_state": None, "_listening": []}
        if self.telemetry is not None and not self._is_ours:
            idle["_arguments"] = {"run_id": self.telemetry.run_id}
        return {**vars(self), **idle, "_losses": [], "_samples": None, "_norm": None}

    def _begin(self, loop: Loop | None) -> None:
        """Clears the state of an earlier training."""
        if self._loop is not None:
            self._loop.parts.close()
        self._loop = loop
        self._state: Any = None
        self._listening: list[PatchedMethod] = []
        self._losses: list[float | Tensor] = []
        self._samples: int | None = None
        self._norm: float | Tensor | None = None

    # -- the Trainer's events, in the order of the calls -----------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Starts the session and observes the Trainer's methods."""
        del control, given
        self._end("interrupted")  # only if the last training was left by an exception
        if self.telemetry is None or self._is_ours:
            arguments = {"rank": args.process_index, "world_size": args.world_size, **self._arguments}
            if state.num_train_epochs < sys.maxsize:  # the Trainer's value for a loader without a length
                arguments.setdefault("epochs", max(int(state.num_train_epochs), 1))
            if self._unfinished and args.auto_find_batch_size:  # the Trainer repeats the run with smaller batches
                arguments.setdefault("run_id", self._unfinished)
            self.telemetry = start(**arguments)
        trainer, checkpoint = _training(sys._getframe())  # noqa: SLF001 - no event provides them
        if checkpoint is not None and state.global_step:
            self._load(Path(checkpoint) / _STATE_FILE)
        loop = Loop(self.telemetry)
        self._begin(loop)
        self._state = state
        if trainer is not None:
            self._listening = [
                PatchedMethod(trainer, "training_step", self._computed, self._asked, self._failed),
                PatchedMethod(trainer.accelerator, "clip_grad_norm_", self._clipped),
                # No event reports exceptions in: batches; evaluating, saving and logging; other callbacks.
                PatchedMethod(trainer, "get_batch_samples", raised=self._failed),
                PatchedMethod(trainer, "_maybe_log_save_evaluate", raised=self._failed),
                PatchedMethod(trainer.callback_handler, "call_event", raised=self._failed),
                timed(trainer, "evaluate", loop.phases, "evaluation", self._wait),
                timed(trainer, "_save_checkpoint", loop.phases, "checkpoint", self._wait),
            ]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Starts timing the wait for the epoch's first batches."""
        del args, state, control, given
        self._wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Ends the wait for the step's batches."""
        del args, control, given
        if self._loop is not None:
            self._state = state
            self._loop.batch()
            self._losses, self._samples, self._norm = [], None, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Records the norm of the complete gradients, which are already clipped if the Trainer clips them."""
        del state, control
        if self._loop is None:
            return
        optimizer = given.get("optimizer")
        if optimizer is not None:
            self._loop.put({"optimizer_lr": optimizer.param_groups[0]["lr"]})
        if self._norm is not None:
            self._loop.put({"gradient_norm": self._norm})
        elif not args.max_grad_norm:  # otherwise clipped by code that is not observed
            scale = None if optimizer is None else getattr(unwrapped(optimizer), "grad_scale", None)
            self._loop.gradients(given["model"].parameters(), scale)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Records the step."""
        del args, control, given
        loop = self._loop
        if loop is None:
            return
        loop.stepped()
        if self._losses:
            loop.put({"loss": sum(self._losses[1:], self._losses[0])})
        if self._samples is not None:
            loop.count(self._samples)
        epoch = max(math.ceil(state.epoch or 0) - 1, 0)  # state.epoch counts epochs done, including this step
        loop.end(epoch=epoch, global_step=state.global_step)
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Restarts timing the wait for input, so that logging is not included."""
        del args, state, control, given
        self._wait()

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Records the evaluation's results and restarts timing the wait for input."""
        del args, state, control
        found = given.get("metrics") or {}
        results = {name: found[key] for name, key in self._validation.items() if key in found}
        if results and self.telemetry is not None and self._loop is not None:
            self.telemetry.validation(**results)
        self._wait()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Stores step number and averages in the checkpoint."""
        del control, given
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.telemetry is not None and state.is_world_process_zero and folder.is_dir():
            try:
                (folder / _STATE_FILE).write_text(json.dumps(self.telemetry.state_dict()), encoding="utf-8")
            except OSError as error:
                _LOGGER.warning("%s: %s; a run resumed from here starts its averages afresh", folder, error)
        self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Ends the session of the run."""
        del args, state, control, given
        self._end(None)

    # -- calls observed between the events -------------------------------------------------------------------

    def _asked(self, *arguments: Any, **named: Any) -> None:
        """Counts the samples of a batch used for training."""
        samples = samples_of(named["inputs"] if "inputs" in named else arguments[1])
        if samples is not None:
            self._samples = samples + (self._samples or 0)

    def _computed(self, loss: Any) -> None:
        """Adds the batch's share of the step's loss, as the Trainer does."""
        if isinstance(loss, Tensor):
            loss = loss.detach()
        if isinstance(loss, float) or (isinstance(loss, Tensor) and not loss.dim()):
            self._losses.append(loss)

    def _failed(self, error: BaseException) -> None:
        """Ends the run with this exception, for which there is no event."""
        if self._loop is not None:
            epoch = math.floor(self._state.epoch or 0)
            self._loop.fail(epoch=epoch, global_step=self._state.global_step + 1)
        self._end(outcome_of(type(error), error))

    def _clipped(self, norm: Any) -> None:
        """Takes the norm before clipping, which no event provides."""
        if self._norm is None and norm is not None:
            self._norm = norm.detach() if isinstance(norm, Tensor) else norm

    # -- the rest --------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        if self._loop is not None:
            self._loop.wait()

    def _end(self, outcome: str | None) -> None:
        """Ends the current training, if there is one."""
        if self._loop is None:
            return
        for each in self._listening:
            each.end()
        self._begin(None)
        if self.telemetry is not None and self._is_ours:
            self._unfinished = None if outcome is None else self.telemetry.run_id
            self.telemetry.close(outcome=outcome)

    def _load(self, file: Path) -> None:
        if self.telemetry is None or not file.is_file():
            return
        try:
            self.telemetry.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        except Exception as error:  # noqa: BLE001 - a bad file must not stop training
            _LOGGER.warning("%s: %s; averages start afresh", file, error)


def _training(frame: FrameType | None) -> tuple[Trainer | None, str | None]:
    """Finds the Trainer in this frame or its callers; returns it and the checkpoint that it resumes from."""
    trainer = None
    while frame is not None:
        names = frame.f_code.co_varnames
        if names[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if trainer is None and isinstance(owner, Trainer):
                trainer = owner
            if trainer is owner is not None and "resume_from_checkpoint" in names:
                found = frame.f_locals.get("resume_from_checkpoint")
                return trainer, os.fspath(found) if isinstance(found, str | os.PathLike) else None
        frame = frame.f_back
    return trainer, None
