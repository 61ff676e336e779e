"""Follows the batches that a training loop takes, and assigns waits and batches to the steps that use them.

A loop can get its batches in many ways: from the loader itself, from another loader that wraps it (Accelerate's
``prepare`` and ``skip_first_batches``), from generators that prefetch a batch, from threads. Followed are stand-ins
(``esper_otel.record.loaders``) and, while there are listeners, all iterators of PyTorch's DataLoader and of
Accelerate's loaders.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch.utils.data import dataloader

from esper_otel.integrations.patches import Patches
from esper_otel.integrations.samples import samples_of
from esper_otel.log import logger
from esper_otel.record.loaders import Listener, is_stand_in, taking
from esper_otel.tracebacks import leave_out_caller

_FARTHEST_AHEAD = 8


# Returns a number that grows with each operation that autograd records on this thread.
_sequence: Callable[[], int] = getattr(torch._C._autograd, "_get_sequence_nr", lambda: 0)  # noqa: SLF001


class BatchListener(Protocol):
    """Is told when the loop waits for a batch and when it has one."""

    def wait(self) -> None:
        """The loop requests a batch. If the optimizer has stepped, that step is over."""

    def batch(self, samples: int | None = None) -> None:
        """The batch for the next step has arrived; ``samples`` is its size, if known."""

    def no_batch(self) -> None:
        """The requested batch does not exist or could not be loaded."""

    def discard(self) -> None:
        """The batches since the last step were not for training."""

    def discard_last(self) -> None:
        """The last batch was not used."""

    def stop(self) -> None:
        """The loop was left by ``break`` or an exception."""


class _Pass:
    """One iteration over a loader."""

    def __init__(self, taker: object, gone: Callable[[object], None]) -> None:
        self.taker = weakref.ref(taker, gone)
        self.number: int | None = None
        self.has_gotten = False
        self.has_worked = False  # whether the model has run since the first batch
        self.is_unused = False  # whether a batch was taken since the last step
        self.ahead = 0  # number of batches that code in between has prefetched
        self.samples: deque[int | None] = deque()
        self.sequence = 0  # at the last batch
        self.asker: CodeType | None = None  # the code that has requested several batches before the model has run
        self.together = 0  # number of batches since the model has run
        self.counts: list[int] = []  # of the first batches, how many were requested at a time
        self.last: deque[int | None] = deque(maxlen=_FARTHEST_AHEAD)  # numbers of samples

    def hand_out(self) -> int | None:
        """Returns the number of samples of the batch that the loop gets now."""
        return self.samples.popleft() if len(self.samples) > self.ahead else None


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Wraps a method so that its exceptions are logged once and never reach the script."""
    seen = set[str]()

    @functools.wraps(method)
    def guarded(self: Any, *arguments: Any) -> None:
        try:
            method(self, *arguments)
        except Exception as error:  # noqa: BLE001 - see above
            if repr(error) not in seen and len(seen) < _FARTHEST_AHEAD:
                seen.add(repr(error))
                logger.exception("following a loader: %s", method.__name__)

    return guarded


