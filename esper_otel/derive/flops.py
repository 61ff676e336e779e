"""The floating-point operations of a model, counted by PyTorch. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from esper_otel.errors import InvalidValue


class _Recomputation(TorchDispatchMode):  # type: ignore[no-untyped-call] # as torch declares it
    """Counts what a backward pass computes a second time, for checkpointed activations.

    A backward pass runs without recording operations for autograd; only a forward pass in it does.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        self.flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            self.flops += self._counter.get_total_flops() - before
        return result


def flops(model: nn.Module, sample: Any, *, backward: bool = True) -> int:
    """Returns the floating-point operations of one training step, by PyTorch's own counter. Runs the model once.

    Counts matrix products, convolutions and attention, a multiplication and an addition as two operations. Operations
    that a checkpointed model repeats are not counted. Give the result to ``telemetry.step(flops=...)``, times the
    number of micro-batches if gradients are accumulated. Call it once, before training or in its first step: it takes
    as long as a step. Gradients, buffers and random numbers of the model are left as they were.

    Args:
        model: the model; a wrapper of DistributedDataParallel or ``torch.compile`` is taken off. Operations that run
            on several ranks are counted for this rank only.
        sample: one batch: a tensor, a tuple of positional arguments, or a mapping of arguments by name.
        backward: whether to count the backward pass, too, for the parameters that require gradients.

    Raises:
        InvalidValue: the backward pass is wanted and the output does not depend on a parameter that requires gradients.
    """
    model = _bare(model)
    counter = FlopCounterMode(display=False)
    with ExitStack() as restored:
        restored.enter_context(_unchanged(model))
        restored.enter_context(torch.set_grad_enabled(backward))
        with counter:
            if isinstance(sample, Mapping):
                output = model(**sample)
            else:
                output = model(*sample) if isinstance(sample, tuple) else model(sample)
        forward: int = counter.get_total_flops()
        return forward + (_of_backward(model, output) if backward else 0)


def _of_backward(model: nn.Module, output: Any) -> int:
    ends = [each for each in _tensors(output) if each.requires_grad]
    parameters = [each for each in model.parameters() if each.requires_grad]
    if not ends or not parameters:
        raise InvalidValue("flops", "nothing to differentiate: the output depends on no parameter that needs gradients")
    total = sum((end.abs() if end.is_complex() else end).sum() for end in ends)
    counter = FlopCounterMode(display=False)
    again = _Recomputation(counter)
    with counter, again:
        torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type] # the sum is a tensor
    every: int = counter.get_total_flops()
    return every - again.flops


def _bare(model: nn.Module) -> nn.Module:
    """Returns the model without wrappers that expect a whole training step, or hide operations from the counter."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers, such as running means, and the state of random numbers."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({each.device.index for each in model.parameters() if each.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from _tensors(each)
