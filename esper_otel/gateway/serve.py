"""Serve: the gateway's two ports, and one event loop behind them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.core import Core
from esper_otel.gateway.faults import Busy, fault_of
from esper_otel.gateway.http import application
from esper_otel.gateway.inflate import MAX_REQUEST_BYTES
from esper_otel.gateway.pull_messages import SERVICE, PullRequest, RanksRequest, RunsRequest
from esper_otel.gateway.security import Certificates, Grant, Tokens
from esper_otel.log import Warnings

OTLP_SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"
_MOST_REQUESTS = 64
_MOST_PULLS = 1_000
_MOST_CONNECTIONS = 500  # fewer than the files that a process usually may open
_SETTLED_S = 0.05
_IDLE_MS = 300_000
_GRACE_S = 1.0
_LOOK_EVERY_S = 5.0

_Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the gateway listens, and who may come.

    Attributes:
        grpc: ``host:port`` for OTLP, pulls, health checking and reflection; None for none. Port 0: a free one.
        http: ``host:port`` for OTLP over HTTP and for looking after the gateway; None for none.
        certificates: of both; None for plain text.
        send_tokens: of senders; None: everybody may send.
        pull_tokens: of pullers; None: everybody may pull.
        has_page: whether the HTTP port has the live page.
    """

    grpc: str | None
    http: str | None
    certificates: Certificates | None = None
    send_tokens: Tokens | None = None
    pull_tokens: Tokens | None = None
    has_page: bool = False


