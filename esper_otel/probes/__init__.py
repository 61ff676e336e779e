"""Probes: hardware readings at their own pace, off the training thread."""

from __future__ import annotations

from collections.abc import Callable

from esper_otel.probes.probe import Probe


def host_and_device_probes(device: Callable[[], str | None]) -> list[Probe]:
    """The probes of a session; ``device`` gives the training device's PyTorch name, None while it is not known."""
    from esper_otel.probes.cuda import CudaMemory
    from esper_otel.probes.machine import HostCpu, HostMemory
    from esper_otel.probes.nvml import GpuTemperature, GpuUtilisation

    return [HostCpu(), HostMemory(device), CudaMemory(device), GpuUtilisation(device), GpuTemperature(device)]
