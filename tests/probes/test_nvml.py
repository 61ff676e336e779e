"""NVML: the GPU that trains, whatever its number, and reasons for everything else. Answers are recorded ones."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, NamedTuple

import pynvml
import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.nvml import GpuTemperature, GpuUtilisation


class Gpu(NamedTuple):
    uuid: str
    bus_id: str
    utilisation: int
    is_split: bool = False  # MIG mode is on
    part_of: Any = None  # the GPU that a MIG instance is part of


FIRST = Gpu("GPU-aaaa-1111", "00000000:65:00.0", 11)
SECOND = Gpu("GPU-bbbb-2222", "00000000:17:00.0", 22)
SPLIT = Gpu("GPU-dddd-4444", "00000000:0A:00.0", 44, is_split=True)
INSTANCE = Gpu("MIG-cccc-3333", "", 99, part_of=SPLIT)


class Recorded:
    """What pynvml is asked by the probes, for the given GPUs in NVML's order."""

    NVMLError = pynvml.NVMLError
    NVMLError_NotFound = pynvml.NVMLError_NotFound
    NVMLError_InvalidArgument = pynvml.NVMLError_InvalidArgument
    NVMLError_FunctionNotFound = pynvml.NVMLError_FunctionNotFound
    NVML_TEMPERATURE_GPU = 0

    def __init__(
        self, *gpus: Gpu, at_start: Exception | None = None, knows_mig: bool = True, has_old_temperature: bool = True
    ) -> None:
        self.gpus = gpus
        self.at_start = at_start
        self.later: Exception | None = None
        self.knows_mig = knows_mig
        self.has_old_temperature = has_old_temperature
        self.starts = self.ends = 0

    def nvmlInit(self) -> None:
        if self.at_start is not None:
            raise self.at_start
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
        return [gpu for gpu in self.gpus if gpu.part_of is None][index]

    def nvmlDeviceGetCount(self) -> int:
        return len([gpu for gpu in self.gpus if gpu.part_of is None])

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetPciInfo(self, gpu: Gpu) -> Any:
        domain, bus, device = gpu.bus_id.split(":")
        return SimpleNamespace(domain=int(domain, 16), bus=int(bus, 16), device=int(device[:2], 16))

    def _mig(self) -> None:
        if not self.knows_mig:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    def nvmlDeviceIsMigDeviceHandle(self, gpu: Gpu) -> ctypes.c_uint:
        self._mig()
        return ctypes.c_uint(gpu.part_of is not None)

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        self._mig()
        return [int(gpu.is_split), int(gpu.is_split)]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: Gpu) -> Any:
        return gpu.part_of

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:
        if self.later is not None:
            raise self.later
        if gpu.part_of is not None or gpu.is_split:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=gpu.utilisation, memory=1)

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        if not self.has_old_temperature:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return self.nvmlDeviceGetTemperatureV(gpu, sensor)

    def nvmlDeviceGetTemperatureV(self, gpu: Gpu, sensor: int) -> int:
        if self.later is not None:
            raise self.later
        if gpu.part_of is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 40 + gpu.utilisation


def settings(
    nvml: Recorded,
    *,
    uuid: str | None = None,
    bus_id: str | None = None,
    index: int = 0,
    visible: str = "",
    order: str = "",
) -> dict[str, Any]:
    environ = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    return {
        "index_of": lambda _device: index,
        "identify": lambda _index: (uuid, bus_id),
        "nvml": nvml,
        "environ": {name: value for name, value in environ.items() if value},
    }


def utilisation(nvml: Recorded, **found_by: Any) -> GpuUtilisation:
    return GpuUtilisation(lambda: "cuda:0", **settings(nvml, **found_by))


def temperature(nvml: Recorded, **found_by: Any) -> GpuTemperature:
    return GpuTemperature(lambda: "cuda:0", **settings(nvml, **found_by))


