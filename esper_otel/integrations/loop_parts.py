"""Tells forward, backward and optimizer apart in loops that do not say so themselves."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from esper_otel import unix
from esper_otel.record.names import PARTS
from esper_otel.record.step_parts import NOTHING, Timer
from esper_otel.record.values import CopyTime
from esper_otel.tracebacks import leave_out_caller

# The time after a backward pass or an optimizer's step: the next forward pass if a backward pass follows, else nothing.
_BETWEEN = "between"


def _uncompiled() -> tuple[Callable[[Any], Any], Callable[[Any], None]] | None:
    """Returns PyTorch's switch of torch.compile's tracing, and what exempts a function from it; None without them.

    ``torch.compiler.disable`` would import the compiler, which takes a second.
    """
    try:
        frames: Any = torch._C._dynamo.eval_frame  # noqa: SLF001 - there is nothing public, see above
        if hasattr(frames, "skip_code"):
            return frames.set_eval_frame, frames.skip_code
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)  # noqa: SLF001
        return frames.set_eval_frame, lambda code: frames.set_code_exec_strategy(code, skip)
    except (AttributeError, TypeError):
        return None


class StepParts:
    """The parts of the steps of one loop, from the moments at which they change. Threads: the training thread.

    Forward lasts from the arrival of a batch, or the end of the last backward pass or optimizer step, until a backward
    pass begins. In a closure that an optimizer calls, what is not the backward pass is the optimizer's.

    Args:
        timer: returns what measures; asked at each batch, since the device may become known late.

    Attributes:
        on_backward: called before each backward pass of a followed loop.
    """

    def __init__(self, timer: Callable[[], Timer]) -> None:
        self.host_ms: dict[str, float] = {}
        self.device: list[tuple[str, CopyTime]] = []
        self.on_backward: Callable[[], None] | None = None
        self._timer_of = timer
        self._timer: Timer = NOTHING
        self._thread = 0
        self._part = ""
        self._since: Any = None
        self._is_in_optimizer = False
        self._depth = 0  # an optimizer's step may call that of its base class, and PyTorch's hooks run for both
        _changes.add(self)

    def batch(self) -> None:
        """A batch has arrived."""
        self._timer = self._timer_of()
        self._thread = threading.get_ident()
        self._is_in_optimizer = False
        self._depth = 0
        self._begin("forward")

    def over(self) -> None:
        """The next batch is requested, or the loop was left."""
        self._part, self._since = "", None

    def close(self) -> None:
        """The loop is no longer followed."""
        self.over()
        _changes.remove(self)

    def take(self) -> tuple[dict[str, float], list[tuple[str, CopyTime]]]:
        """Returns and forgets the durations so far, by metric: milliseconds, and those that a device reports later."""
        taken = self.host_ms, self.device
        self.host_ms, self.device = {}, []
        return taken

    def backward_begins(self) -> None:
        """A backward pass begins."""
        if self._is_followed():
            if self.on_backward is not None:
                self.on_backward()
            self._end("forward" if self._part == _BETWEEN else self._part)
            self._begin("backward")

    def backward_ends(self) -> None:
        """A backward pass has ended."""
        if self._is_followed():
            self._end(self._part)
            self._begin("optimizer" if self._is_in_optimizer else _BETWEEN)

    def step_begins(self) -> None:
        """PyTorch's hook before an optimizer's step."""
        self._depth += 1
        self.optimizer_begins()

    def step_ends(self) -> None:
        """PyTorch's hook after an optimizer's step."""
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self.optimizer_ends()

    def optimizer_begins(self) -> None:
        """An optimizer's step begins. Called again after our own work before it, so that this work is not counted."""
        if self._is_followed() and self._depth <= 1:
            self._is_in_optimizer = True
            self._begin("optimizer")

    def optimizer_ends(self) -> None:
        """An optimizer's step has ended."""
        if self._is_followed() and self._is_in_optimizer:
            self._is_in_optimizer = False
            self._end(self._part)
            self._begin(_BETWEEN)

    def _is_followed(self) -> bool:
        return bool(self._part) and threading.get_ident() == self._thread

    def _begin(self, part: str) -> None:
        self._part, self._since = part, self._timer.mark()

    def _end(self, part: str) -> None:
        """Adds the time since the last change to a part."""
        metric, end = PARTS.get(part), self._timer.mark()
        if metric is None or self._since is None or end is None:
            return
        spent = self._timer.between(self._since, end)
        if isinstance(spent, float):
            self.host_ms[metric] = self.host_ms.get(metric, 0.0) + spent
        else:
            self.device.append((metric, spent))


class _Changes:
    """Tells the followed loops when backward passes and optimizer steps begin and end.

    PyTorch has hooks for optimizers, but none for a whole backward pass: ``torch.autograd.backward``, which
    ``Tensor.backward`` calls, is replaced as long as there are loops.
    """

    def __init__(self) -> None:
        self._followers: weakref.WeakSet[StepParts] = weakref.WeakSet()
        self._hooks: list[Any] = []
        self._replaced: tuple[Any, Any] | None = None  # the original, and ours

    def add(self, parts: StepParts) -> None:
        self._followers.add(parts)
        if not self._hooks:
            self._hooks = [
                register_optimizer_step_pre_hook(lambda *_: self._tell(StepParts.step_begins)),
                register_optimizer_step_post_hook(lambda *_: self._tell(StepParts.step_ends)),
            ]
        uncompiled = _uncompiled()
        if self._replaced is None and uncompiled is not None:
            original = torch.autograd.backward
            self._replaced = original, self._around(original, *uncompiled)
            torch.autograd.backward = self._replaced[1]

    def remove(self, parts: StepParts) -> None:
        self._followers.discard(parts)
        if self._followers:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._replaced is not None and torch.autograd.backward is self._replaced[1]:
            torch.autograd.backward = self._replaced[0]
            self._replaced = None

    def _around(
        self, original: Callable[..., Any], set_eval_frame: Callable[[Any], Any], skip: Callable[[Any], None]
    ) -> Callable[..., Any]:
        @functools.wraps(original)
        def backward(*arguments: Any, **named: Any) -> Any:
            compiler = set_eval_frame(None)  # torch.compile must not compile what follows
            self._tell(StepParts.backward_begins)
            set_eval_frame(compiler)
            try:
                return original(*arguments, **named)
            except BaseException as error:
                leave_out_caller(error)
                raise
            finally:
                compiler = set_eval_frame(None)
                self._tell(StepParts.backward_ends)
                set_eval_frame(compiler)

        ours: Any = backward
        skip(ours.__code__)
        return backward

    def _tell(self, change: Callable[[StepParts], None]) -> None:
        if not torch.compiler.is_compiling():
            for parts in tuple(self._followers):
                change(parts)

    def forget(self) -> None:
        """Removes all followers, in a forked child."""
        self._followers = weakref.WeakSet()


_changes = _Changes()
unix.at_fork(after_in_child=_changes.forget)
