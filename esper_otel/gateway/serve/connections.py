"""Connections: bounded in number and in time on both ports, so that descriptors are left and the honest stay."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

from esper_otel.gateway.faults import Busy
from esper_otel.log import Warnings

SILENT_S = 10.0  # to say something: a TLS handshake, HTTP/2 settings, the head of a request

_SPARE = 128  # descriptors for all but connections
_MOST = {"http": 500, "grpc": 2_000}
_BACKLOG = 256
_UNPROVEN_S = 2.0
_LOOK_EVERY_S = 0.25
_NO_DESCRIPTOR_S = 0.5
_MOST_TAKEN_BACK = 100  # calls of a connection, between two looks


def most_connections(port: str) -> int:
    """How many connections a port takes: as many as are of use, and the process has descriptors for.

    Args:
        port: ``http`` or ``grpc``.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST[port]
    return max(min(_MOST[port], (soft - _SPARE) // 2), 8)


def allow_descriptors() -> None:
    """Raises the process's own limit of open files to what the connections need, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * max(_MOST.values()) + _SPARE
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(slots=True, eq=False)
class _Connection:
    """A connection of the HTTP port.

    Attributes:
        socket: its own; closed by the transport when there is one.
        since_s: when it was accepted.
        connecting: what makes its transport; None when it has done so.
        protocol: what serves it.
        transport: None during a TLS handshake.
        has_asked: whether the head of a request came.
        is_proven: whether a request was answered and not refused.
    """

    socket: socket.socket
    since_s: float
    connecting: asyncio.Task[None] | None = None
    protocol: asyncio.Protocol | None = None
    transport: asyncio.BaseTransport | None = None
    has_asked: bool = False
    is_proven: bool = False

    def end(self) -> None:
        """At once; what was to be sent is dropped."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
        elif self.connecting is not None:
            self.connecting.cancel()


class HttpAcceptor:
    """Accepts the connections of the HTTP port.

    When there is no room for one more, the oldest that has not sent a request gives way, then the oldest of those
    that had no good answer within seconds; if there is none of these, the new one is closed.

    Args:
        listening: sockets that listen.
        protocol: makes what serves a connection.
        context: gives the TLS context for the next connection; None for plain text.
        refused: called when there is no room.
        warnings: where it is said that descriptors are gone.
    """

    def __init__(
        self,
        listening: list[socket.socket],
        protocol: Callable[[], asyncio.Protocol],
        context: Callable[[], ssl.SSLContext] | None,
        refused: Callable[[Exception], None],
        warnings: Warnings,
    ) -> None:
        self._listening = listening
        self._protocol = protocol
        self._context = context
        self._refused = refused
        self._warnings = warnings
        self._most = most_connections("http")
        self._connections: dict[_Connection, None] = {}
        self._served: dict[asyncio.BaseProtocol, _Connection] = {}
        self._tasks = [asyncio.create_task(self._accept(each)) for each in listening]
        self._tasks.append(asyncio.create_task(self._end_silent()))

    def close(self) -> None:
        """Accepts no more."""
        for task in self._tasks:
            task.cancel()
        for each in self._listening:
            each.close()
        for connection in self._connections:
            if connection.transport is None:
                connection.end()

    def note(self, protocol: asyncio.BaseProtocol, *, is_proven: bool) -> None:
        """Notes that a connection has sent a request, or that one of its requests was answered well."""
        connection = self._served.get(protocol)
        if connection is not None:
            connection.has_asked = True
            connection.is_proven |= is_proven

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                self._warnings.say("accept", "no connection can be accepted: %s", error)
                await asyncio.sleep(_NO_DESCRIPTOR_S)
                continue
            if len(self._connections) >= self._most:
                self._forget_ended()
            if len(self._connections) < self._most or self._make_room():
                connection = _Connection(accepted, time.monotonic())
                self._connections[connection] = None
                connection.connecting = asyncio.create_task(self._connect(connection))
            else:
                accepted.close()
                self._refused(Busy("too many connections"))
            await asyncio.sleep(0)  # the others have their turn

    async def _connect(self, connection: _Connection) -> None:
        def protocol() -> asyncio.Protocol:
            connection.protocol = self._protocol()
            self._served[connection.protocol] = connection
            return connection.protocol

        loop = asyncio.get_running_loop()
        try:
            context = None if self._context is None else self._context()
            connection.transport, _ = await loop.connect_accepted_socket(
                protocol, connection.socket, ssl=context, ssl_handshake_timeout=None if context is None else SILENT_S
            )
        except (OSError, asyncio.CancelledError):  # no handshake, or it has given way
            connection.socket.close()
            self._forget(connection)
        finally:
            connection.connecting = None

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)
        if connection.protocol is not None:
            self._served.pop(connection.protocol, None)

    def _forget_ended(self) -> None:
        for each in list(self._connections):
            if each.transport is not None and each.transport.is_closing():
                self._forget(each)

    def _make_room(self) -> bool:
        now_s = time.monotonic()
        unproven = [each for each in self._connections if not each.is_proven]
        silent = [each for each in unproven if not each.has_asked]
        old = silent or [each for each in unproven if now_s - each.since_s >= _UNPROVEN_S]
        if not old:
            return False
        oldest = min(old, key=lambda each: each.since_s)
        oldest.end()
        self._forget(oldest)
        return True

    async def _end_silent(self) -> None:
        while True:
            await asyncio.sleep(SILENT_S / 4)
            now_s = time.monotonic()
            for each in self._connections:
                if not each.has_asked and now_s - each.since_s >= SILENT_S:
                    each.end()
            self._forget_ended()


_Peer = tuple[str, int]


class _OpenSocket(NamedTuple):
    """A connection, with the number of its socket: no later one has both."""

    peer: _Peer
    inode: int


class Guard:
    """Watches the connections of the gRPC port, and ends those that it must.

    gRPC bounds their number and ends those that never say anything, but has no way to name one and end it. They are
    found among the descriptors of the process, by their addresses. When most places are taken, those give way that
    had no request granted for seconds.

    Args:
        port: the number of the gRPC port.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._most = most_connections("grpc")
        self._proven: set[str] = set()
        self._seen: dict[_OpenSocket, float] = {}
        self._taken_back = Counter[str]()
        self._task = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Watches no more."""
        self._task.cancel()

    def note(self, peer: str) -> None:
        """Notes that a request of a peer, as gRPC names it, was granted."""
        if len(self._proven) < 2 * self._most:
            self._proven.add(peer)

    def note_taken_back(self, peer: str) -> None:
        """Notes that a peer has cancelled a call. One that does so without end is cut: gRPC would serve it first."""
        self._taken_back[peer] += 1
        if self._taken_back[peer] == _MOST_TAKEN_BACK:
            self.cut(peer)

    def cut(self, peer: str) -> None:
        """Ends the connection of a peer, as gRPC names it, with all that waits to be sent there."""
        wanted = _peer_of(peer)
        self._end(lambda each: each.peer == wanted)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._taken_back.clear()
            if len(_descriptors()) > self._most // 2 or len(self._proven) >= self._most:
                self._look()

    def _look(self) -> None:
        now_s = time.monotonic()
        found = [each for each, _ in self._found()]
        self._seen = {each: self._seen.get(each, now_s) for each in found}
        peers = {each.peer for each in found}
        self._proven = {name for name in self._proven if _peer_of(name) in peers}
        if len(found) > self._most * 3 // 4:
            proven = {_peer_of(name) for name in self._proven}
            old = {each for each, since_s in self._seen.items() if now_s - since_s >= _UNPROVEN_S}
            self._end(lambda each: each in old and each.peer not in proven)

    def _end(self, is_meant: Callable[[_OpenSocket], bool]) -> None:
        for each, connection in self._found():
            if is_meant(each):
                with contextlib.suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)

    def _found(self) -> Iterator[tuple[_OpenSocket, socket.socket]]:
        """The connections that there are, each to be used at once."""
        for descriptor in _descriptors():
            try:
                connection = socket.socket(fileno=descriptor)
            except OSError:  # not a socket
                continue
            try:
                with contextlib.suppress(OSError):  # it is not connected, or closed by now
                    if connection.family in {socket.AF_INET, socket.AF_INET6} and (
                        connection.getsockname()[1] == self._port
                    ):
                        host, port, *_ = connection.getpeername()
                        yield _OpenSocket((_host(host), port), os.fstat(descriptor).st_ino), connection
            finally:
                connection.detach()  # it is gRPC's


def _descriptors() -> list[int]:
    try:
        with os.scandir("/dev/fd") as entries:
            return [int(entry.name) for entry in entries]
    except OSError:  # not every system has it; then only gRPC's own bounds hold
        return []


def _peer_of(peer: str) -> _Peer:
    """The host and the port in gRPC's ``ipv4:127.0.0.1:4000`` or ``ipv6:%5B::1%5D:4000``."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return _host(host.strip("[]")), int(port) if port.isdecimal() else 0


def _host(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
