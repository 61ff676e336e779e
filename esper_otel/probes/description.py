"""Describes the training device by attributes: which model it is, and which one on its host."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.amd import is_rocm
from esper_otel.probes.cuda import cuda_device, cuda_identity, cuda_name
from esper_otel.probes.nvml import GpuDescription
from esper_otel.probes.probe import NotYet

INFO = "esper.device.info"

Attributes = Mapping[str, str | int]


class Describing(Protocol):
    """Describes a GPU, as ``GpuDescription`` does."""

    def sample(self) -> Mapping[str, Any]:
        """Returns the attributes; raises ProbeUnavailable."""

    def close(self) -> None:
        """Releases what it uses."""


class DeviceDescription:
    """Describes the training device once it is known: a GPU by NVML, or else by PyTorch; a CPU by the system.

    The reading is 1 while ``attributes`` describe the device. It is asked for again only if the device changes.

    Args:
        device: returns the training device's name, or None while it is unknown.
        by_nvml: asks NVML.
        by_torch: asks PyTorch about the GPU with an index in PyTorch's numbering.
        index_of: returns that index.
        root: the folder that contains ``proc``.

    Attributes:
        attributes: what is known of the device.
    """

    gives: tuple[str, ...] = (INFO,)

    def __init__(
        self,
        device: Callable[[], str | None],
        *,
        by_nvml: Describing | None = None,
        by_torch: Callable[[int], Attributes] | None = None,
        index_of: Callable[[Callable[[], str | None]], int] = cuda_device,
        root: Path = Path("/"),
    ) -> None:
        self._device = device
        self._by_nvml = by_nvml or GpuDescription(device)
        self._by_torch = by_torch or described_by_torch
        self._index_of = index_of
        self._root = root
        self._described: str | None = None
        self.attributes: Attributes = {}

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        name = self._device()
        if name is None:
            raise NotYet("the training device is not known yet")
        if name != self._described:
            kind = name.partition(":")[0]
            found = self._of_gpu() if kind == "cuda" else {"hw.type": "cpu" if kind == "cpu" else "gpu"}
            if kind == "cpu" and (model := _cpu_model(self._root)):
                found = {**found, "hw.model": model}
            self.attributes = {"esper.device.id": name, **found}
            self._described = name
        return {INFO: 1.0}

    def _of_gpu(self) -> Attributes:
        index = self._index_of(self._device)
        try:
            return self._by_nvml.sample()
        except NotYet:
            raise
        except ProbeUnavailable:
            return self._by_torch(index)

    def close(self) -> None:
        """See ``Probe``."""
        self._by_nvml.close()


def described_by_torch(index: int, environ: Mapping[str, str] = os.environ) -> Attributes:
    """Returns what PyTorch knows of a GPU in its numbering, in NVML's spelling.

    PyTorch leaves out the beginning of a UUID. It is that of a GPU unless the variable names MIG instances.
    """
    uuid, bus_id = cuda_identity(index)
    found: dict[str, str | int] = {"hw.type": "gpu", "hw.vendor": "AMD" if is_rocm() else "NVIDIA"}
    found["hw.model"] = cuda_name(index)
    if uuid is not None:
        is_split = "MIG-" in environ.get("CUDA_VISIBLE_DEVICES", "")
        found["hw.id"] = f"{'MIG' if is_split else 'GPU'}-{uuid}"
    if bus_id is not None:
        found["esper.device.pci_bus_id"] = bus_id
    return found


def _cpu_model(root: Path) -> str:
    """Returns the name of the CPU; empty if the system does not report it."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor()
