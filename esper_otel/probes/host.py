"""CPU and memory of the host, or of the container that this process lives in."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esper_otel.errors import ProbeUnavailable

_GIB = 1024**3
_FIRST_INTERVAL_S = 0.1


class _Quota(NamedTuple):
    """A limit on CPU time: so many CPUs at most, and the seconds used by all that share it."""

    cpus: float
    used_s: Callable[[], float]


class HostCpu:
    """CPU in use, as a share of what this process may use, in percent; on CPU also the host's memory, in GiB.

    With a quota (cgroup ``cpu.max``, or ``cpu.cfs_quota_us``) it is the CPU time of the quota's group against the
    quota; else that of the CPUs that this process may run on, by anybody (psutil). Bursts above a quota count as 100.

    Args:
        device: the training device's name; None while it is not known.
        root: where ``proc`` and ``sys`` are.
    """

    gives = ("cpu_util_percent",)

    def __init__(
        self,
        device: Callable[[], str | None],
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._device = device
        self._root = root
        self._clock = clock
        self._sleep = sleep
        self._before: tuple[float, float] | None = None

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``. The first call takes 0.1 s: a share needs two moments."""
        try:
            psutil = importlib.import_module("psutil")
        except ImportError as error:
            raise ProbeUnavailable("psutil is not installed") from error
        quota = self._quota()
        if self._before is None:
            self._before = self._busy(psutil, quota)
            self._sleep(_FIRST_INTERVAL_S)
        now = self._busy(psutil, quota)
        (busy_before, capacity_before), self._before = self._before, now
        readings = {}
        if now[1] > capacity_before:
            share = (now[0] - busy_before) / (now[1] - capacity_before)
            readings["cpu_util_percent"] = min(max(100.0 * share, 0.0), 100.0)
        if not (self._device() or "cpu").startswith("cuda"):
            memory = psutil.virtual_memory()
            readings["esper.device.memory_total_gb"] = memory.total / _GIB
            readings["esper.device.memory_available_gb"] = memory.available / _GIB
        return readings

    def _busy(self, psutil: Any, quota: _Quota | None) -> tuple[float, float]:
        """CPU seconds used, and those that could have been, both since some moment in the past."""
        if quota is not None:
            return quota.used_s(), quota.cpus * self._clock()
        times = psutil.cpu_times(percpu=True)
        try:
            allowed = [cpu for cpu in psutil.Process().cpu_affinity() if cpu < len(times)]
        except (AttributeError, psutil.Error):  # not on every system
            allowed = list(range(len(times)))
        total = sum(sum(times[cpu][:8]) for cpu in allowed)  # without guest times, which user time contains
        idle = sum(times[cpu].idle + getattr(times[cpu], "iowait", 0.0) for cpu in allowed)
        return total - idle, total

    def _quota(self) -> _Quota | None:
        """The tightest limit on the way from this process's cgroup to the root."""
        quotas = []
        for line in self._lines("proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            if not controllers:
                quotas += [self._quota_v2(folder) for folder in self._folders("sys/fs/cgroup", path)]
            elif "cpu" in controllers.split(","):
                quotas += [self._quota_v1(folder) for folder in self._folders("sys/fs/cgroup/cpu", path)]
        return min((quota for quota in quotas if quota is not None), key=lambda quota: quota.cpus, default=None)

    def _folders(self, mount: str, path: str) -> list[Path]:
        top = self._root / mount
        folder = top / path.lstrip("/")
        # In a container the path may be the host's, and only the top is there.
        return [each for each in (folder, *folder.parents) if each == top or top in each.parents]

    def _quota_v2(self, folder: Path) -> _Quota | None:
        limit, _, period = next(iter(self._lines_of(folder / "cpu.max")), "max").partition(" ")
        if not limit.isdecimal() or not period.isdecimal():
            return None

        def used_s() -> float:
            stat = dict(line.split(" ", 1) for line in self._lines_of(folder / "cpu.stat"))
            return int(stat["usage_usec"]) / 1e6

        return _Quota(int(limit) / int(period), used_s)

    def _quota_v1(self, folder: Path) -> _Quota | None:
        limit = next(iter(self._lines_of(folder / "cpu.cfs_quota_us")), "-1")
        period = next(iter(self._lines_of(folder / "cpu.cfs_period_us")), "")
        if not limit.isdecimal() or not period.isdecimal():
            return None
        usage = self._root / "sys/fs/cgroup/cpuacct" / folder.relative_to(self._root / "sys/fs/cgroup/cpu")

        def used_s() -> float:
            return int(self._lines_of(usage / "cpuacct.usage")[0]) / 1e9

        return _Quota(int(limit) / int(period), used_s)

    def _lines(self, path: str) -> list[str]:
        return self._lines_of(self._root / path)

    @staticmethod
    def _lines_of(path: Path) -> list[str]:
        try:
            return path.read_text().splitlines()
        except OSError:  # not there: no such limit
            return []
