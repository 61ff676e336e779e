"""``watch()``: records a plain script's own training loop with three added lines."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from signal import Signals
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never, Self, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import IterableDataset

from esper_otel import unix
from esper_otel.errors import InvalidValue
from esper_otel.integrations.loader import Feed, follow, unfollow
from esper_otel.integrations.loop import Loop
from esper_otel.integrations.saves import follow_saves, unfollow_saves
from esper_otel.integrations.steps import OptimizerSteps
from esper_otel.record.loaders import Loader, following, is_stand_in, of
from esper_otel.record.mistakes import Mistakes, spares_mistakes
from esper_otel.session.ending import ended_well
from esper_otel.session.start import start
from esper_otel.session.telemetry import Telemetry, outcome_of
from esper_otel.tracebacks import leave_out_caller

if TYPE_CHECKING:
    from esper_otel.record.values import Scalar

Batch = TypeVar("Batch")


def _mistakes_of(watch: Watch[Any]) -> Mistakes | None:
    return watch._watching.telemetry.mistakes  # noqa: SLF001 - same module


class Watch(Loader[Batch]):
    """Replaces the loader and behaves like it. Created by ``watch``.

    It adds ``put``, ``validation``, ``close`` and ``telemetry``, and is a context manager. Everything else is
    forwarded to the loader, which is not modified.

    A session that ``watch`` has started ends at the latest with the program; before that with the next ``watch`` of a
    sweep, or soon after model or optimizers and this object are gone, unless ``telemetry`` has been used.
    """

    own: frozenset[str] = frozenset({"put", "validation", "close", "telemetry", "_watching"})
    _watching: WatchedLoop

    @property
    def telemetry(self) -> Telemetry:
        """The session, for further uses: seeds, ``pull()``, checkpoints."""
        self._watching.is_shared = True
        return self._watching.telemetry

    def __iter__(self) -> Iterator[Batch]:
        self._watching.has_begun = True
        try:
            return super().__iter__()
        except BaseException as error:
            leave_out_caller(error)
            raise

    @spares_mistakes(_mistakes_of)
    def put(self, **values: Scalar | None) -> None:
        """Records step metrics of the current step: ``put(loss=loss, accuracy=accuracy)``.

        Raises:
            UnknownMetric: a name is not declared; the message suggests the nearest one.
            InvalidValue: a value is not a single number.
        """
        self._watching.steps.put(values)

    @spares_mistakes(_mistakes_of)
    def validation(self, *, loss: Scalar | None = None, accuracy: Scalar | None = None, **others: Never) -> None:
        """See ``Telemetry.validation``."""
        self._watching.telemetry.validation(loss=loss, accuracy=accuracy, **others)

    def close(self, timeout_s: float | None = None, outcome: str | None = None) -> None:
        """Records the last step and ends the session. Called automatically at interpreter exit."""
        self._watching.telemetry.close(timeout_s, outcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome=outcome_of(kind, error))


class WatchedLoop:
    """Records a step for each optimizer step. Keeps no strong references to optimizers, model or loader.

    A step lasts from its first batch until the next batch is requested. ``OptimizerSteps`` decides what happens
    to batches without a step.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], loader: object, telemetry: Telemetry, *, is_ours: bool
    ) -> None:
        self.telemetry = telemetry
        self.is_ours = is_ours
        self.is_shared: bool = False  # whether the script may have the session
        self.loop: Loop = Loop(telemetry)
        self.feed: Feed = Feed(self)
        self.has_begun: bool = False
        self._gone: list[object] = []  # references to objects that are gone
        self.model: Callable[[], nn.Module | None] = weakref.ref(model, self._gone.append)
        self.optimizers: list[Callable[[], object]] = [weakref.ref(each, self._gone.append) for each in optimizers]
        self.loader: Callable[[], object] = _weak(loader)
        self.face: Callable[[], object] = lambda: None
        self.steps: OptimizerSteps = OptimizerSteps(self.loop, self.feed, self.model, optimizers)
        self._is_over = False
        self._hooks = [
            hook
            for each in optimizers
            for hook in (each.register_step_pre_hook(self.steps.before), each.register_step_post_hook(self._after))
        ]
        self._hooks.append(register_optimizer_step_post_hook(self._beside))
        if (dataset := getattr(loader, "dataset", None)) is not None:  # other loaders may wrap this one
            follow(self.feed, _is_of(_weak(dataset)))
        follow_saves(self.loop.phases)
        telemetry.before_close(self.finish)
        if is_ours:
            telemetry.close_when(lambda: self.is_abandoned)
        _live.add(self)

    def set_face(self, face: Watch[Any]) -> None:
        """Sets what the script has instead of the loader."""
        self.face = weakref.ref(face, self._gone.append)

    def _after(self, _optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        self.steps.after()

    def _beside(self, optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        self.steps.beside(optimizer)

    # -- ``BatchListener`` ---------------------------------------------------------------------------------

    def wait(self) -> None:
        """Ends a step in which the optimizer has stepped."""
        self.steps.wait()

    def batch(self, samples: int | None = None) -> None:
        """See ``Waiting``."""
        self.steps.batch(samples)

    def no_batch(self) -> None:
        """See ``Waiting``."""
        self.loop.no_batch()

    def discard(self) -> None:
        """See ``Waiting``."""
        self.loop.discard()

    def discard_last(self) -> None:
        """See ``Waiting``."""
        self.loop.discard_last()

    def stop(self) -> None:
        """See ``Waiting``."""
        self.loop.stop()

    # -- the end -------------------------------------------------------------------------------------------

    @property
    def is_left(self) -> bool:
        """Whether no step can follow, because the model, the optimizers or the training loop are gone."""
        if self._is_gone():
            return True
        return self.has_begun and self.steps.count > 0 and self.face() is None and not self.feed.is_open

    @property
    def is_abandoned(self) -> bool:
        """Whether nothing more can be recorded: no step can follow, and nothing refers to this watch or its session.

        Threads: any. It must not keep an object alive, not even for a moment: that thread would free it.
        """
        return self._is_gone() and self.face in self._gone and not self.is_shared and not self.feed.is_open

    def _is_gone(self) -> bool:
        return self.model in self._gone or all(each in self._gone for each in self.optimizers)

    def is_of(self, watched: Sequence[object]) -> bool:
        """Whether it watches one of the given objects."""
        its = (self.model(), self.loader(), *(each() for each in self.optimizers))
        return any(one is other for one in its for other in watched if one is not None)

    def finish(self, outcome: str | None) -> None:
        """Ends watching: the session is about to close, or a new watch replaces this one."""
        if self._is_over:
            return
        self._is_over = True
        _live.discard(self)
        unfollow(self.feed)
        unfollow_saves(self.loop.phases)
        self.loop.parts.close()
        with suppress(ValueError):
            self.telemetry._before_close.remove(self.finish)  # noqa: SLF001 - same package
        for hook in self._hooks:
            hook.remove()
        if self.feed.is_of_another_thread() and not self.is_abandoned:  # that thread may be about to record
            return
        # A step that was interrupted by a signal has not failed.
        self.steps.finish(is_well=ended_well(outcome) or outcome in Signals.__members__)
        self.steps.say_if_unseen()


_live: set[WatchedLoop] = set()
unix.at_fork(after_in_child=_live.clear)


def _weak(value: object) -> Callable[[], object]:
    try:
        return weakref.ref(value)
    except TypeError:  # a list, for instance
        return lambda: value


def _end_earlier(watched: Sequence[object]) -> None:
    """Ends older watches of the same model, optimizers or loader, and, as in a sweep, those of models that are gone."""
    for each in list(_live):
        if each.is_left or each.is_of(watched):
            each.finish(None)
            if each.is_ours:
                each.telemetry.close()


def _is_of(dataset: Callable[[], object]) -> Callable[[object], bool]:
    """Whether a loader's dataset is this one or a shard of it, as Accelerate creates for iterable datasets."""

    def is_of(other: object) -> bool:
        its = dataset()
        if other is its:
            return True
        return its is not None and isinstance(other, IterableDataset) and getattr(other, "dataset", None) is its

    return is_of


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loader: Iterable[Batch],
    *,
    telemetry: Telemetry | None = None,
    **arguments: Any,
) -> Watch[Batch]:
    """Records a script's own training loop. Use the returned object instead of the loader, and ``put`` the loss.

    Each optimizer step is recorded with loss (from ``put``), gradient norm (unscaled, before the optimizer step; after
    clipping if the script clips), samples/s, input wait, step latency, and the metrics derived from them. An epoch is
    one iteration over the loader. Taking a single batch, or a validation without gradients, is not an epoch.

    Args:
        model: the model whose gradients are used.
        optimizer: the optimizer, or several. With several, each optimizer's step is recorded as a step, with the norm
            of that optimizer's gradients and its index in ``esper.optimizer.index``. Accelerate's wrapper is unwrapped.
        loader: the loader. Other loaders of the same dataset, such as those that Accelerate creates, are followed too.
            For the number of samples see ``samples_of``.
        telemetry: an existing session; by default one is started.
        arguments: passed to ``start`` for a new session.

    Raises:
        InvalidValue: ``model`` or ``optimizer`` has a wrong type, or there are arguments although a session is given.
    """
    if not isinstance(model, nn.Module):
        raise InvalidValue("model", f"a {type(model).__name__} is not a torch.nn.Module")
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [unwrapped(each) for each in given]
    if not optimizers:
        raise InvalidValue("optimizer", "none was given")
    if telemetry is not None and arguments:
        raise InvalidValue(next(iter(arguments)), "has no effect with telemetry=: give it to start()")
    loader = of(loader) if is_stand_in(loader) else loader
    _end_earlier([model, loader, *optimizers])
    session = start(**arguments) if telemetry is None else telemetry
    watching = WatchedLoop(model, optimizers, loader, session, is_ours=telemetry is None)
    face = following(Watch, loader, watching.feed, _watching=watching)
    watching.set_face(face)
    return face


def unwrapped(optimizer: object) -> Optimizer:
    """Returns the optimizer without wrappers: Accelerate's may skip steps, and SAM's makes two steps for one.

    fastai's ``OptimWrapper`` is unwrapped, too.

    Raises:
        InvalidValue: the argument is not an optimizer.
    """
    for name in ("optimizer", "base_optimizer", "opt"):
        if isinstance(inner := getattr(optimizer, name, None), Optimizer):
            return inner
    if not isinstance(optimizer, Optimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        reason = (
            f"a {kind} is not a torch.optim.Optimizer; if it wraps one, give that; the steps of others, such as "
            "Keras's and fastai's own, cannot be followed: record them by telemetry.step() of esper_otel.start()"
        )
        raise InvalidValue("optimizer", reason)
    return optimizer
