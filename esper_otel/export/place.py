"""Where a process runs, by attributes of the Resource: host, container, Slurm job, pod, and place among the ranks."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Attribute(NamedTuple):
    """An attribute of the Resource that is read from the environment.

    Attributes:
        name: its name.
        variables: the variables that may have it; the first one that is set counts.
        meaning: one line for users.
        is_number: whether it is a whole number; other texts are left out.
    """

    name: str
    variables: tuple[str, ...]
    meaning: str
    is_number: bool = False


SLURM: tuple[Attribute, ...] = (
    Attribute("slurm.cluster.name", ("SLURM_CLUSTER_NAME",), "Slurm's cluster"),
    Attribute("slurm.job.id", ("SLURM_JOB_ID",), "the job"),
    Attribute("slurm.job.name", ("SLURM_JOB_NAME",), "its name"),
    Attribute("slurm.job.partition", ("SLURM_JOB_PARTITION",), "its partition"),
    Attribute("slurm.array.job.id", ("SLURM_ARRAY_JOB_ID",), "the array of jobs that it belongs to"),
    Attribute("slurm.array.task.id", ("SLURM_ARRAY_TASK_ID",), "its number in the array"),
    Attribute("slurm.step.id", ("SLURM_STEP_ID",), "the job step"),
    Attribute("slurm.restart.count", ("SLURM_RESTART_COUNT",), "how often Slurm has started the job again"),
    Attribute("slurm.node.name", ("SLURMD_NODENAME",), "the node"),
)
KUBERNETES: tuple[Attribute, ...] = (
    Attribute("k8s.pod.name", ("K8S_POD_NAME", "POD_NAME"), "the pod"),
    Attribute("k8s.pod.uid", ("K8S_POD_UID", "POD_UID"), "its UID"),
    Attribute("k8s.namespace.name", ("K8S_NAMESPACE_NAME", "POD_NAMESPACE"), "its namespace"),
    Attribute("k8s.node.name", ("K8S_NODE_NAME", "NODE_NAME"), "its node"),
    Attribute("k8s.job.name", ("K8S_JOB_NAME", "JOB_NAME"), "the job that it belongs to"),
    Attribute("k8s.container.name", ("K8S_CONTAINER_NAME", "CONTAINER_NAME"), "the container"),
)
RANKS: tuple[Attribute, ...] = (
    Attribute(
        "esper.local_rank",
        ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
        "the rank's number on its node",
        is_number=True,
    ),
    Attribute(
        "esper.torchrun.restart.count",
        ("TORCHELASTIC_RESTART_COUNT",),
        "how often torchrun has started the workers again",
        is_number=True,
    ),
)

# Names of OpenTelemetry's registry of host architectures.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64", "i686": "x86", "s390x": "s390x"}
_MACHINE = re.compile(r"[0-9a-f]{32}")
_CONTAINER = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def attributes_of(declared: tuple[Attribute, ...], environ: Mapping[str, str]) -> dict[str, str | int]:
    """Returns those of the declared attributes that the environment has."""
    found: dict[str, str | int] = {}
    for attribute in declared:
        text = next((environ[name] for name in attribute.variables if environ.get(name)), "")
        if not attribute.is_number and text:
            found[attribute.name] = text
        elif text.isascii() and text.isdecimal():
            found[attribute.name] = int(text)
    return found


def place(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str | int]:
    """Returns the attributes of the place where this process runs.

    The attributes of a pod are read only in a pod, because some of the variables have common names.

    Args:
        environ: the environment.
        root: the folder that contains ``etc`` and ``proc``.
    """
    is_in_pod = bool(environ.get("KUBERNETES_SERVICE_HOST"))
    machine = platform.machine()
    host: dict[str, str | int] = {"host.arch": _ARCHITECTURES.get(machine, machine)} if machine else {}
    container = container_id(root)
    if container:
        host["container.id"] = container
    elif not is_in_pod and (machine_id := _machine_id(root)):
        host["host.id"] = machine_id
    pod = attributes_of(KUBERNETES, environ) if is_in_pod else {}
    return {**host, **attributes_of(SLURM, environ), **pod, **attributes_of(RANKS, environ)}


def container_id(root: Path = Path("/")) -> str:
    """Returns the id of the container that this process runs in; empty if there is none or it cannot be found.

    It stands in the name of the control group, or with control groups of version 2 in the mounts that the container's
    runtime has made.
    """
    for line in _lines(root / "proc/self/cgroup"):
        found = _CONTAINER.search(line.rpartition(":")[2].rpartition("/")[2])
        if found:
            return found[0]
    for line in _lines(root / "proc/self/mountinfo"):
        fields = line.split()
        if len(fields) > 4 and fields[4] in {"/etc/hostname", "/etc/resolv.conf"} and "containers/" in fields[3]:
            found = _CONTAINER.search(fields[3])
            if found:
                return found[0]
    return ""


def _machine_id(root: Path) -> str:
    """Returns the id of the machine; empty in a container, which may have one of its own."""
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        return ""
    for name in ("etc/machine-id", "var/lib/dbus/machine-id"):
        for line in _lines(root / name)[:1]:
            if _MACHINE.fullmatch(line.strip()):
                return line.strip()
    return ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
