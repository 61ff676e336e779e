"""CPU and memory of the host, or of the container that this process lives in."""

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
    # Of the calling thread, which has it from the thread that started it: psutil asks for the main thread's, which
    # OpenMP may have bound to a single CPU in the meantime.
    ask = getattr(os, "sched_getaffinity", None)  # not on every system
    return frozenset() if ask is None else frozenset(ask(0))


class _Moment(NamedTuple):
    """CPU seconds used, and those that could have been, since some moment in the past that ``of`` tells apart."""

    of: object
    busy_s: float
    capacity_s: float


class HostCpu:
    """CPU in use, as a share of what this process may use, in percent.

    With a quota (cgroup ``cpu.max``, or ``cpu.cfs_quota_us``) that is below the CPUs this process may run on, it is
    the CPU time of the quota's group against the quota; else that of those CPUs, used by anybody (psutil). A group
    that has saved up may burst above its quota: it counts as 100.

    Args:
        root: where ``proc`` and ``sys`` are.
        allowed: gives the CPUs that this process may run on; none if the system does not say.
        clock: seconds of a clock that never goes back.
        sleep: waits so many seconds.
    """

    gives = ("cpu_util_percent",)

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
        """See ``Probe``. The first call takes 0.1 s: a share needs two moments, and psutil's own first answer is 0."""
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
        """See ``Probe``: nothing is held."""

    def _moment(self) -> _Moment:
        psutil = _psutil()
        times = psutil.cpu_times(percpu=True)
        allowed = frozenset(cpu for cpu in self._allowed() if cpu < len(times)) or frozenset(range(len(times)))
        quota = cpu_quota(self._root)
        if quota is not None and quota.cpus < len(allowed):
            return _Moment(quota, quota.used_s(), quota.cpus * self._clock())
        total = sum(sum(times[cpu][:8]) for cpu in allowed)  # without guest times, which user time contains
        idle = sum(times[cpu].idle + getattr(times[cpu], "iowait", 0.0) for cpu in allowed)
        return _Moment(allowed, total - idle, total)


class HostMemory:
    """Memory there and available when training runs on the CPU, in GiB; a container's limit is respected.

    Args:
        device: the training device's name; None while it is not known.
        root: where ``proc`` and ``sys`` are.
    """

    gives = ("esper.device.memory_total_gb", "esper.device.memory_available_gb")

    def __init__(self, device: Callable[[], str | None], *, root: Path = Path("/")) -> None:
        self._device = device
        self._root = root

    def sample(self) -> Mapping[str, float]:
        """See ``Probe``."""
        name = self._device()
        if name is None:
            raise NotYet("the training device is not known yet")
        if name.partition(":")[0] != "cpu":
            raise ProbeUnavailable(f"training runs on {name}: the host's memory is not the device's")
        host = _psutil().virtual_memory()
        limits = memory_limits(self._root)
        return {
            "esper.device.memory_total_gb": min([host.total, *(limit.total for limit in limits)]) / _GIB,
            "esper.device.memory_available_gb": min([host.available, *(limit.available for limit in limits)]) / _GIB,
        }

    def close(self) -> None:
        """See ``Probe``: nothing is held."""


def _psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as error:
        raise ProbeUnavailable("psutil is not installed") from error
    return psutil
