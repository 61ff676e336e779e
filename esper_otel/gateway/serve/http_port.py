"""The HTTP port: OTLP in protobuf and JSON, and the paths for operators of the gateway."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from aiohttp import web
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from esper_otel.gateway.core import Answer, Core
from esper_otel.gateway.faults import Busy, fault_of
from esper_otel.gateway.pull_core import PullCore
from esper_otel.gateway.quiet import SeldomLog
from esper_otel.gateway.receive.inflate import GZIP, IDENTITY, MAX_REQUEST_BYTES, check_encoding
from esper_otel.gateway.receive.request import TooLarge, Unsupported
from esper_otel.gateway.security import Tokens
from esper_otel.gateway.serve.connections import HttpAcceptor
from esper_otel.gateway.serve.in_flight import Room
from esper_otel.gateway.serve.live_page import add_page
from esper_otel.gateway.serve.metrics import prometheus_text
from esper_otel.gateway.serve.otlp_answers import logs_answer, metrics_answer
from esper_otel.log import Warnings

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MOST_BYTES_IN_FLIGHT = 2 * MAX_REQUEST_BYTES
_PROTOBUF, _JSON = "application/x-protobuf", "application/json"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_SLOWEST_S = 60.0
_LINGERING_S = 2.0
_METRICS_SHARE = 10.0


class HttpPort:
    """The paths of the HTTP port: ``/v1/metrics`` and ``/v1/logs``, ``/healthz``, ``/readyz`` and ``/metrics``.

    Args:
        core: processes the requests.
        send_tokens: tokens of senders; None allows everyone to send.
        answers: limits the answers that clients have not read yet.
        warnings: where faults are reported.

    Attributes:
        door: the acceptor, which records the connections that sent a request and those whose request succeeded.
    """

    def __init__(self, core: PullCore, send_tokens: Tokens | None, answers: Room, warnings: Warnings) -> None:
        self.door: HttpAcceptor | None = None
        self._core = core
        self._send_tokens = send_tokens
        self._answers = answers
        self._warnings = warnings

    def application(self, hosts: Collection[str] | None, *, has_page: bool, receiver: Core | None) -> web.Application:
        """Makes the application that serves the paths.

        Args:
            hosts: accepted Host names in addition to the usual ones; None skips the check, since TLS verifies the name.
            has_page: whether to serve the live page at ``/``.
            receiver: accepts OTLP; None if the port does not.
        """
        core = self._core

        @web.middleware
        async def bounded(request: web.Request, handler: _Handler) -> web.StreamResponse:
            if hosts is not None:
                self._check_host(request, hosts)
            return await self._sent(request, handler)

        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[bounded])
        if receiver is not None:
            receiving = _OtlpHandler(core, self._send_tokens, self._warnings)
            app.router.add_post("/v1/metrics", receiving.handler(receiver.take, metrics_answer))
            app.router.add_post("/v1/logs", receiving.handler(receiver.take_logs, logs_answer))
        app.router.add_get("/healthz", _text(lambda: (200, "ok\n")))
        ready = _text(lambda: (200, "ok\n") if core.is_ready else (503, "nothing can be stored\n"))
        app.router.add_get("/readyz", ready)

        shown = _MetricsText(core)

        async def metrics(_request: web.Request) -> web.Response:
            return web.Response(body=shown.text(), headers={"content-type": _PROMETHEUS})

        app.router.add_get("/metrics", metrics)
        if has_page:
            add_page(app, core)
        return app

    def _check_host(self, request: web.Request, hosts: Collection[str]) -> None:
        """Refuses requests with a foreign Host header, as from a web page that uses DNS rebinding."""
        if is_own_host(request.headers.get("host", ""), hosts):
            return
        message = "a request for %.100r was refused; if that is a name of this gateway, give --http-name"
        self._warnings.say("host", message, request.headers.get("host", ""))
        raise web.HTTPForbidden(text="this gateway is not known by that name: use its address, or give --http-name\n")

    async def _sent(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Sends the answer within the limit of unread answers; closes the connection if the client does not read it."""
        if self.door is not None:
            self.door.note(request.protocol, is_proven=False)
        response = await handler(request)
        transport = request.transport
        if transport is None or not isinstance(response, web.Response):
            return response
        if self.door is not None and response.status < 400:
            self.door.note(request.protocol, is_proven=True)
        size = response.content_length or 0
        try:
            with self._answers.hold(f"{transport.get_extra_info('peername')}", size, transport.abort):
                async with asyncio.timeout(_SLOWEST_S):
                    await response.prepare(request)
                    await response.write_eof()
        except TimeoutError:
            transport.abort()
        except Busy as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n", headers={"retry-after": "1"}) from None
        return response


