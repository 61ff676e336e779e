"""Memory of the process and its host against /proc, and of PyTorch's allocator against stubs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.memory_use import ProcessMemory, TorchMemory
from esper_otel.probes.probe import NotYet

GIB = 1024**3


def test_the_process_is_what_proc_says() -> None:
    """A leak of 64 MiB is seen."""
    before = ProcessMemory().sample()
    leak = bytearray(64 * 1024 * 1024)
    after = ProcessMemory().sample()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [kib] = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    assert after["esper.memory.process_gb"] == pytest.approx(kib / 1024**2, rel=0.02)
    assert after["esper.memory.process_gb"] - before["esper.memory.process_gb"] > 0.05
    assert 0 < after["esper.memory.host_used_gb"] < psutil.virtual_memory().total / GIB
    assert after["esper.memory.swap_used_gb"] >= 0
    del leak


def test_a_container_is_its_own_host(tmp_path: Path) -> None:
    """cgroup v2: 2 GiB, of which 1.5 are in use."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n", encoding="ascii")
    folder = tmp_path / "sys/fs/cgroup/job"
    folder.mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("memory\n", encoding="ascii")
    (folder / "memory.max").write_text(f"{2 * GIB}\n", encoding="ascii")
    (folder / "memory.current").write_text(f"{3 * GIB // 2}\n", encoding="ascii")
    (folder / "memory.stat").write_text("inactive_file 0\n", encoding="ascii")
    found = ProcessMemory(root=tmp_path).sample()
    assert found["esper.memory.host_used_gb"] == 1.5
    assert found["esper.memory.host_available_gb"] == 0.5


def stub(**of_torch: Any) -> Any:
    return SimpleNamespace(**of_torch)


def test_the_allocator_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {
        "allocated_bytes.all.current": GIB,
        "reserved_bytes.all.current": 3 * GIB,
        "allocated_bytes.all.peak": 2 * GIB,
        "num_alloc_retries": 4,
    }
    answers: list[Any] = [stats, {}]
    cuda = stub(is_initialized=lambda: True, memory_stats=lambda index: answers.pop(0) if index == 1 else None)
    monkeypatch.setitem(sys.modules, "torch", stub(cuda=cuda))
    probe = TorchMemory(lambda: "cuda:1")
    assert dict(probe.sample()) == {
        "esper.memory.torch_allocated_gb": 1.0,
        "esper.memory.torch_reserved_gb": 3.0,
        "esper.memory.torch_peak_gb": 2.0,
        "esper.memory.torch_retries": 4.0,
    }
    with pytest.raises(ProbeUnavailable, match="another allocator"):
        probe.sample()


def test_the_allocator_on_apples_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unproven on the real thing: written from PyTorch's documentation."""
    mps = stub(current_allocated_memory=lambda: GIB, driver_allocated_memory=lambda: 2 * GIB)
    monkeypatch.setitem(sys.modules, "torch", stub(mps=mps))
    assert dict(TorchMemory(lambda: "mps:0").sample()) == {
        "esper.memory.torch_allocated_gb": 1.0,
        "esper.memory.torch_reserved_gb": 2.0,
    }


def test_absent_is_said() -> None:
    with pytest.raises(ProbeUnavailable, match="training runs on cpu"):
        TorchMemory(lambda: "cpu").sample()
    with pytest.raises(NotYet):
        TorchMemory(lambda: None).sample()
