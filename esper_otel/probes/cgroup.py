"""Limits on CPU time and memory that Linux control groups set for this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from esper_otel.errors import ProbeUnavailable

_TOP = "sys/fs/cgroup"


class CpuQuota(NamedTuple):
    """The number of CPUs that all processes of a group together may use."""

    cpus: float
    usage: Path

    def used_s(self) -> float:
        """Returns the CPU seconds that the group has used.

        Raises:
            ProbeUnavailable: the group does not report the time.
        """
        try:
            if self.usage.name == "cpu.stat":
                return _table(self.usage)["usage_usec"] / 1e6
            return int(self.usage.read_text()) / 1e9
        except (OSError, KeyError, ValueError) as error:
            raise ProbeUnavailable(f"the CPU quota's group does not report the time used: {self.usage}") from error


class MemoryLimit(NamedTuple):
    """Memory of a group in bytes: the limit and the part still available, which includes inactive page cache."""

    total: int
    available: int


def cpu_quota(root: Path) -> CpuQuota | None:
    """Returns the tightest quota of this process's group and the groups above it; None if there is no quota.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """
    quotas: list[CpuQuota] = []
    for folder in _folders(root, "cpu", version=2):
        limit, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        if limit.isdecimal() and period.isdecimal():
            quotas.append(CpuQuota(int(limit) / int(period), folder / "cpu.stat"))
    for folder in _folders(root, "cpu", version=1):
        limit, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if limit.isdecimal() and period.isdecimal():  # no limit is -1
            usage = folder / "cpuacct.usage"
            if not usage.exists():  # the two controllers are mounted separately
                group = folder.relative_to(root / _TOP).parts[1:]
                usage = (root / _TOP / "cpuacct").joinpath(*group) / "cpuacct.usage"
            quotas.append(CpuQuota(int(limit) / int(period), usage))
    return min(quotas, key=lambda quota: quota.cpus, default=None)


def memory_limits(root: Path) -> list[MemoryLimit]:
    """Returns the limits of this process's group and of the groups above it. "No limit" is a number above the host's.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """
    limits = []
    for version, most, now, spare in (
        (2, "memory.max", "memory.current", "inactive_file"),
        (1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _folders(root, "memory", version=version):
            limit, usage = _text(folder / most), _text(folder / now)
            if limit.isdecimal() and usage.isdecimal():
                used = max(int(usage) - _table(folder / "memory.stat").get(spare, 0), 0)
                limits.append(MemoryLimit(int(limit), max(int(limit) - used, 0)))
    return limits


def _folders(root: Path, controller: str, *, version: int) -> Iterator[Path]:
    """Yields the folders of this process's group and of the groups above it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if version == 2 and not controllers:
            tops = [_TOP, f"{_TOP}/unified"]
        elif version == 1 and controller in controllers.split(","):
            tops = [f"{_TOP}/{controllers}", f"{_TOP}/{controller}"]
        else:
            continue
        for top in dict.fromkeys(root / top for top in tops):
            folder = top / path.lstrip("/")
            # In a container the path may be that on the host; then only the topmost folder exists.
            yield from (each for each in (folder, *folder.parents) if each == top or top in each.parents)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such file: there is no such limit
        return ""


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2}
