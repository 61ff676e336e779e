"""Records an unmodified training script by following its optimizers and loaders."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from esper_otel.log import logger
from esper_otel.session.ending import follow_exits

if TYPE_CHECKING:
    from esper_otel.integrations.loader import Feed
    from esper_otel.integrations.steps import Steps
    from esper_otel.session.telemetry import Telemetry


def attach(log: str) -> None:
    """Follows the script's optimizers and loaders as soon as it has imported torch.

    Args:
        log: a file for the telemetry's log messages; empty for none. The script's output streams are not used.
    """
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.NullHandler())
    if log:
        logger.addHandler(logging.FileHandler(log))
    follow_exits()
    script = Script()
    sys.meta_path.insert(0, _OnImport("torch", script.follow))
    sys.meta_path.insert(0, _OnImport("accelerate.data_loader", script.follow_accelerate))
    sys.meta_path.insert(0, _OnImport("accelerate.accelerator", script.follow_saves))
    atexit.register(script.say_if_idle)


class _OnImport(MetaPathFinder):
    """Calls a function when a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``MetaPathFinder``."""
        del path, target
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute, then = spec.loader.exec_module, self._then

            def execute_and_follow(module: ModuleType) -> None:
                execute(module)
                then()

            spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign] # on this loader only
        return spec


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Wraps a method so that its exceptions are logged and never reach the script."""

    @functools.wraps(method)
    def guarded(*arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:  # noqa: BLE001 - logged with its traceback
            logger.exception("esper-otel run: %s", method.__name__)

    return guarded


class Script:
    """Follows all optimizers and DataLoaders of the process. Threads: the training thread.

    A step lasts from a batch to the next request for one, with an optimizer step in between. Batches for validation
    are not part of it. Without a DataLoader, or if another thread takes its batches, a step lasts from the end of one
    optimizer step to the end of the next.
    """

    def __init__(self) -> None:
        self._telemetry: Telemetry | None = None
        self._steps: Steps | None = None
        self._feed: Feed | None = None
        self._last_end_s: float | None = None

    @_harmless
    def follow(self) -> None:
        """Installs PyTorch's global optimizer hooks and follows the iterators of all DataLoaders."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        from esper_otel.integrations.loader import Feed, follow

        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(lambda *_: self._after_step())
        self._feed = Feed(self)
        follow(self._feed)

    @_harmless
    def follow_accelerate(self) -> None:
        """Follows Accelerate's loaders instead, since they prefetch a batch."""
        if self._feed is not None:
            from esper_otel.integrations.loader import follow_accelerate

            follow_accelerate()

    @_harmless
    def follow_saves(self) -> None:
        """Times the checkpoints that Accelerate saves."""
        from esper_otel.integrations.saves import follow_accelerate_saves

        follow_accelerate_saves()

    @_harmless
    def say_if_idle(self) -> None:
        """Logs why nothing was recorded."""
        if self._steps is None:
            logger.info(
                "no batch and no optimizer step was seen in this process, and child processes are not followed: "
                "torchrun --no-python esper-otel run SCRIPT follows each worker"
            )

    # -- ``loader.BatchListener``; the feed keeps faults from the script -----------------------------------------

    def wait(self) -> None:
        """Ends a step in which the optimizer has stepped."""
        self._started().wait()

    def batch(self, samples: int | None = None) -> None:
        """See ``loader.Waiting``."""
        self._started().batch(samples)

    def no_batch(self) -> None:
        """See ``loader.Waiting``."""
        self._started().loop.no_batch()

    def discard(self) -> None:
        """See ``loader.Waiting``."""
        self._started().loop.discard()

    def discard_last(self) -> None:
        """See ``loader.Waiting``."""
        self._started().loop.discard_last()

    def stop(self) -> None:
        """See ``loader.Waiting``."""
        self._started().loop.stop()

    # -- the optimizers and the end ------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            return self._started().before(optimizer, arguments, named)
        except Exception:  # noqa: BLE001 - logged with its traceback
            logger.exception("esper-otel run: before a step")
            return None

    @_harmless
    def _after_step(self) -> None:
        steps = self._started()
        steps.after()
        if self._feed is None or not self._feed.is_heard:
            now_s, before_s = time.perf_counter(), self._last_end_s
            self._last_end_s = now_s
            if before_s is not None:
                steps.loop.put({"step_latency_ms": (now_s - before_s) * 1e3})
            steps.end()

    def _started(self) -> Steps:
        """Returns the steps. The first call, at the first batch or step, starts the session."""
        if self._steps is None:
            from esper_otel.integrations.loop import Loop
            from esper_otel.integrations.saves import follow_saves
            from esper_otel.integrations.steps import Steps
            from esper_otel.session.start import start

            assert self._feed is not None
            logger.disabled = False  # the script's logging.config may have disabled all loggers that it does not name
            self._telemetry = start()
            self._steps = Steps(Loop(self._telemetry), self._feed)
            follow_saves(self._steps.loop.phases)
            atexit.register(self._finish)
        return self._steps

    @_harmless
    def _finish(self) -> None:
        from esper_otel.session.start import has_died

        steps = self._started()
        steps.say_if_unseen()
        if not has_died():
            steps.finish(is_well=True)
        elif steps.loop.has_stepped or (self._feed is not None and self._feed.is_training):
            steps.finish(is_well=False)
