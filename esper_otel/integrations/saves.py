"""Times the checkpoints that Accelerate saves, under ``watch`` and ``esper-otel run``, as phases."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from esper_otel import unix
from esper_otel.record.phases import Phases

_NAMES = ("save_state", "save_model")


class _Saves:
    """Patches the methods of ``Accelerator`` that save checkpoints, as long as there are sessions to tell."""

    def __init__(self) -> None:
        self._followers: list[Phases] = []
        self._replaced: list[tuple[type, str, Any, Any]] = []

    def add(self, phases: Phases) -> None:
        self._followers = [*self._followers, phases]
        self.patch()

    def patch(self) -> None:
        """Patches Accelerate, if it has been imported and anybody is to be told."""
        accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
        if accelerator is None or self._replaced or not self._followers:
            return
        for name in _NAMES:
            original = vars(accelerator).get(name)
            if original is not None:
                ours = self._around(original)
                setattr(accelerator, name, ours)
                self._replaced.append((accelerator, name, original, ours))

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def saving(*arguments: Any, **named: Any) -> Any:
            key, followers = object(), self._followers
            for phases in followers:
                phases.enter("checkpoint", key)
            try:
                return original(*arguments, **named)
            finally:
                for phases in followers:
                    phases.leave(key)

        return saving

    def remove(self, phases: Phases) -> None:
        self._followers = [each for each in self._followers if each is not phases]
        if not self._followers:
            for kind, name, original, ours in self._replaced:
                if vars(kind).get(name) is ours:
                    setattr(kind, name, original)
            self._replaced = []

    def forget(self) -> None:
        """Removes all followers, in a forked child."""
        self._followers = []


_saves = _Saves()
unix.at_fork(after_in_child=_saves.forget)


def follow_saves(phases: Phases) -> None:
    """Times Accelerate's checkpoints until ``unfollow_saves``."""
    _saves.add(phases)


def follow_accelerate_saves() -> None:
    """Also times them after Accelerate has been imported later than ``follow_saves`` was called."""
    _saves.patch()


def unfollow_saves(phases: Phases) -> None:
    """Ends it. After the last one, Accelerate's methods are restored."""
    _saves.remove(phases)