class Feed:
    """Turns the events of loaders into waits and batches. A ``Listener``.

    Threads: any. Only events on the training thread count.

    If iterations are nested, the outermost counts. A batch prefetched by a generator is assigned to the step that uses
    it. An epoch is an iteration with at least one step. For a watched loader, a complete iteration with gradients but
    without a step is an epoch, too. Taking a single batch, or a validation, is not.

    Attributes:
        epoch: number of the iteration that the last step belongs to, from 0.
    """

    def __init__(self, waiting: BatchListener) -> None:
        self.epoch: int = 0
        self._waiting = waiting
        self._passes: dict[int, _Pass] = {}
        self._next_number = 0
        self._asking: _Pass | None = None
        self._current: _Pass | None = None
        self._was_training = False
        self._sequence = 0
        self._thread: int | None = None
        self._asked_on: int | None = None
        self._ahead_of: dict[CodeType, int] = {}  # how far code requests batches ahead, where that is known

    @property
    def is_heard(self) -> bool:
        """Whether batches are requested on the training thread."""
        return self._asked_on is not None

    @property
    def is_open(self) -> bool:
        """Whether an iteration is in progress."""
        return any(self._is_open(each) for each in list(self._passes.values()))

    @property
    def is_training(self) -> bool:
        """Whether the last batch may be for training: gradients were enabled, or a step has followed it."""
        return self._was_training

    @property
    def has_worked(self) -> bool:
        """Whether a model has run since the last batch. If not, the batch was only prefetched."""
        return _sequence() != self._sequence

    @property
    def is_ahead(self) -> bool:
        """Whether the model has not run since the last batch or step. Scaling a loss is one operation of its own."""
        return _sequence() - self._sequence <= 1

    @property
    def has_ahead(self) -> bool:
        """Whether batches were requested ahead of the steps that use them."""
        return self._current is not None and self._current.ahead > 0

    def postpone(self) -> None:
        """The step that begins does not use the last batch, which counts for the next one."""
        if self._current is not None:
            self._current.ahead = 1
            self._current.samples.extend([*self._current.last][-1:])

    @_harmless
    def asks(self, taker: object) -> None:
        """See ``Listener``."""
        thread = threading.get_ident()
        if self._thread is not None and self._thread != thread:
            return
        outer = None if self._asking is None else self._asking.taker()
        if outer is not None and outer is not taker:
            return
        before, now = self._current, self._pass_of(taker)
        self._asking = self._current = now
        self._asked_on = thread
        if now is not before:
            if before is not None and before.is_unused:
                if not self._may_go_on(before):
                    self._waiting.discard()
                elif not self._is_open(before) and not self.has_worked:  # as after a ``break`` at the loop's top
                    self._waiting.discard_last()
        elif now.has_gotten and _sequence() != now.sequence:
            now.has_worked = True
            self._learn(now)
        elif now.has_gotten and not now.has_worked:
            self._look_ahead(now)
        self._waiting.wait()

    @_harmless
    def gets(self, taker: object, batch: object) -> None:
        """See ``Listener``."""
        now = self._asking
        if now is None or now.taker() is not taker:
            return
        self._asking = None
        now.has_gotten = now.is_unused = True
        now.together += 1
        samples = samples_of(batch)
        now.last.append(samples)
        if now.ahead:
            now.samples.append(samples)
            samples = now.hand_out()
        self._sequence = now.sequence = _sequence()
        self._was_training = torch.is_grad_enabled()
        self._waiting.batch(samples)

    @_harmless
    def gets_nothing(self, taker: object) -> None:
        """See ``Listener``."""
        now = self._asking
        if now is None or now.taker() is not taker:
            return
        self._asking = None
        if now.samples:  # prefetched batches remain
            now.ahead -= 1
            self._waiting.batch(now.hand_out())
        else:
            self._waiting.no_batch()
        if now.has_gotten and (now.has_worked or _sequence() != now.sequence) and is_stand_in(taker):
            self._count(now)
        self._passes.pop(id(taker), None)

    def left(self, taker: object) -> None:
        """See ``Listener``."""
        self._leave(id(taker))

    @_harmless
    def steps(self) -> None:
        """The optimizer is about to step. Called on the training thread."""
        self._thread = threading.get_ident()
        if self._asked_on is not None and self._asked_on != self._thread:
            self._waiting.discard()  # another thread fetched the batches; which of them the step uses is unknown
            self._asking = self._current = self._asked_on = None
        for each in self._passes.values():
            each.is_unused = False
        now = self._current
        if now is not None:
            now.is_unused = False
            now.has_worked = self._was_training = True
            self._count(now)
            self.epoch = now.number or 0
            self._sequence = _sequence()

    def is_of_another_thread(self) -> bool:
        """Whether the training thread is alive and is not the current thread."""
        own = threading.get_ident()
        return self._thread not in {None, own} and any(each.ident == self._thread for each in threading.enumerate())

    @_harmless
    def _leave(self, key: int, gone: object = None) -> None:
        """Ends the pass, if ``gone`` is given only that of this reference."""
        over = self._passes.get(key)
        if over is None or (gone is not None and over.taker is not gone):
            return
        del self._passes[key]
        if over is self._current and self._asked_on == threading.get_ident():
            self._waiting.stop()

    def _count(self, now: _Pass) -> None:
        if now.number is None:
            now.number = self._next_number
            self._next_number += 1

    def _pass_of(self, taker: object) -> _Pass:
        known = self._passes.get(id(taker))
        if known is None or known.taker() is not taker:
            if len(self._passes) > _FARTHEST_AHEAD:
                self._passes = {key: each for key, each in self._passes.items() if each.taker() is not None}
            key = id(taker)
            # Iterators without a stand-in do not say that they are left, as by ``break``.
            self._passes[key] = known = _Pass(taker, lambda reference: self._leave(key, reference))
        return known

    def _may_go_on(self, before: _Pass) -> bool:
        """Whether a step may still use the pass's last batches: it goes on, or its gradients add up over its end."""
        return self._was_training and (self._is_open(before) or before.number is not None)

    def _is_open(self, each: _Pass | None) -> bool:
        taker = None if each is None else each.taker()
        return taker is not None and self._passes.get(id(taker)) is each

    def _look_ahead(self, now: _Pass) -> None:
        """Another batch is requested before the model has run: the one before is of the same step, or prefetched.

        Until it is known what the code in between does, generators and iterators are taken to prefetch.
        """
        asker = _asker()
        if asker is None:
            return
        now.asker = asker
        is_iterator = bool(asker.co_flags & inspect.CO_GENERATOR) or asker.co_name == "__next__"
        if now.ahead < self._ahead_of.get(asker, _FARTHEST_AHEAD if is_iterator else 0):
            now.ahead += 1

    def _learn(self, now: _Pass) -> None:
        """Learns from the first steps of a pass how many of the batches requested at first were prefetched.

        Who needs two batches for a step requests two for each; who prefetches one requests two only once.
        """
        together, now.together = now.together, 0
        if now.asker is None or now.asker in self._ahead_of or len(now.counts) > 2:
            return
        now.counts.append(together)
        first, *later = now.counts
        if later and (later[0] == first or (len(later) > 1 and later[0] == later[1] < first)):
            now.ahead = self._ahead_of[now.asker] = first - later[0]
            now.samples = deque([*now.last][len(now.last) - now.ahead :])


