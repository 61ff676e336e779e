"""The programs that stand around us, for tests: the collector and Prometheus, as processes on free ports."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import pytest
import requests

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "collector-config"
TIMEOUT_S = 120.0

# As it was before tests began to change it: it may say where the cache is.
_ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

# For programs in Go: they have little to keep, and would spend a third of their CPU time in looking for garbage.
_GO = {"GOGC": "400"}
SPARING = {**_ENVIRON, **_GO}

# A shell that sees other mounts than we do, without being root outside.
NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c")


@cache
def needs_namespaces() -> None:
    """The test is skipped where a process may not have mounts of its own."""
    if subprocess.run([*NAMESPACE, "mount --bind /etc/hosts /etc/hosts"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here (unshare --map-root-user --mount)")


@cache
def built(what: str) -> Path:
    """The path of a program that ``tools/build`` makes; the test is skipped, with the reason, when it cannot."""
    done = subprocess.run([ROOT / "tools" / "build", what], capture_output=True, text=True, check=False, env=_ENVIRON)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"{what} could not be built: {last}")
    return Path(done.stdout.splitlines()[-1])


# Below those that the system gives to whoever asks for any, and of each test process its own, also where the tests of
# another clone run at the same time.
_PORTS = count(
    20_000 + 3_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) + os.getpid() % 29 * 100
)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that nobody is given by chance."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def soak(name: str) -> ModuleType:
    """A program of tests/soak, as a module."""
    spec = importlib.util.spec_from_file_location(f"soak_{name}", ROOT / "tests" / "soak" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def until(what: str, is_so: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """Waits until a call gives something true; returns it."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)
    return found


class Program:
    """A process that serves while the ``with`` block runs; its log is kept."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str | Path]:
        """What is run."""
        raise NotImplementedError

    def environ(self) -> Mapping[str, str]:
        """Variables that it gets, beside ours."""
        return {}

    def is_ready(self) -> bool:
        """Whether it serves."""
        raise NotImplementedError

    @property
    def said(self) -> str:
        """Its log."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def start(self) -> Self:
        """Starts it, and waits until it serves."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command()), stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **_GO, **self.environ()}
            )

        def has_started() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.said[-3000:]
            return self.is_ready()

        until(f"{self._log.stem} serves", has_started)
        return self

    def end(self, number: int = signal.SIGTERM) -> None:
        """Ends it by a signal."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(TIMEOUT_S)
        finally:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Collector(Program):
    """The collector, with our files.

    Args:
        folder: of its queue and log.
        configs: files of ``collector-config``, or other paths; later ones change earlier ones.
        variables: set beside the addresses.
    """

    def __init__(self, folder: Path, *configs: str | Path, **variables: str) -> None:
        super().__init__(folder, "collector")
        self._configs = configs or ("agent.yaml",)
        self.grpc, self.http, self.scrape, self.health = (f"127.0.0.1:{free_port()}" for _ in range(4))
        self.metrics_port = free_port()
        self.variables = variables
        self.hosts: Path | None = None

    def command(self) -> Sequence[str | Path]:
        """See ``Program``. With ``hosts`` it finds other machines by that file instead of by ``/etc/hosts``."""
        configs = [part for config in self._configs for part in ("--config", CONFIG / config)]
        within: list[str | Path] = (
            [] if self.hosts is None else [*NAMESPACE, 'mount --bind "$0" /etc/hosts && exec "$@"', self.hosts]
        )
        return [*within, built("collector"), *configs]

    def environ(self) -> Mapping[str, str]:
        """See ``Program``."""
        return {
            "ESPER_OTELCOL_GRPC": self.grpc,
            "ESPER_OTELCOL_HTTP": self.http,
            "ESPER_OTELCOL_SCRAPE": self.scrape,
            "ESPER_OTELCOL_HEALTH": self.health,
            "ESPER_OTELCOL_METRICS_PORT": str(self.metrics_port),
            "ESPER_OTELCOL_QUEUE": str(self.folder / "queue"),
            **self.variables,
        }

    def is_ready(self) -> bool:
        """See ``Program``."""
        try:
            return requests.get(f"http://{self.health}", timeout=1).status_code == 200
        except requests.ConnectionError:
            return False

    def counts(self) -> dict[str, float]:
        """Its own metrics, summed over their labels."""
        text = requests.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=TIMEOUT_S).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


