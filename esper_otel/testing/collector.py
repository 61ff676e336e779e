"""``MemoryCollector``, a real OTLP receiver on loopback."""

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

    It receives while the context is entered. ``answer`` and ``hang`` may be set at any time. Threads: any.

    Args:
        keep: number of latest requests to keep; None keeps all. ``frames_received`` also counts frames of requests no
            longer kept.
        answer: called for each request, in the receiving thread. Returning None or a response, which may report
            partial success, accepts the request; ``grpc.StatusCode`` or, over HTTP, a status number refuses it.
        retry_after_s: the retry hint sent with each refusal; over HTTP in whole seconds.
        hang: whether to receive requests without keeping or answering them.
        headers: required headers, with names in lower case: ``{"authorization": "Bearer secret"}``.
        certificate_file: PEM file; with ``key_file``, both ports use TLS.
        key_file: PEM file of the certificate's key.

    Attributes:
        grpc_endpoint: ``http://127.0.0.1:<port>``; https with TLS.
        http_endpoint: the same for HTTP, without ``/v1/metrics``.
        attempts: number of requests that were received completely and had the required headers, whatever the answer.

    Raises:
        ConfigurationError: only one of the two TLS files was given.
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
            raise WrongState("a MemoryCollector can be entered only once; create another one")
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
        """Closes the ports and ends the threads. Gives up on a thread that is still in ``answer``."""
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
        """Number of completely received frames, identified by run, attempt, rank and time.

        A frame that is received again is not counted again, unless 10,000 others have begun in between.
        """
        with self._arrived:
            return self._frames.count

    def points(self) -> list[Point]:
        """The gauge and sum points of the kept requests, in order of arrival."""
        return [point for request in self.requests for point in points_of(request)]

    def wait_for(self, predicate: Callable[[MemoryCollector], bool], timeout_s: float = 10.0) -> bool:
        """Waits until the predicate, which is called after each request, holds. Returns False if it timed out."""
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