# -- which GPU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found_by",
    [
        {"uuid": "bbbb-2222"},
        {"uuid": "bbbb-2222", "visible": "GPU-aaaa"},
        {"bus_id": SECOND.bus_id},
        {"uuid": "not known to NVML", "bus_id": SECOND.bus_id},
        {"visible": "GPU-bbbb-2222"},
        {"visible": "GPU-bbbb"},
        {"visible": "GPU-aaaa, GPU-bbbb", "index": 1},
        {"order": "PCI_BUS_ID"},
        {"order": "PCI_BUS_ID", "visible": "0"},
        {"order": "PCI_BUS_ID", "visible": "1,0", "index": 1},
    ],
    ids=str,
)
def test_the_gpu_that_trains_is_found_whatever_its_number_in_nvml(found_by: dict[str, Any]) -> None:
    """NVML lists it second: index 0 would show somebody else's load."""
    assert utilisation(Recorded(FIRST, SECOND), **found_by).sample() == {"gpu_util_percent": 22.0}
    assert temperature(Recorded(FIRST, SECOND), **found_by).sample() == {"esper.device.temperature_celsius": 62.0}


@pytest.mark.parametrize(
    "found_by",
    [
        {},
        {"visible": "1"},
        {"order": "FASTEST_FIRST", "visible": "1"},
        {"order": "PCI_BUS_ID", "visible": "0", "index": 1},
        {"order": "PCI_BUS_ID", "visible": "7"},
        {"uuid": "not known to NVML", "order": "PCI_BUS_ID"},
    ],
    ids=str,
)
def test_an_index_alone_is_no_proof_among_several_gpus(found_by: dict[str, Any]) -> None:
    """CUDA's order is fastest first, NVML's is by bus: absent is better than wrong."""
    with pytest.raises(ProbeUnavailable, match=r"cannot tell which of 2 GPUs is cuda:\d"):
        utilisation(Recorded(FIRST, SECOND), **found_by).sample()


def test_the_only_gpu_is_the_one_unless_its_uuid_is_another() -> None:
    """With one GPU there is no doubt, except when NVML is shown another than CUDA."""
    assert utilisation(Recorded(FIRST)).sample() == {"gpu_util_percent": 11.0}
    assert utilisation(Recorded(FIRST), visible="0").sample() == {"gpu_util_percent": 11.0}
    with pytest.raises(ProbeUnavailable, match="cannot tell which of 1 GPUs"):
        utilisation(Recorded(FIRST), uuid="bbbb-2222").sample()


@pytest.mark.parametrize(("visible", "fits"), [("GPU-", 2), ("GPU-cccc", 0)])
def test_a_prefix_that_fits_none_or_several_is_no_match(visible: str, fits: int) -> None:
    """As CUDA itself has it."""
    with pytest.raises(ProbeUnavailable, match=f"names {visible}, which fits {fits} GPUs"):
        utilisation(Recorded(FIRST, SECOND), visible=visible).sample()


def test_another_training_device_is_looked_up_anew() -> None:
    """The first CUDA tensor seen may name the device only after the start."""
    index = [0]
    probe = GpuUtilisation(
        lambda: "cuda:0",
        index_of=lambda _device: index[0],
        identify=lambda number: (("aaaa-1111", "bbbb-2222")[number], None),
        nvml=Recorded(FIRST, SECOND),
        environ={},
    )
    assert probe.sample() == {"gpu_util_percent": 11.0}
    index[0] = 1
    assert probe.sample() == {"gpu_util_percent": 22.0}


# -- MIG ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found_by",
    [{"uuid": "cccc-3333"}, {"visible": "MIG-cccc-3333"}, {"uuid": "dddd-4444"}, {"bus_id": SPLIT.bus_id}],
    ids=str,
)
def test_a_mig_instance_has_no_utilisation_and_says_so_but_its_gpus_temperature(found_by: dict[str, Any]) -> None:
    """NVML has no utilisation for instances; that of the whole GPU would be the neighbours' too."""
    with pytest.raises(ProbeUnavailable, match="MIG instances report no utilisation"):
        utilisation(Recorded(FIRST, SPLIT, INSTANCE), **found_by).sample()
    readings = temperature(Recorded(FIRST, SPLIT, INSTANCE), **found_by).sample()
    assert readings == {"esper.device.temperature_celsius": 84.0}


