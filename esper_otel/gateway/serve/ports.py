"""Opens the gateway's two ports and serves them in one event loop."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import dataclass

import grpc
from aiohttp import web
from grpc_health.v1 import health_pb2

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.core import Core
from esper_otel.gateway.faults import fault_of
from esper_otel.gateway.pull_core import PullCore
from esper_otel.gateway.receive.inflate import MAX_REQUEST_BYTES
from esper_otel.gateway.security import Certificates, CertificatesInForce, Content, Tokens
from esper_otel.gateway.serve.connections import SILENT_S, Guard, HttpAcceptor, most_connections
from esper_otel.gateway.serve.grpc_port import OTLP_SERVICE, Rpc
from esper_otel.gateway.serve.http_port import HttpPort, runner_of
from esper_otel.gateway.serve.in_flight import Room
from esper_otel.log import Warnings

__all__ = ["OTLP_SERVICE", "Gateway", "Ports"]

_MOST_UNREAD_BYTES = 64 * 1024 * 1024
_UNREAD_S = 0.25  # how long an unread answer is safe at the limit; otherwise _SLOWEST_S of the ports applies
_BACKLOG = 256
# gRPC itself knows identity, deflate and gzip. It passes on messages of any compression; see ``receive/inflate.py``.
_ALGORITHMS = 0b111
_IDLE_MS = 300_000
_GRACE_S = 1.0
_ANOTHER = "give another port, or port 0 for a free one"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the gateway listens, and who has access.

    Attributes:
        grpc: ``host:port`` for OTLP, pulls, health checking and reflection; None opens no port, port 0 a free one.
        http: ``host:port`` for OTLP over HTTP and for operators; None opens no port.
        certificates: the certificates of both ports; None for plain text.
        send_tokens: tokens of senders; None allows everyone to send.
        pull_tokens: tokens of pullers; None allows everyone to pull.
        has_page: whether the HTTP port serves the live page.
        hosts: Host names that the HTTP port accepts in addition to the usual ones.
    """

    grpc: str | None
    http: str | None
    certificates: Certificates | None = None
    send_tokens: Tokens | None = None
    pull_tokens: Tokens | None = None
    has_page: bool = False
    hosts: frozenset[str] = frozenset()


