"""Watch: a plain script with a loop of its own, in three lines."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from torch import nn
from torch.optim import Optimizer

from esper_otel.errors import InvalidValue
from esper_otel.integrations.loop import Loop, samples_of
from esper_otel.session import has_died, start
from esper_otel.telemetry import Telemetry, outcome_of

if TYPE_CHECKING:
    from esper_otel.record.values import Scalar

Batch = TypeVar("Batch")


class Watch(Generic[Batch]):
    """Stands in the place of the loader, and records a step for each step of the optimizer. Made by ``watch``.

    A step lasts from its first batch until the next one is asked for. Without an optimizer step between two batches the
    gradients are taken to be accumulated: the step goes on.

    Attributes:
        telemetry: the session, for whatever else there is to record: seeds, ``pull()``, checkpoints.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, loader: Iterable[Batch], telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self._model = model
        self._loader = loader
        self._loop = Loop(telemetry)
        self._epoch = -1
        inner = unwrapped(optimizer)
        self._hooks = (inner.register_step_pre_hook(self._before), inner.register_step_post_hook(self._after))
        self._is_closed = False
        atexit.register(self._finish)  # before the session's own end, which was registered earlier

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type] # TypeError where the loader has no length

    def __iter__(self) -> Iterator[Batch]:
        self._end()
        self._epoch += 1
        epoch = self._epoch
        batches = iter(self._loader)
        try:
            while True:
                if self._loop.has_stepped:
                    self._loop.end(epoch=epoch)
                self._loop.wait()
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                self._loop.batch(samples_of(batch))
                yield batch
        except GeneratorExit:  # a break, or an exception of the script: which one, the end will tell
            self._loop.stop()
            raise
        self._end()

    def put(self, **values: Scalar | None) -> None:
        """Records step metrics of the step under way: ``put(loss=loss, accuracy=accuracy)``.

        Raises:
            UnknownMetric: a name that is not declared; the message names the nearest.
            InvalidValue: a value that is not one number.
        """
        self._loop.put(values)

    def validation(self, *, loss: Scalar | None = None, accuracy: Scalar | None = None) -> None:
        """See ``Telemetry.validation``."""
        self.telemetry.validation(loss=loss, accuracy=accuracy)

    def close(self, timeout_s: float = 5.0, outcome: str | None = None) -> None:
        """Records the last step and ends the session; at interpreter exit this happens by itself."""
        if self._is_closed:
            return
        if outcome is None:
            self._end()
        else:
            self._loop.fail(epoch=max(self._epoch, 0))
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        atexit.unregister(self._finish)
        self.telemetry.close(timeout_s, outcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome=outcome_of(kind, error))

    def _before(self, optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        # A fused optimizer that a GradScaler drives divides by the scale itself.
        self._loop.gradients(self._model, getattr(optimizer, "grad_scale", None))

    def _after(self, _optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        self._loop.stepped()

    def _end(self) -> None:
        """Records a step that is over; what came to no optimizer step is none."""
        if self._is_closed:
            return
        self._loop.end(epoch=max(self._epoch, 0))
        self._loop.forget()

    def _finish(self) -> None:
        if not has_died():
            self._end()
        elif not self._is_closed:
            self._loop.fail(epoch=max(self._epoch, 0))
        self._is_closed = True


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Batch],
    *,
    telemetry: Telemetry | None = None,
    **arguments: Any,
) -> Watch[Batch]:
    """Watches a script's own loop: iterate over what this returns instead of the loader, and ``put`` the loss.

    Each step of the optimizer is a step, with loss (from ``put``), gradient norm (before the optimizer's step, and
    unscaled; after clipping, if the script clips), samples/s, input wait, step latency, and what is derived of them.
    An epoch is one iteration over the loader.

    Args:
        model: whose gradients count.
        optimizer: whose steps count; one of Accelerate's is looked through.
        loader: gives batches; samples are the first dimension of the first tensor in a batch.
        telemetry: a session that is there; else one is started.
        arguments: as of ``start``, for the session that is started.

    Raises:
        InvalidValue: an optimizer or model that is none, or arguments beside a session.
    """
    if not isinstance(model, nn.Module):
        raise InvalidValue("model", f"a {type(model).__name__} is no torch.nn.Module")
    unwrapped(optimizer)
    if telemetry is not None and arguments:
        raise InvalidValue(next(iter(arguments)), "has no effect beside telemetry=: give it to start()")
    return Watch(model, optimizer, loader, start(**arguments) if telemetry is None else telemetry)


def unwrapped(optimizer: object) -> Optimizer:
    """The optimizer itself: Accelerate's wrapper may skip steps.

    Raises:
        InvalidValue: it is none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise InvalidValue("optimizer", f"a {type(optimizer).__name__} is no torch.optim.Optimizer")
    return inner
