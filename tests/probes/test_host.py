"""CPU of the host or container, against readings taken another way."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import psutil
import pytest

from esper_otel.probes.host import HostCpu


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


class Moments:
    """A clock that a sample moves by a second, during which the group uses CPU time."""

    def __init__(self, root: Path, usage: str, per_second: int) -> None:
        self.now_s = 50.0
        self._file = root / usage
        self._per_second = per_second

    def pass_a_second(self, _wanted_s: float = 0.0) -> None:
        self.now_s += 1.0
        text = self._file.read_text().split()
        text[-1] = str(int(text[-1]) + self._per_second)
        self._file.write_text(" ".join(text))


def sampled(root: Path, usage: str, per_second: int) -> float:
    moments = Moments(root, usage, per_second)
    probe = HostCpu(lambda: "cpu", root=root, clock=lambda: moments.now_s, sleep=moments.pass_a_second)
    probe.sample()
    moments.pass_a_second()
    return probe.sample()["cpu_util_percent"]


@pytest.mark.parametrize(("used_us", "percent"), [(0, 0.0), (500_000, 25.0), (2_000_000, 100.0), (2_600_000, 100.0)])
def test_a_container_of_cgroup_v2_is_measured_against_its_quota(tmp_path: Path, used_us: int, percent: float) -> None:
    """Two CPUs allowed on a machine of 64: half of one of them is a quarter, not 0.8 %. A burst is not above 100."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/pod/container/cpu.stat": "usage_usec 7000000\n",
            "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
        },
    )
    assert sampled(tmp_path, "sys/fs/cgroup/pod/container/cpu.stat", used_us) == pytest.approx(percent)


def test_the_tightest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    """A pod's limit binds a container that has none; its neighbours in the pod use it too."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/pod/cpu.stat": "usage_usec 0\n",
        },
    )
    assert sampled(tmp_path, "sys/fs/cgroup/pod/cpu.stat", 250_000) == pytest.approx(50.0)


def test_a_container_that_sees_only_its_own_top_is_measured_there(tmp_path: Path) -> None:
    """With a namespace of its own the path in /proc leads nowhere."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/cpu.stat": "usage_usec 0\n",
        },
    )
    assert sampled(tmp_path, "sys/fs/cgroup/cpu.stat", 100_000) == pytest.approx(10.0)


def test_a_container_of_cgroup_v1_is_measured_against_its_quota(tmp_path: Path) -> None:
    """Older hosts."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpuacct,cpu:/docker/x\n2:memory:/docker/x\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpuacct/docker/x/cpuacct.usage": "0\n",
        },
    )
    assert sampled(tmp_path, "sys/fs/cgroup/cpuacct/docker/x/cpuacct.usage", 10**9) == pytest.approx(25.0)


def _burn(seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        pass


def _proc_stat(cpus: set[int]) -> tuple[float, float]:
    busy = total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            ticks = [float(field) for field in fields[:8]]
            total += sum(ticks)
            busy += sum(ticks) - ticks[3] - ticks[4]
    return busy, total


def test_without_a_quota_it_is_the_load_of_the_cpus_that_this_process_may_use(tmp_path: Path) -> None:
    """Against /proc/stat, read by ourselves, under a load of our own."""
    probe = HostCpu(lambda: "cpu", root=tmp_path)
    allowed = os.sched_getaffinity(0)
    burning = multiprocessing.get_context("spawn").Process(target=_burn, args=(1.5,))
    burning.start()
    probe.sample()
    before = _proc_stat(allowed)
    _burn(1.0)
    percent = probe.sample()["cpu_util_percent"]
    after = _proc_stat(allowed)
    burning.join()
    expected = 100.0 * (after[0] - before[0]) / (after[1] - before[1])
    assert percent == pytest.approx(expected, abs=10.0)
    assert percent > 20.0


def test_the_first_sample_is_a_share_of_a_tenth_of_a_second_and_not_psutils_zero(tmp_path: Path) -> None:
    """psutil's first answer means nothing."""
    waited: list[float] = []

    def work(seconds: float) -> None:
        waited.append(seconds)
        _burn(0.3)

    probe = HostCpu(lambda: "cpu", root=tmp_path, sleep=work)
    assert probe.sample()["cpu_util_percent"] > 0.0
    assert waited == [0.1]


def test_the_hosts_memory_is_the_devices_only_when_training_runs_on_the_cpu() -> None:
    """On CUDA the device's memory is CUDA's to tell."""
    on_cpu = HostCpu(lambda: "cpu").sample()
    assert on_cpu["esper.device.memory_total_gb"] == psutil.virtual_memory().total / 1024**3
    assert 0 < on_cpu["esper.device.memory_available_gb"] < on_cpu["esper.device.memory_total_gb"]
    assert HostCpu(lambda: "cuda:0").sample().keys() == {"cpu_util_percent"}
