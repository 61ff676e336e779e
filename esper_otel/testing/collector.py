"""MemoryCollector: a real OTLP receiver on loopback."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from esper_otel.errors import ConfigurationError, WrongState
from esper_otel.testing.received import CompleteFrames, Point, points_of
from esper_otel.testing.servers import Answer, GrpcServer, HttpServer, Responder

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class MemoryCollector:
    """An OTLP metrics receiver on free ports of 127.0.0.1: gRPC and HTTP/protobuf, plain or gzip.

    It receives from entering the context until it is left. ``answer`` and ``hang`` may be set at any time.
    Threads: any.

    Args:
        keep: how many requests are kept, the newest; None keeps all. ``frames_received`` counts on.
        answer: decides on each request, in the receiving thread. None takes it, and so does a response, which
            may report partial success; ``grpc.StatusCode`` or, over HTTP, a status number refuses it.
        retry_after_s: the hint sent with each refusal; over HTTP in whole seconds.
        hang: takes requests, keeps none and never answers.
        headers: what each request must bring, names in lower case: ``{"authorization": "Bearer secret"}``.
        certificate_file: PEM file; with ``key_file`` both ports speak TLS.
        key_file: PEM file of the certificate's key.

    Attributes:
        grpc_endpoint: ``http://127.0.0.1:<port>``; https with TLS.
        http_endpoint: the same for HTTP, without ``/v1/metrics``.
        attempts: requests that came in whole and were admitted, whatever the answer.

    Raises:
        ConfigurationError: one of the two TLS files without the other.
    """

    def __init__(
        self,
        *,
        keep: int | None = None,
        answer: Callable[[ExportMetricsServiceRequest], Answer] | None = None,
        retry_after_s: float | None = None,
        hang: bool = False,
        headers: Mapping[str, str] = _NO_HEADERS,
        certificate_file: Path | str | None = None,
        key_file: Path | str | None = None,
    ) -> None:
        if (certificate_file is None) != (key_file is None):
            raise ConfigurationError(
                f"certificate_file={certificate_file!r} and key_file={key_file!r}: TLS needs both files"
            )
        tls = (Path(certificate_file), Path(key_file)) if certificate_file and key_file else None
        self.answer = answer
        self.hang = hang
        self.grpc_endpoint: str = ""
        self.http_endpoint: str = ""
        self.attempts: int = 0
        self._headers = headers
        self._door = Responder(self._admits, self._receive, retry_after_s, tls)
        self._servers: list[GrpcServer | HttpServer] = []
        self._closing = threading.Event()
        self._arrived = threading.Condition()
        self._kept: deque[ExportMetricsServiceRequest] = deque(maxlen=keep)
        self._frames = CompleteFrames()

    def __enter__(self) -> Self:
        if self._servers or self._closing.is_set():
            raise WrongState("a MemoryCollector is entered once; make another one")
        scheme = "https" if self._door.tls else "http"
        try:
            self._servers.append(http_server := HttpServer(self._door))
            self._servers.append(grpc_server := GrpcServer(self._door))
        except BaseException:
            self.close()
            raise
        self.grpc_endpoint = f"{scheme}://127.0.0.1:{grpc_server.port}"
        self.http_endpoint = f"{scheme}://127.0.0.1:{http_server.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """Closes the ports and ends the threads; a thread that ``answer`` holds longer is left behind."""
        deadline = time.monotonic() + timeout_s
        self._closing.set()
        for server in self._servers:
            server.stop(deadline)

    @property
    def requests(self) -> list[ExportMetricsServiceRequest]:
        """The kept requests, in order of arrival."""
        with self._arrived:
            return list(self._kept)

    @property
    def frames_received(self) -> int:
        """Frames, told apart by run, attempt, rank and time, of which every point has come.

        One that comes again is not counted again, unless 10,000 others have begun in between.
        """
        with self._arrived:
            return self._frames.count

    def points(self) -> list[Point]:
        """The gauge and sum points of the kept requests, in order of arrival."""
        return [point for request in self.requests for point in points_of(request)]

    def wait_for(self, predicate: Callable[[MemoryCollector], bool], timeout_s: float = 10.0) -> bool:
        """Waits until the predicate holds; it is asked after each request. False when it does not in time."""
        with self._arrived:
            return self._arrived.wait_for(lambda: predicate(self), timeout_s)

    def _admits(self, headers: Mapping[str, str]) -> bool:
        return all(headers.get(name) == value for name, value in self._headers.items())

    def _receive(self, request: ExportMetricsServiceRequest) -> Answer:
        with self._arrived:
            self.attempts += 1
            self._arrived.notify_all()
        if self.hang:
            self._closing.wait()
            return None
        answer = self.answer(request) if self.answer else None
        if answer is None:
            answer = ExportMetricsServiceResponse()
        if isinstance(answer, ExportMetricsServiceResponse):
            with self._arrived:
                self._kept.append(request)
                self._frames.add(request)
                self._arrived.notify_all()
        return answer
