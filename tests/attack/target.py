"""The gateway that is attacked: a process of its own on loopback, watched; and how an attack reaches it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
import psutil

from attack.otlp import MIB
from esper_otel.pull.calls import method
from esper_otel.pull.messages import PullRequest, PullResponse, RunsRequest, RunsResponse

TESTS = Path(__file__).parents[1]
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
PULL = method("Pull")[0]
MOST_MIB = 1024
_STOP_AT_MIB = 2 * MOST_MIB  # an attack that bites is not to take the machine along
_START_S = 30.0
_FILES = 1_024  # that a process usually may open
_PROTOBUF = "application/x-protobuf"


class GatewayEnded(Exception):
    """The gateway has ended by itself, or did not start."""


class Gateway:
    """``esper-otel gateway`` with a store and tokens of two tenants, whose runs begin with ``honest-`` and ``rogue-``.

    Args:
        folder: of its store, its files and its log.
        options: further ones of the command line.
        has_pull_tokens: whether pullers need a token.
        tls: certificate, key, and who signed them.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        *,
        has_pull_tokens: bool = True,
        tls: tuple[Path, Path, Path] | None = None,
    ) -> None:
        self.folder, self.store, self.log = folder, folder / "store", folder / "log"
        self._turns, self._ready_s = folder / "turns", 0.0
        self.grpc, self.http = (f"127.0.0.1:{_free_port()}" for _ in range(2))
        self.ca = None if tls is None else tls[2]
        self.peak_mib = 0.0
        self.was_stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = self.log.open("ab")
        self._over = threading.Event()
        (folder / "tokens").write_text("honest-token run=honest-\nrogue-token run=rogue-\n", encoding="utf-8")
        for name in ("honest", "rogue"):
            (folder / name).write_text(f"{name}-token\n", encoding="utf-8")
        self._options = ["--grpc", self.grpc, "--http", self.http, "--store", str(self.store)]
        self._options += ["--send-tokens", str(folder / "tokens"), *options]
        if has_pull_tokens:
            self._options += ["--pull-tokens", str(folder / "tokens")]
        if tls is not None:
            self._options += ["--tls-cert", str(tls[0]), "--tls-key", str(tls[1])]
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self) -> float:
        """Starts it; returns after how many seconds it serves.

        Raises:
            GatewayEnded: it does not.
        """
        command = [sys.executable, "-m", "attack.watched", str(self._turns), "gateway", "--json", *self._options]
        command = ["sh", "-c", f'ulimit -Sn {_FILES}; exec "$@"', "sh", *command]
        begun_s = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        process = self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=self._log)
        while time.monotonic() - begun_s < _START_S:
            if process.poll() is not None:
                raise GatewayEnded(f"the gateway does not start: status {process.returncode}: {self.last_words()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get("/readyz", timeout_s=2.0) == 200:
                    self._ready_s = time.monotonic()
                    return time.monotonic() - begun_s
            time.sleep(0.05)
        raise GatewayEnded(f"the gateway is not ready after {_START_S:g} s")

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def close(self) -> None:
        """Ends everything."""
        self._over.set()
        self.kill()
        self._log.close()

    def is_running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    def cpu_s(self) -> float:
        """CPU seconds so far, of this life."""
        with contextlib.suppress(psutil.Error):
            if self._process is not None:
                times = psutil.Process(self._process.pid).cpu_times()
                return float(times.user + times.system)
        return 0.0

    def longest_turn_ms(self) -> float:
        """CPU time of the longest turn of the event loop in this life, since it served; 0 if all were short."""
        lines = self._turns.read_text(encoding="utf-8").split("\n") if self._turns.exists() else []
        turns = [tuple(map(float, line.split())) for line in lines[:-1]]
        return max((took_ms for at_s, took_ms in turns if at_s > self._ready_s), default=0.0)

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1][:200] if lines else ""

    def get(self, path: str, *, timeout_s: float = 5.0, **headers: str) -> int:
        """The status of a GET."""
        with contextlib.closing(self.connection(timeout_s)) as connection:
            connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def connection(self, timeout_s: float = 5.0) -> http.client.HTTPConnection:
        """To the HTTP port."""
        if self.ca is None:
            return http.client.HTTPConnection(self.http, timeout=timeout_s)
        context = ssl.create_default_context(cafile=str(self.ca))
        return http.client.HTTPSConnection(self.http, timeout=timeout_s, context=context)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            process = self._process
            with contextlib.suppress(psutil.Error, OSError, ValueError):  # it ends at any moment
                if process is not None:
                    self.peak_mib = max(self.peak_mib, _rss_mib(process.pid))
                    if psutil.Process(process.pid).memory_info().rss > _STOP_AT_MIB * MIB:
                        self.was_stopped = True
                        process.kill()


