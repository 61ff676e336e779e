"""Threads of the operating system, also where gevent or eventlet has put greenlets in their place.

A greenlet that waits in gRPC, or for a disk, holds up every other one, and with them the training loop.
"""

from __future__ import annotations

import _thread
import functools
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any


def threads() -> Any:
    """The module ``threading`` as Python has it; asked for when something starts, since patching may come late."""
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return eventlet.original("threading")
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return _unpatched()
    return threading


def has_greenlet_sockets() -> bool:
    """Whether sockets are eventlet's, which threads cannot share; gevent's can be used from any thread."""
    eventlet: Any = sys.modules.get("eventlet.patcher")
    return eventlet is not None and bool(eventlet.is_monkey_patched("socket"))


@functools.cache
def _unpatched() -> ModuleType:
    """A copy of ``threading`` over what ``_thread`` had before gevent changed it."""
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
