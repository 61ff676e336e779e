"""The ports of this machine that training runs send to by default, and what listens there."""

from __future__ import annotations

import contextlib
import http.client
import selectors
import socket

GRPC_PORT = 4317
HTTP_PORT = 4318
GATEWAY_PORT = 4327

_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_WAIT_S = 0.05  # the answer of the machine itself; it is there at once
_ANSWER_S = 1.0
_MOST_BYTES = 65_536
_OURS = b"esper_gateway_"


def is_free(port: int) -> bool:
    """Whether nobody on this machine listens on the port, at 127.0.0.1 or ::1. Waits 0.1 s at most."""
    return all(_is_refused(family, host, port) for family, host in _LOOPBACK)


def gateway_here() -> str:
    """Returns where to look for a gateway on this machine: the port of the live page if only that is taken."""
    return f"127.0.0.1:{GRPC_PORT if is_free(GATEWAY_PORT) and not is_free(GRPC_PORT) else GATEWAY_PORT}"


def page_at(address: str) -> str | None:
    """Returns the URL of the live page that a gateway of ours serves at ``host:port``; None if there is none.

    Waits 2 s at most for a program that listens there and does not answer.
    """
    with contextlib.suppress(OSError, http.client.HTTPException):
        if _OURS in _content(address, "/metrics") and _content(address, "/"):
            return f"http://{address}/"
    return None


def _is_refused(family: socket.AddressFamily, host: str, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex((host, port)) == 0:
                return False
            with selectors.DefaultSelector() as waiting:
                waiting.register(probe, selectors.EVENT_WRITE)
                waiting.select(_WAIT_S)
            return probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
    except OSError:  # there is no such address here
        return True


def _content(address: str, path: str) -> bytes:
    """Returns the beginning of a document; empty if there is none."""
    connection = http.client.HTTPConnection(address, timeout=_ANSWER_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read(_MOST_BYTES) if answer.status == http.client.OK else b""
