"""Measures parts of a step: by the host's clock, or by events of a CUDA device, which are resolved later."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from esper_otel.captures import check_no_capture
from esper_otel.errors import WrongState
from esper_otel.record.device import CopyTiming
from esper_otel.record.values import CopyTime

if TYPE_CHECKING:
    from esper_otel.record.step import Step


class Timer(Protocol):
    """Marks moments and measures between two of them."""

    def mark(self) -> Any:
        """Returns this moment; None if it cannot be told."""

    def between(self, start: Any, end: Any) -> CopyTime | float:
        """Returns the milliseconds between two moments, or what knows them later."""


class HostTimer:
    """The host's clock, for training on the CPU."""

    def mark(self) -> float:
        """See ``Timer``."""
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        """See ``Timer``."""
        return (end - start) * 1e3


class NoTimer:
    """Measures nothing: enrichment is off, or it is not known yet on which device the training runs."""

    def mark(self) -> None:
        """See ``Timer``."""

    def between(self, start: None, end: None) -> float:
        """See ``Timer``."""
        raise NotImplementedError


class CudaTimer:
    """Events on a CUDA device's current stream, which never make the host wait. Not proven on every driver.

    Args:
        device: the device's name.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def mark(self) -> Any:
        """See ``Timer``; None while a CUDA graph is being captured, or if the device has failed."""
        torch = sys.modules["torch"]
        try:
            check_no_capture("parts of a step are timed")
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        except (RuntimeError, WrongState):
            return None
        return event

    def between(self, start: Any, end: Any) -> CopyTime:
        """See ``Timer``."""
        return CopyTiming(start, end)


HOST, NOTHING = HostTimer(), NoTimer()


def timer_for(device: str, *, enriched: bool) -> Timer:
    """Returns what measures parts of steps.

    Args:
        device: name of the device that trains, or its type; empty if it is not known.
        enriched: whether events of the device may be used.
    """
    if device.startswith("cuda"):
        torch = sys.modules.get("torch")
        return CudaTimer(device) if enriched and torch is not None and torch.cuda.is_initialized() else NOTHING
    if device:
        return HOST if device.startswith("cpu") else NOTHING
    torch = sys.modules.get("torch")
    return NOTHING if torch is not None and torch.cuda.is_initialized() else HOST


class TimedPart:
    """``with now.part(name):`` on a CUDA device."""

    __slots__ = ("_metric", "_start", "_step", "_timer")

    def __init__(self, step: Step, metric: str, timer: Timer) -> None:
        self._step = step
        self._metric = metric
        self._timer = timer

    def __enter__(self) -> None:
        self._start = self._timer.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._timer.mark()
        if self._start is not None and end is not None:
            timing = self._timer.between(self._start, end)
            if not isinstance(timing, float):
                self._step._hold_part(self._metric, timing)  # noqa: SLF001 - a part of the step
