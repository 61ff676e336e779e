"""Operating system threads, and an event to wake them, even if gevent or eventlet has replaced threads by greenlets.

A greenlet that waits in gRPC or for a disk blocks all other greenlets, including the training loop.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import importlib.util
import sys
import threading
from _queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any


def threads() -> Any:
    """Returns the original module ``threading``. Call it when a thread is needed, since patching may happen late."""
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return eventlet.original("threading")
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return _unpatched()
    return threading


def has_greenlet_sockets() -> bool:
    """Whether sockets are eventlet's, which threads cannot share. Gevent's sockets work in any thread."""
    eventlet: Any = sys.modules.get("eventlet.patcher")
    return eventlet is not None and bool(eventlet.is_monkey_patched("socket"))


@functools.cache
def _unpatched() -> ModuleType:
    """Returns a copy of ``threading`` that uses the functions that ``_thread`` had before gevent patched it."""
    gevent: Any = sys.modules["gevent.monkey"]
    original = ModuleType("_thread")
    for name in dir(_thread):
        try:
            value = gevent.get_original("_thread", name)
        except AttributeError:
            continue
        setattr(original, name, value)
    spec = importlib.util.find_spec("threading")
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    patched = sys.modules["_thread"]
    sys.modules["_thread"] = original
    try:
        spec.loader.exec_module(copy)
    finally:
        sys.modules["_thread"] = patched
    return copy


class Bell:
    """An event for one waiting thread, safe to set in a signal handler because it has no lock.

    Setting a ``threading.Event`` in a handler deadlocks if the signal interrupts code that is just setting it.
    """

    def __init__(self) -> None:
        self._rung: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wakes the waiting thread, or the next one that waits."""
        if self._rung.empty():
            self._rung.put(None)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until ``set`` has been called since the last wait, or until the timeout."""
        with contextlib.suppress(Empty):
            self._rung.get(timeout=timeout_s)

    def clear(self) -> None:
        """Clears the event."""
        with contextlib.suppress(Empty):
            while True:
                self._rung.get(block=False)
