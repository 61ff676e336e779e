"""Limits the number and age of connections on both ports, so that idle ones cannot exhaust the file descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

from esper_otel import unix
from esper_otel.gateway.faults import Busy
from esper_otel.log import Warnings

SILENT_S = 10.0  # time limit for a TLS handshake, the HTTP/2 settings, and the head of a request

_SPARE = 128  # descriptors for everything except connections
MOST_CONNECTIONS = {"http": 500, "grpc": 2_000}
_most = dict(MOST_CONNECTIONS)
_BACKLOG = 256
_UNPROVEN_S = 2.0
_LOOK_EVERY_S = 0.25
_NO_DESCRIPTOR_S = 0.5
_MOST_TAKEN_BACK = 100  # calls that one connection may cancel between two checks


def most_connections(port: str) -> int:
    """Returns how many connections a port accepts, which depends on the process's limit of file descriptors.

    Args:
        port: ``http`` or ``grpc``.
    """
    soft, _ = unix.open_files()
    return _most[port] if math.isinf(soft) else max(min(_most[port], (int(soft) - _SPARE) // 2), 8)


def allow_connections(most: Mapping[str, int] = MOST_CONNECTIONS) -> None:
    """Sets how many connections this process accepts on each port, and raises its limit of open files accordingly.

    If the system does not allow that many files, fewer connections are accepted.
    """
    _most.update(most)
    soft, hard = unix.open_files()
    wanted = int(min(2 * max(_most.values()) + _SPARE, hard))
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            unix.allow_open_files(wanted)


@dataclass(slots=True, eq=False)
class _HttpConnection:
    """A connection of the HTTP port.

    Attributes:
        socket: its socket; closed by the transport once there is one.
        since_s: when it was accepted.
        connecting: the task that makes its transport; None when the task is done.
        protocol: the protocol that serves it.
        transport: its transport; None during a TLS handshake.
        has_asked: whether the head of a request was received.
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
        """Closes the connection at once; data not sent yet is dropped."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
        elif self.connecting is not None:
            self.connecting.cancel()


class HttpAcceptor:
    """Accepts the connections of the HTTP port.

    When the limit is reached, the oldest connection that has not sent a request is closed. If there is none, the oldest
    connection without a successful request in its first seconds is closed; otherwise the new connection is closed.

    Args:
        listening: sockets that listen.
        protocol: makes the protocol that serves a connection.
        context: returns the TLS context for the next connection; None for plain text.
        refused: called when a new connection is closed.
        warnings: where failures to accept connections are reported.

    Attributes:
        requests: number of requests so far.
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
        self.requests: int = 0
        self._most = most_connections("http")
        self._connections: dict[_HttpConnection, None] = {}
        self._served: dict[asyncio.BaseProtocol, _HttpConnection] = {}
        self._tasks = [asyncio.create_task(self._accept(each)) for each in listening]
        self._tasks.append(asyncio.create_task(self._end_silent()))

    def close(self) -> None:
        """Stops accepting connections."""
        for task in self._tasks:
            task.cancel()
        for each in self._listening:
            each.close()
        for connection in self._connections:
            if connection.transport is None:
                connection.end()

    def note(self, protocol: asyncio.BaseProtocol, *, is_proven: bool) -> None:
        """Records that a connection has sent a request, or that one of its requests succeeded."""
        self.requests += not is_proven
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
                connection = _HttpConnection(accepted, time.monotonic())
                self._connections[connection] = None
                connection.connecting = asyncio.create_task(self._connect(connection))
            else:
                accepted.close()
                self._refused(Busy("too many connections"))
            await asyncio.sleep(0)  # let other tasks run

    async def _connect(self, connection: _HttpConnection) -> None:
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
        except (OSError, asyncio.CancelledError):  # the handshake failed, or the connection was closed for another one
            connection.socket.close()
            self._forget(connection)
        finally:
            connection.connecting = None

    def _forget(self, connection: _HttpConnection) -> None:
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
    """A connection, identified by its peer and its socket's inode; no later connection has the same pair."""

    peer: _Peer
    inode: int


class Guard:
    """Watches the connections of the gRPC port, and closes unused or misbehaving ones.

    gRPC limits their number and closes those that never send anything, but offers no way to close a particular
    connection. So connections are found among the process's file descriptors, by their addresses. When most of the
    allowed connections are in use, those that had no authorized request for seconds are closed.

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
        """Stops watching."""
        self._task.cancel()

    def note(self, peer: str) -> None:
        """Records that a request of a peer (in gRPC's notation) was authorized."""
        if len(self._proven) < 2 * self._most:
            self._proven.add(peer)

    def note_taken_back(self, peer: str) -> None:
        """Counts a cancelled call. A peer that cancels too many is disconnected, since gRPC would serve it first."""
        self._taken_back[peer] += 1
        if self._taken_back[peer] == _MOST_TAKEN_BACK:
            self.cut(peer)

    def cut(self, peer: str) -> None:
        """Closes the connection of a peer (in gRPC's notation), and drops the data waiting to be sent to it."""
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
                with contextlib.suppress(OSError):  # it is already closed
                    connection.shutdown(socket.SHUT_RDWR)

    def _found(self) -> Iterator[tuple[_OpenSocket, socket.socket]]:
        """Yields the port's connections; each must be used before the next one is requested."""
        for descriptor in _descriptors():
            try:
                connection = socket.socket(fileno=descriptor)
            except OSError:  # not a socket
                continue
            try:
                with contextlib.suppress(OSError):  # it is not connected, or was closed meanwhile
                    if connection.family in {socket.AF_INET, socket.AF_INET6} and (
                        connection.getsockname()[1] == self._port
                    ):
                        host, port, *_ = connection.getpeername()
                        yield _OpenSocket((_host(host), port), os.fstat(descriptor).st_ino), connection
            finally:
                connection.detach()  # gRPC owns the descriptor, so it must not be closed here


def _descriptors() -> list[int]:
    try:
        with os.scandir("/dev/fd") as entries:
            return [int(entry.name) for entry in entries]
    except OSError:  # not every system has /dev/fd; without it only gRPC's own limits apply
        return []


def _peer_of(peer: str) -> _Peer:
    """Parses host and port from gRPC's ``ipv4:127.0.0.1:4000`` or ``ipv6:%5B::1%5D:4000``."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return _host(host.strip("[]")), int(port) if port.isdecimal() else 0


def _host(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
