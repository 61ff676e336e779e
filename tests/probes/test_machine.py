"""CPU and memory of the host or container, against recorded trees and readings taken another way."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.machine import HostCpu, HostMemory
from esper_otel.probes.probe import NotYet

GIB = 1024**3
TWO_CPUS = {
    "proc/self/cgroup": "0::/pod/container\n",
    "sys/fs/cgroup/pod/container/cpu.max": "200000 100000\n",
    "sys/fs/cgroup/pod/container/cpu.stat": "usage_usec 7000000\nuser_usec 6000000\n",
    "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
}
USAGE = "sys/fs/cgroup/pod/container/cpu.stat"


def write(root: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


class Machine:
    """A machine of 64 CPUs whose clock is moved a second at a time, in which the group uses CPU time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, *, cpus: int = 64) -> None:
        self.now_s = 50.0
        self.root = root
        self.allowed: frozenset[int] = frozenset(range(cpus))
        self.usage, self.per_second = USAGE, 0
        self.busy_cpus = 0
        monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [self._times(cpu) for cpu in range(cpus)])

    def _times(self, cpu: int) -> tuple[float, ...]:
        busy_s = self.now_s if cpu < self.busy_cpus else 0.0
        idle_s = (self.now_s - busy_s) / 2
        # Guest time is contained in user time: counted twice it would show more than there is.
        return Times(busy_s, 0.0, 0.0, idle_s, idle_s, 0.0, 0.0, 0.0, busy_s, 0.0)

    def pass_a_second(self, _wanted_s: float = 0.0) -> None:
        self.now_s += 1.0
        file = self.root / self.usage
        if file.exists():
            used = re.search(r"[0-9]+", file.read_text())
            assert used is not None
            file.write_text(file.read_text().replace(used[0], str(int(used[0]) + self.per_second), 1))

    def probe(self) -> HostCpu:
        return HostCpu(root=self.root, allowed=lambda: self.allowed, clock=lambda: self.now_s, sleep=self.pass_a_second)

    def sampled(self) -> float:
        probe = self.probe()
        first = probe.sample()["cpu_util_percent"]
        self.pass_a_second()
        assert probe.sample()["cpu_util_percent"] == pytest.approx(first)
        return first


class Times(tuple[float, ...]):
    """psutil's, of one CPU."""

    def __new__(cls, *seconds: float) -> Times:
        return super().__new__(cls, seconds)

    @property
    def idle(self) -> float:
        return self[3]

    @property
    def iowait(self) -> float:
        return self[4]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


# -- CPU against a quota ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("used_us", "percent"), [(0, 0.0), (500_000, 25.0), (2_000_000, 100.0), (2_600_000, 100.0)])
def test_a_container_of_cgroup_v2_is_measured_against_its_quota(machine: Machine, used_us: int, percent: float) -> None:
    """Two CPUs allowed on a machine of 64: half of one of them is a quarter, not 0.8 %. A burst is not above 100."""
    write(machine.root, TWO_CPUS)
    machine.per_second = used_us
    assert machine.sampled() == pytest.approx(percent)


def test_the_tightest_quota_on_the_way_up_counts(machine: Machine) -> None:
    """A pod's limit binds a container that has none; its neighbours in the pod use it too."""
    write(machine.root, TWO_CPUS)
    write(
        machine.root,
        {"sys/fs/cgroup/pod/cpu.max": "50000 100000\n", "sys/fs/cgroup/pod/cpu.stat": "usage_usec 0\n"},
    )
    machine.usage, machine.per_second = "sys/fs/cgroup/pod/cpu.stat", 250_000
    assert machine.sampled() == pytest.approx(50.0)


@pytest.mark.parametrize("path", ["/", "/kubepods/of/the/host"])
def test_a_container_that_sees_only_its_own_top_is_measured_there(machine: Machine, path: str) -> None:
    """The path in /proc is then the namespace's, or leads nowhere."""
    write(
        machine.root,
        {
            "proc/self/cgroup": f"0::{path}\n",
            "sys/fs/cgroup/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/cpu.stat": "usage_usec 0\n",
        },
    )
    machine.usage, machine.per_second = "sys/fs/cgroup/cpu.stat", 100_000
    assert machine.sampled() == pytest.approx(10.0)


@pytest.mark.parametrize("top", ["cpuacct,cpu", "cpu"])
def test_a_container_of_cgroup_v1_is_measured_against_its_quota(machine: Machine, top: str) -> None:
    """Older hosts: the two controllers in one folder, or in two."""
    machine.usage = f"sys/fs/cgroup/{'cpuacct' if top == 'cpu' else top}/docker/x/cpuacct.usage"
    write(
        machine.root,
        {
            "proc/self/cgroup": "5:cpuacct,cpu:/docker/x\n2:memory:/docker/x\n",
            f"sys/fs/cgroup/{top}/docker/x/cpu.cfs_quota_us": "400000\n",
            f"sys/fs/cgroup/{top}/docker/x/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/{top}/cpu.cfs_quota_us": "-1\n",
            f"sys/fs/cgroup/{top}/cpu.cfs_period_us": "100000\n",
            machine.usage: "0\n",
        },
    )
    machine.per_second = 10**9
    assert machine.sampled() == pytest.approx(25.0)


def test_a_quota_above_the_allowed_cpus_is_no_limit(machine: Machine) -> None:
    """Pinned to one CPU, a process with a quota of two can use one."""
    write(machine.root, TWO_CPUS)
    machine.allowed, machine.busy_cpus = frozenset({0, 63}), 1
    assert machine.sampled() == pytest.approx(50.0)


