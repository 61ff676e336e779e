"""A gateway for tests: ``esper-otel gateway`` as a process of its own, on free ports.

For tests it is a fork of a process that has imported what it needs, see ``warm``: a tenth of the CPU time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import warm

from esper_otel.gateway.core import Core
from esper_otel.pull.messages import (
    SERVICE,
    PullRequest,
    PullResponse,
    RunsRequest,
    RunsResponse,
    Step,
)

TIMEOUT_S = 120.0
PROGRAM = ("-m", "esper_otel")


class RunningGateway:
    """Runs while the ``with`` block does. ``said`` is what it wrote to standard error, when it has ended.

    Args:
        options: further ones of the command line.
        descriptors: how many files it may open; None: as many as we.
        program: what Python itself runs, as users start it; None: PROGRAM, by a fork.
    """

    def __init__(self, *options: str, descriptors: int | None = None, program: Sequence[str] | None = None) -> None:
        self._options = options
        self._program = program
        self._descriptors = descriptors
        self.said = ""

    def __enter__(self) -> Self:
        command = self.command()
        for port in ("--grpc", "--http"):
            if port not in self._options:
                command += [port, "127.0.0.1:0"]
        self.process = self._started([*command, *self._options])
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, said = self.process.communicate(timeout=TIMEOUT_S)
            raise AssertionError(said)
        addresses = json.loads(line)
        self.grpc: str = addresses["grpc"]
        self.http: str = addresses["http"]
        return self

    def _started(self, command: list[str]) -> subprocess.Popen[str] | warm.Process:
        if self._program is None and warm.are_served():
            return warm.started(*command[1:], imported=warm.PACKAGE, descriptors=self._descriptors)
        if self._descriptors is not None:
            command = ["prlimit", f"--nofile={self._descriptors}", *command]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def command(self) -> list[str]:
        """What is run."""
        return [sys.executable, *(self._program or PROGRAM), "gateway", "--json"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends it by a signal; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.said_at_last()
        return self.process.wait(TIMEOUT_S)

    def said_at_last(self) -> str:
        """Waits until it ends by itself; returns what it wrote to standard error."""
        _, said = self.process.communicate(timeout=TIMEOUT_S)
        self.said += said
        return self.said

    def channel(self) -> grpc.Channel:
        """In plain text."""
        return grpc.insecure_channel(self.grpc)


def post(http: str, body: bytes) -> tuple[int, bytes]:
    """Sends a request to the HTTP port; its status and its answer."""
    request = urllib.request.Request(f"http://{http}/v1/metrics", body, {"content-type": "application/x-protobuf"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def pull(channel: grpc.Channel, run_id: str, cursor: str = "", token: str | None = None, **request: Any) -> Any:
    """One pull: the response."""
    call = channel.unary_unary(f"/{SERVICE}/Pull", PullRequest.SerializeToString, PullResponse.FromString)
    asked = PullRequest(run_id=run_id, cursor=cursor, **request)
    return call(asked, timeout=TIMEOUT_S, metadata=_headers(token))


async def pulled(core: Core, run_id: str, most: int = 1_000) -> list[Step]:
    """All steps of a run, page by page: a page ends before a gap, too."""
    steps: list[Step] = []
    cursor = ""
    while (page := await core.pull(PullRequest(run_id=run_id, cursor=cursor, max_packets=most))).steps:
        steps += page.steps
        cursor = page.cursor
    return steps


def runs(channel: grpc.Channel, token: str | None = None) -> list[Any]:
    """The runs that the gateway knows."""
    call = channel.unary_unary(f"/{SERVICE}/Runs", RunsRequest.SerializeToString, RunsResponse.FromString)
    return list(call(RunsRequest(), timeout=TIMEOUT_S, metadata=_headers(token)).runs)


def _headers(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)
