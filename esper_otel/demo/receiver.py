"""Receivers of the demo's frames: the user's endpoint, a collector in this process, or the gateway of a live page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from esper_otel import TamiyoClient
from esper_otel.errors import ConfigurationError
from esper_otel.testing import MemoryCollector

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Receiver:
    """The receiver of the frames. Call ``open`` once; read the attributes after the telemetry is closed.

    Attributes:
        destination: the receiver, described for the user.
        is_ours: whether a collector in this process receives the frames.
        frames_received: number of complete frames received; None if this process cannot count them.
    """

    def __init__(self) -> None:
        theirs = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name, "").strip()), None)
        self.is_ours: bool = theirs is None
        self.destination: str = theirs or ""
        self.frames_received: int | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Receives within the context, where the environment names our collector unless it names the user's."""
        if not self.is_ours:
            yield
            return
        with MemoryCollector(keep=0) as collector:
            self.destination = f"{collector.grpc_endpoint}, a receiver in this process"
            with _sent_to(collector.grpc_endpoint):
                try:
                    yield
                finally:
                    self.frames_received = collector.frames_received


class PageReceiver(Receiver):
    """A gateway in a separate process, which shows the run on its live page, also after the training.

    Attributes:
        page: the page's address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_ours: bool = False
        command = [sys.executable, "-m", "esper_otel", "gateway", "--ui", "--json"]
        command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ConfigurationError("demo --ui: the gateway did not start; see its output above")
        addresses = json.loads(line)
        self._endpoint = f"http://{addresses['grpc']}"
        self.page: str = f"http://{addresses['http']}/"
        self.destination: str = f"the live page, {self.page}"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within the context, the environment names the gateway, regardless of the user's endpoint."""
        with _sent_to(self._endpoint):
            yield
        with TamiyoClient(self._endpoint.removeprefix("http://")) as client:
            self.frames_received: int | None = sum(run.stored for run in client.runs())

    def wait(self) -> None:
        """Waits until the gateway ends or Ctrl-C is pressed."""
        self._process.wait()

    def close(self) -> None:
        """Ends the gateway."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextmanager
def _sent_to(endpoint: str) -> Iterator[None]:
    variables = {
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "none",
        "no_grpc_proxy": "127.0.0.1",
    }
    with _environment(variables):
        yield


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
