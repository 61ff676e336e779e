"""Utilisation and temperature of the training GPU, from NVML."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.cuda import cuda_device, cuda_identity


class GpuUtilisation:
    """Share of time in which the training device ran a kernel, in percent, and its temperature.

    NVML numbers GPUs otherwise than CUDA: the device is found by its UUID, else by its place on the PCI bus, else by
    what ``CUDA_VISIBLE_DEVICES`` says, never by its index alone on a machine with several GPUs.

    Args:
        device: the training device's name; None while it is not known.
        identify: gives UUID and PCI bus id of a GPU in PyTorch's numbering.
        nvml: the module ``pynvml``; imported when it is needed.
    """

    gives = ("gpu_util_percent",)

    def __init__(
        self,
        device: Callable[[], str | None],
        *,
        index_of: Callable[[Callable[[], str | None]], int] = cuda_device,
        identify: Callable[[int], tuple[str | None, str | None]] = cuda_identity,
        nvml: Any = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._device = device
        self._index_of = index_of
        self._identify = identify
        self._nvml = nvml
        self._environ = environ
        self._is_ready = False
        self._handle: tuple[int, Any] | None = None

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        index = self._index_of(self._device)
        nvml = self._loaded()
        try:
            if not self._is_ready:
                nvml.nvmlInit()
                self._is_ready = True
            if self._handle is None or self._handle[0] != index:
                self._handle = (index, self._found(nvml, index))
            handle = self._handle[1]
            if self._is_mig(nvml, handle):
                raise ProbeUnavailable("the training device is a MIG instance: NVML tells no utilisation of those")
            readings = {"gpu_util_percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)}
            with contextlib.suppress(nvml.NVMLError):
                temperature = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
                readings["esper.device.temperature_celsius"] = float(temperature)
        except nvml.NVMLError as error:
            self._forget(nvml)
            raise ProbeUnavailable(f"NVML: {error}") from error
        return readings

    def _loaded(self) -> Any:
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError as error:
                raise ProbeUnavailable("pynvml is not installed: pip install nvidia-ml-py") from error
        return self._nvml

    def _forget(self, nvml: Any) -> None:
        """Begins anew at the next sample: the driver may have been loaded again."""
        self._handle = None
        if self._is_ready:
            self._is_ready = False
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _found(self, nvml: Any, index: int) -> Any:
        uuid, bus_id = self._identify(index)
        if uuid is not None:
            for prefix in ("GPU-", "MIG-"):
                with contextlib.suppress(nvml.NVMLError):
                    return nvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
        visible = [entry.strip() for entry in self._environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        named = visible[index] if index < len(visible) else None
        if named is not None and named.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(named)
        if bus_id is not None:
            with contextlib.suppress(nvml.NVMLError):
                return nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        if named is not None and named.startswith("GPU-"):
            return self._by_prefix(nvml, named)
        if nvml.nvmlDeviceGetCount() == 1:
            return nvml.nvmlDeviceGetHandleByIndex(0)
        raise ProbeUnavailable(f"cannot tell which of several GPUs is cuda:{index}: it has no UUID in this PyTorch")

    @staticmethod
    def _by_prefix(nvml: Any, named: str) -> Any:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        fitting = [handle for handle in handles if str(nvml.nvmlDeviceGetUUID(handle)).startswith(named)]
        if len(fitting) != 1:
            raise ProbeUnavailable(f"CUDA_VISIBLE_DEVICES names {named}, which fits {len(fitting)} GPUs")
        return fitting[0]

    @staticmethod
    def _is_mig(nvml: Any, handle: Any) -> bool:
        try:
            return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
        except nvml.NVMLError:  # a driver that does not know MIG
            return False
