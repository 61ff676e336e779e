"""CPU and memory of the host, or of the container that this process runs in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.cgroup import cpu_quota, memory_limits
from esper_otel.probes.probe import NotYet

_GIB = 1024**3
_FIRST_INTERVAL_S = 0.1


def _allowed_cpus() -> Set[int]:
    # This is the affinity of the calling thread, inherited from the thread that started it. psutil reads that of the
    # main thread, which OpenMP may have bound to a single CPU since.
    ask = getattr(os, "sched_getaffinity", None)  # not on every system
    return frozenset() if ask is None else frozenset(ask(0))


class _Moment(NamedTuple):
    """CPU seconds used and available since a start in the past. Only moments with equal ``of`` share that start."""

    of: object
    busy_s: float
    capacity_s: float


class HostCpu:
    """CPU in use, in percent of the CPU time that this process may use.

    If a quota (cgroup ``cpu.max`` or ``cpu.cfs_quota_us``) is lower than the number of CPUs that this process may run
    on, the value is the CPU time used by the quota's group relative to the quota. Otherwise it is the use of those
    CPUs by all processes (psutil). A group that bursts above its quota counts as 100 percent.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
        allowed: returns the CPUs that this process may run on; empty if the system does not report them.
        clock: returns the seconds of a clock that never goes back.
        sleep: waits for a number of seconds.
    """

    gives: tuple[str, ...] = ("cpu_util_percent",)

    def __init__(
        self,
        *,
        root: Path = Path("/"),
        allowed: Callable[[], Set[int]] = _allowed_cpus,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = root
        self._allowed = allowed
        self._clock = clock
        self._sleep = sleep
        self._before: _Moment | None = None

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``. The first call takes 0.1 s, because a share is computed from two moments."""
        before, now = self._before, self._moment()
        if before is None or before.of != now.of or now.capacity_s <= before.capacity_s:
            before = now
            self._sleep(_FIRST_INTERVAL_S)
            now = self._moment()
        self._before = now
        if before.of != now.of or now.capacity_s <= before.capacity_s:
            raise ProbeUnavailable("this system's CPU times do not advance")
        share = (now.busy_s - before.busy_s) / (now.capacity_s - before.capacity_s)
        return {"cpu_util_percent": min(max(100.0 * share, 0.0), 100.0)}

    def close(self) -> None:
        """See ``Probe``. Nothing to release."""

    def _moment(self) -> _Moment:
        psutil = loaded_psutil()
        times = psutil.cpu_times(percpu=True)
        allowed = frozenset(cpu for cpu in self._allowed() if cpu < len(times)) or frozenset(range(len(times)))
        quota = cpu_quota(self._root)
        if quota is not None and quota.cpus < len(allowed):
            return _Moment(quota, quota.used_s(), quota.cpus * self._clock())
        total = sum(sum(times[cpu][:8]) for cpu in allowed)  # without guest times, which user time contains
        idle = sum(times[cpu].idle + getattr(times[cpu], "iowait", 0.0) for cpu in allowed)
        return _Moment(allowed, total - idle, total)


class HostMemory:
    """Total and available host memory in GiB, if training runs on the CPU. Takes account of a container's limit.

    Args:
        device: returns the training device's name, or None while it is unknown.
        root: the folder that contains ``proc`` and ``sys``.
    """

    gives: tuple[str, ...] = ("esper.device.memory_total_gb", "esper.device.memory_available_gb")

    def __init__(self, device: Callable[[], str | None], *, root: Path = Path("/")) -> None:
        self._device = device
        self._root = root

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        name = self._device()
        if name is None:
            raise NotYet("the training device is not known yet")
        if name.partition(":")[0] != "cpu":
            raise ProbeUnavailable(f"training runs on {name}: host memory is not device memory")
        host = loaded_psutil().virtual_memory()
        limits = memory_limits(self._root)
        return {
            "esper.device.memory_total_gb": min([host.total, *(limit.total for limit in limits)]) / _GIB,
            "esper.device.memory_available_gb": min([host.available, *(limit.available for limit in limits)]) / _GIB,
        }

    def close(self) -> None:
        """See ``Probe``. Nothing to release."""


def loaded_psutil() -> ModuleType:
    """Returns psutil.

    Raises:
        ProbeUnavailable: it is not installed.
    """
    try:
        import psutil
    except ImportError as error:
        raise ProbeUnavailable("psutil is not installed") from error
    return psutil
