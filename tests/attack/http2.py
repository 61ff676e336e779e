"""HTTP/2 by hand, as far as attacks need it: what no honest client would send, or would not read."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

from esper_otel.varint import varint

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CANCEL = struct.pack("!I", 8)


class Connection:
    """One connection to a gRPC port, without TLS.

    Args:
        address: of the port.
        reads: whether what comes is read, in a thread; else the peer's answers stay with it.
    """

    def __init__(self, address: str, *, reads: bool = True) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=5)
        self._room = threading.Condition()
        self._window, self._first_window = 65_535, 65_535
        self._windows: dict[int, int] = {}
        self._socket.sendall(_PREFACE)
        self.frame(SETTINGS, 0, 0, b"")
        if reads:
            threading.Thread(target=self._read, daemon=True).start()

    def frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Sends a frame."""
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack("!I", stream)
        self._socket.sendall(head + payload)

    def call(self, stream: int, path: str, token: str, *, is_gzip: bool = False) -> None:
        """Opens a gRPC call; its message follows as data."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
            "authorization": f"Bearer {token}",
        }
        if is_gzip:
            headers["grpc-encoding"] = "gzip"
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
        self.frame(HEADERS, END_HEADERS, stream, block)

    def message(self, stream: int, content: bytes, deadline_s: float, *, is_gzip: bool = False) -> bool:
        """Sends a call's only message, within the peer's windows; says whether all of it went out."""
        left = memoryview(bytes([is_gzip]) + struct.pack("!I", len(content)) + content)
        while left:
            with self._room:
                while (size := min(self._window, self._windows.get(stream, self._first_window), 16_384)) <= 0:
                    if not self._room.wait(deadline_s - time.monotonic()):
                        return False
                size = min(size, len(left))
                self._window -= size
                self._windows[stream] = self._windows.get(stream, self._first_window) - size
            self.frame(DATA, END_STREAM if size == len(left) else 0, stream, bytes(left[:size]))
            left = left[size:]
        return True

    def cancel(self, stream: int) -> None:
        """Takes a call back."""
        self.frame(RST_STREAM, 0, stream, _CANCEL)

    def close(self) -> None:
        """Ends the connection without a word."""
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._socket.settimeout(None)
            file = self._socket.makefile("rb")
            while len(head := file.read(9)) == 9:
                payload = file.read(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                if kind == PING and not flags & ACK:
                    self.frame(PING, ACK, 0, payload)
                if kind == SETTINGS and not flags & ACK:
                    self.frame(SETTINGS, ACK, 0, b"")
                with self._room:
                    self._note(kind, flags, stream, payload)
                    self._room.notify_all()

    def _note(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            grown = int.from_bytes(payload, "big")
            if stream:
                self._windows[stream] = self._windows.get(stream, self._first_window) + grown
            else:
                self._window += grown
        elif kind == SETTINGS and not flags & ACK:
            for place in range(0, len(payload), 6):
                name, value = struct.unpack("!HI", payload[place : place + 6])
                if name == 4:
                    grown = value - self._first_window
                    self._first_window = value
                    self._windows = {number: window + grown for number, window in self._windows.items()}


def _text(text: str) -> bytes:
    """A literal of HPACK, not compressed."""
    content = text.encode()
    length = bytes([len(content)]) if len(content) < 127 else b"\x7f" + varint(len(content) - 127)
    return length + content
