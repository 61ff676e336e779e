"""Python processes that have no need to import what takes long: forks of one process that has done so.

``started()`` is for tests whose scripts need a process of their own, and PyTorch, which takes seconds to import, or
this package, which takes one. Such a process does what Python would do: ``-c``, ``-m`` and scripts, ``PYTHONPATH`` and
``sitecustomize``, standard streams, signals, the exit status. ``import torch`` goes through the import system, and
takes a millisecond. Differences: PyTorch computes with one thread, modules are not taken apart at the end, and this
package has been imported, whoever looks. A few tests start Python itself, for what this file cannot prove.

This file is the server too: one with PyTorch, one with Lightning and Transformers as well, and one with what this
package needs. They are started with the tests, import that when they are first asked for a process, and end with them.
"""

from __future__ import annotations

import atexit
import builtins
import copy
import functools
import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import greenlet

_ADDRESS = "WARM_PYTHON"  # the variable: test processes inherit it from the one that has started them
TORCH, FRAMEWORKS, PACKAGE = "torch", "frameworks", "package"
_WITH_TORCH = ("torch", "torch._dynamo", "torch.utils.data")
_PRELOADED = {
    TORCH: _WITH_TORCH,
    FRAMEWORKS: (
        *(
            *_WITH_TORCH,
            "torch._inductor.output_code",
            "torch.distributed.run",
            "accelerate",
            "lightning",
            "transformers.trainer",
        ),
        *("transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2"),
    ),
    PACKAGE: (
        *("esper_otel.session.start", "esper_otel.export.grpc_sender", "esper_otel.export.http_sender"),
        *("esper_otel.gateway.command", "esper_otel.gateway.kafka.command", "grpc.aio", "aiohttp.web", "redis"),
        *("esper_otel.pull.command", "esper_otel.send.command"),
    ),
}
_MOST_BYTES = 1 << 20


# -- for tests ---------------------------------------------------------------------------------------------------


def serve_tests() -> None:
    """Starts the servers, for this process and those that it starts; they end with this process."""
    address = f"/tmp/warm-python-{os.getpid()}"
    environ = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    environ["GRPC_VERBOSITY"] = "NONE"  # as the command line has it; gRPC reads it when it is imported
    for imported in _PRELOADED:
        command = [sys.executable, __file__, f"{address}-{imported}", imported]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdout.readline()
        atexit.register(server.wait)
        atexit.register(server.stdin.close)
    os.environ[_ADDRESS] = address


def are_served() -> bool:
    """Whether this process is one of tests; a benchmark has no such servers."""
    return _ADDRESS in os.environ


class Done(NamedTuple):
    """How a process has ended; the names are those of ``subprocess.CompletedProcess``."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """A process that runs. The names are those of ``subprocess.Popen``."""

    def __init__(self, connection: socket.socket, given: int | None, output: int, errors: int) -> None:
        self._connection = connection
        self.stdin = None if given is None else os.fdopen(given, "w", encoding="utf-8")
        self.stdout = os.fdopen(output, encoding="utf-8")
        self.stderr = os.fdopen(errors, encoding="utf-8")
        self.pid: int = self._answer(300)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        if self.returncode is None:
            with suppress(BlockingIOError):
                self.wait(0)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Waits for its end; returns its exit status.

        Raises:
            OSError: it still runs after so many seconds.
        """
        if self.returncode is None:
            self.returncode = self._answer(timeout)
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signals it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, given: str = "", timeout: float = 300) -> tuple[str, str]:
        """Waits for its end; returns what it has written to standard output and to standard error.

        Args:
            given: what it can read from standard input, if it takes any; that ends then.
            timeout: how long to wait, in seconds.
        """
        if self.stdin is not None:
            with suppress(BrokenPipeError), self.stdin:
                self.stdin.write(given)
        with ThreadPoolExecutor(2) as readers:
            output, errors = readers.submit(self.stdout.read), readers.submit(self.stderr.read)
            self.wait(timeout)
        self.stdout.close()
        self.stderr.close()
        return output.result(), errors.result()

    def _answer(self, timeout: float) -> int:
        self._connection.settimeout(timeout)
        answer = self._connection.recv(64)
        assert answer, "the server of warm.py has ended"
        return int(answer)