class Gateway:
    """Receives OTLP and serves pulls. An asynchronous context manager; threads: that of its event loop.

    Args:
        core: processes the requests.
        ports: where it listens.
        receives: whether the ports accept OTLP, if the core does.

    Attributes:
        grpc_address: ``host:port`` of the gRPC port, when it is open.
        http_address: ``host:port`` of the HTTP port, when it is open.
    """

    def __init__(self, core: PullCore, ports: Ports, *, receives: bool = True) -> None:
        self.grpc_address: str | None = None
        self.http_address: str | None = None
        self._core = core
        self._ports = ports
        self._receiver = core if receives and isinstance(core, Core) else None
        self._warnings = Warnings()
        self._answers = Room(_MOST_UNREAD_BYTES, "too many answers that are not read yet", safe_s=_UNREAD_S)
        self._certificates: CertificatesInForce | None = None
        self._server: grpc.aio.Server | None = None
        self._guard: Guard | None = None
        self._runner: web.AppRunner | None = None
        self._door: HttpAcceptor | None = None

    @property
    def page(self) -> str | None:
        """The address of the live page."""
        if not self._ports.has_page or self.http_address is None:
            return None
        return f"{'http' if self._ports.certificates is None else 'https'}://{self.http_address}/"

    @property
    def requests(self) -> int:
        """Requests so far: those that sent or pulled something, and all on the HTTP port."""
        counts = self._core.counts
        return counts["requests"] + counts["pulled_steps"] + (0 if self._door is None else self._door.requests)

    async def __aenter__(self) -> Gateway:
        try:
            self._core.start()
            if self._ports.certificates is not None:
                self._certificates = CertificatesInForce(self._ports.certificates, self._warnings)
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
        """Stops accepting requests, waits briefly for the current ones, and closes the store."""
        if self._door is not None:
            self._door.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._core.end_waiting()
        if self._server is not None:
            await self._server.stop(_GRACE_S)
        if self._guard is not None:
            self._guard.close()
        self._core.close()

    # -- gRPC --------------------------------------------------------------------------------------------

    async def _open_grpc(self, address: str) -> None:
        server = self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", -1),  # the size of pages is limited elsewhere
                # Requests are decompressed by this gateway, within limits and when their turn has come.
                ("grpc.per_message_decompression", 0),
                ("grpc.compression_enabled_algorithms_bitset", _ALGORITHMS),
                ("grpc.http2.bdp_probe", 0),  # keeps gRPC from buffering messages that no method reads yet
                ("grpc.so_reuseport", 0),  # a second gateway on the same port is a mistake
                ("grpc.max_concurrent_streams", 200),
                ("grpc.max_allowed_incoming_connections", most_connections("grpc")),
                ("grpc.server_handshake_timeout_ms", int(SILENT_S * 1000)),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.keepalive_time_ms", _IDLE_MS),  # detects peers that vanished without closing
            ],
        )
        port = self._bind(server, address)
        self._guard = Guard(port)
        ports = self._ports
        rpc = Rpc(self._core, ports.send_tokens, ports.pull_tokens, self._guard, self._answers, self._warnings)
        handlers = rpc.handlers(self._receiver)
        server.add_generic_rpc_handlers(
            tuple(grpc.method_handlers_generic_handler(*handler) for handler in handlers.items())
        )
        await server.start()
        for service in ("", *handlers):
            await rpc.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self.grpc_address = f"{address.rpartition(':')[0]}:{port}"

    def _bind(self, server: grpc.aio.Server, address: str) -> int:
        try:
            if self._certificates is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, _grpc_credentials(self._certificates))
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigurationError(
                f"--grpc {address}: the port is taken, or it is not an address of this machine: {_ANOTHER}"
            )
        return port

    # -- HTTP --------------------------------------------------------------------------------------------

    async def _open_http(self, address: str) -> None:
        port = HttpPort(self._core, self._ports.send_tokens, self._answers, self._warnings)
        hosts = None if self._certificates is not None else self._ports.hosts
        app = port.application(hosts, has_page=self._ports.has_page, receiver=self._receiver)
        self._runner = runner_of(app, self._warnings, shutdown_timeout=_GRACE_S)
        await self._runner.setup()
        host, _, number = address.rpartition(":")
        try:
            listening = await _listening(host.strip("[]"), int(number))
        except OSError as error:
            raise ConfigurationError(f"--http {address}: {_why_not_open(error)}") from None
        context = None if self._certificates is None else self._certificates.context
        served = self._runner.server
        assert served is not None
        self._door = port.door = HttpAcceptor(listening, served, context, self._refuse, self._warnings)
        self.http_address = f"{host}:{listening[0].getsockname()[1]}"

    def _refuse(self, error: Exception) -> None:
        self._core.note_fault(fault_of(error, self._warnings))


def _why_not_open(error: OSError) -> str:
    """Returns why a port cannot be opened, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"another program listens on this port: {_ANOTHER}"
    if error.errno == errno.EACCES:
        return f"this user may not open this port: {_ANOTHER}"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return "this is not an address of this machine: give 127.0.0.1, or 0.0.0.0 for all of its addresses"
    return error.strerror or str(error)


async def _listening(host: str, port: int) -> list[socket.socket]:
    """Opens sockets that listen on every address of a host.

    Raises:
        OSError: the port is taken, or it is not an address of this machine.
    """
    server = await asyncio.get_running_loop().create_server(
        asyncio.Protocol, host, port, backlog=_BACKLOG, start_serving=False
    )
    sockets = [each.dup() for each in server.sockets]
    server.close()
    for each in sockets:
        each.listen(_BACKLOG)
        each.setblocking(False)
    return sockets


def _grpc_credentials(certificates: CertificatesInForce) -> grpc.ServerCredentials:
    """Makes credentials that follow changes of the files, since gRPC requests them for each handshake."""
    in_force: Content | None = None

    def configuration() -> grpc.ServerCertificateConfiguration | None:
        nonlocal in_force
        content = certificates.content()
        if content is in_force:
            return None  # keep the current configuration
        in_force = content
        pair = (content.key, content.certificate)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=content.client_ca)

    first = configuration()
    assert first is not None
    return grpc.dynamic_ssl_server_credentials(
        first,
        configuration,  # type: ignore[arg-type] # gRPC documents that None keeps the current one
        require_client_authentication=certificates.content().client_ca is not None,
    )
