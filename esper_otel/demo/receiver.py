"""Receiver: where the demo's frames go: the user's endpoint, or a collector in this process over a real socket."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from esper_otel.testing import MemoryCollector

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Receiver:
    """Who receives the frames. ``open`` once, and read the rest after the telemetry is closed.

    Attributes:
        destination: where they go, in words.
        is_ours: whether a collector in this process receives them.
        frames_received: whole frames that came in; None when the endpoint is somebody else's.
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
            with _environment(
                {
                    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": collector.grpc_endpoint,
                    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
                    "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "none",
                    "no_grpc_proxy": "127.0.0.1",
                }
            ):
                try:
                    yield
                finally:
                    self.frames_received = collector.frames_received


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
