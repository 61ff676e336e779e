"""Utilisation and temperature of the training GPU, as reported by NVML."""

from __future__ import annotations

import contextlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.cuda import cuda_device, cuda_identity

# Reasons by the name of pynvml's exception class. For other exceptions, NVML's own text is shown.
_IN_PLAIN_WORDS = {
    "NVMLError_LibraryNotFound": "no NVIDIA driver on this machine: NVML's library was not found",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is not loaded",
    "NVMLError_LibRmVersionMismatch": "the NVIDIA driver and NVML's library are of different versions: "
    "the driver was updated but not reloaded",
    "NVMLError_NoPermission": "this process has no permission to query the NVIDIA driver",
    "NVMLError_GpuIsLost": "the GPU is lost: it no longer answers on the bus",
    "NVMLError_GpuNotFound": "the NVIDIA driver finds no GPU",
    "NVMLError_NotFound": "the NVIDIA driver does not know the training device",
    "NVMLError_ResetRequired": "the GPU needs a reset",
    "NVMLError_NotSupported": "the GPU does not report it",
    "NVMLError_FunctionNotFound": "the NVIDIA driver is too old to report it",
    "NVMLError_InsufficientPower": "the GPU has no power: its cables are not attached properly",
    "NVMLError_OperatingSystem": "the operating system blocks the NVIDIA driver's access to the GPU",
    "NVMLError_Timeout": "the NVIDIA driver did not answer in time",
}


