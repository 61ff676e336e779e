"""TamiyoClient for asyncio: the same methods as in ``client``, as coroutines. Public as ``esper_otel.aio``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from esper_otel.hours.bar import RunHours
from esper_otel.leyline.packets import Page
from esper_otel.pull.client import (
    RETRY_S,
    RunInfo,
    Target,
    may_retry,
    method,
    page_of,
    pull_request,
    raise_translated,
    run_infos,
    run_outcome,
)
from esper_otel.pull.messages import (
    HoursRequest,
    HoursResponse,
    PullResponse,
    RanksRequest,
    RanksResponse,
    RunsRequest,
    RunsResponse,
)
from esper_otel.pull.views import RunRanks, run_hours, run_ranks

__all__ = ["RunInfo", "TamiyoClient"]


class TamiyoClient:
    """Pulls packets from a gateway: ``await TamiyoClient("127.0.0.1:4327").pull("digits-7")``.

    Arguments and errors are those of ``esper_otel.TamiyoClient``. Create it in the event loop in which it is used.
    """

    def __init__(
        self,
        target: str,
        *,
        token_file: Path | str | None = None,
        ca_file: Path | str | None = None,
        certificate_file: Path | str | None = None,
        key_file: Path | str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._target = Target.of(target, token_file, ca_file, certificate_file, key_file, timeout_s)
        address, credentials, options = self._target.address, self._target.credentials, self._target.options
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._runs = self._channel.unary_unary(*method("Runs"), RunsResponse.FromString)
        self._pull = self._channel.unary_unary(*method("Pull"), PullResponse.FromString)
        self._ranks = self._channel.unary_unary(*method("Ranks"), RanksResponse.FromString)
        self._hours = self._channel.unary_unary(*method("Hours"), HoursResponse.FromString)

    async def runs(self, run_id: str = "") -> list[RunInfo]:
        """Returns the runs that the gateway knows. See ``esper_otel.TamiyoClient.runs``."""
        return run_infos(await self._call(self._runs, RunsRequest(run_id=run_id), 0.0))

    async def pull(
        self,
        run_id: str,
        cursor: str | None = None,
        *,
        rank: int | None = None,
        max_packets: int = 64,
        wait_s: float = 0.0,
    ) -> Page:
        """Returns the steps after a cursor, oldest first. See ``esper_otel.TamiyoClient.pull``."""
        request = pull_request(run_id, cursor, rank, max_packets, wait_s)
        return page_of(run_id, await self._call(self._pull, request, wait_s))

    async def ranks(self, run_id: str, *, steps: int = 256) -> RunRanks:
        """Compares the ranks of a run. See ``esper_otel.TamiyoClient.ranks``."""
        return run_ranks(await self._call(self._ranks, RanksRequest(run_id=run_id, steps=steps), 0.0))

    async def hours(self, run_id: str) -> RunHours:
        """Returns where the hours of a run went. See ``esper_otel.TamiyoClient.hours``."""
        return run_hours(await self._call(self._hours, HoursRequest(run_id=run_id), 0.0))

    async def ended(self, run_id: str) -> str | None:
        """Returns how the whole run ended. See ``esper_otel.TamiyoClient.ended``."""
        return run_outcome(await self.runs(run_id), run_id)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, call: Callable[..., Any], request: Message, wait_s: float) -> Any:
        deadline_s = time.monotonic() + self._target.timeout_s + wait_s
        while True:
            try:
                return await call(
                    request,
                    timeout=deadline_s - time.monotonic(),
                    metadata=self._target.metadata(),
                    wait_for_ready=True,  # otherwise a channel that failed once may not reconnect while calls come
                )
            except grpc.RpcError as error:
                if not may_retry(error, deadline_s):
                    raise_translated(error, self._target)
            await asyncio.sleep(RETRY_S)
