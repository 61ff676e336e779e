"""Decodes small bodies at once, and large ones in a thread, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.inflate import IDENTITY, inflated
from esper_otel.gateway.receive.log_records import DecodedLogs, decode_logs
from esper_otel.gateway.receive.request import DecodedRequest, Malformed, PointBlock, TooLarge

# A body of up to this size is decoded within a few milliseconds, whatever its content. JSON is slower than protobuf.
_SMALL, _SMALL_JSON = 32 * 1024, 8 * 1024
# A compressed body of up to this size is unpacked at once, to see whether its content is small.
_SMALL_COMPRESSED = 4 * 1024

_T = TypeVar("_T")


class RequestReader:
    """Decodes requests.

    Threads: it is used from the thread of one event loop, and starts one of its own.

    Args:
        limits: limits on senders.
        prepare: called in the thread with each decoded block, to do slow work outside the event loop.
    """

    def __init__(self, limits: Limits | None, prepare: Callable[[PointBlock], None]) -> None:
        self._limits = limits or Limits()
        self._decoder, self._other = Decoder(limits), Decoder(limits)
        self._prepare = prepare
        self._thread: ThreadPoolExecutor | None = None
        self._is_free = asyncio.Lock()

    def read(self, body: bytes, *, is_json: bool) -> DecodedRequest:
        """Decodes a request at once.

        Raises:
            Malformed, TooLarge: the request cannot be accepted.
        """
        return self._decoder.decode_json(body) if is_json else self._decoder.decode(body)

    @asynccontextmanager
    async def reading(
        self, body: bytes, *, is_json: bool, encoding: str
    ) -> AsyncIterator[tuple[bytes, DecodedRequest]]:
        """Yields the unpacked body and the decoded request. While the block of a large one runs, other large ones wait.

        Raises:
            Malformed, TooLarge: the request cannot be accepted.
        """
        if len(body) <= _SMALL_COMPRESSED:
            body, encoding = inflated(body, encoding=encoding), IDENTITY
        if len(body) <= (_SMALL_JSON if is_json else _SMALL) and encoding == IDENTITY:
            yield body, self.read(body, is_json=is_json)
            return
        async with self._is_free:
            yield await self._in_thread(self._read_large, body, is_json, encoding)

    @asynccontextmanager
    async def reading_logs(self, body: bytes, *, is_json: bool, encoding: str) -> AsyncIterator[DecodedLogs]:
        """Yields a decoded request with log records. While the block of a large one runs, other large ones wait.

        Raises:
            Malformed, TooLarge: the request cannot be accepted.
        """
        if len(body) <= _SMALL_COMPRESSED:
            body, encoding = inflated(body, encoding=encoding), IDENTITY
        if len(body) <= _SMALL_JSON and encoding == IDENTITY:
            yield decode_logs(body, self._limits, is_json=is_json)
            return
        async with self._is_free:
            yield await self._in_thread(self._read_large_logs, body, is_json, encoding)

    async def _in_thread(self, read: Callable[[bytes, bool, str], _T], body: bytes, is_json: bool, encoding: str) -> _T:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "esper-otel-decode")
        return await asyncio.get_running_loop().run_in_executor(self._thread, read, body, is_json, encoding)

    def _read_large_logs(self, body: bytes, is_json: bool, encoding: str) -> DecodedLogs:
        try:
            return decode_logs(inflated(body, encoding=encoding), self._limits, is_json=is_json)
        except (Malformed, TooLarge) as error:
            body = b""  # as below
            raise error.with_traceback(None) from None

    def _read_large(self, body: bytes, is_json: bool, encoding: str) -> tuple[bytes, DecodedRequest]:
        try:
            body = inflated(body, encoding=encoding)
            decoded = self._other.decode_json(body) if is_json else self._other.decode(body)
            for block in decoded.blocks:
                self._prepare(block)
        except (Malformed, TooLarge) as error:
            body = b""  # drop the unpacked bytes: a traceback that is kept would keep them alive
            raise error.with_traceback(None) from None
        return body, decoded

    def close(self) -> None:
        """Stops the thread without waiting for a request that is still being decoded."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
