"""Receiver: where the demo's frames go: the user's endpoint, a collector in this process, or a live page's gateway."""

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
    """Who receives the frames. ``open`` once, and read the rest after the telemetry is closed.

    Attributes:
        destination: where they go, in words.
        is_ours: whether a collector in this process receives them.
        frames_received: whole frames that came in; None when nobody here has counted them.
    """

    def __init__(self) -> None:
        theirs = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name, "").strip()), None)
        self.is_ours = theirs is None
        self.destination = theirs or ""
        self.frames_received: int | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Receives until left; while it does, the environment names our collector unless it names the user's."""
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
    """A gateway in a process of its own, which shows the run on its live page, after the training too.

    Attributes:
        page: the page's address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_ours = False
        command = [sys.executable, "-m", "esper_otel", "gateway", "--ui", "--json"]
        command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - it is ourselves
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ConfigurationError("demo --ui: the gateway did not start; what it said stands above")
        addresses = json.loads(line)
        self._endpoint = f"http://{addresses['grpc']}"
        self.page = f"http://{addresses['http']}/"
        self.destination = f"the live page, {self.page}"

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it lasts, the environment names the gateway, whatever it named before."""
        with _sent_to(self._endpoint):
            yield
        with TamiyoClient(self._endpoint.removeprefix("http://")) as client:
            self.frames_received = sum(run.stored for run in client.runs())

    def wait(self) -> None:
        """Until the gateway ends, or Ctrl-C."""
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
