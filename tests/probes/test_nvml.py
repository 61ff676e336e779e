"""NVML: the GPU that trains, whatever its number, and reasons for everything else. Answers are recorded ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import pynvml
import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.nvml import GpuUtilisation


class Gpu(NamedTuple):
    uuid: str
    bus_id: str
    utilisation: int
    is_mig: bool = False


FIRST = Gpu("GPU-aaaa-1111", "00000000:65:00.0", 11)
SECOND = Gpu("GPU-bbbb-2222", "00000000:17:00.0", 22)


class Recorded:
    """What pynvml is asked by the probe, for the given GPUs in NVML's order."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *gpus: Gpu, fault: Exception | None = None) -> None:
        self.gpus = gpus
        self.fault = fault
        self.starts = self.ends = 0

    def nvmlInit(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.starts += 1

    def nvmlShutdown(self) -> None:
        self.ends += 1

    def _one(self, fits: Any) -> Gpu:
        for gpu in self.gpus:
            if fits(gpu):
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        return self._one(lambda gpu: gpu.uuid == uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> Gpu:
        return self._one(lambda gpu: gpu.bus_id == bus_id)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceIsMigDeviceHandle(self, gpu: Gpu) -> bool:
        return gpu.is_mig

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:
        if self.fault is not None:
            raise self.fault
        return type("Rates", (), {"gpu": gpu.utilisation})

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        return 40 + gpu.utilisation


def probe(
    nvml: Recorded, *, uuid: str | None = None, bus_id: str | None = None, index: int = 0, visible: str = ""
) -> GpuUtilisation:
    return GpuUtilisation(
        lambda: f"cuda:{index}",
        index_of=lambda _device: index,
        identify=lambda _index: (uuid, bus_id),
        nvml=nvml,
        environ={"CUDA_VISIBLE_DEVICES": visible} if visible else {},
    )


@pytest.mark.parametrize(
    "found_by",
    [
        {"uuid": "bbbb-2222"},
        {"bus_id": SECOND.bus_id},
        {"uuid": "not known to NVML", "bus_id": SECOND.bus_id},
        {"visible": "GPU-bbbb"},
        {"visible": "GPU-aaaa, GPU-bbbb", "index": 1},
    ],
    ids=str,
)
def test_the_gpu_that_trains_is_found_whatever_its_number_in_nvml(found_by: dict[str, Any]) -> None:
    """CUDA calls it 0; NVML may call it 1: index 0 would show somebody else's load."""
    readings = probe(Recorded(FIRST, SECOND), **found_by).sample()
    assert readings == {"gpu_util_percent": 22.0, "esper.device.temperature_celsius": 62.0}


@pytest.mark.parametrize("visible", ["", "1"])
def test_an_index_alone_is_no_proof_among_several_gpus(visible: str) -> None:
    """CUDA's order is fastest first, NVML's is by bus: absent is better than wrong."""
    with pytest.raises(ProbeUnavailable, match="which of several GPUs is cuda:0"):
        probe(Recorded(FIRST, SECOND), visible=visible).sample()


def test_the_only_gpu_is_the_one() -> None:
    """With one GPU there is no doubt."""
    assert probe(Recorded(FIRST)).sample()["gpu_util_percent"] == 11.0


@pytest.mark.parametrize("visible", ["GPU-", "GPU-cccc"])
def test_a_prefix_that_fits_none_or_several_is_no_match(visible: str) -> None:
    """As CUDA itself has it."""
    with pytest.raises(ProbeUnavailable, match="which fits"):
        probe(Recorded(FIRST, SECOND), visible=visible).sample()


@pytest.mark.parametrize("found_by", [{"uuid": "cccc-3333"}, {"visible": "MIG-cccc-3333"}], ids=str)
def test_a_mig_instance_has_no_utilisation_and_says_so(found_by: dict[str, Any]) -> None:
    """NVML has none for instances; that of the whole GPU would be the neighbours' too."""
    mig = Gpu("MIG-cccc-3333", "", 99, is_mig=True)
    with pytest.raises(ProbeUnavailable, match="MIG instance"):
        probe(Recorded(FIRST, mig), **found_by).sample()


ERRORS = sorted(
    (value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")),
)


@pytest.mark.parametrize("code", ERRORS)
def test_no_error_of_nvml_escapes(code: int) -> None:
    """Every one of them becomes a reason; at the start and in the middle of a run."""
    with pytest.raises(ProbeUnavailable, match="NVML: "):
        probe(Recorded(FIRST, fault=pynvml.NVMLError(code))).sample()
    nvml = Recorded(FIRST)
    running = probe(nvml)
    running.sample()
    nvml.fault = pynvml.NVMLError(code)
    with pytest.raises(ProbeUnavailable, match="NVML: "):
        running.sample()
    nvml.fault = None
    assert running.sample()["gpu_util_percent"] == 11.0
    assert (nvml.starts, nvml.ends) == (2, 1)


def test_this_machine_has_a_reading_or_a_reason() -> None:
    """The real library, whatever hardware is here."""
    real = GpuUtilisation(lambda: "cuda:0", index_of=lambda _device: 0, identify=lambda _index: (None, None))
    try:
        found = real.sample()
    except ProbeUnavailable as unavailable:
        reason = str(unavailable)
        assert reason.startswith(("NVML: ", "cannot tell", "the training device"))
    else:
        assert 0.0 <= found["gpu_util_percent"] <= 100.0


@pytest.mark.parametrize(
    ("device", "reason"), [(None, "not known yet"), ("cpu", "training runs on cpu"), ("cuda:0", "not in use")]
)
def test_cuda_is_never_initialised_by_asking(device: str | None, reason: str) -> None:
    """Initialising it takes seconds and hundreds of MiB, and breaks forking DataLoader workers."""
    import torch

    from esper_otel.probes.cuda import CudaMemory

    for each in (CudaMemory(lambda: device), GpuUtilisation(lambda: device)):
        with pytest.raises(ProbeUnavailable, match=reason):
            each.sample()
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call] # torch's
