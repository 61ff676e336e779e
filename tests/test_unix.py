"""Nothing needs what only Linux and macOS have, except where a message says so: Windows is simulated by hiding it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from gateways import RunningGateway

import esper_otel
from esper_otel import TamiyoClient
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

PACKAGE = Path(esper_otel.__file__).parent
ASKED_FOR_IN = "unix.py"

# Modules, and names of modules, that Python's documentation gives as available on Unix only.
MODULES = {
    *("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"),
    *("readline", "multiprocessing.popen_fork"),
}
NAMES = {
    "os": {
        *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "chown", "chroot", "fchdir", "fchmod"),
        *("fchown", "fdatasync", "fork", "forkpty", "fstatvfs", "getegid", "geteuid", "getgid", "getgroups"),
        *("getloadavg", "getpgid", "getpgrp", "getpriority", "getuid", "killpg", "mkfifo", "mknod", "nice", "openpty"),
        *("pread", "pwrite", "readv", "register_at_fork", "sched_getaffinity", "sched_yield", "sendfile", "setsid"),
        *("setuid", "statvfs", "sync", "sysconf", "uname", "wait", "wait4", "waitid", "writev"),
    },
    "select": {"poll", "epoll", "kqueue"},
    "signal": {
        *("SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP"),
        *("SIGUSR1", "SIGUSR2", "SIGXCPU", "ITIMER_REAL", "alarm", "getitimer", "pause", "pthread_kill"),
        *("pthread_sigmask", "setitimer", "siginterrupt", "sigpending", "sigwait"),
    },
    "socket": {"AF_UNIX", "SO_REUSEPORT", "MSG_DONTWAIT", "send_fds", "recv_fds"},
    "time": {"CLOCK_MONOTONIC", "CLOCK_BOOTTIME", "clock_gettime", "clock_gettime_ns", "tzset"},
}
# Uses that nobody reaches elsewhere, each with the reason.
UNREACHED = {
    "export/folder.py": {"os.pread", "os.pwrite"},  # Spool has called unix.demand
    "record/clock.py": {"time.CLOCK_BOOTTIME", "time.clock_gettime_ns"},  # asks hasattr
    "record/phases.py": {"os.sysconf", "time.clock_gettime", "time.CLOCK_BOOTTIME"},  # has read /proc before
    "session/ending.py": {"signal.SIGALRM", "signal.ITIMER_REAL", "signal.getitimer", "signal.setitimer"},  # likewise
    "session/mpi.py": {"os.sysconf"},  # has read /proc before
}


def uses_of(path: Path) -> set[str]:
    """What a file uses of the names above; not what it asks for with ``getattr`` or ``hasattr``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found & {*MODULES, *(f"{module}.{name}" for module, names in NAMES.items() for name in names)}


def test_what_only_unix_has_is_used_in_one_file() -> None:
    """A list of exceptions that is longer than the truth would hide the next one: they must be equal."""
    found = {str(path.relative_to(PACKAGE).as_posix()): uses_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
    assert {where: names for where, names in found.items() if names and where != ASKED_FOR_IN} == UNREACHED


# Other packages are imported before, since how they manage on Windows is their own affair.
HIDING = f"""
import asyncio, multiprocessing, os, select, signal, socket, subprocess, sys, tempfile, threading, time
import aiohttp.web, grpc.aio, numpy, opentelemetry.sdk.metrics, psutil, requests, rich.console
import opentelemetry.exporter.otlp.proto.grpc.metric_exporter
import google.protobuf.json_format, grpc_health.v1.health, grpc_reflection.v1alpha.reflection

STAYS = {{"CLOCK_MONOTONIC", "poll", "epoll", "AF_UNIX"}}  # the selectors and pipes of asyncio on this system
for name in {sorted(MODULES)!r}:
    sys.modules[name] = None
for module, names in {sorted((module, sorted(names)) for module, names in NAMES.items())!r}:
    for name in set(names) - STAYS:
        vars(sys.modules[module]).pop(name, None)
        if signal.Signals._member_map_.pop(name, None):
            signal.Signals._member_names_.remove(name)
os.supports_dir_fd = set()

def refuse(*_):
    raise NotImplementedError

asyncio.SelectorEventLoop.add_signal_handler = refuse
"""


def test_a_run_is_recorded_where_unix_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is sent, with its end, and a black box is written; what needs locks is refused in words that name them."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("ESPER_BLACK_BOX_DIR", raising=False)
    monkeypatch.delenv("ESPER_BLACK_BOX_FRAMES", raising=False)
    script = f"""{HIDING}
import esper_otel
from esper_otel.errors import ConfigurationError

for name, value in (("spool_dir", sys.argv[1]), ("flush_signals", "SIGUSR1")):
    try:
        esper_otel.start(settings=esper_otel.EsperSettings(**{{name: value}}))
    except ConfigurationError as error:
        print(error)
with esper_otel.start(run_id="run") as telemetry:
    telemetry.record_step({{"loss": 1.0}}, epoch=0)
    telemetry.record_step({{"loss": float("nan")}}, epoch=0)
"""
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        command = [sys.executable, "-c", script, str(tmp_path / "spool")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert collector.frames_received == 2
        assert [p.attributes["outcome"] for p in collector.points() if p.name == "esper.run.ended" and not p.flags]
    assert (
        "no file locks (fcntl), owners of files (os.geteuid), paths relative to an open folder (dir_fd)" in done.stdout
    )
    assert "without it, steps wait in memory" in done.stdout
    assert "this system has no signal SIGUSR1" in done.stdout
    assert not (tmp_path / "spool").exists()
    assert [*(tmp_path / "esper-otel").iterdir()] != []


def test_a_gateway_serves_from_memory_where_unix_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And ends when it is told to; a store is refused before anything is made."""
    store = tmp_path / "store"
    program = f"""{HIDING}
import esper_otel.cli

esper_otel.cli.main(["gateway", "--store", {str(store)!r}])
sys.exit(esper_otel.cli.main())
"""
    with RunningGateway(program=("-c", program)) as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        with esper_otel.start(run_id="run") as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        with TamiyoClient(gateway.grpc) as client:
            assert len(client.pull("run", wait_s=10.0)) == 1
        assert gateway.end() == 0
    assert "without --store, the gateway keeps steps in memory" in gateway.said
    assert not store.exists()
