"""HTTP/2 by hand, for tests: a client of a gRPC server that sends what it likes and need not read."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
_CANCEL = struct.pack(">I", 8)
_WINDOW_UPDATE = 8
_END_STREAM, _END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def message(body: bytes, *, is_packed: bool = False) -> bytes:
    """A gRPC message."""
    return bytes([is_packed]) + struct.pack(">I", len(body)) + body


class RawClient:
    """A connection to a gRPC server; what it answers is only read when asked for.

    Args:
        address: ``host:port``.
        metadata: shown with each call.
    """

    def __init__(self, address: str, **metadata: str) -> None:
        host, _, port = address.rpartition(":")
        self._more = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        self.socket = socket.create_connection((host, int(port)), 20)
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self._next = 1
        self._window = 65_535

    def begin(self, path: str, data: bytes = b"", *, is_all: bool = False) -> int:
        """Begins a call, with the first part of its message; returns the stream's number."""
        stream, self._next = self._next, self._next + 2
        self.socket.sendall(frame(HEADERS, _END_HEADERS, stream, self._head(path)))
        if data or is_all:
            self.send(stream, data, is_all=is_all)
        return stream

    def send(self, stream: int, data: bytes, *, is_all: bool = False) -> None:
        """Sends more of a message, whether the server wants it or not."""
        parts: Sequence[bytes] = [data[at : at + 16384] for at in range(0, len(data), 16384)] or [b""]
        for number, part in enumerate(parts, 1):
            flags = _END_STREAM if is_all and number == len(parts) else 0
            self.socket.sendall(frame(DATA, flags, stream, part))

    def take_back(self, stream: int) -> None:
        """Cancels a call."""
        self.socket.sendall(frame(RST_STREAM, 0, stream, _CANCEL))

    def read(self, within_s: float) -> bytes:
        """What the server sends within a time."""
        found, deadline_s = b"", time.monotonic() + within_s
        while (left_s := deadline_s - time.monotonic()) > 0 and select.select([self.socket], [], [], left_s)[0]:
            part = self.socket.recv(65_536)
            if not part:
                break
            found += part
        return found

    def send_as_allowed(self, stream: int, data: bytes, within_s: float) -> int:
        """Sends as much of a message as the server wants within a time; returns how much that was."""
        window, of_all, sent, deadline_s = 65_535, self._window, 0, time.monotonic() + within_s
        while sent < len(data) and time.monotonic() < deadline_s:
            size = min(16_384, window, of_all, len(data) - sent)
            if size:
                self.socket.sendall(frame(DATA, 0, stream, data[sent : sent + size]))
                sent, window, of_all = sent + size, window - size, of_all - size
            while select.select([self.socket], [], [], 0.0 if size else 0.05)[0]:
                head = self.socket.recv(9, socket.MSG_WAITALL)
                if len(head) < 9:
                    return sent
                payload = self.socket.recv(int.from_bytes(head[:3]), socket.MSG_WAITALL)
                if head[3] == _WINDOW_UPDATE and int.from_bytes(head[5:]) == stream:
                    window += int.from_bytes(payload)
                elif head[3] == _WINDOW_UPDATE and head[5:] == bytes(4):
                    of_all += int.from_bytes(payload)
        self._window = of_all
        return sent

    def _head(self, path: str) -> bytes:
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "tests")]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *self._more]
        return b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
