"""The training device, described once it is known: by NVML, by PyTorch, or by the system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes import description
from esper_otel.probes.description import INFO, DeviceDescription, described_by_torch
from esper_otel.probes.nvml import GpuDescription, gpu_attributes
from esper_otel.probes.probe import NotYet
from esper_otel.schema.attribute_catalogue import ATTRIBUTES, Carrier

GPU = SimpleNamespace(uuid="GPU-aaaa-1111", bus_id=b"00000000:65:00.0", index=3)


class Driver:
    """pynvml on a machine with one GPU, or one MIG instance of it."""

    NVMLError = pynvml.NVMLError
    NVMLError_NotFound = pynvml.NVMLError_NotFound
    NVMLError_InvalidArgument = pynvml.NVMLError_InvalidArgument

    def __init__(self, *, is_split: bool = False) -> None:
        self.calls = 0
        self._handle: Any = SimpleNamespace(uuid="MIG-bbbb-2222", whole=GPU) if is_split else GPU

    def nvmlInit(self) -> None:
        self.calls += 1

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        if uuid != self._handle.uuid:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self._handle

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, _index: int) -> Any:
        return self._handle

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(handle.uuid)

    def nvmlDeviceGetName(self, _handle: Any) -> str:
        return "NVIDIA H200"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceIsMigDeviceHandle(self, handle: Any) -> bool:
        return handle is not GPU

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any) -> Any:
        return handle.whole

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return SimpleNamespace(busId=handle.bus_id)

    def nvmlDeviceGetIndex(self, handle: Any) -> int:
        return int(handle.index)


def gpu_description(driver: Driver, uuid: str) -> GpuDescription:
    identify = lambda _index: (uuid, None)  # noqa: E731
    return GpuDescription(lambda: "cuda:0", index_of=lambda _: 0, identify=identify, nvml=driver, environ={})


OF_GPU = {
    "hw.type": "gpu",
    "hw.vendor": "NVIDIA",
    "hw.model": "NVIDIA H200",
    "hw.driver_version": "580.1",
    "esper.device.pci_bus_id": "00000000:65:00.0",
    "esper.device.index": 3,
}


@pytest.mark.parametrize(
    ("is_split", "uuid", "ids"),
    [
        (False, "aaaa-1111", {"hw.id": "GPU-aaaa-1111"}),
        (True, "bbbb-2222", {"hw.id": "MIG-bbbb-2222", "hw.parent": "GPU-aaaa-1111"}),
    ],
)
def test_a_gpu_is_described_as_dcgm_spells_it(is_split: bool, uuid: str, ids: Mapping[str, str]) -> None:
    """For a MIG instance with the UUID, bus id and number of its GPU, by which DCGM labels it."""
    driver = Driver(is_split=is_split)
    probe = DeviceDescription(lambda: "cuda:0", by_nvml=gpu_description(driver, uuid), index_of=lambda _: 0)
    assert probe.sample() == {INFO: 1.0}
    assert probe.attributes == {"esper.device.id": "cuda:0", **OF_GPU, **ids}
    assert probe.attributes.keys() <= {each.name for each in ATTRIBUTES if Carrier.DEVICE in each.places}
    probe.sample()
    assert driver.calls == 1  # asked once: nothing of this changes
    probe.close()


def test_the_detector_says_the_same_of_the_gpu() -> None:
    assert gpu_attributes({}, Driver()) == {**OF_GPU, "hw.id": "GPU-aaaa-1111"}


def test_without_nvml_pytorch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def sample(self) -> Mapping[str, Any]:
            raise ProbeUnavailable("pynvml is not installed")

        def close(self) -> None:
            pass

    monkeypatch.setattr(description, "cuda_identity", lambda _index: ("aaaa-1111", "00000000:65:00.0"))
    monkeypatch.setattr(description, "cuda_name", lambda _index: "NVIDIA H200")
    probe = DeviceDescription(lambda: "cuda:0", by_nvml=Missing(), index_of=lambda _: 0)
    probe.sample()
    assert probe.attributes == {
        "esper.device.id": "cuda:0",
        "hw.type": "gpu",
        "hw.vendor": "NVIDIA",
        "hw.model": "NVIDIA H200",
        "hw.id": "GPU-aaaa-1111",
        "esper.device.pci_bus_id": "00000000:65:00.0",
    }
    split = described_by_torch(0, {"CUDA_VISIBLE_DEVICES": "MIG-aaaa-1111"})
    assert split["hw.id"] == "MIG-aaaa-1111"


def test_a_cpu_has_its_model_and_no_id_and_another_device_is_described_anew(tmp_path: Path) -> None:
    """No CUDA, no NVML; the device may be named only after the start, and become another."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 7\n", encoding="utf-8")
    names: list[str | None] = [None, "cpu", "mps"]
    probe = DeviceDescription(lambda: names[0], root=tmp_path)
    with pytest.raises(NotYet):
        probe.sample()
    assert probe.attributes == {}
    del names[0]
    probe.sample()
    assert probe.attributes == {"esper.device.id": "cpu", "hw.type": "cpu", "hw.model": "Some CPU 7"}
    del names[0]
    probe.sample()
    assert probe.attributes == {"esper.device.id": "mps", "hw.type": "gpu"}