def test_a_quota_that_changes_begins_a_new_interval(machine: Machine) -> None:
    """Kubernetes resizes pods in place; the usage before would be held against the capacity after."""
    write(machine.root, TWO_CPUS)
    machine.per_second = 500_000
    probe = machine.probe()
    assert probe.sample() == {"cpu_util_percent": pytest.approx(25.0)}
    write(machine.root, {"sys/fs/cgroup/pod/container/cpu.max": "100000 100000\n"})
    assert probe.sample() == {"cpu_util_percent": pytest.approx(50.0)}
    write(machine.root, {"sys/fs/cgroup/pod/container/cpu.max": "max 100000\n"})
    machine.busy_cpus = 16
    assert probe.sample() == {"cpu_util_percent": pytest.approx(25.0)}


def test_a_quota_whose_use_is_not_told_is_a_reason(machine: Machine) -> None:
    """The host's load is not the group's."""
    write(machine.root, TWO_CPUS)
    (machine.root / USAGE).unlink()
    with pytest.raises(ProbeUnavailable, match=r"does not report the time used: .*cpu\.stat"):
        machine.probe().sample()


# -- CPU without a quota ----------------------------------------------------------------------------------------


def test_only_the_cpus_count_that_this_process_may_use(machine: Machine) -> None:
    """Others may belong to other jobs."""
    machine.busy_cpus = 4
    machine.allowed = frozenset({2, 3, 4, 5, 6, 7, 8, 9})
    assert machine.sampled() == pytest.approx(25.0)
    machine.allowed = frozenset()  # a system that does not say
    assert machine.sampled() == pytest.approx(100.0 * 4 / 64)


def test_cpu_times_that_stand_still_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sandboxes show zeros for ever."""
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [Times(*[0.0] * 10)])
    with pytest.raises(ProbeUnavailable, match="CPU times do not advance"):
        HostCpu(root=tmp_path, sleep=lambda _seconds: None).sample()


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


def test_without_a_quota_it_is_the_real_load_of_the_allowed_cpus(tmp_path: Path) -> None:
    """Against /proc/stat, read by ourselves, under a load of our own."""
    probe = HostCpu(root=tmp_path)
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
    assert percent > 80.0 / len(allowed)


def test_the_first_sample_is_a_share_of_a_tenth_of_a_second_and_not_psutils_zero(tmp_path: Path) -> None:
    """psutil's first answer means nothing."""
    waited: list[float] = []

    def work(seconds: float) -> None:
        waited.append(seconds)
        _burn(0.3)

    probe = HostCpu(root=tmp_path, sleep=work)
    assert probe.sample()["cpu_util_percent"] > 0.0
    assert waited == [0.1]


# -- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        total, available = 64 * GIB, 48 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("files", "total_gb", "available_gb"),
    [
        ({}, 64, 48),
        (
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "sys/fs/cgroup/pod/container/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/pod/container/memory.current": f"{5 * GIB}\n",
                "sys/fs/cgroup/pod/container/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n",
                "sys/fs/cgroup/pod/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.current": f"{9 * GIB}\n",
            },
            *(8, 5),
        ),
        (
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "sys/fs/cgroup/pod/container/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/pod/container/memory.current": f"{1 * GIB}\n",
                "sys/fs/cgroup/pod/memory.max": f"{16 * GIB}\n",
                "sys/fs/cgroup/pod/memory.current": f"{15 * GIB}\n",
            },
            *(8, 1),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n0::/\n",
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/docker/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{30 * GIB}\n",
            },
            *(4, 2),
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            },
            *(2, 0),
        ),
    ],
    ids=["no limit", "v2", "v2, a full pod around it", "v1", "more than allowed"],
)
def test_memory_is_what_this_process_can_have(
    tmp_path: Path, files: dict[str, str], total_gb: float, available_gb: float
) -> None:
    """A container's limit kills long before the host's memory is full; page cache is given back before that."""
    write(tmp_path, files)
    assert HostMemory(lambda: "cpu", root=tmp_path).sample() == {
        "esper.device.memory_total_gb": total_gb,
        "esper.device.memory_available_gb": available_gb,
    }


def test_this_machines_memory_is_shown() -> None:
    """The real files."""
    readings = HostMemory(lambda: "cpu").sample()
    total, available = readings["esper.device.memory_total_gb"], readings["esper.device.memory_available_gb"]
    assert 0 < available < total <= psutil.virtual_memory().total / GIB


@pytest.mark.parametrize(
    ("device", "reason", "kind"),
    [
        ("cuda:0", "training runs on cuda:0: host memory is not device memory", ProbeUnavailable),
        (None, "the training device is not known yet", NotYet),
    ],
)
def test_the_hosts_memory_is_the_devices_only_when_training_runs_on_the_cpu(
    device: str | None, reason: str, kind: type[ProbeUnavailable]
) -> None:
    """On CUDA the device's memory is CUDA's to tell, also in the first steps."""
    with pytest.raises(ProbeUnavailable) as unavailable:
        HostMemory(lambda: device).sample()
    assert (str(unavailable.value), type(unavailable.value)) == (reason, kind)


@pytest.mark.parametrize("make", [HostCpu, lambda: HostMemory(lambda: "cpu")])
def test_without_psutil_there_is_a_reason(
    make: Callable[[], HostCpu | HostMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken installation costs metrics, not the training."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ProbeUnavailable, match="psutil is not installed"):
        make().sample()
