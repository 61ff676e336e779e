"""The two servers of the receiver: OTLP over gRPC, and OTLP over HTTP with protobuf bodies."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from esper_otel.errors import InvalidValue

if TYPE_CHECKING:
    import grpc

Answer: TypeAlias = "ExportMetricsServiceResponse | grpc.StatusCode | int | None"

_MAX_HTTP_BYTES = 20 * 1024 * 1024  # the Collector's default; gRPC's is 4 MiB
_GZIP = 16 + zlib.MAX_WBITS
_GRPC_THREADS = 8


class Responder(NamedTuple):
    """Functions and settings that both servers use to handle a request.

    Attributes:
        admits: returns whether a request with these headers, names in lower case, is admitted.
        receive: returns the answer; None to send no answer.
        retry_after_s: the retry hint for refused requests.
        tls: the files with the certificate and its key.
    """

    admits: Callable[[Mapping[str, str]], bool]
    receive: Callable[[ExportMetricsServiceRequest], Answer]
    retry_after_s: float | None
    tls: tuple[Path, Path] | None


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


class GrpcServer:
    """Serves OTLP over gRPC on ``port`` of 127.0.0.1 from its creation."""

    def __init__(self, door: Responder) -> None:
        import grpc  # importing esper_otel.testing must not import it

        self._door = door
        self._threads = ThreadPoolExecutor(_GRPC_THREADS, "memory-collector-grpc")
        self._server = grpc.server(self._threads, options=[("grpc.so_reuseport", 0)])
        export = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=ExportMetricsServiceRequest.FromString,
            response_serializer=ExportMetricsServiceResponse.SerializeToString,
        )
        service = "opentelemetry.proto.collector.metrics.v1.MetricsService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": export}),))
        if door.tls:
            certificate, key = (path.read_bytes() for path in door.tls)
            credentials = grpc.ssl_server_credentials([(key, certificate)])
            self.port: int = self._server.add_secure_port("127.0.0.1:0", credentials)
        else:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self, deadline: float) -> None:
        """Closes the port and ends the threads, or gives up at the deadline (monotonic clock)."""
        self._server.stop(grace=None).wait(_left_s(deadline))
        # The pool's own shutdown has no timeout.
        ending = threading.Thread(target=self._threads.shutdown, daemon=True)
        ending.start()
        ending.join(_left_s(deadline))

    def _export(
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        import grpc

        if not self._door.admits({key: str(text) for key, text in context.invocation_metadata()}):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a required header is missing or wrong")
        answer = self._door.receive(request)
        if isinstance(answer, ExportMetricsServiceResponse):
            return answer
        if isinstance(answer, int):
            raise InvalidValue("answer", f"{answer} is not an answer for gRPC; give a grpc.StatusCode")
        if answer is None:  # the server has been stopped; the client gets no answer
            return ExportMetricsServiceResponse()
        if self._door.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self._door.retry_after_s * 1e9))
            status = Status(code=answer.value[0], message="refused")
            status.details.add().Pack(RetryInfo(retry_delay=delay))
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        return context.abort(answer, "refused")


class HttpServer(ThreadingTCPServer):
    """Serves OTLP over HTTP on ``port`` of 127.0.0.1 from its creation, with a thread for each connection."""

    request_queue_size = 64

    def __init__(self, door: Responder) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.door = door
        self.port: int = self.socket.getsockname()[1]
        self._connections: dict[threading.Thread, socket.socket] = {}
        if door.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(*door.tls)
            except BaseException:
                self.server_close()
                raise
            # The handshake then happens in the connection's own thread, at its first read.
            self.socket: socket.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self._listening = threading.Thread(
            target=self.serve_forever, args=(0.05,), name="memory-collector-http", daemon=True
        )
        self._listening.start()

    def stop(self, deadline: float) -> None:
        """Closes the port and ends the threads, or gives up at the deadline (monotonic clock)."""
        self.shutdown()
        self.server_close()
        for thread, connection in list(self._connections.items()):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            thread.join(_left_s(deadline))
        self._listening.join(_left_s(deadline))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a connection in a thread of its own, so that an idle one can be closed."""
        thread = threading.Thread(
            target=self._serve, args=(request, client_address), name="memory-collector-http", daemon=True
        )
        self._connections[thread] = request
        thread.start()

    def _serve(self, connection: socket.socket, client_address: Any) -> None:
        try:
            self.process_request_thread(connection, client_address)
        finally:
            del self._connections[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports exceptions in ``answer``, but not clients that disconnect or do not use TLS."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


_PROTOBUF, _JSON = "application/x-protobuf", "application/json"


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body are sent in one packet
    server: HttpServer

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_HTTP_BYTES:
            self.close_connection = True  # the body has not been read
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE if length else HTTPStatus.LENGTH_REQUIRED)
            return
        body = self.rfile.read(int(length))
        if self.path != "/v1/metrics":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif not self.server.door.admits({name.lower(): text for name, text in self.headers.items()}):
            self._refuse(HTTPStatus.UNAUTHORIZED)
        elif self.headers.get("Content-Type") not in {_PROTOBUF, _JSON}:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        else:
            self._export(body)

    def _export(self, body: bytes) -> None:
        try:
            if self.headers.get("Content-Encoding") == "gzip":
                body = _inflated(body)
            if self._is_json():
                request = Parse(body, ExportMetricsServiceRequest())
            else:
                request = ExportMetricsServiceRequest.FromString(body)
        except (zlib.error, DecodeError, ParseError, UnicodeDecodeError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        answer = self.server.door.receive(request)
        if isinstance(answer, ExportMetricsServiceResponse):
            self._reply(HTTPStatus.OK, answer)
        elif isinstance(answer, int):
            self._refuse(answer)
        elif answer is None:
            self.close_connection = True
        else:
            raise InvalidValue("answer", f"{answer} is not an answer for HTTP; give a status number")

    def _refuse(self, status: int) -> None:
        # In OTLP/HTTP, error responses contain a google.rpc.Status.
        self._reply(status, Status(message="refused"), self.server.door.retry_after_s)

    def _is_json(self) -> bool:
        return self.headers.get("Content-Type") == _JSON

    def _reply(self, status: int, answer: Message, retry_after_s: float | None = None) -> None:
        body = MessageToJson(answer).encode() if self._is_json() else answer.SerializeToString()
        self.send_response(status)
        self.send_header("Content-Type", _JSON if self._is_json() else _PROTOBUF)
        self.send_header("Content-Length", str(len(body)))
        if retry_after_s is not None:
            self.send_header("Retry-After", str(round(retry_after_s)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Logs nothing; received requests can be read from the collector."""


def _inflated(body: bytes) -> bytes:
    inflater = zlib.decompressobj(_GZIP)
    inflated = inflater.decompress(body, _MAX_HTTP_BYTES)
    if not inflater.eof:
        raise zlib.error(f"not one gzip stream of at most {_MAX_HTTP_BYTES} bytes")
    return inflated
