"""Records an unmodified training script by following its optimizers and loaders."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from esper_otel.errors import EsperOtelError
from esper_otel.log import logger
from esper_otel.session.ending import follow_exits, live_sessions

if TYPE_CHECKING:
    from esper_otel.integrations.loader import Feed
    from esper_otel.integrations.steps import OptimizerSteps
    from esper_otel.session.telemetry import Telemetry

# The process whose steps are recorded, for the instrumentor of processes that it starts.
FOLLOWED = "ESPER_OTEL_FOLLOWED"


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
    atexit.register(follow_process().say_if_idle)


def follow_process() -> Script:
    """Follows this process's optimizers and loaders from the import of torch on. Later calls return the same object."""
    if not _following:
        follow_exits()
        script = Script()
        _following.append(script)
        _on_import("torch", script.follow)
        _on_import("accelerate.data_loader", script.follow_accelerate)
        _on_import("accelerate.accelerator", script.follow_saves)
    return _following[0]


_following: list[Script] = []


def _on_import(name: str, then: Callable[[], None]) -> None:
    """Calls the function when the module is imported; at once if it has been."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _ImportHook(name, then))


class _ImportHook(MetaPathFinder):
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

    Attributes:
        marks_children: whether processes that this one starts are marked as parts of what is recorded.
    """

    def __init__(self) -> None:
        self.marks_children: bool = False
        self._telemetry: Telemetry | None = None
        self._steps: OptimizerSteps | None = None
        self._feed: Feed | None = None
        self._last_end_s: float | None = None
        self._hooks: list[Any] = []
        self._is_idle = False
        self._starting = threading.RLock()

    @_harmless
    def follow(self) -> None:
        """Installs PyTorch's global optimizer hooks and follows the iterators of all DataLoaders."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        from esper_otel.integrations.loader import Feed, follow

        if self._is_idle:
            return
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(lambda *_: self._after_step()),
        ]
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
    def unfollow(self) -> None:
        """Removes what ``follow`` has installed, and ends the session."""
        self._stand_aside()
        if self._steps is not None:
            from esper_otel.integrations.saves import unfollow_saves

            self._finish()
            atexit.unregister(self._finish)
            unfollow_saves(self._steps.loop.phases)
            self._steps.loop.parts.close()
        _following.clear()

    def _stand_aside(self) -> None:
        """Follows nothing any more."""
        self._is_idle = True
        for hook in self._hooks:
            hook.remove()
        if self._feed is not None:
            from esper_otel.integrations.loader import unfollow

            unfollow(self._feed)

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
        if steps := self._started():
            steps.wait()

    def batch(self, samples: int | None = None) -> None:
        """See ``loader.Waiting``."""
        if steps := self._started():
            steps.batch(samples)

    def no_batch(self) -> None:
        """See ``loader.Waiting``."""
        if steps := self._started():
            steps.loop.no_batch()

    def discard(self) -> None:
        """See ``loader.Waiting``."""
        if steps := self._started():
            steps.loop.discard()

    def discard_last(self) -> None:
        """See ``loader.Waiting``."""
        if steps := self._started():
            steps.loop.discard_last()

    def stop(self) -> None:
        """See ``loader.Waiting``."""
        if steps := self._started():
            steps.loop.stop()

    # -- the optimizers and the end ------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            steps = self._started()
            return steps.before(optimizer, arguments, named) if steps else None
        except Exception:  # noqa: BLE001 - logged with its traceback
            logger.exception("esper-otel run: before a step")
            return None

    @_harmless
    def _after_step(self) -> None:
        steps = self._started()
        if steps is None:
            return
        steps.after()
        if self._feed is None or not self._feed.is_heard:
            now_s, before_s = time.perf_counter(), self._last_end_s
            self._last_end_s = now_s
            if before_s is not None:
                steps.loop.put({"step_latency_ms": (now_s - before_s) * 1e3})
            steps.end()

    def _started(self) -> OptimizerSteps | None:
        """Returns the steps. The first call, at the first batch or step, starts the session.

        Returns None if the script records itself, or if the settings are wrong; nothing is followed from then on.
        """
        if self._steps is None and not self._is_idle:
            with self._starting:
                self._start_once()
        return self._steps

    def _start_once(self) -> None:
        """Threads: any; a script may train several models at once, which are recorded in one session."""
        if self._steps is None and not self._is_idle:
            logger.disabled = False  # the script's logging.config may have disabled all loggers that it does not name
            if live_sessions():
                logger.info("the script has a session of its own, so its loaders and optimizers are not followed")
                self._stand_aside()
                return
            try:
                self._start()
            except EsperOtelError as error:
                logger.warning("nothing is recorded: %s", error)
                self._stand_aside()

    def _start(self) -> None:
        from esper_otel.integrations.loop import Loop
        from esper_otel.integrations.saves import follow_saves
        from esper_otel.integrations.steps import OptimizerSteps
        from esper_otel.session.start import start

        assert self._feed is not None
        self._telemetry = start()
        self._steps = OptimizerSteps(Loop(self._telemetry), self._feed)
        follow_saves(self._steps.loop.phases)
        if self.marks_children:
            os.environ[FOLLOWED] = str(os.getpid())
        atexit.register(self._finish)

    @_harmless
    def _finish(self) -> None:
        from esper_otel.session.ending import has_died

        steps = self._steps
        if steps is None:
            return
        steps.say_if_unseen()
        if not has_died():
            steps.finish(is_well=True)
        elif steps.loop.has_stepped or (self._feed is not None and self._feed.is_training):
            steps.finish(is_well=False)
