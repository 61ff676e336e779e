"""Memory of the training GPU, as reported by CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from esper_otel.captures import Driver, apart_from_captures, cuda_driver
from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.probe import NotYet

_GIB = 1024**3


def cuda_device(device: Callable[[], str | None]) -> int:
    """Returns the index, in PyTorch's numbering, of the training GPU. Does not initialise CUDA.

    Raises:
        ProbeUnavailable: there is no training GPU.
    """
    name = device()
    if name is None:
        raise NotYet("the training device is not known yet")
    kind, _, index = name.partition(":")
    if kind != "cuda":
        raise ProbeUnavailable(f"training runs on {name}")
    torch = sys.modules.get("torch")
    if torch is None:
        raise NotYet("torch is not imported in this process")
    if not torch.cuda.is_initialized():
        raise NotYet("CUDA is not in use in this process")
    return int(index or 0)


class CudaMemory:
    """Used, free and total memory of the training device in GiB, for all processes. Source: cudaMemGetInfo.

    cudaMemGetInfo does not wait for pending work of the device.

    Args:
        device: returns the training device's name, or None while it is unknown.
        driver: loads CUDA's driver library.
    """

    gives: tuple[str, ...] = ("gpu_mem_used_gb", "gpu_mem_free_gb", "esper.device.memory_total_gb")

    def __init__(
        self,
        device: Callable[[], str | None],
        *,
        driver: Driver = cuda_driver,
    ) -> None:
        self._device = device
        self._driver = driver

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        index = cuda_device(self._device)
        import torch

        try:
            with apart_from_captures(self._driver):
                free, total = torch.cuda.mem_get_info(index)
        except (RuntimeError, AssertionError) as error:
            raise ProbeUnavailable(f"CUDA could not report: {str(error).partition(chr(10))[0]}") from error
        return {
            "gpu_mem_used_gb": (total - free) / _GIB,
            "gpu_mem_free_gb": free / _GIB,
            "esper.device.memory_total_gb": total / _GIB,
        }

    def close(self) -> None:
        """See ``Probe``. Nothing to release."""


def cuda_identity(index: int) -> tuple[str | None, str | None]:
    """Returns the UUID and PCI bus id of a GPU, as NVML writes them; None where PyTorch does not report them."""
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    bus = getattr(properties, "pci_bus_id", None)
    place = None
    if bus is not None:
        place = f"{properties.pci_domain_id:08X}:{bus:02X}:{properties.pci_device_id:02X}.0"
    return (None if uuid is None else str(uuid).removeprefix("GPU-")), place


def cuda_name(index: int) -> str:
    """Returns the name of a GPU in PyTorch's numbering, such as ``NVIDIA H200``."""
    import torch

    return str(torch.cuda.get_device_name(index))
