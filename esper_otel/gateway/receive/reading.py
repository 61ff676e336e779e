"""Reading: bodies are decoded, small ones at once, large ones in a thread and one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.inflate import inflated
from esper_otel.gateway.receive.request import DecodedRequest, Malformed, PointBlock, TooLarge

# A body of so many bytes is decoded within some milliseconds, whatever is in it; JSON takes longer than protobuf.
_SMALL, _SMALL_JSON = 32 * 1024, 8 * 1024
# A gzip body of so many bytes is unpacked at once, to see whether what is in it is small.
_SMALL_GZIP = 4 * 1024


class Reader:
    """Decodes requests.

    Threads: that of one event loop, and one of its own.

    Args:
        limits: what senders may cost.
        prepare: is called with what was decoded in the thread, to find out there what takes long.
    """

    def __init__(self, limits: Limits | None, prepare: Callable[[PointBlock], None]) -> None:
        self._decoder, self._other = Decoder(limits), Decoder(limits)
        self._prepare = prepare
        self._thread: ThreadPoolExecutor | None = None
        self._is_free = asyncio.Lock()

    def read(self, body: bytes, *, is_json: bool) -> DecodedRequest:
        """A request, decoded at once.

        Raises:
            Malformed, TooLarge: it is none that can be taken.
        """
        return self._decoder.decode_json(body) if is_json else self._decoder.decode(body)

    @asynccontextmanager
    async def reading(
        self, body: bytes, *, is_json: bool, is_gzip: bool
    ) -> AsyncIterator[tuple[bytes, DecodedRequest]]:
        """A request, unpacked, and what it says. Of large ones the next waits until the block is left.

        Raises:
            Malformed, TooLarge: it is none that can be taken.
        """
        if is_gzip and len(body) <= _SMALL_GZIP:
            body, is_gzip = inflated(body), False
        if len(body) <= (_SMALL_JSON if is_json else _SMALL) and not is_gzip:
            yield body, self.read(body, is_json=is_json)
            return
        async with self._is_free:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "esper-otel-decode")
            loop = asyncio.get_running_loop()
            yield await loop.run_in_executor(self._thread, self._read_large, body, is_json, is_gzip)

    def _read_large(self, body: bytes, is_json: bool, is_gzip: bool) -> tuple[bytes, DecodedRequest]:
        try:
            if is_gzip:
                body = inflated(body)
            decoded = self._other.decode_json(body) if is_json else self._other.decode(body)
            for block in decoded.blocks:
                self._prepare(block)
        except (Malformed, TooLarge) as error:
            body = b""  # a traceback that somebody keeps would keep what was unpacked
            raise error.with_traceback(None) from None
        return body, decoded

    def close(self) -> None:
        """Ends the thread; what it still decodes is of no use."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
