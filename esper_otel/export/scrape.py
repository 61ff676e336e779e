"""Serves a session's metrics to Prometheus at the configured port, or at the next free one if that is taken."""

from __future__ import annotations

import contextlib
import errno
import socket
import socketserver
import threading
import time
import weakref
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry, make_wsgi_app

from esper_otel import unix
from esper_otel.export.provider import PROMETHEUS_PORT, prometheus_port
from esper_otel.export.variables import Variables

_HOST = "OTEL_EXPORTER_PROMETHEUS_HOST"
_NEIGHBOURS = 64  # ports to try, so that the ranks of one host use consecutive ports
_PAUSE_S = 0.1
_CANNOT_HAVE = {errno.EADDRINUSE, errno.EACCES}


class ScrapeReader(PrometheusMetricReader):
    """The SDK's scrape exporter with its own registry and server, since all sessions have metrics of the same names.

    Raises:
        OSError: the host is not an address of this machine, or no port is free; the message names the setting.
    """

    def __init__(self, variables: Variables) -> None:
        _, host = variables.text(_HOST)
        host = host or "localhost"
        port = prometheus_port(variables)
        registry = CollectorRegistry()
        try:
            self._server, why = _listening(host, port)
        except OSError as error:
            raise OSError(f"{_HOST}={host!r}, {PROMETHEUS_PORT}={port}: {error.strerror or error}") from None
        super().__init__(registry=registry)
        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._serve, name="esper-otel-scrape", daemon=True)
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        self.said: str = f"scraped at http://{shown}:{self._server.server_port}/metrics"
        if why:
            self.said += f" ({PROMETHEUS_PORT}={port}: {why})"
        _open.add(self._server)

    def _serve(self) -> None:
        while not self._server.is_closing:
            self._server.handle_request()

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Releases the port. See ``MetricReader``."""
        self._server.is_closing = True
        with contextlib.suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(timeout_millis / 1e3)
        self._server.server_close()
        super().shutdown(timeout_millis, **kwargs)


class _ScrapeHandler(WSGIRequestHandler):
    timeout = 10.0  # for a client that connects and sends nothing

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Logs nothing for a scrape."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_port = False  # newer Pythons let two processes share a port; a scrape would reach either of them
    is_closing = False

    def server_bind(self) -> None:
        """Binds like ``WSGIServer``, but does not look up this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment] # both are there
        self.setup_environ()

    def get_request(self) -> Any:
        """Accepts like ``WSGIServer``, but pauses after a failure, such as when no file descriptors are left."""
        try:
            return super().get_request()
        except OSError:
            if not self.is_closing:
                time.sleep(_PAUSE_S)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints no traceback when a client closes the connection."""


def _listening(host: str, port: int) -> tuple[_Server, str]:
    """Returns the server, and why it does not use the configured port (empty if it does)."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    kind = type("_Server", (_Server,), {"address_family": family})
    why = ""
    for each in range(port, min(port + _NEIGHBOURS, 65536)):
        try:
            return kind((address[0], each), _ScrapeHandler), why
        except OSError as error:
            if error.errno not in _CANNOT_HAVE:
                raise
            why = why or (error.strerror or str(error)).lower()
    return kind((address[0], 0), _ScrapeHandler), why


_open: weakref.WeakSet[_Server] = weakref.WeakSet()


def _let_go() -> None:
    """Closes the sockets in a forked child, which would otherwise keep the port in use."""
    for server in _open:
        server.socket.close()


unix.at_fork(after_in_child=_let_go)
