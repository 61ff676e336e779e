"""HTTP: OTLP in protobuf and JSON, and what those ask who look after the gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from esper_otel.gateway.core import Core
from esper_otel.gateway.decoded import TooLarge
from esper_otel.gateway.faults import Busy, Unsupported, fault_of
from esper_otel.gateway.inflate import MAX_REQUEST_BYTES
from esper_otel.gateway.live import add_page
from esper_otel.gateway.metrics import prometheus_text
from esper_otel.gateway.security import Tokens
from esper_otel.log import Warnings

_MOST_BYTES_IN_FLIGHT = 8 * MAX_REQUEST_BYTES
_PROTOBUF, _JSON = "application/x-protobuf", "application/json"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_SLOWEST_S = 60.0


def application(
    core: Core, send_tokens: Tokens | None, warnings: Warnings, *, has_page: bool = False
) -> web.Application:
    """``POST /v1/metrics``, ``GET /healthz``, ``/readyz`` and ``/metrics``; with a page also ``/``."""
    app = web.Application(client_max_size=MAX_REQUEST_BYTES)
    receiving = _Receiving(core, send_tokens, warnings)
    app.router.add_post("/v1/metrics", receiving.metrics)
    app.router.add_get("/healthz", _text(lambda: (200, "ok\n")))
    app.router.add_get("/readyz", _text(lambda: (200, "ok\n") if core.is_ready else (503, "nothing can be stored\n")))

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=prometheus_text(core).encode(), headers={"content-type": _PROMETHEUS})

    app.router.add_get("/metrics", metrics)
    if has_page:
        add_page(app, core)
    return app


def _text(answer: Callable[[], tuple[int, str]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_request: web.Request) -> web.Response:
        status, text = answer()
        return web.Response(status=status, text=text)

    return handler


class _Receiving:
    """OTLP over HTTP: the body, unpacked within bounds, goes to the core."""

    def __init__(self, core: Core, tokens: Tokens | None, warnings: Warnings) -> None:
        self._core = core
        self._tokens = tokens
        self._warnings = warnings
        self._in_flight = 0

    async def metrics(self, request: web.Request) -> web.Response:
        """Answers as OTLP/HTTP says: in the request's encoding; a failure as ``google.rpc.Status``."""
        is_json = request.content_type == _JSON
        if not is_json and request.content_type != _PROTOBUF:
            return self._unsupported(f"the body is to be {_PROTOBUF} or {_JSON}")
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding not in {"identity", "gzip"}:
            return self._unsupported("content-encoding is to be gzip or identity")
        try:
            grant = None if self._tokens is None else self._tokens.grant(request.headers.get("authorization"))
            body = await self._body(request)
            answer = await self._core.take(body, is_json=is_json, is_gzip=encoding == "gzip", grant=grant)
        except Exception as error:  # noqa: BLE001 - whatever it is, a sender is told by OTLP's rules
            fault = fault_of(error, self._warnings)
            self._core.note_fault(fault)
            headers = {} if fault.retry_s is None else {"retry-after": f"{fault.retry_s:g}"}
            return _response(fault.body(), is_json=is_json, status=fault.status, headers=headers)
        response = ExportMetricsServiceResponse()
        if answer.rejected or answer.reason:
            response.partial_success.rejected_data_points = answer.rejected
            response.partial_success.error_message = answer.reason
        return _response(response, is_json=is_json)

    def _unsupported(self, message: str) -> web.Response:
        self._core.note_fault(fault_of(Unsupported(message), self._warnings))
        return web.Response(status=415, text=f"{message}\n")

    async def _body(self, request: web.Request) -> bytes:
        announced = request.content_length or 0
        if announced > MAX_REQUEST_BYTES:
            raise TooLarge(f"{announced} bytes; {MAX_REQUEST_BYTES} are the most")
        reserved = announced or MAX_REQUEST_BYTES  # sent in chunks: it may become as much
        if self._in_flight + reserved > _MOST_BYTES_IN_FLIGHT:
            raise Busy("too much is being received at once")
        self._in_flight += reserved
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise TooLarge(f"more than {MAX_REQUEST_BYTES} bytes") from error
        finally:
            self._in_flight -= reserved


def _response(
    message: Message, *, is_json: bool, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    body = MessageToJson(message, indent=None).encode() if is_json else message.SerializeToString()
    return web.Response(body=body, status=status, content_type=_JSON if is_json else _PROTOBUF, headers=headers)
