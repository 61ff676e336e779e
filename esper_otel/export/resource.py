"""The OpenTelemetry Resource: which run, attempt, rank, process, device and code the telemetry comes from."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.util.types import AnyValue

from esper_otel.export.config_file import configured_resource
from esper_otel.export.place import place
from esper_otel.frames.frame import RUN_FIELDS, Run

DEFAULT_SERVICE_NAME = "esper-tolaria"

# Sent even when they are 0; the others are left out while they are unknown.
_ALWAYS = ("esper.run.id", "esper.rank", "esper.world_size")

_NO_SETTINGS: Mapping[str, str] = {}

# Never sent, since command lines may contain paths and secrets; a detector that the user enabled may add them.
_NEVER = ("process.command_args", "process.command_line")


def resource_for(run: Run) -> Resource:
    """Returns the Resource of one rank's attempt, including ``OTEL_*`` variables. Detects anew; see ``resources``."""
    return resources()(run)


def resources(
    settings: Mapping[str, str] = _NO_SETTINGS,
    environ: Mapping[str, str] = os.environ,
    parallel: Mapping[str, int] = MappingProxyType({}),
) -> Callable[[Run], Resource]:
    """Detects the process's attributes now and returns a function that makes the Resource of a run from them.

    Args:
        settings: the session's settings that differ from the defaults; sent as one text, ``esper.settings``.
        environ: where the name of a configuration file, and the variables of the launcher, are looked for.
        parallel: the process's place along each parallel dimension.

    ``service.instance.id`` and the ``esper.*`` attributes that the run sets always override other values, because
    receivers use them to reassemble frames and packets. For all other attributes, ``OTEL_SERVICE_NAME``,
    ``OTEL_RESOURCE_ATTRIBUTES`` and ``OTEL_EXPERIMENTAL_RESOURCE_DETECTORS`` take precedence, or the ``resource`` of
    ``OTEL_CONFIG_FILE``, which replaces them.

    Detection takes about a millisecond, plus the time of detectors that the user enabled. The SDK runs detectors in
    threads, which cannot be started while the interpreter shuts down; so detection is done when a session starts.

    Raises:
        ConfigurationError: ``OTEL_CONFIG_FILE`` names a file that cannot be used.
    """
    detected = configured_resource(environ) or Resource.create()
    found = dict(detected.attributes)
    # The SDK sets this name, as specified, when no service name is configured.
    if str(found[SERVICE_NAME]).startswith("unknown_service"):
        found[SERVICE_NAME] = DEFAULT_SERVICE_NAME
    for name in _NEVER:
        found.pop(name, None)
    of_process = {**_process(), **place(environ), **found}
    ours: dict[str, str | int] = {f"esper.parallel.{name}": number for name, number in parallel.items()}
    if settings:
        ours["esper.settings"] = settings_text(settings)

    def of_run(run: Run) -> Resource:
        attributes: dict[str, AnyValue] = {**of_process, **_identity(run), **ours}
        return Resource({name: _valid_text(value) for name, value in attributes.items()}, detected.schema_url)

    return of_run


def settings_text(settings: Mapping[str, str]) -> str:
    """Returns settings as one text, in the order of their names."""
    return ", ".join(f"{name} = {value}" for name, value in sorted(settings.items()))


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
    # An environment variable may hold bytes that are not UTF-8. They become surrogates, which protobuf refuses.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MAX_FILE_BYTES = 16 * 1024 * 1024  # packed-refs of a very large repository
_MAX_SYMBOLIC_REFS = 5  # the limit of git itself


def _git_revision() -> str:
    """Reads the commit checked out in the current directory from git's files; empty when it cannot be found."""
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
    # In a linked worktree or a submodule, .git is a file that contains the path of the git directory.
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
    # Reading a pipe or device of that name would block forever.
    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is not a file of at most {_MAX_FILE_BYTES} bytes")
    return path.read_text(encoding="utf-8")