def started(
    *command: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    imported: str = TORCH,
    descriptors: int | None = None,
    takes_input: bool = False,
) -> Process:
    """Starts what Python would do with these arguments. Standard output and error are pipes, and text.

    Args:
        command: without Python itself.
        env: its variables; None: ours.
        cwd: where it starts; None: here.
        imported: TORCH, FRAMEWORKS or PACKAGE: what it has imported already.
        descriptors: how many files it may open; None: as many as the tests.
        takes_input: whether standard input is a pipe, too; else it is empty.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output, errors = os.pipe(), os.pipe()
    given = os.pipe() if takes_input else (os.open(os.devnull, os.O_RDONLY), None)
    order = {
        "command": [str(part) for part in command],
        "environ": dict(os.environ if env is None else env),
        "folder": str(Path.cwd() if cwd is None else cwd),
        "descriptors": descriptors,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"{os.environ[_ADDRESS]}-{imported}")
        socket.send_fds(server, [json.dumps(order).encode()], [theirs.fileno(), given[0], output[1], errors[1]])
    theirs.close()
    for each in (given[0], output[1], errors[1]):
        os.close(each)
    return Process(mine, given[1], output[0], errors[0])


def run(
    *command: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    imported: str = TORCH,
) -> Done:
    """Does what Python would do with these arguments; see ``started``."""
    process = started(*command, env=env, cwd=cwd, imported=imported)
    output, errors = process.communicate()
    return Done(process.wait(), output, errors)


def executable(folder: Path, imported: str = TORCH) -> Path:
    """A program that does what Python would do with its arguments, for launchers that start Python themselves.

    A fork that has its path in the variable PYTHON_EXEC, as torchrun knows it, has it as ``sys.executable``.

    Args:
        folder: where it is written.
        imported: as in ``started``.
    """
    path = folder / f"python-with-{imported}"
    client = Path(__file__).with_name("warm_python.py")
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {client} {os.environ[_ADDRESS]}-{imported} "$@"\n')
    path.chmod(0o755)
    return path


# -- the server --------------------------------------------------------------------------------------------------


def _serve(address: str, imported: str) -> tuple[dict[str, Any], list[int]]:
    """Forks a process for each order until standard input ends. Returns in the forks only, with the order."""
    selector = selectors.DefaultSelector()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    selector.register(0, selectors.EVENT_READ)
    selector.register(listening, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                Path(address).unlink()
                os._exit(0)
            if key.fileobj is listening:
                taken = _fork(listening, selector, imported)
                if taken is not None:
                    return taken
            else:
                pid, asker = key.data
                _, status = os.waitpid(pid, 0)
                selector.unregister(key.fd)
                os.close(key.fd)
                with asker:
                    asker.send(str(os.waitstatus_to_exitcode(status)).encode())


def _fork(
    listening: socket.socket, selector: selectors.BaseSelector, imported: str
) -> tuple[dict[str, Any], list[int]] | None:
    asker, _ = listening.accept()
    with asker:
        text, descriptors, _, _ = socket.recv_fds(asker, _MOST_BYTES, 4)
    answers = socket.socket(fileno=descriptors[0])
    for name in _PRELOADED[imported]:
        with suppress(ModuleNotFoundError):  # the broker's client, for one
            import_module(name)
    gc.collect()
    gc.freeze()  # a fork has nothing of this to look through, nor to copy
    pid = os.fork()
    if pid:
        for each in descriptors[1:]:
            os.close(each)
        answers.send(str(pid).encode())
        selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, answers))
        return None
    for key in selector.get_map().values():
        if key.data is not None:
            os.close(key.fd)
            key.data[1].close()
    selector.close()
    listening.close()
    answers.close()
    return json.loads(text), descriptors[1:]


# -- in a process of its own ---------------------------------------------------------------------------------------


class _Kept(MetaPathFinder, Loader):
    """PyTorch as it has been imported; it is hidden until it is imported here."""

    def __init__(self) -> None:
        self._modules = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] == "torch"}
        self._spec = self._modules["torch"].__spec__
        for name in self._modules:
            del sys.modules[name]
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = copy.copy(self._spec)
        assert spec is not None
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self._modules["torch"]

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec
        sys.modules.update(self._modules)


class _Replaced(BaseException):
    """The process has asked for another program: as ``esper-otel run`` does for Python with the script."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        super().__init__()
        self.command = command
        self.environ = environ


