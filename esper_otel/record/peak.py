"""The highest rate of a training device, against which ``esper.mfu`` is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


class DeviceRates(NamedTuple):
    """Dense matrix rates of a device, in TFLOP/s, as its vendor states them: without sparsity, at boost clock.

    Attributes:
        names: the names that PyTorch reports.
        tflops: the rates by dtype, for results accumulated in float32.
        source: where the vendor states them.
    """

    names: tuple[str, ...]
    tflops: dict[str, float]
    source: str


def _rates(float32: float, tf32: float | None, half: float, float8: float | None = None) -> dict[str, float]:
    """Returns a row's rates; those of bfloat16 and float16 are the same on all devices with tf32."""
    of_half = {"float16": half} if tf32 is None else {"bfloat16": half, "float16": half}
    more = {"tf32": tf32, "float8": float8}
    return {"float32": float32, **of_half, **{name: rate for name, rate in more.items() if rate is not None}}


# Only devices whose names and figures are certain. Data sheets that state rates with sparsity are halved.
PEAKS: tuple[DeviceRates, ...] = (
    DeviceRates(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), _rates(15.7, None, 125.0), f"{_NVIDIA}v100/"),
    DeviceRates(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), _rates(14.0, None, 112.0), f"{_NVIDIA}v100/"),
    DeviceRates(("Tesla T4",), _rates(8.1, None, 65.0), f"{_NVIDIA}tesla-t4/"),
    DeviceRates(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        _rates(19.5, 156.0, 312.0),
        f"{_NVIDIA}a100/",
    ),
    DeviceRates(("NVIDIA A30",), _rates(10.3, 82.0, 165.0), f"{_NVIDIA}products/a30-gpu/"),
    DeviceRates(("NVIDIA A40",), _rates(37.4, 74.8, 149.7), f"{_NVIDIA}a40/"),
    DeviceRates(("NVIDIA A10",), _rates(31.2, 62.5, 125.0), f"{_NVIDIA}products/a10-gpu/"),
    DeviceRates(("NVIDIA L4",), _rates(30.3, 60.0, 121.0, 242.5), f"{_NVIDIA}l4/"),
    DeviceRates(("NVIDIA L40S",), _rates(91.6, 183.0, 362.05, 733.0), f"{_NVIDIA}l40s/"),
    DeviceRates(("NVIDIA H100 PCIe",), _rates(51.0, 378.0, 756.5, 1513.0), f"{_NVIDIA}h100/"),
    DeviceRates(("NVIDIA H100 80GB HBM3",), _rates(67.0, 494.5, 989.5, 1979.0), f"{_NVIDIA}h100/"),
    DeviceRates(("NVIDIA H100 NVL",), _rates(60.0, 417.5, 835.5, 1670.5), f"{_NVIDIA}h100/"),
    DeviceRates(("NVIDIA H200",), _rates(67.0, 494.5, 989.5, 1979.0), f"{_NVIDIA}h200/"),
    DeviceRates(
        ("AMD Instinct MI300X",),
        _rates(163.4, 653.7, 1307.4, 2614.9),
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
)


def peak_of(device_name: str, dtype: str) -> float | None:
    """Returns the highest rate of a device in TFLOP/s; None if the table does not have it.

    Args:
        device_name: the name that PyTorch reports.
        dtype: a value of the setting ``compute_dtype``.
    """
    found = (row.tflops.get(dtype) for row in PEAKS if device_name in row.names)
    return next(found, None)


def _name_of(device: str) -> str | None:
    """Returns the vendor's name of a GPU such as ``cuda:0``; None if CUDA is not in use in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_properties(torch.device(device)).name)


class Peak:
    """The highest rate of the training device. Threads: the recording thread, and any for ``reason``.

    Args:
        tflops: the rate in TFLOP/s, which the user has given; None to take it from the table.
        dtype: the dtype of the matrix products; empty if it is unknown.
        device: returns the training device's name, such as ``cuda:0``; empty while it is unknown.
        name_of: returns the vendor's name of a GPU; None if it is not known yet.
    """

    def __init__(
        self,
        tflops: float | None,
        dtype: str,
        device: Callable[[], str],
        name_of: Callable[[str], str | None] = _name_of,
    ) -> None:
        self._given = tflops
        self._dtype = dtype
        self._device = device
        self._name_of = name_of
        self._found: tuple[str, float | None, str] = ("", None, "no step has had flops=")

    def tflops(self) -> float | None:
        """Returns the rate in TFLOP/s; None if it is unknown: see ``reason``."""
        if self._given is not None:
            return self._given
        device = self._device()
        if self._found[0] != device or not device:
            self._found = self._looked_up(device)
        return self._found[1]

    @property
    def reason(self) -> str:
        """Why the rate is unknown, as found by the last call of ``tflops``; empty if it is known."""
        return "" if self._given is not None else self._found[2]

    def _looked_up(self, device: str) -> tuple[str, float | None, str]:
        """Returns the device's name, or an empty one to look it up again in the next step; its rate; a reason."""
        if not device.startswith("cuda"):
            what = f"training runs on {device}, whose" if device else "the training device is not known yet; its"
            return device, None, f"{what} peak rate is not in the table: set ESPER_PEAK_TFLOPS"
        if not self._dtype:
            return (
                device,
                None,
                "the dtype of the matrix products is unknown: set ESPER_COMPUTE_DTYPE",
            )
        try:
            name = self._name_of(device)
        except (RuntimeError, AssertionError) as error:
            return device, None, f"CUDA could not report the device's name: {str(error).partition(chr(10))[0]}"
        if name is None:
            return "", None, "CUDA is not in use in this process"
        rate = peak_of(name, self._dtype)
        unknown = f"the table has no {self._dtype} rate of {name!r}: set ESPER_PEAK_TFLOPS"
        return device, rate, "" if rate is not None else unknown
