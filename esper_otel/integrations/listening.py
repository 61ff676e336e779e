"""Observing the calls of a method of another library's object without changing the object."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

from esper_otel.record.phases import Phases
from esper_otel.tracebacks import leave_out_caller

_MARK = "_esper_listening"


class PatchedMethod:
    """Observes the calls of one object's method by patching its class, so the object can still be copied and pickled.

    Calls on other objects of the class are ignored, and so are calls that the method makes to its own version in a
    base class. A method that is not a plain function of the class is not observed.

    Args:
        owner: the object.
        name: the name of the method.
        returned: called with the return value of the method.
        called: called with the arguments before the method runs.
        raised: called with an exception that the method raises.
    """

    def __init__(
        self,
        owner: object,
        name: str,
        returned: Callable[[Any], None] | None = None,
        called: Callable[..., None] | None = None,
        raised: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._owner: Callable[[], object] = weakref.ref(owner)
        self._name = name
        self._hears = (called, returned, raised)
        self._is_inside = False
        self._class = next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
        found = None if self._class is None or name in vars(owner) else vars(self._class)[name]
        if isinstance(found, FunctionType):
            setattr(self._class, name, self._around(found))

    def end(self) -> None:
        """Stops observing. Restores the method of the class, unless another library has replaced it since."""
        self._owner = lambda: None
        if self._class is None:
            return
        now = vars(self._class)[self._name]
        while isinstance(listening := getattr(now, _MARK, None), PatchedMethod) and listening.is_over:
            now = now.__wrapped__
        if now is not vars(self._class)[self._name]:
            setattr(self._class, self._name, now)

    @property
    def is_over(self) -> bool:
        """Whether the observed object is gone."""
        return self._owner() is None

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        called, returned, raised = self._hears

        @functools.wraps(original)
        def listening(owner: object, *arguments: Any, **named: Any) -> Any:
            is_heard = not self._is_inside and owner is self._owner()
            try:
                if is_heard:
                    self._is_inside = True
                    _harmless(called, *arguments, **named)
                result = original(owner, *arguments, **named)
            except BaseException as error:
                if is_heard:
                    _harmless(raised, error)
                leave_out_caller(error)
                raise
            finally:
                if is_heard:
                    self._is_inside = False
            if is_heard:
                _harmless(returned, result)
            return result

        setattr(listening, _MARK, self)
        return listening


def timed(
    owner: object, name: str, phases: Phases, phase: str, then: Callable[[], None] | None = None
) -> PatchedMethod:
    """Times the calls of an object's method as a phase.

    Args:
        owner: the object.
        name: the name of the method.
        phases: times the phases.
        phase: the name of the phase.
        then: called after each of them.
    """
    key = object()

    def begin(*_arguments: Any, **_named: Any) -> None:
        phases.enter(phase, key)

    def end(_outcome: object) -> None:
        phases.leave(key)
        if then is not None:
            then()

    return PatchedMethod(owner, name, end, begin, end)


def _harmless(hear: Callable[..., None] | None, *given: Any, **named: Any) -> None:
    """Runs a callback and logs its exceptions, so that they do not reach the training."""
    try:
        if hear is not None:
            hear(*given, **named)
    except Exception:
        logging.getLogger("esper_otel").exception("%s", getattr(hear, "__qualname__", hear))
