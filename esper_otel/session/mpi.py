"""What ``mpirun`` (``mpiexec``) reports to the ranks that it starts, and a number of its launch that they share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class LauncherVariables(NamedTuple):
    """The names of a launcher's variables."""

    rank: str
    size: str
    local_size: str


class Launch(NamedTuple):
    """The process that has started all ranks.

    Attributes:
        time_ms: when it was started, in Unix milliseconds, rounded up by at most a second.
        pid: its process id.
    """

    time_ms: int
    pid: int


_LAUNCHERS = (
    LauncherVariables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    LauncherVariables("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),  # MVAPICH2
    LauncherVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # Hydra: MPICH and Intel MPI; other process managers
)
_LASTING = {"prte", "prted"}  # servers of Open MPI that start many jobs one after the other
_MOST = 32  # processes between a rank and its launcher


def variables(environ: Mapping[str, str]) -> LauncherVariables | None:
    """Returns the variables of the launcher that has set both rank and size."""
    return next((each for each in _LAUNCHERS if environ.get(each.rank) and environ.get(each.size)), None)


def launch(environ: Mapping[str, str]) -> Launch | None:
    """Returns what has started all ranks of this launch; None if they are on several hosts, or it cannot be found.

    It is the nearest ancestor of this process without the rank's variable, so that scripts in between do not matter.
    """
    names = variables(environ)
    if names is None or environ[names.size] != environ.get(names.local_size):
        return None
    with suppress(OSError, ValueError, IndexError):  # no /proc, or not ours to read
        pid = os.getppid()
        for _ in range(_MOST):
            if pid < 1:
                return None
            stat = Path(f"/proc/{pid}/stat").read_bytes()
            name, fields = stat[stat.index(b"(") + 1 : stat.rindex(b")")], stat[stat.rindex(b")") + 1 :].split()
            if not _has(pid, names.rank):
                return None if name.decode() in _LASTING else Launch(_unix_ms(int(fields[19])), pid)
            pid = int(fields[1])
    return None


def _has(pid: int, variable: str) -> bool:
    """Whether a process was started with the variable."""
    return f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()


def _unix_ms(ticks: int) -> int:
    """Returns the time of so many clock ticks after the boot; the same in all processes while the clock is not set."""
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    [booted_s] = [int(line.split()[1]) for line in lines if line.startswith("btime ")]
    return (booted_s + 1) * 1000 + ticks * 1000 // os.sysconf("SC_CLK_TCK")
