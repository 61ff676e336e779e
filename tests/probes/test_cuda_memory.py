"""CUDA's memory, and the promise that asking never initialises CUDA."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper_otel.captures import apart_from_captures
from esper_otel.errors import ProbeUnavailable
from esper_otel.probes import host_and_device_probes
from esper_otel.probes.cuda import CudaMemory, cuda_device
from esper_otel.probes.nvml import GpuTemperature, GpuUtilisation
from esper_otel.probes.probe import NotYet, Probe, names_of

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GIB = 1024**3


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_importing_the_probes_imports_no_foreign_library() -> None:
    """Each is imported by the one module that owns it, when it is asked, off the training thread."""
    code = """
import sys
from esper_otel.probes import host_and_device_probes
from esper_otel.probes.sampler import Sampler
Sampler(host_and_device_probes(lambda: None), period_s=1.0)
print({"torch", "pynvml", "psutil"} & sys.modules.keys())
"""
    assert run(code) == "set()"


def test_asking_neither_imports_torch_nor_initialises_cuda() -> None:
    """Initialising takes seconds and hundreds of MiB, and breaks forking DataLoader workers."""
    code = """
import sys
from esper_otel.errors import ProbeUnavailable
from esper_otel.probes import host_and_device_probes

def reasons():
    for probe in host_and_device_probes(lambda: "cuda:0"):
        try:
            probe.sample()
        except ProbeUnavailable as unavailable:
            yield str(unavailable)

print(sorted(set(reasons())))
assert "torch" not in sys.modules
import torch
print(sorted(set(reasons())))
assert not torch.cuda.is_initialized()
"""
    host = "training runs on cuda:0: host memory is not device memory"
    assert run(code).splitlines() == [
        str(["torch is not imported in this process", host]),
        str(["CUDA is not in use in this process", host]),
    ]


@pytest.mark.parametrize("make", [CudaMemory, GpuUtilisation, GpuTemperature])
@pytest.mark.parametrize(
    ("device", "reason", "kind"),
    [
        (None, "the training device is not known yet", NotYet),
        ("cpu", "training runs on cpu", ProbeUnavailable),
        ("mps:0", "training runs on mps:0", ProbeUnavailable),
    ],
)
def test_without_cuda_training_there_is_a_reason(
    make: Callable[[Callable[[], str | None]], Probe],
    device: str | None,
    reason: str,
    kind: type[ProbeUnavailable],
) -> None:
    """What may change any moment is asked again soon."""
    with pytest.raises(ProbeUnavailable) as unavailable:
        make(lambda: device).sample()
    assert (str(unavailable.value), type(unavailable.value)) == (reason, kind)


def test_every_probe_metric_of_the_catalogue_has_a_probe() -> None:
    """And no probe gives a name that the catalogue does not have."""
    from esper_otel.schema import METRICS

    sampled = {metric.name for metric in METRICS if re.search("(last|each) sample", metric.present)}
    assert {name for probe in host_and_device_probes(lambda: None) for name in names_of(probe)} == sampled


# -- with stand-ins for CUDA ------------------------------------------------------------------------------------


class Driver:
    """CUDA's driver library: the capture mode of the calling thread, 0 (global) at first."""

    def __init__(self, result: int = 0) -> None:
        self.mode = 0
        self.set: list[int] = []
        self._result = result

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        if self._result == 0:
            asked = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int)).contents
            self.set.append(asked.value)
            self.mode, asked.value = asked.value, self.mode
        return self._result


Answer = tuple[int, int] | Exception | Callable[[], tuple[int, int]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """A CUDA in use, with an answer for ``mem_get_info``."""

    def answer(given: Answer) -> None:
        def mem_get_info(index: int) -> tuple[int, int]:
            assert index == 1
            if isinstance(given, Exception):
                raise given
            return given if isinstance(given, tuple) else given()

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)

    return answer


def test_memory_is_device_wide_and_in_gib(cuda: Callable[[Answer], None]) -> None:
    """Used is what no process can have."""
    cuda((30 * GIB, 80 * GIB))
    assert CudaMemory(lambda: "cuda:1", driver=Driver).sample() == {
        "gpu_mem_used_gb": 50.0,
        "gpu_mem_free_gb": 30.0,
        "esper.device.memory_total_gb": 80.0,
    }


