"""The layers: nothing upstream imports what lies downstream, and each foreign library has one owner."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import esper_otel

pytestmark = pytest.mark.own_code

PACKAGE = Path(esper_otel.__file__).parent

# What each room may import at run time, besides itself, errors and the standard library. Imports for types are free.
BASE = {"text", "log", "native", "unix", "untraced", "tracebacks", "varint"}
# Files of the gateway that its rooms stand on; they know no room.
GATEWAY_BASE = {f"gateway/{name}" for name in ("items", "limits", "turns", "changes", "quiet")}
MAY_IMPORT = {
    "errors": set[str](),
    "text": set[str](),
    "_version": set[str](),
    "settings": {"errors"},
    "bearer": {"errors", "log", "unix"},
    "varint": set[str](),
    "native": set[str](),
    "unix": set[str](),
    "addresses": set[str](),
    "captures": set[str](),
    "local_ports": set[str](),
    "untraced": set[str](),
    "tracebacks": set[str](),
    "log": {"text", "untraced"},
    "schema": set[str](),
    "hours": set[str](),
    "frames": {*BASE, "schema", "_version"},
    "derive": {"schema", "frames"},
    "record": {*BASE, "schema", "frames", "captures"},
    "probes": {*BASE, "schema", "captures"},
    "export": {*BASE, "schema", "frames", "settings", "addresses", "bearer", "_version"},
    "parts": {"schema", "frames"},
    "events": {"schema", "frames", "leyline"},
    "leyline": {*BASE, "schema", "frames", "parts"},
    "session": {
        *(*BASE, "schema", "frames", "settings", "_version"),
        *("session/identity", "session/parallel", "session/agreement", "session/launcher", "session/mpi"),
        *("record", "derive", "probes", "export", "leyline", "local_ports", "charts", "events"),
    },
    # What a run is by its environment, which is checked without one.
    "session/identity": {*BASE, "frames", "session/agreement", "session/launcher"},
    "session/agreement": {*BASE, "frames", "session/launcher"},
    "session/launcher": {*BASE, "session/mpi"},
    "session/mpi": {*BASE},
    "session/parallel": set[str](),
    "pull": {*BASE, "hours", "leyline", "addresses", "bearer", "local_ports"},
    "oona": {*BASE, "leyline"},
    "integrations": {*BASE, "derive", "record", "session"},
    **{name: {*BASE, "frames", "parts"} for name in GATEWAY_BASE},
    # Of the files that stand above the rooms of the gateway, the commands alone know the ports.
    "gateway": {
        *(*BASE, *GATEWAY_BASE, "schema", "frames", "parts", "leyline", "pull", "oona", "bearer", "hours"),
        *("gateway/ranks", "gateway/receive", "gateway/rebuild", "gateway/store", "gateway/hours", "gateway/events"),
    },
    "gateway/command": {
        *BASE,
        *GATEWAY_BASE,
        "gateway/notify",
        "oona",
        "gateway",
        "gateway/options",
        "gateway/store",
        "gateway/serve",
        "gateway/kafka/member_process",
    },
    "gateway/options": {*BASE, *GATEWAY_BASE, "leyline", "oona", "gateway", "gateway/store", "gateway/serve"},
    "gateway/ui": {*BASE, "gateway", "gateway/command", "local_ports"},
    "gateway/replay": {
        *(*BASE, *GATEWAY_BASE, "frames", "gateway"),
        *("gateway/command", "gateway/options", "gateway/store", "gateway/serve"),
    },
    "gateway/receive": {*BASE, *GATEWAY_BASE, "schema", "frames", "parts"},
    "gateway/hours": {*BASE, *GATEWAY_BASE, "frames", "hours", "pull", "gateway/receive", "gateway/store"},
    "gateway/events": {*BASE, *GATEWAY_BASE, "schema", "pull", "gateway/receive", "gateway/store"},
    "gateway/rebuild": {*BASE, *GATEWAY_BASE, "schema", "frames", "parts", "gateway/receive"},
    "gateway/store": {*BASE, *GATEWAY_BASE, "frames", "parts", "leyline"},
    "gateway/kafka": {
        *(*BASE, *GATEWAY_BASE, "schema", "frames", "hours", "leyline", "pull", "gateway"),
        *("gateway/ranks", "gateway/receive", "gateway/rebuild", "gateway/store", "gateway/hours", "gateway/events"),
    },
    # A member and a server: the processes, with their ports.
    "gateway/kafka/member_process": {
        *(*BASE, *GATEWAY_BASE, "gateway", "gateway/options", "gateway/kafka", "gateway/serve"),
    },
    "gateway/kafka/command": {
        *(*BASE, *GATEWAY_BASE, "oona", "gateway", "gateway/command", "gateway/options"),
        *("gateway/kafka", "gateway/serve"),
    },
    "gateway/notify": {*BASE, *GATEWAY_BASE, "schema", "frames", "leyline", "oona", "addresses"},
    "gateway/ranks": {*BASE, *GATEWAY_BASE, "schema", "frames", "pull"},
    "gateway/page_data": {
        *(*BASE, *GATEWAY_BASE, "schema", "frames", "leyline", "pull", "charts", "gateway/ranks", "gateway/store"),
    },
    "gateway/serve": {
        *(*BASE, *GATEWAY_BASE, "schema", "frames", "leyline", "pull", "charts", "hours"),
        *("gateway", "gateway/ranks", "gateway/receive", "gateway/store", "gateway/page_data"),
    },
    "charts": {"schema", "hours"},
    "report": {*BASE, "schema", "frames", "hours", "parts", "leyline", "pull", "charts", "local_ports"},
    "compare": {"text", "schema", "frames", "pull", "report", "gateway/store", "local_ports"},
    "files": {"text", "_version", "schema", "leyline"},
    "check": {
        *(*BASE, "schema", "frames", "settings", "export", "send", "leyline", "pull", "_version", "events"),
        *("session/identity", "session/parallel"),
    },
    "send": {*BASE, "schema", "frames", "settings", "export", "events"},
    "testing": {"schema", "export"},
    "demo": {"schema", "settings", "session", "leyline", "testing", "record", "_version", ""},
    "cli": {"text", "_version"},  # commands are modules that it names
    "aio": {"pull"},
    "__main__": {"cli"},
    "": {"_version"},  # the rest is loaded when it is first used
}

# Where each foreign library may be imported at run time; a folder ends in a slash.
OWNERS = {
    "torch": ("record/", "derive/", "probes/cuda.py", "demo/", "integrations/"),
    "pynvml": ("probes/nvml.py",),
    "amdsmi": ("probes/amd.py",),
    "psutil": ("probes/machine.py",),
    "sklearn": ("demo/",),
    "rich": ("schema/command.py", "demo/"),
    "numpy": (
        *("frames/", "record/", "derive/", "export/", "parts/", "leyline/", "gateway/", "check/"),
        *("charts/", "compare/", "events/"),
    ),
    "opentelemetry": ("export/", "untraced.py", "leyline/reader.py", "session/start.py"),
    "opentelemetry.instrumentation": ("integrations/instrumentor.py",),
    "opentelemetry.sdk": ("export/", "leyline/reader.py", "session/detector.py"),
    "opentelemetry.exporter": ("export/",),
    "opentelemetry.proto": ("export/", "send/", "testing/", "check/", "gateway/"),
    "google.protobuf": ("leyline/", "send/", "export/", "testing/", "gateway/", "pull/"),
    "google.rpc": ("export/", "testing/", "gateway/"),
    "grpc": ("export/", "testing/", "gateway/", "pull/"),
    "grpc_health": ("gateway/",),
    "grpc_reflection": ("gateway/",),
    "aiohttp": ("gateway/",),
    "backports": ("gateway/receive/inflate.py",),
    "compression": ("gateway/receive/inflate.py",),  # of the standard library from 3.14 on
    "requests": ("export/", "check/"),
    "urllib3": ("export/",),
    "prometheus_client": ("export/",),
    "redis": ("oona/publisher.py",),
    "confluent_kafka": ("gateway/kafka/",),
    "pyarrow": ("report/table.py", "compare/readings.py"),
    "IPython": ("session/show.py",),
    "lightning": ("integrations/lightning.py",),
    "pytorch_lightning": ("integrations/lightning.py",),
    "transformers": ("integrations/transformers.py",),
}


class Import(NamedTuple):
    where: str  # the file, relative to the package
    line: int
    module: str
    is_for_types: bool


@functools.cache
def imports() -> list[Import]:
    """Those of all files; read when a test needs them, since each process that runs tests imports this file."""
    return [each for path in FILES for each in imports_of(path)]


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All that a file consists of."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands, and modules that are named to ``import_module``."""
    where = str(path.relative_to(PACKAGE))
    nodes = nodes_of(path)
    for_types = {
        id(node)
        for block in nodes
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}:{node.lineno}: imports are absolute"
            names = [_module(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and _name(node.func) == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        for name in names:
            yield Import(where, node.lineno, name, id(node) in for_types)


def _name(function: ast.expr) -> str:
    return str(getattr(function, "attr", getattr(function, "id", "")))


def _module(module: str, name: str) -> str:
    """The module that ``from module import name`` reads."""
    if module == "esper_otel":
        is_part = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
        return f"{module}.{name}" if is_part else module
    return f"{module}.{name}" if module in {"opentelemetry", "google"} else module


FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: str) -> str:
    """The room that a file or module, relative to the package, is in or is itself; empty for the package's own face."""
    parts = path.removesuffix(".py").split("/")
    names = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in MAY_IMPORT), "" if path == "__init__.py" else parts[0])


