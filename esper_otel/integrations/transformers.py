"""Hugging Face's Trainer: ``trainer.add_callback(EsperCallback())``."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from esper_otel.errors import InvalidValue
from esper_otel.integrations.loop import Loop, samples_of
from esper_otel.integrations.watch import unwrapped
from esper_otel.session import start
from esper_otel.telemetry import Telemetry

VALIDATION = {"loss": "eval_loss", "accuracy": "eval_accuracy"}
_STATE_FILE = "esper_otel.json"


class EsperCallback(TrainerCallback):
    """Records a step for each step of the optimizer: loss, gradient norm, samples/s, input wait, step latency.

    - ``loss`` is what the model's forward returns as ``loss``, as it does when it is given labels; of accumulated
      batches the mean, or the sum where the model divides by the items of all of them (of all ranks: then times their
      number, so that the ranks' mean is the loss that the Trainer logs). Absent where it is computed outside the model.
    - ``gradient_norm`` is the Trainer's own, before it clips; without clipping (``max_grad_norm=0``) it is computed.
    - ``input_wait_ms`` begins when the step before, with its logging, saving and evaluating, is over; the Trainer
      fetches all batches of a step at once.
    - Steps have the numbers of ``state.global_step``; a run resumed from a checkpoint goes on with them, and with the
      averages, which lie in the checkpoint's folder as ``esper_otel.json``.

    Args:
        telemetry: a session that is there, which its owner closes; else one is started with the training.
        validation: what of the evaluation's metrics is the validation's ``loss`` and ``accuracy``.
        arguments: as of ``esper_otel.start``.
    """

    def __init__(
        self, telemetry: Telemetry | None = None, *, validation: Mapping[str, str] | None = None, **arguments: Any
    ) -> None:
        if telemetry is not None and arguments:
            raise InvalidValue(next(iter(arguments)), "has no effect beside telemetry=: give it to start()")
        self.telemetry = telemetry
        self._is_ours = telemetry is None
        self._validation = VALIDATION if validation is None else dict(validation)
        self._arguments = arguments
        self._loop: Loop | None = None
        self._model: nn.Module | None = None
        self._hook: Any = None
        self._losses: list[Tensor] = []
        self._are_shares = False
        self._parts = 1
        self._samples = 0
        self._norm: float | Tensor | None = None
        self._unclip: Callable[[], None] = lambda: None

    # -- the Trainer's events, in the order in which they come -----------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Starts the session, and listens to the model."""
        del control
        if self.telemetry is None or self._is_ours:
            arguments = {"rank": args.process_index, "world_size": args.world_size, **self._arguments}
            arguments.setdefault("epochs", max(int(state.num_train_epochs), 1))
            self.telemetry = start(**arguments)
        self._load(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE_FILE)
        self._loop = Loop(self.telemetry)
        self._parts = args.world_size if args.average_tokens_across_devices else 1
        model = given["model"]
        self._model = model
        self._hook = model.register_forward_hook(self._forwarded, with_kwargs=True)
        self._unclip = _listening_to_clipping(self._clipped)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The first batches of the epoch are asked for."""
        del args, state, control, given
        self._wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The step's batches are there."""
        del args, state, control, given
        if self._loop is not None:
            self._loop.batch()
            self._losses, self._samples, self._norm = [], 0, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The gradients are whole; clipped, if the Trainer clips."""
        del args, state, control
        if self._loop is None or self._model is None:
            return
        optimizer = given.get("optimizer")
        if optimizer is not None:
            self._loop.put({"optimizer_lr": optimizer.param_groups[0]["lr"]})
        if self._norm is None:
            scale = None if optimizer is None else getattr(unwrapped(optimizer), "grad_scale", None)
            self._loop.gradients(self._model, scale)
        else:
            self._loop.put({"gradient_norm": self._norm})

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The step is over."""
        del args, control, given
        loop = self._loop
        if loop is None:
            return
        loop.stepped()
        if self._losses:
            total = sum(self._losses[1:], self._losses[0])
            loop.put({"loss": total * self._parts if self._are_shares else total / len(self._losses)})
        if self._samples:
            loop.count(self._samples)
        epoch = max(math.ceil(state.epoch or 0) - 1, 0)  # what has been done of them, this step included
        loop.end(epoch=epoch, global_step=state.global_step)
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Logging is not waiting for input."""
        del args, state, control, given
        self._wait()

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Notes the evaluation's results; evaluating is not waiting for input."""
        del args, state, control
        found = given.get("metrics") or {}
        results = {name: found[key] for name, key in self._validation.items() if key in found}
        if results and self.telemetry is not None and self._loop is not None:
            self.telemetry.validation(**results)
        self._wait()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Puts step number and averages into the checkpoint."""
        del control, given
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.telemetry is not None and state.is_world_process_zero and folder.is_dir():
            (folder / _STATE_FILE).write_text(json.dumps(self.telemetry.state_dict()), encoding="utf-8")
        self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The run has ended."""
        del args, state, control, given
        self._unclip()
        if self._hook is not None:
            self._hook.remove()
        if self.telemetry is not None and self._is_ours:
            self.telemetry.close()
        self._loop = None

    # -- the rest --------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        if self._loop is not None:
            self._loop.wait()

    def _forwarded(self, model: nn.Module, inputs: Any, named: Mapping[str, Any], outputs: Any) -> None:
        """The model has computed something: in a training step, its loss."""
        if self._loop is None or not model.training or not torch.is_grad_enabled():
            return
        self._samples += samples_of((*inputs, dict(named))) or 0
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and loss.dim() == 0:
            self._losses.append(loss.detach())
            # Then each loss is a share of the step's, not a mean of its own.
            self._are_shares = named.get("num_items_in_batch") is not None

    def _clipped(self, norm: Any) -> None:
        if self._loop is not None and self._norm is None:
            self._norm = norm.detach().clone() if isinstance(norm, Tensor) else norm

    def _load(self, file: Path) -> None:
        if self.telemetry is None or not file.is_file():
            return
        try:
            self.telemetry.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            logging.getLogger("esper_otel").warning("%s: %s; averages begin anew", file, error)


def _listening_to_clipping(heard: Callable[[Any], None]) -> Callable[[], None]:
    """Hears the norm that ``torch.nn.utils.clip_grad_norm_`` returns: the Trainer keeps it to itself.

    Returns:
        What ends the listening.
    """
    original = nn.utils.clip_grad_norm_

    @functools.wraps(original)
    def listening(*arguments: Any, **named: Any) -> Any:
        norm = original(*arguments, **named)
        heard(norm)
        return norm

    nn.utils.clip_grad_norm_ = listening

    def end() -> None:
        if nn.utils.clip_grad_norm_ is listening:
            nn.utils.clip_grad_norm_ = original

    return end
