"""A model's parameters, step after step, without a walk through its modules each time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn


class Parameters:
    """Remembers which parameters a model has, until a module or a parameter is added, removed or replaced.

    In a model of 160 parameters, looking for changes takes a third of the time of a walk. Keeps no strong references:
    neither the model nor a layer that has been replaced lives longer for it.
    """

    def __init__(self) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []
        self._parameters: list[weakref.ref[nn.Parameter]] = []
        self._parts: list[int] = []

    def of(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Returns the model's parameters, each once, as ``model.parameters()`` does."""
        if self._modules and self._modules[0]() is model and self._parts_now() == self._parts:
            known = [each() for each in self._parameters]
            found = [each for each in known if each is not None]
            if len(found) == len(known):  # otherwise a new parameter may have the identity of one that is gone
                return found
        found = list(model.parameters())
        if type(model).parameters is nn.Module.parameters:  # a model's own method may give others in each step
            self._modules = [weakref.ref(each) for each in model.modules()]
            self._parameters = [weakref.ref(each) for each in found]
            self._parts = self._parts_now()
        return found

    def _parts_now(self) -> list[int]:
        """Returns the identities of all modules and parameters within the known modules; nothing if one is gone."""
        parts: list[object] = []
        for known in self._modules:
            module = known()
            if module is None:
                return []
            parts += module._parameters.values()  # noqa: SLF001 - a module has no other quick way
            parts += module._modules.values()  # noqa: SLF001
        return [*map(id, parts)]
