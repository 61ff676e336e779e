"""Watch: a plain script with a loop of its own, in three lines."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from signal import Signals
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import IterableDataset

from esper_otel.errors import InvalidValue
from esper_otel.integrations.loader import Feed, follow, unfollow
from esper_otel.integrations.loop import Loop
from esper_otel.integrations.steps import Steps
from esper_otel.record.loaders import Loader, following, is_stand_in, of
from esper_otel.session.start import ended_well, start
from esper_otel.session.telemetry import Telemetry, outcome_of

if TYPE_CHECKING:
    from esper_otel.record.values import Scalar

Batch = TypeVar("Batch")


class Watch(Loader[Batch]):
    """Stands in the place of the loader, and behaves as it. Made by ``watch``.

    Its own are ``put``, ``validation``, ``close``, ``telemetry``, and that it is a context manager; all else is the
    loader's, which stays itself.

    Attributes:
        telemetry: the session, for whatever else there is to record: seeds, ``pull()``, checkpoints.
    """

    own: frozenset[str] = frozenset({"put", "validation", "close", "telemetry", "_watching"})
    _watching: WatchedLoop
    telemetry: Telemetry

    def __iter__(self) -> Iterator[Batch]:
        self._watching.has_begun = True
        return super().__iter__()

    def put(self, **values: Scalar | None) -> None:
        """Records step metrics of the step under way: ``put(loss=loss, accuracy=accuracy)``.

        Raises:
            UnknownMetric: a name that is not declared; the message names the nearest.
            InvalidValue: a value that is not one number.
        """
        self._watching.loop.put(values)

    def validation(self, *, loss: Scalar | None = None, accuracy: Scalar | None = None) -> None:
        """See ``Telemetry.validation``."""
        self.telemetry.validation(loss=loss, accuracy=accuracy)

    def close(self, timeout_s: float = 5.0, outcome: str | None = None) -> None:
        """Records the last step and ends the session; at interpreter exit this happens by itself."""
        self.telemetry.close(timeout_s, outcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome=outcome_of(kind, error))


class WatchedLoop:
    """Records a step for each step of the optimizers; holds neither them nor the model nor the loader.

    A step lasts from its first batch until the next one is asked for. See ``Steps`` for batches without a step.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], loader: object, telemetry: Telemetry, *, is_ours: bool
    ) -> None:
        self.telemetry = telemetry
        self.is_ours = is_ours
        self.loop: Loop = Loop(telemetry)
        self.feed: Feed = Feed(self)
        self.has_begun: bool = False
        self.model: Callable[[], nn.Module | None] = weakref.ref(model)
        self.optimizers: list[Callable[[], object]] = [weakref.ref(each) for each in optimizers]
        self.loader: Callable[[], object] = _weak(loader)
        self.face: Callable[[], object] = lambda: None
        self.steps: Steps = Steps(self.loop, self.feed, self.model, optimizers)
        self._is_over = False
        self._hooks = [
            hook
            for each in optimizers
            for hook in (each.register_step_pre_hook(self.steps.before), each.register_step_post_hook(self._after))
        ]
        self._hooks.append(register_optimizer_step_post_hook(self._beside))
        if (dataset := getattr(loader, "dataset", None)) is not None:  # loaders may be made of this one
            follow(self.feed, _is_of(_weak(dataset)))
        telemetry.before_close(self.finish)
        _live.add(self)

    def _after(self, _optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        self.steps.after()

    def _beside(self, optimizer: Optimizer, _arguments: Any, _named: Any) -> None:
        self.steps.beside(optimizer)

    # -- see ``Waiting`` -----------------------------------------------------------------------------------

    def wait(self) -> None:
        """The step that was made is over."""
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

    def stop(self) -> None:
        """See ``Waiting``."""
        self.loop.stop()

    # -- the end -------------------------------------------------------------------------------------------

    @property
    def is_left(self) -> bool:
        """Whether no step can come any more: the model or the optimizers are gone, or the loop that has trained."""
        if self.model() is None or all(each() is None for each in self.optimizers):
            return True
        return self.has_begun and self.steps.count > 0 and self.face() is None and not self.feed.is_open

    def is_of(self, watched: Sequence[object]) -> bool:
        """Whether it watches one of these."""
        its = (self.model(), self.loader(), *(each() for each in self.optimizers))
        return any(one is other for one in its for other in watched if one is not None)

    def finish(self, outcome: str | None) -> None:
        """The session is about to be closed, or another one watches the same."""
        if self._is_over:
            return
        self._is_over = True
        _live.discard(self)
        unfollow(self.feed)
        with suppress(ValueError):
            self.telemetry._before_close.remove(self.finish)  # noqa: SLF001 - of the same package
        for hook in self._hooks:
            hook.remove()
        if self.feed.is_of_another_thread():  # which may be about to record
            return
        # A step that a signal ends has not failed.
        self.steps.finish(is_well=ended_well(outcome) or outcome in Signals.__members__)
        self.steps.say_if_unseen()


_live: set[WatchedLoop] = set()
os.register_at_fork(after_in_child=_live.clear)


def _weak(value: object) -> Callable[[], object]:
    try:
        return weakref.ref(value)
    except TypeError:  # a list, for instance
        return lambda: value


def _end_earlier(watched: Sequence[object]) -> None:
    """Of one model, optimizer or loader there is one watch; of a sweep, that of the newest model."""
    for each in list(_live):
        if each.is_left or each.is_of(watched):
            each.finish(None)
            if each.is_ours:
                each.telemetry.close()


def _is_of(dataset: Callable[[], object]) -> Callable[[object], bool]:
    """Whether a loader's dataset is this one, or a shard of it, as Accelerate makes them of streams."""

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
    """Watches a script's own loop: use what this returns instead of the loader, and ``put`` the loss.

    Each step of the optimizer is a step, with loss (from ``put``), gradient norm (before the optimizer's step, and
    unscaled; after clipping, if the script clips), samples/s, input wait, step latency, and what is derived of them.
    An epoch is one iteration over the loader; looks at one batch and validations without gradients are none.

    Args:
        model: whose gradients count.
        optimizer: whose steps count, or several of them: then each one's step is a step, with the norm of its own
            gradients, and ``esper.optimizer.index`` says whose. One of Accelerate's is looked through.
        loader: gives batches. What this returns behaves as the loader; other loaders that are made of the same
            dataset, such as those of Accelerate, are followed too. For samples see ``samples_of``.
        telemetry: a session that is there; else one is started.
        arguments: as of ``start``, for the session that is started.

    Raises:
        InvalidValue: an optimizer or model that is none, or arguments beside a session.
    """
    if not isinstance(model, nn.Module):
        raise InvalidValue("model", f"a {type(model).__name__} is no torch.nn.Module")
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [unwrapped(each) for each in given]
    if not optimizers:
        raise InvalidValue("optimizer", "there is none")
    if telemetry is not None and arguments:
        raise InvalidValue(next(iter(arguments)), "has no effect beside telemetry=: give it to start()")
    loader = of(loader) if is_stand_in(loader) else loader
    _end_earlier([model, loader, *optimizers])
    session = start(**arguments) if telemetry is None else telemetry
    watching = WatchedLoop(model, optimizers, loader, session, is_ours=telemetry is None)
    face = following(Watch, loader, watching.feed, _watching=watching, telemetry=session)
    watching.face = weakref.ref(face)
    return face


def unwrapped(optimizer: object) -> Optimizer:
    """The optimizer itself: Accelerate's wrapper may skip steps, and SAM's makes two for one.

    Raises:
        InvalidValue: it is none.
    """
    for name in ("optimizer", "base_optimizer"):
        if isinstance(inner := getattr(optimizer, name, None), Optimizer):
            return inner
    if not isinstance(optimizer, Optimizer):
        reason = f"a {type(optimizer).__name__} is no torch.optim.Optimizer; if it wraps one, give that"
        raise InvalidValue("optimizer", reason)
    return optimizer
