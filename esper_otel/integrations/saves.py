"""Times the checkpoints that Accelerate saves, under ``watch`` and ``esper-otel run``, as phases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from esper_otel.integrations.patches import Patches
from esper_otel.record.phases import Phases
from esper_otel.tracebacks import leave_out_caller

_NAMES = ("save_state", "save_model")


class _Saves(Patches[Phases]):
    """The methods of ``Accelerator`` that save checkpoints."""

    def _patch(self) -> None:
        accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
        if accelerator is not None:
            for name in _NAMES:
                self.replace(accelerator, name, self._around)

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def saving(*arguments: Any, **named: Any) -> Any:
            key, followers = object(), self.followers
            for phases in followers:
                phases.enter("checkpoint", key)
            try:
                return original(*arguments, **named)
            except BaseException as error:
                leave_out_caller(error)
                raise
            finally:
                for phases in followers:
                    phases.leave(key)

        return saving


_saves = _Saves()


def follow_saves(phases: Phases) -> None:
    """Times Accelerate's checkpoints until ``unfollow_saves``."""
    _saves.add(phases)


def follow_accelerate_saves() -> None:
    """Also times them after Accelerate has been imported later than ``follow_saves`` was called."""
    _saves.patch()


def unfollow_saves(phases: Phases) -> None:
    """Ends it. After the last one, Accelerate's methods are restored."""
    _saves.remove(lambda each: each is phases)