def test_every_room_has_its_place_in_the_order() -> None:
    """A new folder says what it stands on before it has any content."""
    assert {room_of(str(path.relative_to(PACKAGE))) for path in FILES} - MAY_IMPORT.keys() == set()


def test_nothing_upstream_imports_what_lies_downstream() -> None:
    """schema, frames, record, derive, then export or leyline: a value passes each room once; only session wires."""
    faults = []
    for each in imports():
        root, _, inside = each.module.partition(".")
        if root != "esper_otel" or each.is_for_types:
            continue
        importer, imported = room_of(each.where), room_of(inside.replace(".", "/"))
        if imported not in {importer, "errors", *MAY_IMPORT.get(importer, ())}:
            faults.append(f"{each.where}:{each.line}: {importer or 'esper_otel'} may not import {each.module}")
    assert faults == [], "\n".join(faults)


def test_every_foreign_library_is_imported_by_its_owners_only() -> None:
    """What a new version of a library breaks is in one place."""
    faults = []
    for each in imports():
        if each.is_for_types or each.module.split(".")[0] in {"esper_otel", *sys.stdlib_module_names}:
            continue
        owners = owners_of(each.module)
        if not any(each.where == owner or (owner[-1] == "/" and each.where.startswith(owner)) for owner in owners):
            faults.append(f"{each.where}:{each.line}: {each.module} belongs to {', '.join(owners) or 'nobody yet'}")
    assert faults == [], "\n".join(faults)