def _rss_mib(pid: int) -> float:
    """The highest that its memory has been."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Target:
    """A gateway as an attack sees it. What the attack finds wrong is noted with ``fault``.

    Attributes:
        gateway: it.
        deadline_s: on the monotonic clock; the attack ends by then.
        faults: in words, each once.
    """

    gateway: Gateway
    deadline_s: float
    faults: list[str] = field(default_factory=list)

    def left_s(self) -> float:
        """How long the attack may go on."""
        return max(self.deadline_s - time.monotonic(), 0.0)

    def rounds(self, pause_s: float = 0.0) -> Iterator[int]:
        """Counts until the time is over."""
        number = 0
        while self.left_s() > 0.0 and self.gateway.is_running():
            yield number
            number += 1
            time.sleep(min(pause_s, self.left_s()))

    def fault(self, words: str) -> None:
        """Notes that something did not hold."""
        if words not in self.faults:
            self.faults.append(words)

    def hold(self, *, holds: bool, otherwise: str) -> None:
        """Notes ``otherwise`` unless it holds."""
        if not holds:
            self.fault(otherwise)

    def post(
        self,
        body: bytes,
        *,
        token: str = "rogue-token",
        kind: str = _PROTOBUF,
        path: str = "/v1/metrics",
        **headers: str,
    ) -> tuple[int, bytes]:
        """A request over HTTP: status and answer; 0 when there is none in time."""
        given = {"content-type": kind, "authorization": f"Bearer {token}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(self.gateway.connection(max(self.left_s(), 0.1))) as connection:
            try:
                connection.request("POST", path, body, given)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                return 0, b""

    def raw(self, content: bytes, timeout_s: float = 2.0, *, port: str = "http") -> bytes:
        """Bytes to a port; what comes back, up to the end or the time-out."""
        answer = b""
        with contextlib.suppress(OSError), self.socket(port) as opened:
            opened.settimeout(timeout_s)
            opened.sendall(content)
            while part := opened.recv(65_536):
                answer += part
        return answer

    def socket(self, port: str = "http") -> socket.socket:
        """A TCP connection."""
        host, _, number = getattr(self.gateway, port).rpartition(":")
        return socket.create_connection((host, int(number)), timeout=2)

    def channel(self) -> grpc.Channel:
        """A gRPC connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        if self.gateway.ca is None:
            return grpc.insecure_channel(self.gateway.grpc, options)
        return grpc.secure_channel(
            self.gateway.grpc, grpc.ssl_channel_credentials(self.gateway.ca.read_bytes()), options
        )

    def export(self, channel: grpc.Channel, body: bytes, *, is_gzip: bool = False) -> grpc.StatusCode:
        """A request over gRPC: what became of it."""
        call = channel.unary_unary(EXPORT, None, None)
        compression = grpc.Compression.Gzip if is_gzip else grpc.Compression.NoCompression
        try:
            call(body, timeout=max(self.left_s(), 0.1), metadata=bearer(), compression=compression)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def pull(self, channel: grpc.Channel, run: str, cursor: str = "", **request: Any) -> tuple[grpc.StatusCode, Any]:
        """A pull: its code, and the answer or the words of the fault."""
        call = channel.unary_unary(PULL, PullRequest.SerializeToString, PullResponse.FromString)
        try:
            asked = PullRequest(run_id=run, cursor=cursor, **request)
            return grpc.StatusCode.OK, call(asked, timeout=5.0, metadata=bearer())
        except grpc.RpcError as error:
            return error.code(), error.details()

    def runs(self, token: str = "rogue-token") -> list[Any]:
        """The runs that a tenant sees."""
        with self.channel() as channel:
            call = channel.unary_unary(method("Runs")[0], RunsRequest.SerializeToString, RunsResponse.FromString)
            return list(call(RunsRequest(), timeout=10.0, metadata=bearer(token)).runs)

    def command(self, *arguments: str, timeout_s: float = 20.0) -> subprocess.CompletedProcess[str]:
        """``esper-otel``, as its user calls it."""
        command = [sys.executable, "-m", "esper_otel", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def bearer(token: str = "rogue-token") -> tuple[tuple[str, str], ...]:
    """Metadata of a call."""
    return (("authorization", f"Bearer {token}"),)


class HonestProcess:
    """``attack.honest`` next to the gateway."""

    def __init__(self, gateway: Gateway, protocol: str) -> None:
        scheme = "http" if gateway.ca is None else "https"
        address = gateway.grpc if protocol == "grpc" else gateway.http
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "ESPER_"))}
        environment |= {
            "PYTHONPATH": str(TESTS),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"{scheme}://{address}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "5",
            "ESPER_TOKEN_FILE": str(gateway.folder / "honest"),
            "ESPER_BLACK_BOX_FRAMES": "0",
        }
        if gateway.ca is not None:
            environment["OTEL_EXPORTER_OTLP_CERTIFICATE"] = str(gateway.ca)
        command = [sys.executable, "-m", "attack.honest", "--grpc", gateway.grpc]
        command += ["--health", f"{scheme}://{gateway.http}/healthz", "--run", f"honest-{protocol.partition('/')[0]}"]
        command += ["--pull-token", str(gateway.folder / "honest")]
        command += [] if gateway.ca is None else ["--ca", str(gateway.ca)]
        with (gateway.folder / f"log-{protocol.partition('/')[0]}").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, command: str) -> None:
        """Gives a command; ``answer`` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Attack:
    """One kind of attack.

    Attributes:
        name: what it is called.
        what: what it does, in one line.
        run: does it, until the target's deadline at most.
        options: further ones of the gateway.
        between: done to the store while the gateway is down.
        after: looks at the gateway that was started again.
        has_tls: whether the gateway speaks TLS.
        has_pull_tokens: whether pullers need a token.
        is_delay_accepted: whether honest steps may be late meanwhile, as SECURITY.md says.
    """

    name: str
    what: str
    run: Callable[[Target], None]
    options: tuple[str, ...] = ()
    between: Callable[[Target], None] | None = None
    after: Callable[[Target], None] | None = None
    has_tls: bool = False
    has_pull_tokens: bool = True
    is_delay_accepted: bool = False