def _execve(path: str, command: Sequence[str | Path], environ: Mapping[str, str]) -> NoReturn:
    assert path == sys.executable, path
    raise _Replaced([str(part) for part in command[1:]], environ)


def _prepare(order: dict[str, Any], descriptors: list[int], imported: str) -> None:
    """Makes this process what a fresh one would be."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["folder"])
    os.execve = _execve  # type: ignore[assignment]
    if order["descriptors"] is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["descriptors"], order["descriptors"]))
    if imported != PACKAGE:
        _Kept()


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def _paths(command: Sequence[str], environ: Mapping[str, str], own: Sequence[str]) -> list[str]:
    """``sys.path`` as Python makes it."""
    if command[0] == "-c":
        first = ""
    else:
        first = str(Path.cwd()) if command[0] == "-m" else str(Path(command[0]).resolve().parent)
    named = environ.get("PYTHONPATH", "")
    return [
        first,
        *(str(Path(part).absolute()) if part else str(Path.cwd()) for part in named.split(os.pathsep) if named),
        *own,
    ]


def _code(command: Sequence[str], module: types.ModuleType) -> Any:
    if command[0] == "-c":
        return compile(command[1], "<string>", "exec")
    module.__file__ = str(Path(command[0]).absolute())
    return compile(Path(command[0]).read_bytes(), command[0], "exec")


def _become(command: Sequence[str], environ: Mapping[str, str], own: Sequence[str]) -> None:
    """Does what Python would do with these arguments and variables."""
    os.environ.clear()
    os.environ.update(environ)
    sys.executable = environ.get("PYTHON_EXEC", sys.executable)
    first, *rest = _paths(command, environ, own)
    sys.path[:] = rest
    if any((Path(folder) / "sitecustomize.py").is_file() for folder in rest):
        _at_the_root(import_module, "sitecustomize")
    sys.path.insert(0, first)
    if command[0] == "-m":
        sys.argv[:] = ["-m", *command[2:]]
        _at_the_root(runpy._run_module_as_main, command[1])  # type: ignore[attr-defined]
        return
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv[:] = [command[0], *command[2 if command[0] == "-c" else 1 :]]
    _at_the_root(exec, _code(command, main), main.__dict__)


def _at_the_root(function: Callable[..., object], *arguments: object) -> None:
    """Calls it with no frame around its own: who looks for the outermost frame finds what Python runs."""
    greenlet.greenlet(functools.partial(function, *arguments)).switch()


def _end(error: BaseException | None) -> NoReturn:
    """Ends as Python does; but modules are not taken apart, which with PyTorch takes a second."""
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def _main(address: str, imported: str) -> NoReturn:
    named = os.environ.get("PYTHONPATH", "")
    own = sys.path[1 + len(named.split(os.pathsep) if named else []) :]  # without the folder of this file
    order, descriptors = _serve(address, imported)
    _prepare(order, descriptors, imported)
    command, environ = order["command"], order["environ"]
    if environ.get("PYTHONPATH", "") != named:
        _forget("esper_otel")
    while True:
        _forget("sitecustomize")
        try:
            _become(command, environ, own)
        except _Replaced as replaced:
            command, environ = replaced.command, replaced.environ
            _forget("esper_otel")
        except BaseException as error:
            _end(error)
        else:
            _end(None)


if __name__ == "__main__":
    _main(*sys.argv[1:])