def test_a_driver_without_mig_is_read_all_the_same() -> None:
    """Drivers before 450, and GPUs that cannot be split."""
    assert utilisation(Recorded(FIRST, knows_mig=False)).sample() == {"gpu_util_percent": 11.0}
    assert temperature(Recorded(FIRST, knows_mig=False)).sample() == {"esper.device.temperature_celsius": 51.0}


def test_a_driver_with_only_the_new_temperature_call_is_read() -> None:
    """NVML announces the end of the old one for CUDA 14."""
    assert temperature(Recorded(FIRST, has_old_temperature=False)).sample() == {
        "esper.device.temperature_celsius": 51.0
    }


# -- errors ---------------------------------------------------------------------------------------------------

ERRORS = [pynvml.NVMLError(kind().value) for kind in pynvml.NVMLError.__subclasses__()] + [pynvml.NVMLError(4711)]


@pytest.mark.parametrize("make", [utilisation, temperature])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_no_error_of_nvml_escapes_and_all_heal(make: Any, error: Exception) -> None:
    """Every one of pynvml's becomes a reason, at the start and in the middle; NVML is begun anew afterwards."""
    with pytest.raises(ProbeUnavailable, match=r".+"):
        make(Recorded(FIRST, at_start=error)).sample()
    nvml = Recorded(FIRST)
    running = make(nvml)
    healthy = running.sample()
    nvml.later = error
    with pytest.raises(ProbeUnavailable, match=r".+"):
        running.sample()
    nvml.later = None
    assert running.sample() == healthy
    assert (nvml.starts, nvml.ends) == (2, 1)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver on this machine: NVML's library was not found"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "the NVIDIA driver is not loaded"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "this process has no permission to query the NVIDIA driver"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "the GPU is lost: it no longer answers on the bus"),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, "the GPU does not report it"),
        (pynvml.NVML_ERROR_UNKNOWN, "pynvml failed: Unknown Error; trying again"),
    ],
)
def test_the_reason_is_in_plain_words(code: int, reason: str) -> None:
    """A user who has never heard of NVML reads it."""
    with pytest.raises(ProbeUnavailable) as unavailable:
        utilisation(Recorded(FIRST, at_start=pynvml.NVMLError(code))).sample()
    assert str(unavailable.value) == reason


def test_plain_words_belong_to_classes_that_pynvml_has() -> None:
    """A misspelt class would never be matched."""
    from esper_otel.probes.nvml import _IN_PLAIN_WORDS

    assert _IN_PLAIN_WORDS.keys() <= {kind.__name__ for kind in pynvml.NVMLError.__subclasses__()}


def test_nvml_is_started_once_and_ended_by_closing() -> None:
    """Closing before the first sample, and twice, is harmless."""
    nvml = Recorded(FIRST)
    probe = utilisation(nvml)
    probe.close()
    probe.sample()
    probe.sample()
    assert (nvml.starts, nvml.ends) == (1, 0)
    probe.close()
    probe.close()
    assert (nvml.starts, nvml.ends) == (1, 1)


def test_this_machine_has_a_reading_or_a_reason() -> None:
    """The real library, whatever hardware is here."""
    real = GpuUtilisation(lambda: "cuda:0", index_of=lambda _device: 0, identify=lambda _index: (None, None))
    said = ""
    try:
        said = f"{real.sample()['gpu_util_percent']:.0f} %"
    except ProbeUnavailable as unavailable:
        said = str(unavailable)
    finally:
        real.close()
    assert said
