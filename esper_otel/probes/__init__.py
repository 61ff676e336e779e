"""Probes, which read hardware at their own intervals in threads of their own."""

from __future__ import annotations

from collections.abc import Callable

from esper_otel.probes.probe import Probe


def host_and_device_probes(device: Callable[[], str | None]) -> list[Probe]:
    """Returns the probes of a session. ``device`` returns the training device's PyTorch name, or None if unknown."""
    from esper_otel.probes.amd import AmdGpu
    from esper_otel.probes.cuda import CudaMemory
    from esper_otel.probes.installed import installed_probes
    from esper_otel.probes.machine import HostCpu, HostMemory
    from esper_otel.probes.memory_use import ProcessMemory, TorchMemory
    from esper_otel.probes.nvml import GpuTemperature, GpuUtilisation

    return [
        *(HostCpu(), HostMemory(device), ProcessMemory()),
        *(CudaMemory(device), GpuUtilisation(device), GpuTemperature(device), AmdGpu(device), TorchMemory(device)),
        *installed_probes(device),
    ]
