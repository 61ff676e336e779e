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

from esper_otel.errors import GatewayError, GatewayUnavailable, UnknownRun
from esper_otel.hours.bar import RunHours
from esper_otel.leyline.packets import Page
from esper_otel.pull.calls import (
    ANSWERS,
    RETRY_S,
    events_request,
    has_some,
    may_retry,
    method,
    newest_ranks,
    pull_request,
    pulled_of,
    pulling_of,
    raise_of,
    raise_translated,
    request_after,
    translated,
)
from esper_otel.pull.event_infos import EventPage
from esper_otel.pull.gateway_address import GatewayAddress, targets_of
from esper_otel.pull.infos import RunInfo, run_infos, run_outcome
from esper_otel.pull.messages import EventsRequest, HoursRequest, PullRequest, RanksRequest, RunsRequest
from esper_otel.pull.several import EVENTS, STEPS, Answer, Ask, Kind, NoAnswer, SeveralGateways, merged_runs
from esper_otel.pull.views import RunRanks, merged_hours, run_ranks

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
        targets = targets_of(target, token_file, ca_file, certificate_file, key_file, timeout_s)
        self._gateways = {each.address: _AsyncGatewayChannel(each) for each in targets}
        self._several = SeveralGateways(tuple(self._gateways), timeout_s) if len(targets) > 1 else None

    async def runs(self, run_id: str = "") -> list[RunInfo]:
        """Returns the runs that the gateway knows. See ``esper_otel.TamiyoClient.runs``."""
        return merged_runs(map(run_infos, await self._of_all("Runs", RunsRequest(run_id=run_id))))

    async def pull(
        self,
        run_id: str,
        cursor: str | None = None,
        *,
        rank: int | None = None,
        shard: tuple[int, int] | None = None,
        max_packets: int = 64,
        wait_s: float = 0.0,
        values: bool = False,
    ) -> Page:
        """Returns the steps after a cursor, oldest first. See ``esper_otel.TamiyoClient.pull``."""
        request = pull_request(run_id, cursor, rank, max_packets, wait_s, shard, values=values)
        return await self._pulled(request, STEPS, max_packets)  # type: ignore[no-any-return]

    async def events(
        self,
        run_id: str,
        cursor: str | None = None,
        *,
        rank: int | None = None,
        max_events: int = 64,
        wait_s: float = 0.0,
    ) -> EventPage:
        """Returns the events of a run after a cursor. See ``esper_otel.TamiyoClient.events``."""
        request = events_request(run_id, cursor, rank, max_events, wait_s)
        return await self._pulled(request, EVENTS, max_events)  # type: ignore[no-any-return]

    async def _pulled(self, request: PullRequest | EventsRequest, what: Kind, most: int) -> Any:
        """Asks the gateway, or several of them until there is a page."""
        if self._several is None:
            [gateway] = self._gateways.values()
            return pulled_of(request.run_id, await gateway.call(what.method, request, request.wait_s))
        pulling = pulling_of(self._several, request, what, most)
        ask = next(pulling)
        while True:
            answers = await self._answers(what.method, request, ask)
            try:
                ask = pulling.send(answers)
            except StopIteration as end:
                return end.value

    async def ranks(self, run_id: str, *, steps: int = 256) -> RunRanks:
        """Compares the ranks of a run. See ``esper_otel.TamiyoClient.ranks``."""
        return newest_ranks(map(run_ranks, await self._of_all("Ranks", RanksRequest(run_id=run_id, steps=steps))))

    async def hours(self, run_id: str) -> RunHours:
        """Returns where the hours of a run went. See ``esper_otel.TamiyoClient.hours``."""
        request = HoursRequest(run_id=run_id, with_accounts=len(self._gateways) > 1)
        return merged_hours(await self._of_all("Hours", request))

    async def ended(self, run_id: str) -> str | None:
        """Returns how the whole run ended. See ``esper_otel.TamiyoClient.ended``."""
        return run_outcome(await self.runs(run_id), run_id)

    async def close(self) -> None:
        """Closes the connections."""
        for gateway in self._gateways.values():
            await gateway.channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _of_all(self, name: str, request: Message) -> list[Any]:
        """Returns the answers of the gateways that have one.

        Raises:
            GatewayError: none of them has.
        """
        is_only = len(self._gateways) == 1
        found: list[Any] = []
        errors: list[GatewayError] = []
        calls = [gateway.call(name, request, 0.0, is_only=is_only) for gateway in self._gateways.values()]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, (UnknownRun, GatewayUnavailable)):
                errors.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        return found or raise_of(errors)

    async def _answers(self, name: str, request: PullRequest | EventsRequest, ask: Ask) -> dict[str, Answer]:
        """Asks several gateways at once; does not wait for all of them if they wait for steps and one has some."""
        await asyncio.sleep(ask.pause_s)
        deadline_s = time.monotonic() + ask.timeout_s
        calls: dict[asyncio.Future[Answer], str] = {}
        for address, cursor in ask.cursors.items():
            pull = self._gateways[address].pull(name, request_after(request, cursor, ask.wait_s), ask.timeout_s)
            calls[asyncio.ensure_future(pull)] = address
        answers: dict[str, Answer] = {}
        open_calls = set(calls)
        try:
            while open_calls and (left_s := deadline_s - time.monotonic()) > 0:
                done, open_calls = await asyncio.wait(open_calls, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                answers |= {calls[call]: call.result() for call in done}
                if ask.wait_s and any(map(has_some, answers.values())):
                    break
        finally:
            for call in open_calls:
                call.cancel()
            await asyncio.gather(*open_calls, return_exceptions=True)
        if not ask.wait_s:
            for address in (calls[call] for call in open_calls):
                answers[address] = NoAnswer(f"gateway {address}: no answer within {ask.timeout_s:g} s")
        return answers


class _AsyncGatewayChannel:
    """The connection to one gateway."""

    def __init__(self, target: GatewayAddress) -> None:
        self._target = target
        self.channel = (
            grpc.aio.insecure_channel(target.address, target.options)
            if target.credentials is None
            else grpc.aio.secure_channel(target.address, target.credentials, target.options)
        )
        self._calls: dict[str, Callable[..., Any]] = {
            name: self.channel.unary_unary(*method(name), kind.FromString) for name, kind in ANSWERS.items()
        }

    async def call(self, name: str, request: Message, wait_s: float, *, is_only: bool = True) -> Any:
        """Calls a method; if the gateway is unavailable and there is no other, retries until the time is over."""
        deadline_s = time.monotonic() + self._target.timeout_s + wait_s
        while True:
            try:
                return await self._calls[name](
                    request,
                    timeout=deadline_s - time.monotonic(),
                    metadata=self._target.metadata(),
                    wait_for_ready=is_only,  # otherwise a channel that failed once may not reconnect while calls come
                )
            except grpc.RpcError as error:
                if not (is_only and may_retry(error, deadline_s)):
                    raise_translated(error, self._target)
            await asyncio.sleep(RETRY_S)

    async def pull(self, name: str, request: PullRequest | EventsRequest, timeout_s: float) -> Answer:
        """Pulls steps or events once; an error is an answer, too."""
        try:
            response = await self._calls[name](request, timeout=timeout_s, metadata=self._target.metadata())
            return pulled_of(request.run_id, response)
        except grpc.RpcError as error:
            return translated(error, self._target)
        except GatewayError as error:
            return error
