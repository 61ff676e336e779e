"""Captures: CUDA graphs that the training captures must not meet calls of ours."""

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
    """CUDA's driver library.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL("libcuda.so.1")


@contextmanager
def apart_from_captures(driver: Driver = cuda_driver) -> Iterator[None]:
    """Keeps this thread's calls from ending a CUDA graph capture on another thread.

    While a capture in mode "global" (PyTorch's default) is open, an unsafe call of *any* thread, such as asking for an
    event, fails and spoils the capture. CUDA does not say whether cudaMemGetInfo is one. A thread in mode "thread
    local" is exempt (CUDA driver API 10.1 and later, cuThreadExchangeStreamCaptureMode).
    """
    try:
        exchange = driver().cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):  # a PyTorch without NVIDIA's driver: ROCm
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
    """What would be done once, at the capture, and not at each replay, is a mistake.

    Raises:
        WrongState: the current stream captures a CUDA graph.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise WrongState(f"{what} inside a CUDA graph capture: do it after replay(), when the graph's tensors are new")