@pytest.mark.parametrize(("error", "text"), [(RuntimeError("device-side assert\nand more"), "device-side assert")])
def test_a_device_that_has_failed_is_a_reason(cuda: Callable[[Answer], None], error: Exception, text: str) -> None:
    """The training learns of it by itself."""
    cuda(error)
    driver = Driver()
    with pytest.raises(ProbeUnavailable, match=f"^CUDA could not report: {text}$"):
        CudaMemory(lambda: "cuda:1", driver=lambda: driver).sample()
    assert driver.mode == 0


def test_a_sample_is_taken_apart_from_graph_captures_and_the_threads_mode_put_back(
    cuda: Callable[[Answer], None],
) -> None:
    """A capture in mode "global" would be spoilt by an unsafe call on any thread."""
    driver, modes = Driver(), list[int]()

    def answered() -> tuple[int, int]:
        modes.append(driver.mode)
        return GIB, GIB

    cuda(answered)
    CudaMemory(lambda: "cuda:1", driver=lambda: driver).sample()
    assert (modes, driver.set, driver.mode) == ([1], [1, 0], 0)


def _no_library() -> Any:
    raise OSError("libcuda.so.1: cannot open shared object file")


@pytest.mark.parametrize("driver", [_no_library, object, lambda: Driver(result=1)])
def test_a_driver_that_cannot_keep_apart_is_asked_all_the_same(
    cuda: Callable[[Answer], None], driver: Callable[[], Any]
) -> None:
    """ROCm has no such library."""
    cuda((GIB, GIB))
    assert CudaMemory(lambda: "cuda:1", driver=driver).sample()["gpu_mem_free_gb"] == 1.0


# -- with a GPU -------------------------------------------------------------------------------------------------


@needs_cuda
def test_memory_is_that_of_the_device() -> None:
    """Against CUDA itself, before and after an allocation of 256 MiB."""
    probe = CudaMemory(lambda: "cuda:0")
    torch.zeros(1, device="cuda:0")
    before = probe.sample()
    held = torch.zeros(256 * 1024**2, dtype=torch.uint8, device="cuda:0")
    after = probe.sample()
    assert after["gpu_mem_used_gb"] - before["gpu_mem_used_gb"] == pytest.approx(0.25, abs=0.1)
    assert after["esper.device.memory_total_gb"] == torch.cuda.mem_get_info(0)[1] / GIB
    del held
    torch.cuda.empty_cache()


@needs_cuda
def test_the_gpu_is_found_in_nvml_and_has_a_utilisation() -> None:
    """The whole way from PyTorch's number to NVML's handle."""
    torch.zeros(1, device="cuda:0")
    assert cuda_device(lambda: "cuda:0") == 0
    for probe in (GpuUtilisation(lambda: "cuda:0"), GpuTemperature(lambda: "cuda:0")):
        (value,) = probe.sample().values()
        assert 0.0 <= value <= 120.0
        probe.close()


@needs_cuda
def test_sampling_beside_a_graph_capture_does_not_spoil_it() -> None:
    """PyTorch captures in mode "global"."""
    probe = CudaMemory(lambda: "cuda:0")
    ending, samples = threading.Event(), [0]

    def sample() -> None:
        while not ending.is_set():
            probe.sample()
            samples[0] += 1

    numbers = torch.ones(1024, device="cuda:0")
    torch.cuda.synchronize()
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                doubled = numbers * 2
            graph.replay()
        torch.cuda.synchronize()
        assert float(doubled.sum()) == 2048.0
        assert samples[0] > 20
    finally:
        ending.set()
        thread.join()


@needs_cuda
def test_the_drivers_library_keeps_this_thread_apart() -> None:
    """The name and the numbers are the driver's."""
    torch.zeros(1, device="cuda:0")
    driver = ctypes.CDLL("libcuda.so.1")
    with apart_from_captures(lambda: driver):
        mode = ctypes.c_int(1)
        assert driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        assert mode.value == 1