def is_own_host(host: str, hosts: Collection[str]) -> bool:
    """Whether a Host header may name this gateway: an address, a name without a dot, or one of ``hosts``.

    A foreign web page cannot have such a name, unless it is in ``hosts``. A request without a Host header is not from
    a browser and is accepted.
    """
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    name = name.lower().rstrip(".")
    if "." not in name or name.endswith(".localhost") or name in hosts:
        return True
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def runner_of(app: web.Application, warnings: Warnings, *, shutdown_timeout: float) -> web.AppRunner:
    """Makes a runner without an access log, without automatic decompression, and without headers in any log."""
    log = logging.Logger("http")  # noqa: LOG001 - outside the logger hierarchy, so that records go nowhere else
    log.addHandler(SeldomLog(warnings, "HTTP"))
    return web.AppRunner(
        app,
        access_log=None,
        logger=log,
        auto_decompress=False,
        lingering_time=_LINGERING_S,
        shutdown_timeout=shutdown_timeout,
    )


class _MetricsText:
    """The text of ``/metrics``. Anybody may ask for it, so that making it takes a tenth of the time at most."""

    def __init__(self, core: PullCore) -> None:
        self._core = core
        self._text = b""
        self._until_s = -math.inf

    def text(self) -> bytes:
        """Returns the text, which is made anew if it is older than ten times the time that it took to make."""
        now_s = time.monotonic()
        if now_s >= self._until_s:
            self._text = prometheus_text(self._core).encode()
            self._until_s = now_s + _METRICS_SHARE * (time.monotonic() - now_s)
        return self._text


def _text(answer: Callable[[], tuple[int, str]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_request: web.Request) -> web.Response:
        status, text = answer()
        return web.Response(status=status, text=text)

    return handler


_SYNONYMS = {"": IDENTITY, "none": IDENTITY, "x-gzip": GZIP, "zlib": "deflate"}  # zlib is the Collector's word for it


class _OtlpHandler:
    """Receives OTLP over HTTP: reads the body within limits and passes it to the core."""

    def __init__(self, core: PullCore, tokens: Tokens | None, warnings: Warnings) -> None:
        self._core = core
        self._tokens = tokens
        self._warnings = warnings
        self._room = Room(_MOST_BYTES_IN_FLIGHT, "too much is being received")

    def handler(
        self, take: Callable[..., Awaitable[Answer]], said: Callable[[Answer], Message]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Returns the handler of a path.

        Args:
            take: passes the body to the core.
            said: makes the message that says what was taken.
        """

        async def handle(request: web.Request) -> web.Response:
            return await self._received(request, take, said)

        return handle

    async def _received(
        self, request: web.Request, take: Callable[..., Awaitable[Answer]], said: Callable[[Answer], Message]
    ) -> web.Response:
        """Answers as OTLP/HTTP specifies: in the request's encoding, and failures as ``google.rpc.Status``."""
        is_json = request.content_type == _JSON
        if not is_json and request.content_type != _PROTOBUF:
            return self._unsupported(f"the body must be {_PROTOBUF} or {_JSON}")
        encoding = request.headers.get("content-encoding", IDENTITY).strip().lower()
        encoding = _SYNONYMS.get(encoding, encoding)
        try:
            check_encoding(encoding)
            grant = None if self._tokens is None else self._tokens.grant(request.headers.get("authorization"))
            async with self._body(request) as body:
                answer = await take(body, is_json=is_json, encoding=encoding, grant=grant)
        except Exception as error:  # noqa: BLE001 - any error is reported to the sender as OTLP specifies
            fault = fault_of(error, self._warnings)
            self._core.note_fault(fault)
            headers = {} if fault.retry_s is None else {"retry-after": f"{fault.retry_s:g}"}
            return _response(fault.body(), is_json=is_json, status=fault.status, headers=headers)
        return _response(said(answer), is_json=is_json)

    def _unsupported(self, message: str) -> web.Response:
        self._core.note_fault(fault_of(Unsupported(message), self._warnings))
        return web.Response(status=415, text=f"{message}\n")

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        """Reads the body. Received bytes count against a limit; when it is reached, the largest body is refused."""
        announced = request.content_length or 0
        if announced > MAX_REQUEST_BYTES:
            raise TooLarge(f"{announced} bytes; at most {MAX_REQUEST_BYTES} are allowed")
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(_SLOWEST_S)
        parts: list[bytes] = []
        size = 0
        with self._room.hold(f"{id(request)}", 0, lambda: limit.reschedule(loop.time())) as held:
            try:
                async with limit:
                    while part := await request.content.readany():
                        size += len(part)
                        if size > MAX_REQUEST_BYTES:
                            raise TooLarge(f"more than {MAX_REQUEST_BYTES} bytes")
                        held.resize(size)
                        parts.append(part)
            except TimeoutError:
                raise Busy("the body came too slowly, or too many bytes are in flight") from None
            yield b"".join(parts)


def _response(
    message: Message, *, is_json: bool, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    body = MessageToJson(message, indent=None).encode() if is_json else message.SerializeToString()
    return web.Response(body=body, status=status, content_type=_JSON if is_json else _PROTOBUF, headers=headers)
