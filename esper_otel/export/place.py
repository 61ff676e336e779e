"""Where a process runs, by attributes of the Resource: host, container, Slurm job, pod, and place among the ranks."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path

from esper_otel.schema.attribute_catalogue import KUBERNETES, RANKS, SLURM, Attribute

# Names of OpenTelemetry's registry of host architectures.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64", "i686": "x86", "s390x": "s390x"}
_MACHINE = re.compile(r"[0-9a-f]{32}")
_CONTAINER = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def attributes_of(declared: tuple[Attribute, ...], environ: Mapping[str, str]) -> dict[str, str | int]:
    """Returns those of the declared attributes that the environment has."""
    found: dict[str, str | int] = {}
    for attribute in declared:
        text = next((environ[name] for name in attribute.variables if environ.get(name)), "")
        if attribute.type == "string" and text:
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
