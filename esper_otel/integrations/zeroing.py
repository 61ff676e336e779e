"""Observes calls of ``zero_grad(set_to_none=False)``.

Whether a gradient has been set to zero or has grown by another batch cannot be seen from the gradient itself.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# Called with the optimizer or the module whose gradients are zero now.
Zeroed = Callable[[Any], None]


class _Patches:
    """Replaces ``zero_grad`` of ``Optimizer`` and ``Module``, as long as there are listeners."""

    def __init__(self) -> None:
        self._listeners: list[Zeroed] = []
        self._replaced: list[tuple[type, Any, Any]] = []

    def add(self, listener: Zeroed) -> None:
        self._listeners = [*self._listeners, listener]
        if not self._replaced:
            for kind in (Optimizer, nn.Module):
                original = kind.zero_grad
                ours = functools.wraps(original)(self._around(original))
                kind.zero_grad = ours  # type: ignore[method-assign] # until the last listener is gone
                self._replaced.append((kind, original, ours))

    def remove(self, listener: Zeroed) -> None:
        self._listeners = [each for each in self._listeners if each != listener]
        if not self._listeners:
            for kind, original, ours in self._replaced:
                if vars(kind)["zero_grad"] is ours:  # otherwise another library has replaced it since
                    kind.zero_grad = original  # type: ignore[attr-defined]
            self._replaced = []

    def forget(self) -> None:
        """Removes all listeners, in a forked child."""
        self._listeners = []

    def _around(self, original: Callable[..., None]) -> Callable[..., None]:
        def zero_grad(owner: Any, *arguments: Any, **named: Any) -> None:
            original(owner, *arguments, **named)
            if (
                not (arguments[0] if arguments else named.get("set_to_none", True))
                and not torch.compiler.is_compiling()
            ):
                for listener in self._listeners:
                    try:
                        listener(owner)
                    except Exception:
                        logging.getLogger("esper_otel").exception("following zero_grad")

        return zero_grad


_patches = _Patches()
os.register_at_fork(after_in_child=_patches.forget)


def follow(listener: Zeroed) -> None:
    """Calls the listener after each ``zero_grad(set_to_none=False)`` of any optimizer or module, until ``unfollow``."""
    _patches.add(listener)


def unfollow(listener: Zeroed) -> None:
    """Removes the listener. After the last one, restores PyTorch's methods."""
    _patches.remove(listener)