class Prometheus(Program):
    """Prometheus 3, with our file; the addresses that it scrapes are replaced.

    Args:
        folder: of its database and log.
        config: the file.
        targets: addresses by the port that stands in the file.
        more: further options.
        tls: its certificate and key; then ``authority`` says who signed them.
        authority: the certificate to verify it by.
    """

    def __init__(
        self,
        folder: Path,
        config: Path,
        targets: Mapping[int, str] | None = None,
        *more: str,
        tls: tuple[Path, Path] | None = None,
        authority: Path | None = None,
    ) -> None:
        super().__init__(folder, "prometheus")
        self.address = f"127.0.0.1:{free_port()}"
        self._verify = True if authority is None else str(authority)
        self.url = f"http://{self.address}" if tls is None else f"https://{self.address}"
        if tls is not None:
            web = folder / "web.yml"
            web.write_text(f"tls_server_config: {{cert_file: {tls[0]}, key_file: {tls[1]}}}", encoding="utf-8")
            more += (f"--web.config.file={web}",)
        text = config.read_text(encoding="utf-8")
        for port, target in (targets or {}).items():
            text = text.replace(f"127.0.0.1:{port}", target)
        self._config = folder / "prometheus.yml"
        self._config.write_text(text, encoding="utf-8")
        rules = config.parent / "rules"
        if rules.is_dir() and not (folder / "rules").exists():
            (folder / "rules").symlink_to(rules)
        self._more = more

    def command(self) -> Sequence[str | Path]:
        """See ``Program``."""
        return [
            built("prometheus"),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={self.address}",
            "--web.enable-otlp-receiver",
            *self._more,
        ]

    def is_ready(self) -> bool:
        """See ``Program``."""
        try:
            return requests.get(f"{self.url}/-/ready", timeout=1, verify=self._verify).status_code == 200
        except requests.ConnectionError:
            return False

    @property
    def otlp(self) -> str:
        """Where it takes OTLP."""
        return f"{self.url}/api/v1/otlp"

    def get(self, path: str, **parameters: str | float) -> Any:
        """What its API answers."""
        response = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=TIMEOUT_S, verify=self._verify)
        answer = json.loads(response.text)
        assert answer["status"] == "success", answer
        return answer["data"]

    def text(self, path: str) -> str:
        """A page as it is."""
        return requests.get(f"{self.url}/{path}", timeout=TIMEOUT_S, verify=self._verify).text

    def query(self, expression: str, **parameters: float) -> list[Any]:
        """An instant query's series."""
        found: list[Any] = self.get("query", query=expression, **parameters)["result"]
        return found

    def samples(self, selector: str, range_s: int = 86_400) -> set[tuple[frozenset[tuple[str, str]], int, str]]:
        """Every sample of a selector: labels, milliseconds, and the value as Prometheus writes it."""
        return {
            (frozenset(series["metric"].items()), round(time_s * 1000), value)
            for series in self.query(f"{selector}[{range_s}s]")
            for time_s, value in series["values"]
        }


class Redis(Program):
    """A server on a port of its own, which keeps what it was given."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder, "redis")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options

    def command(self) -> list[str | Path]:
        """See ``Program``."""
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        return ["redis-server", *where, "--appendonly", "yes", "--appendfsync", "always", *self._options]

    def client(self, **more: Any) -> Any:
        """To look at it."""
        import redis

        return redis.Redis(port=self.port, **more)

    def is_ready(self) -> bool:
        """See ``Program``."""
        import redis

        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
