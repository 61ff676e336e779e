"""The OpenTelemetry Resource: which run, attempt, rank, process, device and code the telemetry comes from."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.util.types import AnyValue

from esper_otel.frames.frame import RUN_FIELDS, Run

DEFAULT_SERVICE_NAME = "esper-tolaria"

# Sent also where they are 0; of the others an empty one is not known.
_ALWAYS = ("esper.run.id", "esper.rank", "esper.world_size")

# Command lines hold paths and secrets; a detector that the user switched on may have added them.
_NEVER = ("process.command_args", "process.command_line")


def resource_for(run: Run) -> Resource:
    """The Resource of one rank's attempt, with what ``OTEL_*`` variables say. Detects anew; see ``resources``."""
    return resources()(run)


def resources() -> Callable[[Run], Resource]:
    """Gives the Resource of a run, as often as asked, from what is detected now.

    ``service.instance.id`` and the ``esper.*`` that the run fills are always ours: frames are put together
    and packets rebuilt from them. For everything else ``OTEL_SERVICE_NAME``,
    ``OTEL_RESOURCE_ATTRIBUTES`` and ``OTEL_EXPERIMENTAL_RESOURCE_DETECTORS`` win.

    Detecting takes about a millisecond; detectors that the user switched on take what they take. The SDK runs them in
    threads, which an interpreter that shuts down does not start any more: so it is done at the start of a session.
    """
    detected = Resource.create()
    found = dict(detected.attributes)
    # The SDK fills in this name, by specification, when nobody has given one.
    if str(found[SERVICE_NAME]).startswith("unknown_service"):
        found[SERVICE_NAME] = DEFAULT_SERVICE_NAME
    for name in _NEVER:
        found.pop(name, None)
    of_process = {**_process(), **found}

    def of_run(run: Run) -> Resource:
        attributes: dict[str, AnyValue] = {**of_process, **_identity(run)}
        return Resource({name: _valid_text(value) for name, value in attributes.items()}, detected.schema_url)

    return of_run


def _identity(run: Run) -> dict[str, str | int]:
    said = {each.attribute: getattr(run, each.name) for each in RUN_FIELDS}
    known = {name: value for name, value in said.items() if value or name in _ALWAYS}
    return {"service.instance.id": f"{run.run_id}/{run.rank}", **known}


def _process() -> dict[str, str | int]:
    process: dict[str, str | int] = {
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        "process.runtime.name": sys.implementation.name,
        "process.runtime.version": platform.python_version(),
        "process.runtime.description": sys.version,
    }
    revision = _git_revision()
    if revision:
        process["vcs.ref.head.revision"] = revision  # semantic conventions 1.44, registry "vcs"
    return process


def _valid_text(value: AnyValue) -> AnyValue:
    # An environment variable may hold bytes that are no UTF-8; protobuf refuses the surrogates they become.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MAX_FILE_BYTES = 16 * 1024 * 1024  # packed-refs of a very large repository
_MAX_SYMBOLIC_REFS = 5  # git follows as many


def _git_revision() -> str:
    """The commit checked out in the current directory, read from its files; empty when it cannot be known."""
    try:
        here = Path.cwd()
        for directory in (here, *here.parents):
            if (directory / ".git").exists():
                return _head(_git_directory(directory))
    except (OSError, ValueError):  # gone, unreadable, not text, a path with a null byte
        pass
    return ""


def _git_directory(checkout: Path) -> Path:
    entry = checkout / ".git"
    if entry.is_dir():
        return entry
    # A linked worktree or a submodule has a file that says where its directory is.
    return checkout / _read(entry).strip().removeprefix("gitdir: ")


def _head(git_directory: Path) -> str:
    shared = git_directory
    if (git_directory / "commondir").exists():
        shared = git_directory / _read(git_directory / "commondir").strip()
    content = _read(git_directory / "HEAD").strip()
    for _ in range(_MAX_SYMBOLIC_REFS):
        if _HASH.fullmatch(content):
            return content
        name = content.removeprefix("ref: ")
        if not name.startswith("refs/") or ".." in name:
            return ""
        loose = [directory / name for directory in (git_directory, shared) if (directory / name).exists()]
        content = _read(loose[0]).strip() if loose else _packed(shared / "packed-refs", name)
    return ""


def _packed(packed_refs: Path, name: str) -> str:
    found = re.search(rf"^([0-9a-f]+) {re.escape(name)}$", _read(packed_refs), re.MULTILINE)
    return found[1] if found else ""


def _read(path: Path) -> str:
    # A pipe or device of that name would block for ever.
    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is not a file of at most {_MAX_FILE_BYTES} bytes")
    return path.read_text(encoding="utf-8")