class _GpuProbe(ABC):
    """Queries NVML about the training GPU.

    NVML numbers GPUs differently from CUDA. So the device is found by its UUID, or else by its PCI bus id, or else by
    ``CUDA_VISIBLE_DEVICES``. Its number is used only if CUDA also numbers GPUs in the order of the PCI bus.

    Args:
        device: returns the training device's name, or None while it is unknown.
        index_of: returns the index of that device in PyTorch's numbering.
        identify: returns the UUID and PCI bus id of a GPU in PyTorch's numbering.
        nvml: the module ``pynvml``; imported when needed.
        environ: the environment that CUDA was started with.
    """

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

    def sample(self) -> Mapping[str, Any]:
        """See ``Probe``."""
        index = self._index_of(self._device)
        nvml = self._loaded()
        try:
            if not self._is_ready:
                nvml.nvmlInit()
                self._is_ready = True
            if self._handle is None or self._handle[0] != index:
                self._handle = (index, self._found(nvml, index))
            return self._read(nvml, self._handle[1])
        except nvml.NVMLError as error:
            self.close()  # the next sample starts afresh: the driver may have been reloaded
            reason = _IN_PLAIN_WORDS.get(type(error).__name__)
            raise ProbeUnavailable(reason or f"pynvml failed: {error}; trying again") from error

    def close(self) -> None:
        """See ``Probe``. NVML counts its users, so this does not end the user's own use of it."""
        self._handle = None
        if self._is_ready:
            self._is_ready = False
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    @abstractmethod
    def _read(self, nvml: Any, handle: Any) -> Mapping[str, Any]:
        """Returns the readings of a GPU or MIG instance."""

    def _loaded(self) -> Any:
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError as error:
                raise ProbeUnavailable("pynvml is not installed: pip install nvidia-ml-py") from error
        return self._nvml

    def _found(self, nvml: Any, index: int) -> Any:
        uuid, bus_id = self._identify(index)
        visible = [entry.strip() for entry in self._environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        named = visible[index] if index < len(visible) else ""
        if uuid is not None:
            for prefix in ("GPU-", "MIG-"):
                with contextlib.suppress(nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
                    return nvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
        if named.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(named)
        if bus_id is not None:
            with contextlib.suppress(nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
                return nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        if named.startswith("GPU-"):
            fitting = [handle for handle in handles if str(nvml.nvmlDeviceGetUUID(handle)).startswith(named)]
            if len(fitting) != 1:
                raise ProbeUnavailable(f"CUDA_VISIBLE_DEVICES names {named}, which fits {len(fitting)} GPUs")
            return fitting[0]
        if uuid is None and len(handles) == 1:
            return handles[0]
        number = int(named) if named.isdecimal() else index if not visible else len(handles)
        # CUDA's default order, fastest GPU first, cannot be determined from outside.
        if uuid is None and self._environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" and number < len(handles):
            return sorted(handles, key=lambda handle: _place(nvml, handle))[number]
        raise ProbeUnavailable(f"cannot tell which of {len(handles)} GPUs is cuda:{index}: no UUID or bus id matches")


class GpuUtilisation(_GpuProbe):
    """Percentage of time in which the training device ran a kernel, over NVML's own window. See ``_GpuProbe``."""

    gives: tuple[str, ...] = ("gpu_util_percent",)

    def _read(self, nvml: Any, handle: Any) -> Mapping[str, float]:
        if _is_mig(nvml, handle):  # the whole GPU's value would include other instances
            raise ProbeUnavailable("the training device is a MIG instance: MIG instances report no utilisation")
        return {"gpu_util_percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)}


class GpuTemperature(_GpuProbe):
    """Temperature of the training device in °C; for a MIG instance, that of the whole GPU. See ``_GpuProbe``."""

    gives: tuple[str, ...] = ("esper.device.temperature_celsius",)

    def _read(self, nvml: Any, handle: Any) -> Mapping[str, float]:
        with contextlib.suppress(nvml.NVMLError):  # the driver does not support MIG
            if nvml.nvmlDeviceIsMigDeviceHandle(handle):
                handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return {"esper.device.temperature_celsius": float(self._celsius(nvml, handle))}

    @staticmethod
    def _celsius(nvml: Any, handle: Any) -> int:
        sensor = nvml.NVML_TEMPERATURE_GPU
        # NVML 13 deprecates the first call; drivers before 570 do not have the second.
        with contextlib.suppress(AttributeError, nvml.NVMLError_FunctionNotFound):
            return int(nvml.nvmlDeviceGetTemperature(handle, sensor))
        return int(nvml.nvmlDeviceGetTemperatureV(handle, sensor))


class GpuDescription(_GpuProbe):
    """Describes the training GPU by attributes. UUID, bus id and number are as DCGM writes them. See ``_GpuProbe``."""

    def _read(self, nvml: Any, handle: Any) -> Mapping[str, Any]:
        found: dict[str, str | int] = {
            "hw.type": "gpu",
            "hw.vendor": "NVIDIA",
            "hw.id": _text(nvml.nvmlDeviceGetUUID(handle)),
            "hw.model": _text(nvml.nvmlDeviceGetName(handle)),
            "hw.driver_version": _text(nvml.nvmlSystemGetDriverVersion()),
        }
        whole = handle
        with contextlib.suppress(nvml.NVMLError):  # the driver does not support MIG
            if nvml.nvmlDeviceIsMigDeviceHandle(handle):
                whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
                found["hw.parent"] = _text(nvml.nvmlDeviceGetUUID(whole))
        with contextlib.suppress(nvml.NVMLError):
            found["esper.device.pci_bus_id"] = _text(nvml.nvmlDeviceGetPciInfo(whole).busId)
            found["esper.device.index"] = int(nvml.nvmlDeviceGetIndex(whole))
        return found


def gpu_attributes(environ: Mapping[str, str] = os.environ, nvml: Any = None) -> Mapping[str, str | int]:
    """Returns the attributes of this process's GPU, by OpenTelemetry's conventions for hardware. Does not start CUDA.

    The GPU is that of ``LOCAL_RANK``, or the first visible one. Without NVML, or if the GPU is uncertain, returns
    nothing.
    """
    local = environ.get("LOCAL_RANK", "")
    index = int(local) if local.isdecimal() else 0
    device = f"cuda:{index}"
    found = GpuDescription(
        lambda: device, index_of=lambda _: index, identify=lambda _: (None, None), nvml=nvml, environ=environ
    )
    try:
        return found.sample()
    except ProbeUnavailable:
        return {}
    finally:
        found.close()


def _text(text: Any) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _is_mig(nvml: Any, handle: Any) -> bool:
    """Whether this is a MIG instance, or a GPU split into them, in which case training runs on one of its instances."""
    with contextlib.suppress(nvml.NVMLError):  # the driver or the GPU does not support MIG
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle)) or bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    return False


def _place(nvml: Any, handle: Any) -> tuple[int, int, int]:
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    return pci.domain, pci.bus, pci.device