def owners_of(module: str) -> tuple[str, ...]:
    """The owners of the longest declared name that the module is, or lies in."""
    names = [name for name in OWNERS if module == name or module.startswith(f"{name}.")]
    return OWNERS[max(names, key=len)] if names else ()


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    """Fifty lines, docstring not counted."""
    long = {}
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                if lines > 50:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert long == {}


# Names that users write, so that the twins must have them: who moves from one to the other changes an import only.
TWINS = {
    "EsperCallback": "the callback of Lightning and that of transformers",
    "TamiyoClient": "the client and that for asyncio",
}


def test_no_two_classes_share_a_name() -> None:
    """One word, one meaning: who reads a name needs not know in which room it is used. An underscore does not count."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    shared = {name: where for name, where in homes.items() if len(where) > 1}
    assert shared.keys() - TWINS.keys() == set(), shared
    assert TWINS.keys() - shared.keys() == set(), "these are twins no more"


# Modules of several rooms that have one name because they have one job.
ONE_JOB = {
    "__init__": "the face of a room",
    "aio": "the client for asyncio, and its public face",
    "command": "a command of the command line",
    "messages": "the classes of a contract's messages",
    "metrics": "a process's own metrics, in Prometheus' text format",
    "otlp_json": "OTLP in JSON, written and read",
}


def test_modules_of_one_name_have_one_job() -> None:
    """Who looks for a module by its name finds one, or several that do the same in their rooms."""
    counts = Counter(path.stem for path in FILES)
    assert {name for name, count in counts.items() if count > 1} == ONE_JOB.keys()


@pytest.mark.parametrize(
    "code",
    [
        "import esper_otel",
        "import esper_otel; esper_otel.LeylineMetricReader",
        "import esper_otel.cli; esper_otel.cli.main(['schema'])",
        "import esper_otel.testing",
    ],
)
def test_torch_and_grpc_are_imported_only_where_they_are_needed(code: str) -> None:
    """A Tamiyo host has no torch, and a command line must not wait seconds for one."""
    script = f"{code}\nimport sys\nprint(sorted({{'torch', 'grpc', 'sklearn', 'pandas'}} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert ran.stdout.splitlines()[-1:] == ["[]"], ran.stderr
