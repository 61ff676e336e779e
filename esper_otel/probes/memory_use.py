"""Memory of this process, of its host, and of PyTorch's allocator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.cgroup import memory_limits
from esper_otel.probes.cuda import cuda_device
from esper_otel.probes.machine import loaded_psutil
from esper_otel.probes.probe import NotYet

_GIB = 1024**3


class ProcessMemory:
    """Resident memory of this process, and memory and swap of the host or container, in GiB. Source: psutil.

    In a container with a limit, used and available memory are those of the group with the least available.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """

    gives: tuple[str, ...] = (
        "esper.memory.process_gb",
        "esper.memory.host_used_gb",
        "esper.memory.host_available_gb",
        "esper.memory.swap_used_gb",
    )
    once = True

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._root = root

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        psutil = loaded_psutil()
        host = psutil.virtual_memory()
        total, available = min(
            [(host.total, host.available), *((limit.total, limit.available) for limit in memory_limits(self._root))],
            key=lambda each: each[1],
        )
        used = host.total - host.available if total == host.total else total - available
        numbers = (psutil.Process().memory_info().rss, used, available, psutil.swap_memory().used)
        return {name: number / _GIB for name, number in zip(self.gives, numbers, strict=True)}

    def close(self) -> None:
        """See ``Probe``. Nothing to release."""


class TorchMemory:
    """Memory of PyTorch's allocator on the training device, in GiB, and its allocation retries.

    Reading the allocator's counters does not wait for the device. On Apple's GPUs (MPS) PyTorch has only the first two;
    this was written from its documentation and has not been tried on such a machine.

    Args:
        device: returns the training device's name, or None while it is unknown.
    """

    gives: tuple[str, ...] = (
        "esper.memory.torch_allocated_gb",
        "esper.memory.torch_reserved_gb",
        "esper.memory.torch_peak_gb",
        "esper.memory.torch_retries",
    )
    once = True

    def __init__(self, device: Callable[[], str | None]) -> None:
        self._device = device

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        torch: Any = sys.modules.get("torch")
        if (self._device() or "").partition(":")[0] == "mps":
            if torch is None:
                raise NotYet("torch is not imported in this process")
            numbers = [torch.mps.current_allocated_memory() / _GIB, torch.mps.driver_allocated_memory() / _GIB]
            return dict(zip(self.gives, numbers, strict=False))
        index = cuda_device(self._device)
        try:
            found = torch.cuda.memory_stats(index)
        except (RuntimeError, AssertionError) as error:
            raise ProbeUnavailable(f"PyTorch could not report: {str(error).partition(chr(10))[0]}") from error
        if not found:
            raise ProbeUnavailable("PyTorch's allocator reports nothing: another allocator is in use")
        names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "allocated_bytes.all.peak")
        numbers = [*(found[name] / _GIB for name in names), float(found["num_alloc_retries"])]
        return dict(zip(self.gives, numbers, strict=True))

    def close(self) -> None:
        """See ``Probe``. Nothing to release."""
