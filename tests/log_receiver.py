"""A receiver of OTLP logs on loopback, over both protocols, that answers as a test likes."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse

SERVICE = "opentelemetry.proto.collector.logs.v1.LogsService"


class LogReceiver:
    """What was received.

    Attributes:
        endpoint: the address, as ``OTEL_EXPORTER_OTLP_LOGS_ENDPOINT`` has it.
        requests: the requests that were accepted.
        headers: those of the newest request, with names in lower case.
        answer: returns a status for a request: 200, another one of HTTP, or a code of gRPC.
        hang: whether to leave requests without an answer.
        arrived: called with each request.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.requests: list[ExportLogsServiceRequest] = []
        self.headers: dict[str, str] = {}
        self.answer: Callable[[ExportLogsServiceRequest], Any] = lambda _: 200
        self.hang = False
        self.arrived: Callable[[ExportLogsServiceRequest], None] = lambda _: None
        self.released = threading.Event()
        self.changed = threading.Condition()

    def take(self, request: ExportLogsServiceRequest) -> Any:
        self.arrived(request)
        if self.hang:
            self.released.wait()
        status = self.answer(request)
        with self.changed:
            if status == 200:
                self.requests.append(request)
            self.changed.notify_all()
        return status

    @property
    def records(self) -> list[Any]:
        return [
            record
            for request in list(self.requests)
            for of_run in request.resource_logs
            for scope in of_run.scope_logs
            for record in scope.log_records
        ]

    def wait_for(self, predicate: Callable[[LogReceiver], bool], timeout_s: float = 60.0) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: predicate(self), timeout_s)


def attributes_of(record: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in record.attributes}


@contextmanager
def receiver(protocol: str) -> Iterator[LogReceiver]:
    """A receiver over a protocol; over HTTP at /v1/logs."""
    received = LogReceiver()
    with _over_grpc(received) if protocol == "grpc" else _over_http(received) as address:
        received.endpoint = f"http://{address}" + ("" if protocol == "grpc" else "/v1/logs")
        try:
            yield received
        finally:
            received.released.set()


@contextmanager
def _over_grpc(received: LogReceiver) -> Iterator[str]:
    def export(request: ExportLogsServiceRequest, context: grpc.ServicerContext) -> ExportLogsServiceResponse:
        received.headers = {key: str(text) for key, text in context.invocation_metadata()}
        status = received.take(request)
        if status != 200:
            context.abort(status, "refused")
        return ExportLogsServiceResponse()

    threads = ThreadPoolExecutor(2)
    serving = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=ExportLogsServiceRequest.FromString,
        response_serializer=ExportLogsServiceResponse.SerializeToString,
    )
    serving.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
    port = serving.add_insecure_port("127.0.0.1:0")
    serving.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        received.released.set()
        serving.stop(None).wait(5)
        threads.shutdown()


@contextmanager
def _over_http(received: LogReceiver) -> Iterator[str]:
    class Exchange(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.headers = {name.lower(): text for name, text in self.headers.items()}
            is_json = self.headers["Content-Type"] == "application/json"
            request = ExportLogsServiceRequest()
            request = Parse(body, request) if is_json else ExportLogsServiceRequest.FromString(body)
            status = received.take(request) if self.path == "/v1/logs" else 404
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
    server.daemon_threads = False
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        received.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
