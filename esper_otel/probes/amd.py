"""Utilisation and temperature of an AMD GPU, as reported by AMD SMI.

Written from AMD's documentation and tested with a stub: it has not been tried on such a machine. The memory of an AMD
GPU is reported by PyTorch's ROCm build under CUDA's names, so that the CUDA probes read it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.cuda import cuda_device, cuda_identity
from esper_otel.probes.probe import OtherHardware


def is_rocm() -> bool:
    """Whether PyTorch was built for AMD's GPUs."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and getattr(torch.version, "hip", None) is not None


class AmdGpu:
    """Percentage of time in which the graphics engine was busy, and the hot spot's temperature in °C.

    The device is found by its PCI bus id, because AMD SMI ignores ``HIP_VISIBLE_DEVICES``.

    Args:
        device: returns the training device's name, or None while it is unknown.
        index_of: returns the index of that device in PyTorch's numbering.
        identify: returns the UUID and PCI bus id of a GPU in PyTorch's numbering.
        is_amd: whether PyTorch was built for ROCm.
        smi: the module ``amdsmi``; imported when needed.
    """

    gives: tuple[str, ...] = ("gpu_util_percent", "esper.device.temperature_celsius")

    def __init__(
        self,
        device: Callable[[], str | None],
        *,
        index_of: Callable[[Callable[[], str | None]], int] = cuda_device,
        identify: Callable[[int], tuple[str | None, str | None]] = cuda_identity,
        is_amd: Callable[[], bool] = is_rocm,
        smi: Any = None,
    ) -> None:
        self._device = device
        self._index_of = index_of
        self._identify = identify
        self._is_amd = is_amd
        self._smi = smi
        self._is_ready = False

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        index = self._index_of(self._device)
        if not self._is_amd():
            raise OtherHardware("PyTorch was not built for ROCm")
        smi = self._loaded()
        try:
            if not self._is_ready:
                smi.amdsmi_init(smi.AmdSmiInitFlags.INIT_AMD_GPUS)
                self._is_ready = True
            handle = self._found(smi, index)
            busy = smi.amdsmi_get_gpu_activity(handle)["gfx_activity"]
            sensor, metric = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
            celsius = smi.amdsmi_get_temp_metric(handle, sensor, metric)
        except smi.AmdSmiException as error:
            self.close()  # the next sample starts afresh
            raise ProbeUnavailable(f"amdsmi failed: {error}; trying again") from error
        if not isinstance(busy, int | float) or not isinstance(celsius, int | float):  # "N/A"
            raise ProbeUnavailable("the GPU does not report it")
        return dict(zip(self.gives, (float(busy), float(celsius)), strict=True))

    def close(self) -> None:
        """See ``Probe``."""
        if self._is_ready:
            self._is_ready = False
            with contextlib.suppress(self._smi.AmdSmiException):
                self._smi.amdsmi_shut_down()

    def _loaded(self) -> Any:
        if self._smi is None:
            try:
                self._smi = importlib.import_module("amdsmi")
            except ImportError as error:
                raise ProbeUnavailable("amdsmi is not installed: it comes with ROCm") from error
        return self._smi

    def _found(self, smi: Any, index: int) -> Any:
        _, bus_id = self._identify(index)
        handles = smi.amdsmi_get_processor_handles()
        if bus_id is not None:
            for handle in handles:
                if _place(smi.amdsmi_get_gpu_device_bdf(handle)) == _place(bus_id):
                    return handle
        if bus_id is None and len(handles) == 1:
            return handles[0]
        raise ProbeUnavailable(f"cannot tell which of {len(handles)} GPUs is cuda:{index}: no bus id matches")


def _place(bus_id: str) -> tuple[int, int, int]:
    """Returns domain, bus and device of an id such as ``0000:41:00.0``."""
    domain, bus, device = bus_id.rpartition(".")[0].split(":")
    return int(domain, 16), int(bus, 16), int(device, 16)
