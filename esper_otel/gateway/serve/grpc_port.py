"""The methods of the gRPC port, and their limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from esper_otel.gateway.core import Answer, Core
from esper_otel.gateway.faults import Busy, fault_of
from esper_otel.gateway.pages import Bounds
from esper_otel.gateway.pull_core import PullCore
from esper_otel.gateway.receive.inflate import ENCODINGS, check_encoding, encoding_of, inflated
from esper_otel.gateway.receive.request import Malformed
from esper_otel.gateway.security import Grant, Tokens
from esper_otel.gateway.serve.connections import Guard
from esper_otel.gateway.serve.in_flight import Room, RoomShare, Turns
from esper_otel.gateway.serve.otlp_answers import logs_answer, metrics_answer
from esper_otel.gateway.turns import at_half_speed
from esper_otel.log import Warnings
from esper_otel.pull.messages import (
    SERVICE,
    EventsRequest,
    EventsResponse,
    HoursRequest,
    PullRequest,
    PullResponse,
    RanksRequest,
    RunsRequest,
    RunsResponse,
)

OTLP_SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"
LOGS_SERVICE = "opentelemetry.proto.collector.logs.v1.LogsService"

_PLACES = 4  # requests read at the same time; each may have MAX_REQUEST_BYTES
_MOST_WAITING = 500
_PATIENCE_S = 0.5
_SLOWEST_S = 60.0
_PAUSE_S = 0.002
_MOST_PULLS = 1_000
_MOST_WATCHES = 200

_END: Any = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs lack it

_Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")


class Rpc:
    """The methods of the gRPC port.

    gRPC reads a message only when a method asks for it. So tokens are checked before the message is read, and only a
    few requests are read at a time. Threads: that of the event loop.

    Args:
        core: processes the requests.
        send_tokens: tokens of senders; None allows everyone to send.
        pull_tokens: tokens of pullers; None allows everyone to pull.
        guard: closes connections.
        answers: limits the answers that clients have not read yet.
        warnings: where faults are reported.
    """

    def __init__(
        self,
        core: PullCore,
        send_tokens: Tokens | None,
        pull_tokens: Tokens | None,
        guard: Guard,
        answers: Room,
        warnings: Warnings,
    ) -> None:
        self._core = core
        self._send_tokens = send_tokens
        self._pull_tokens = pull_tokens
        self._guard = guard
        self._answers = answers
        self._warnings = warnings
        self._turns = Turns(_PLACES, _MOST_WAITING, patience_s=_PATIENCE_S, slowest_s=_SLOWEST_S)
        # For the methods that need no token.
        self._strangers = Turns(2, _MOST_WATCHES, patience_s=_PATIENCE_S, slowest_s=_SLOWEST_S)
        self._steps = Turns(1, _MOST_PULLS, patience_s=_SLOWEST_S, slowest_s=_SLOWEST_S, pause_s=_PAUSE_S)
        # What is made as a whole, for one puller after the other.
        self._views = Turns(1, _MOST_PULLS, patience_s=_SLOWEST_S, slowest_s=_SLOWEST_S, pause_s=_PAUSE_S)
        self._polls = Room(_MOST_PULLS, "too many pulls")
        self._watches = Room(_MOST_WATCHES, "too many watches")
        self.health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined] # the stubs lack it

    def handlers(self, receiver: Core | None) -> dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]:
        """Returns the methods by service.

        Args:
            receiver: accepts OTLP; None if the port does not.
        """

        def unary(method: Callable[[Any, _Context], Awaitable[Any]], *coding: Any) -> Any:
            # On the wire this is the same as unary_unary.
            return grpc.stream_unary_rpc_method_handler(partial(self._followed, method), *coding)

        stream = grpc.stream_stream_rpc_method_handler
        found = {
            SERVICE: {
                "Runs": unary(partial(self._view, RunsRequest, self._runs)),
                "Pull": unary(partial(self._poll, PullRequest, self._steps, self._pull, PullResponse)),
                "Ranks": unary(partial(self._view, RanksRequest, self._core.ranks)),
                "Hours": unary(partial(self._view, HoursRequest, self._core.hours)),
                "Events": unary(partial(self._poll, EventsRequest, self._views, self._events, EventsResponse)),
            }
        }
        if receiver is not None:
            found[OTLP_SERVICE] = {"Export": unary(partial(self._export, receiver.take, metrics_answer))}
            found[LOGS_SERVICE] = {"Export": unary(partial(self._export, receiver.take_logs, logs_answer))}
        services = (*found, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._reflection = reflection.aio.ReflectionServicer(services)  # type: ignore[attr-defined] # as for health
        bytes_of = reflection_pb2.ServerReflectionResponse.SerializeToString
        found[health.SERVICE_NAME] = {
            "Check": unary(self._check, None, health_pb2.HealthCheckResponse.SerializeToString),
            "Watch": stream(self._watch, None, health_pb2.HealthCheckResponse.SerializeToString),
        }
        found[reflection.SERVICE_NAME] = {"ServerReflectionInfo": stream(self._reflect, None, bytes_of)}
        return found

    async def _followed(
        self, method: Callable[[Any, _Context], Awaitable[Any]], requests: Any, context: _Context
    ) -> Any:
        try:
            return await method(requests, context)
        except asyncio.CancelledError:
            self._guard.note_taken_back(context.peer())
            raise

    # -- OTLP --------------------------------------------------------------------------------------------

    async def _export(
        self, take: Callable[..., Awaitable[Answer]], said: Callable[[Answer], Message], _: Any, context: _Context
    ) -> bytes:
        try:
            grant, owner = self._granted(self._send_tokens, context)
            async with self._turns.turn(owner):
                body = await self._body(context, self._turns)
                encoding = encoding_of(body)
                check_encoding(encoding)
                answer = await take(body, encoding=encoding, grant=grant)
        except Exception as error:  # noqa: BLE001 - any error is reported to the sender as OTLP specifies
            await self._abort(error, context, is_sender=True)
        return said(answer).SerializeToString()

    # -- pulling -----------------------------------------------------------------------------------------

    async def _view(
        self, kind: type[Any], make: Callable[[Any, Grant | None], Awaitable[Message]], _: Any, context: _Context
    ) -> bytes:
        """Answers with a message that is made as a whole."""

        async def answered(grant: Grant | None, answer: RoomShare) -> bytes:
            request = await self._message(kind.FromString, context, answer.owner, self._turns)
            async with self._views.turn(answer.owner):
                return (await make(request, grant)).SerializeToString()

        return await self._pulled(context, answered)

    async def _runs(self, request: RunsRequest, grant: Grant | None) -> RunsResponse:
        return await at_half_speed(self._core.listing(grant, request.run_id))

    async def _poll(
        self,
        kind: type[Any],
        turns: Turns,
        make: Callable[[Any, Grant | None, Bounds], Awaitable[bytes]],
        nothing: type[PullResponse | EventsResponse],
        _: Any,
        context: _Context,
    ) -> bytes:
        """Answers with steps or events; the request may wait for them."""

        async def answered(grant: Grant | None, answer: RoomShare) -> bytes:
            request = await self._message(kind.FromString, context, answer.owner, self._turns)
            limit = asyncio.timeout(None)
            bounds = Bounds(partial(turns.turn, answer.owner), answer.has_room)
            with self._polls.hold(answer.owner, 1, partial(_end, limit)):
                try:
                    async with limit:
                        return await make(request, grant, bounds)
                except TimeoutError:  # ended early to admit another owner's request; nothing has arrived for it yet
                    return nothing(cursor=request.cursor).SerializeToString()

        return await self._pulled(context, answered)

    async def _pull(self, request: PullRequest, grant: Grant | None, bounds: Bounds) -> bytes:
        return (await self._core.pulled(request, grant, bounds)).body

    async def _events(self, request: EventsRequest, grant: Grant | None, bounds: Bounds) -> bytes:
        return (await self._core.events(request, grant, bounds)).SerializeToString()

    async def _pulled(
        self, context: _Context, answered: Callable[[Grant | None, RoomShare], Awaitable[bytes]]
    ) -> bytes:
        """Makes an answer, which counts against the limit of unread answers until the client has read it."""
        try:
            grant, owner = self._granted(self._pull_tokens, context)
            with ExitStack() as entered:
                answer = entered.enter_context(self._answers.hold(owner, 0, lambda: None))
                body = await answered(grant, answer)
                answer.resize(len(body))
                # An unread answer is ended by closing its connection, since gRPC keeps an answer it has begun to send.
                answer.since_s = time.monotonic()
                answer.give_way = partial(self._guard.cut, context.peer())
                entered.callback(asyncio.get_running_loop().call_later(_SLOWEST_S, answer.take_back).cancel)
                over = entered.pop_all()
            context.add_done_callback(lambda _: over.close())  # type: ignore[arg-type] # the stubs know another one
        except Exception as error:  # noqa: BLE001 - any error is reported to the puller
            await self._abort(error, context)
        return body

    # -- health and reflection ---------------------------------------------------------------------------

    async def _check(self, _: Any, context: _Context) -> Any:
        try:
            request = await self._message(
                health_pb2.HealthCheckRequest.FromString, context, context.peer(), self._strangers
            )
        except Exception as error:  # noqa: BLE001 - the caller gets the error
            await self._abort(error, context)
        return await self.health.Check(request, context)

    async def _watch(self, _: Any, context: _Context) -> None:
        owner = context.peer()
        limit = asyncio.timeout(None)
        try:
            request = await self._message(health_pb2.HealthCheckRequest.FromString, context, owner, self._strangers)
            with self._watches.hold(owner, 1, partial(_end, limit)):
                async with limit:
                    await self.health.Watch(request, context)
        except TimeoutError:
            await self._abort(Busy("too many watches at once"), context)
        except Exception as error:  # noqa: BLE001 - the caller gets the error
            await self._abort(error, context)

    async def _reflect(self, _: Any, context: _Context) -> AsyncIterator[Any]:
        owner = context.peer()
        limit = asyncio.timeout(_SLOWEST_S)

        async def requests() -> AsyncIterator[Any]:
            while True:
                async with self._strangers.turn(owner):
                    body = await self._read(context, self._strangers)
                if body is None:
                    return
                yield reflection_pb2.ServerReflectionRequest.FromString(body)

        try:
            with self._watches.hold(owner, 1, partial(_end, limit)):
                async with limit:
                    async for response in self._reflection.ServerReflectionInfo(requests(), context):
                        yield response
        except TimeoutError:
            await self._abort(Busy("too many watches at once, or the call took more than a minute"), context)
        except Exception as error:  # noqa: BLE001 - the caller gets the error
            await self._abort(error, context)

    # -- common to all methods ---------------------------------------------------------------------------

    def _granted(self, tokens: Tokens | None, context: _Context) -> tuple[Grant | None, str]:
        """Returns what the peer may do, and whose share it uses: its tenant's, or its connection's without tokens."""
        peer = context.peer()
        grant = None
        if tokens is not None:
            given = dict(context.invocation_metadata() or ()).get("authorization")
            grant = tokens.grant(given.decode(errors="surrogateescape") if isinstance(given, bytes) else given)
        self._guard.note(peer)
        return grant, peer if grant is None else grant.tenant

    async def _message(self, parse: Callable[[bytes], _T], context: _Context, owner: str, turns: Turns) -> _T:
        async with turns.turn(owner):
            body = await self._body(context, turns)
        try:
            encoding = encoding_of(body)
            return parse(inflated(body, encoding=encoding) if encoding in ENCODINGS else body)
        except DecodeError as error:
            raise Malformed(f"not a valid request: {error}") from None

    async def _body(self, context: _Context, turns: Turns) -> bytes:
        body = await self._read(context, turns)
        if body is None:
            raise Malformed("the call has no message")
        return body

    async def _read(self, context: _Context, turns: Turns) -> bytes | None:
        """Reads the next message of a call, within a turn; None at the end."""
        async with turns.slow():
            body: Any = await context.read()
        return None if body is _END else body

    async def _abort(self, error: Exception, context: _Context, *, is_sender: bool = False) -> NoReturn:
        fault = fault_of(error, self._warnings)
        if is_sender:
            self._core.note_fault(fault)
        details = (("grpc-status-details-bin", fault.body().SerializeToString()),)
        await context.abort(fault.code, fault.message, details)
        raise AssertionError  # abort has raised


def _end(limit: asyncio.Timeout) -> None:
    limit.reschedule(asyncio.get_running_loop().time())