def _asker() -> CodeType | None:
    """Returns the code that requests a batch."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the caller
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("esper_otel."):
        frame = frame.f_back
    return None if frame is None else frame.f_code


# -- iterators of loaders without a stand-in ---------------------------------------------------------------


class _LoaderHooks(Patches[tuple[Listener, Callable[[Any], bool]]]):
    """The iterators of all DataLoaders. A follower is a listener, and whether it wants to hear of a dataset."""

    def _patch(self) -> None:
        self.replace(dataloader._BaseDataLoaderIter, "__next__", self._next)  # noqa: SLF001 - called for every batch
        if (accelerate := sys.modules.get("accelerate.data_loader")) is not None:
            for name in ("DataLoaderShard", "DataLoaderDispatcher"):
                if (kind := getattr(accelerate, name, None)) is not None:
                    self.replace(kind, "__iter__", self._iter)

    def _hearing(self, source: Any) -> list[Listener]:
        return [listener for listener, of in self.followers if of(source)]

    def _next(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def following(iterator: Any) -> Any:
            listeners = self._hearing(iterator._dataset)  # noqa: SLF001 - see ``_patch``
            is_new = not iterator._num_yielded  # noqa: SLF001 - persistent workers keep the iterator for all passes
            for listener in listeners:
                if is_new:
                    listener.left(iterator)
                listener.asks(iterator)
            try:
                batch = original(iterator)
            except BaseException as error:
                for listener in listeners:
                    listener.gets_nothing(iterator)
                leave_out_caller(error)
                raise
            for listener in listeners:
                listener.gets(iterator, batch)
            return batch

        return following

    def _iter(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def following(loader: Any) -> Any:
            try:
                iterator = original(loader)
            except BaseException as error:
                leave_out_caller(error)
                raise
            for listener in self._hearing(loader.dataset):
                iterator = taking(iterator, listener)
            return iterator

        return following


_everywhere = _LoaderHooks()


def follow(listener: Listener, of: Callable[[Any], bool] = lambda _dataset: True) -> None:
    """Calls the listener for every DataLoader whose dataset ``of`` accepts, until ``unfollow``."""
    _everywhere.add((listener, of))


def follow_accelerate() -> None:
    """Also follows Accelerate's loaders, after Accelerate has been imported later than ``follow`` was called."""
    _everywhere.patch()


def unfollow(listener: Listener) -> None:
    """Removes the listener. After the last one, restores the methods of PyTorch and Accelerate."""
    _everywhere.remove(lambda each: each[0] is listener)
