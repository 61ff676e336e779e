"""Follows optimizers and records each of their steps. For loops that do not call the telemetry themselves."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_otel.integrations.loader import Feed
from esper_otel.integrations.loop import Loop
from esper_otel.integrations.parameters import Parameters
from esper_otel.log import logger
from esper_otel.tracebacks import leave_out_caller

_MANY = 100
_SOME = 10
_UNSEEN = (
    "%d batches and no step of a followed torch.optim optimizer. These are not seen: an optimizer that has replaced "
    "the watched one (watch the result of accelerator.prepare or apex), steps made without torch.optim "
    "(Keras, fastai's own optimizers, some of SAM's and DeepSpeed's), steps inside a fully compiled graph, and steps "
    "of another process"
)
_REPLACED = (
    "the watched %s has not stepped, but %s has, which has parameters of the same model: give watch() that one "
    "(the result of accelerator.prepare or apex, or a wrapper's own optimizer); until then no step is recorded"
)


class _Gradient:
    """A gradient at the end of a batch, which finds out whether the next batch adds to it or begins anew.

    It looks just before a backward pass adds to the gradient. A gradient that is as it was counts, even if the sum
    is another tensor (``create_graph=True``). One that has been replaced or set to zero was dropped.
    """

    def __init__(self, parameter: Tensor, gradient: Tensor) -> None:
        self._parameter = weakref.ref(parameter)
        self._gradient = weakref.ref(gradient)
        self._version = gradient._version  # noqa: SLF001 - how often it was changed in place
        self._is_added_to: bool | None = None
        self._hook: Any = None
        if parameter.requires_grad:
            self._hook = parameter.register_hook(self._before_adding)  # type: ignore[no-untyped-call] # torch's

    def _before_adding(self, _more: Tensor) -> None:
        if self._is_added_to is None:
            gradient = self._same()
            self._is_added_to = gradient is not None and gradient._version == self._version  # noqa: SLF001

    def _same(self) -> Tensor | None:
        parameter, gradient = self._parameter(), self._gradient()
        return gradient if parameter is not None and parameter.grad is gradient else None

    def is_dropped(self) -> bool:
        """Whether the gradient does not count any more. A parameter that is gone is no evidence of that."""
        if self._parameter() is None:
            return False
        return self._same() is None if self._is_added_to is None else not self._is_added_to

    def release(self) -> None:
        """Removes what was added to the parameter."""
        if self._hook is not None:
            self._hook.remove()


class OptimizerSteps:
    """Records a step for each optimizer step, with the batches before it. Threads: the training thread.

    The wait and the samples of a batch belong to the first step after it. If several batches precede a step, theirs
    are summed, provided that their gradients were accumulated. If gradients were dropped instead, values put in their
    batches are recorded as a failed step.

    Args:
        loop: records the steps.
        feed: provides the epochs.
        model: the model whose gradients are used. Without it, or with several optimizers, the gradients of each
            optimizer's parameters are used.
        optimizers: the known optimizers, in order; others are added in the order of their first steps.
    """

    def __init__(
        self,
        loop: Loop,
        feed: Feed,
        model: Callable[[], nn.Module | None] = lambda: None,
        optimizers: Sequence[object] = (),
    ) -> None:
        self.loop = loop
        self.count: int = 0
        self._feed = feed
        self._model = model
        self._known: list[weakref.ref[Any]] = [weakref.ref(each) for each in optimizers]
        self._last_index = 0  # of the optimizer that stepped last
        self._stepped_s: float | None = None
        self._before: _Gradient | None = None
        self._had_none = False  # whether no parameter had a gradient at the end of the last batch
        self._parameters = Parameters()
        self._batches = 0
        self._others = 0
        self._has_said = False
        self._is_evaluating = False  # whether the last batch was requested without gradients
        self._is_ahead = False  # whether the last batch is for the step after the one that was made last
        self.loop.parts.on_backward = self._before_backward

    # -- batches; ``loader.BatchListener`` -------------------------------------------------------------------------

    def wait(self) -> None:
        """The loop requests a batch."""
        self._stepped_s = None
        if not self.loop.has_stepped and self.loop.is_in_batch:
            self._drop_if_dropped()
            self._note_gradient()
        self.loop.wait()

    def batch(self, samples: int | None = None) -> None:
        """The batch has arrived: records the previous step, to which ``put`` no longer applies.

        With a batch requested without gradients, as for an evaluation, the step is held a while: ``put`` may follow.
        """
        self._is_evaluating = not torch.is_grad_enabled() and self._model() is not None
        if not self._is_evaluating:
            self.end()
            self.loop.release()
        else:
            self._note_index()
            self.loop.hold(epoch=self._feed.epoch)
        self._is_ahead = False
        self.loop.batch(samples)
        if not self.count:
            self._batches += 1
            if self._batches == _MANY and torch.is_grad_enabled():
                self.say_if_unseen()

    def put(self, values: Mapping[str, Any]) -> None:
        """See ``Loop.put``. If the model has run on a batch requested ahead, the values belong to its step."""
        if self._is_ahead and self.loop.has_stepped and self._stepped_s is not None and not self._feed.is_ahead:
            self._begin_next(self._stepped_s)
        if self._is_evaluating and not self._feed.is_training:
            self.loop.put_between(values)
        else:
            self.loop.put(values)

    # -- optimizers ------------------------------------------------------------------------------------------------

    def before(self, optimizer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """An optimizer is about to step. Returns its arguments with a wrapped closure, if it has one."""
        if torch.compiler.is_compiling():
            return None
        try:
            return self._before_step(optimizer, arguments, named)
        except Exception:  # noqa: BLE001 - never the script's concern
            logger.exception("before an optimizer's step")
            return None
        finally:
            self.loop.parts.optimizer_begins()  # after our own work

    def _before_step(self, optimizer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        index = self._index_of(optimizer)
        if self.loop.has_stepped:
            if self._stepped_s is not None:
                self._begin_next(self._stepped_s)
            else:
                self.end()
        elif self._feed.is_ahead and (self.loop.has_earlier or self._feed.has_ahead):
            if not self._feed.has_ahead:
                self._feed.postpone()
                self.loop.uncount()
            self._is_ahead = True
        self.loop.release()
        self._last_index = index
        self._feed.steps()
        closure = named.get("closure", arguments[1] if len(arguments) > 1 else None)
        if not callable(closure):
            self._note(optimizer)
            return None
        followed = self._followed(optimizer, closure)
        if "closure" in named:
            return arguments, {**named, "closure": followed}
        return (arguments[0], followed, *arguments[2:]), named

    def after(self) -> None:
        """The optimizer has stepped."""
        if torch.compiler.is_compiling():
            return
        self.count += 1
        self._forget_gradient()
        self._stepped_s = time.perf_counter()
        self.loop.stepped()

    def finish(self, *, is_well: bool) -> None:
        """The run ends: records the current step, or values put without an optimizer step."""
        self._forget_gradient()
        self.loop.release()
        if not is_well:
            self.loop.fail(epoch=self._feed.epoch)
        elif self.loop.has_stepped:
            if self._stepped_s is not None:  # the loop was left without a sign
                self.loop.stop_at(self._stepped_s)
            self.end()
        elif self._feed.is_training:
            self.loop.skip_all(epoch=self._feed.epoch)
        self.loop.say_what_is_left()

    def say_if_unseen(self) -> None:
        """Logs why no steps are recorded although the loop trains."""
        if self._has_said:
            return
        model = self._model()
        has_trained = model is None or any(each.grad is not None for each in model.parameters())
        if self._batches and not self.count and has_trained:
            self._has_said = True
            logger.warning(_UNSEEN, self._batches)

    def beside(self, optimizer: Any) -> None:
        """Any optimizer of the process has stepped. Warns if it steps in place of the watched ones."""
        if torch.compiler.is_compiling() or self.count or self._has_said:
            return
        model, watched = self._model(), [each() for each in self._known]
        if model is None or any(each is optimizer for each in watched):
            return
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in own for parameter in _parameters(optimizer)):
            self._others += 1
            if self._others == _SOME:
                self._has_said = True
                logger.warning(_REPLACED, type(watched[0]).__name__, f"another {type(optimizer).__name__}")

    def _before_backward(self) -> None:
        """A backward pass begins."""
        if self._feed.is_ahead:  # it is of the batch before, which therefore was not skipped
            self._forget_gradient()

    # -- helpers ---------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Records the step if the optimizer has stepped."""
        self._note_index()
        self.loop.end(epoch=self._feed.epoch)

    def _note_index(self) -> None:
        if self.loop.has_stepped and len(self._known) > 1:
            self.loop.put({"esper.optimizer.index": self._last_index})

    def _begin_next(self, since_s: float) -> None:
        """Records the step, which ended at ``since_s``, where the next one has begun without a new batch."""
        self._is_ahead = False
        self.loop.stop_at(since_s)
        self.end()
        self.loop.go_on(since_s)

    def _followed(self, optimizer: Any, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the closure, to use the gradients of its last evaluation."""

        def followed(*arguments: Any, **named: Any) -> Any:
            try:
                result = closure(*arguments, **named)
            except BaseException as error:
                leave_out_caller(error)
                raise
            try:
                self._note(optimizer)
            except Exception:  # noqa: BLE001 - never the script's concern
                logger.exception("following a closure")
            return result

        return followed

    def _note(self, optimizer: Any) -> None:
        self._drop_if_dropped()
        model = self._model() if len(self._known) == 1 else None
        parameters = _parameters(optimizer) if model is None else self._parameters.of(model)
        # With a GradScaler, a fused optimizer divides by the scale itself.
        self.loop.gradients(parameters, getattr(optimizer, "grad_scale", None))

    def _index_of(self, optimizer: object) -> int:
        groups = getattr(optimizer, "param_groups", None)
        for index, known in enumerate(self._known):
            # The inner optimizer of a wrapper such as SAM has the wrapper's groups and is not a second optimizer.
            if (one := known()) is not None and (one is optimizer or one.param_groups is groups):
                return index
        if self._model() is None:
            self._forget_gradient()  # it belongs to another optimizer
        # An optimizer that is gone, as in a sweep, no longer counts.
        self._known = [known for known in self._known if known() is not None] + [weakref.ref(optimizer)]
        return len(self._known) - 1

    def _drop_if_dropped(self) -> None:
        """Skips earlier batches whose gradients were dropped, not accumulated."""
        if not self.loop.has_earlier:
            return
        if self._before is not None:
            is_dropped = self._before.is_dropped()
        else:
            is_dropped = self._had_none and self._gradient() is not None
        if is_dropped:
            self._forget_gradient()
            self.loop.skip(epoch=self._feed.epoch)

    def _forget_gradient(self) -> None:
        if self._before is not None:
            self._before.release()
        self._before, self._had_none = None, False

    def _note_gradient(self) -> None:
        """Notes a gradient, to find out later whether the next batch adds to it; nothing if that is uncertain."""
        self._forget_gradient()
        if not self._feed.has_worked or not _stay_in_place(self._model()):
            return
        if len(self._known) > 1:
            return  # one optimizer's gradients may be dropped while another's accumulate
        found = self._gradient()
        self._had_none = found is None
        self._before = None if found is None else _Gradient(*found)

    def _gradient(self) -> tuple[Tensor, Tensor] | None:
        """Returns the first parameter with a gradient, and this gradient."""
        model = self._model()
        known = (each() for each in self._known)
        parameters: Iterable[Tensor] = (
            (each for optimizer in known if optimizer is not None for each in _parameters(optimizer))
            if model is None
            else model.parameters()
        )
        for parameter in parameters:
            if (gradient := parameter.grad) is not None:
                return parameter, gradient
        return None


def _stay_in_place(model: nn.Module | None) -> bool:
    """Whether gradients stay where they are between batches. Code that shards them may keep them elsewhere."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return not model.gradient_as_bucket_view
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _parameters(optimizer: Any) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