class Gateway:
    """Receives OTLP and serves pulls. An asynchronous context manager; threads: that of its event loop.

    Args:
        core: what it does with requests.
        ports: where it listens.
        receives: whether the gRPC port takes OTLP.

    Attributes:
        grpc_address: ``host:port`` of the gRPC port, when it is open.
        http_address: the same of the HTTP port.
    """

    def __init__(self, core: Core, ports: Ports, *, receives: bool = True) -> None:
        self.grpc_address: str | None = None
        self.http_address: str | None = None
        self._core = core
        self._ports = ports
        self._receives = receives
        self._warnings = Warnings()
        self._requests = 0
        self._pulls = 0
        self._server: grpc.aio.Server | None = None
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def page(self) -> str | None:
        """The address of the live page."""
        if not self._ports.has_page or self.http_address is None:
            return None
        return f"{'http' if self._ports.certificates is None else 'https'}://{self.http_address}/"

    async def __aenter__(self) -> Gateway:
        try:
            self._core.start()
            if self._ports.grpc is not None:
                await self._open_grpc(self._ports.grpc)
            if self._ports.http is not None:
                await self._open_http(self._ports.http)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops taking requests, lets those that run end, and closes the store."""
        if self._watching is not None:
            self._watching.cancel()
        if self._listening is not None:
            self._listening.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._core.end_waiting()
        if self._server is not None:
            await self._server.stop(_GRACE_S)
        self._core.close()

    # -- gRPC --------------------------------------------------------------------------------------------

    async def _open_grpc(self, address: str) -> None:
        server = self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
                ("grpc.so_reuseport", 0),  # a second gateway on the port is a mistake, not a colleague
                ("grpc.max_concurrent_streams", 200),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.keepalive_time_ms", _IDLE_MS),  # a peer that is gone without a word
            ],
        )
        checking = health.aio.HealthServicer()  # type: ignore[attr-defined] # the stubs lack it
        health_pb2_grpc.add_HealthServicer_to_server(checking, server)
        unary = grpc.unary_unary_rpc_method_handler
        bytes_of = ExportMetricsServiceResponse.SerializeToString
        pull_handlers = {
            "Runs": unary(self._runs, RunsRequest.FromString, lambda response: response.SerializeToString()),
            "Pull": unary(self._pull, PullRequest.FromString, lambda response: response.SerializeToString()),
            "Ranks": unary(self._ranks, RanksRequest.FromString, lambda response: response.SerializeToString()),
        }
        handlers = {SERVICE: pull_handlers}
        if self._receives:
            handlers[OTLP_SERVICE] = {"Export": unary(self._export, None, bytes_of)}
        server.add_generic_rpc_handlers(
            tuple(grpc.method_handlers_generic_handler(*handler) for handler in handlers.items())
        )
        reflection.enable_server_reflection((*handlers, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            certificates = self._ports.certificates
            if certificates is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, _grpc_credentials(certificates, self._warnings))
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigurationError(f"--grpc {address}: the port is taken, or the address is none of this machine")
        await server.start()
        for service in ("", *handlers):
            await checking.set(service, health_pb2.HealthCheckResponse.SERVING)
        self.grpc_address = f"{address.rpartition(':')[0]}:{port}"

    async def _export(self, body: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> ExportMetricsServiceResponse:
        try:
            grant = _grant(self._ports.send_tokens, context)
            if self._requests >= _MOST_REQUESTS:
                raise Busy("too many requests at once")  # noqa: TRY301 - answered like every other fault
            self._requests += 1
            try:
                answer = await self._core.take(body, grant=grant)
            finally:
                self._requests -= 1
        except Exception as error:  # noqa: BLE001 - whatever it is, a sender is told by OTLP's rules
            await self._abort(error, context, is_sender=True)
        response = ExportMetricsServiceResponse()
        if answer.rejected or answer.reason:
            response.partial_success.rejected_data_points = answer.rejected
            response.partial_success.error_message = answer.reason
        return response

    async def _runs(self, _request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return self._core.runs(_grant(self._ports.pull_tokens, context))
        except Exception as error:  # noqa: BLE001 - a puller is told
            await self._abort(error, context)

    async def _pull(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            grant = _grant(self._ports.pull_tokens, context)
            if self._pulls >= _MOST_PULLS:
                raise Busy("too many pulls at once")  # noqa: TRY301 - answered like every other fault
            self._pulls += 1
            try:
                return await self._core.pull(request, grant)
            finally:
                self._pulls -= 1
        except Exception as error:  # noqa: BLE001 - a puller is told
            await self._abort(error, context)

    async def _ranks(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await self._core.ranks(request, _grant(self._ports.pull_tokens, context))
        except Exception as error:  # noqa: BLE001 - a puller is told
            await self._abort(error, context)

    async def _abort(
        self, error: Exception, context: grpc.aio.ServicerContext[Any, Any], *, is_sender: bool = False
    ) -> None:
        fault = fault_of(error, self._warnings)
        if is_sender:
            self._core.note_fault(fault)
        details = (("grpc-status-details-bin", fault.body().SerializeToString()),)
        await context.abort(fault.code, fault.message, details)

    # -- HTTP --------------------------------------------------------------------------------------------

    async def _open_http(self, address: str) -> None:
        app = application(self._core, self._ports.send_tokens, self._warnings, has_page=self._ports.has_page)
        # Bodies are unpacked by us, within bounds.
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=_GRACE_S)
        await self._runner.setup()
        certificates = self._ports.certificates
        context = None if certificates is None else certificates.context()
        host, _, port = address.rpartition(":")
        served = self._runner.server
        assert served is not None
        loop = asyncio.get_running_loop()

        def connected() -> asyncio.BaseProtocol:
            handler = served()
            loop.call_later(_SETTLED_S, bound, handler)  # it is counted when it is connected
            return handler

        def bound(handler: web.RequestHandler) -> None:
            open_ones = [each.transport for each in served.connections if each.transport is not None]
            count = sum(not transport.is_closing() for transport in open_ones)
            if count > _MOST_CONNECTIONS and handler.transport is not None:
                handler.transport.close()
                self._core.note_fault(fault_of(Busy("too many connections"), self._warnings))

        try:
            self._listening = await loop.create_server(connected, host.strip("[]"), int(port), ssl=context)
        except OSError as error:
            raise ConfigurationError(f"--http {address}: {error.strerror or error}") from None
        self.http_address = f"{host}:{self._listening.sockets[0].getsockname()[1]}"
        if certificates is not None and context is not None:
            self._watching = asyncio.create_task(self._renew(certificates, context))

    async def _renew(self, certificates: Certificates, context: Any) -> None:
        """Takes a new certificate into the context that is in use, for connections from then on."""
        before = certificates.stamp()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(OSError):  # in the middle of being replaced
                now = certificates.stamp()
                if now == before:
                    continue
                try:
                    certificates.context()  # are they a pair?
                    context.load_cert_chain(certificates.certificate, certificates.key)
                    before = now
                except ConfigurationError as error:
                    self._warnings.say("tls", "%s; the certificate before stays in force", error)


def _grant(tokens: Tokens | None, context: grpc.aio.ServicerContext[Any, Any]) -> Grant | None:
    if tokens is None:
        return None
    given = dict(context.invocation_metadata() or ()).get("authorization")
    return tokens.grant(given.decode(errors="replace") if isinstance(given, bytes) else given)


def _grpc_credentials(certificates: Certificates, warnings: Warnings) -> grpc.ServerCredentials:
    """Credentials that follow the files: gRPC asks with each handshake."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        root = None if certificates.client_ca is None else certificates.client_ca.read_bytes()
        pair = (certificates.key.read_bytes(), certificates.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=root)

    certificates.context()  # raises in words for files that are no pair; gRPC's own words tell nothing
    known = certificates.stamp()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal known
        try:
            now = certificates.stamp()
            if now == known:
                return None
            certificates.context()
            known = now
            return configuration()
        except (OSError, ConfigurationError) as error:
            warnings.say("tls", "%s; the certificate before stays in force", error)
            return None

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        renewed,  # type: ignore[arg-type] # None: go on with what there is, says grpc
        require_client_authentication=certificates.client_ca is not None,
    )
