"""Keeps calls of this package from disturbing CUDA graph captures of the training."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

from esper_otel.errors import WrongState

Driver: TypeAlias = Callable[[], Any]
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


@cache
def cuda_driver() -> Any:
    """Loads CUDA's driver library.

    Raises:
        OSError: there is no such library.
    """
    return ctypes.CDLL("libcuda.so.1")


@contextmanager
def apart_from_captures(driver: Driver = cuda_driver) -> Iterator[None]:
    """Keeps this thread's calls from invalidating a CUDA graph capture on another thread.

    During a capture in the mode "global" (PyTorch's default), an unsafe call on *any* thread, such as querying an
    event, fails and invalidates the capture. CUDA's documentation does not state whether cudaMemGetInfo is unsafe. A
    thread in the mode "thread local" is exempt (cuThreadExchangeStreamCaptureMode, CUDA driver API 10.1 and later).
    """
    try:
        exchange = driver().cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):  # PyTorch without NVIDIA's driver: ROCm
        yield
        return
    mode = ctypes.c_int(_THREAD_LOCAL)
    has_changed = exchange(ctypes.byref(mode)) == 0
    try:
        yield
    finally:
        if has_changed:
            exchange(ctypes.byref(mode))


def check_no_capture(what: str) -> None:
    """Rejects a call during a CUDA graph capture: it would take effect once, at the capture, and not at each replay.

    Raises:
        WrongState: the current stream is capturing a CUDA graph.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise WrongState(f"{what} inside a CUDA graph capture: do it after replay(), when the graph's tensors are new")
