"""Calls of a gateway's methods: requests made of arguments, results and errors made of answers; for both clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from esper_otel.errors import ConfigurationError, GatewayError, GatewayUnavailable, StaleCursor, UnknownRun
from esper_otel.leyline import messages
from esper_otel.leyline.packets import Packets, Page
from esper_otel.pull.event_infos import event_page
from esper_otel.pull.gateway_address import GatewayAddress
from esper_otel.pull.messages import (
    SERVICE,
    EventsRequest,
    EventsResponse,
    HoursResponse,
    PullRequest,
    PullResponse,
    RanksResponse,
    RunsResponse,
)
from esper_otel.pull.several import Answer, Ask, Kind, SeveralGateways
from esper_otel.pull.views import RunRanks

RETRY_S = 0.1
_MOST_SHARDS = 1_000
_DEFAULT_PACKETS = 64
ANSWERS: dict[str, Any] = {
    "Runs": RunsResponse,
    "Pull": PullResponse,
    "Ranks": RanksResponse,
    "Hours": HoursResponse,
    "Events": EventsResponse,
}
_ERRORS: dict[grpc.StatusCode, type[GatewayError]] = {
    grpc.StatusCode.NOT_FOUND: UnknownRun,
    grpc.StatusCode.FAILED_PRECONDITION: StaleCursor,
    grpc.StatusCode.UNAVAILABLE: GatewayUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: GatewayUnavailable,
}


def method(name: str) -> tuple[str, Callable[[Any], bytes]]:
    """Returns a method's path and the function that serializes its request."""
    return f"/{SERVICE}/{name}", lambda message: message.SerializeToString()


def may_retry(error: Any, deadline_s: float) -> bool:
    """Returns whether a failed call should be retried before the deadline, given on the monotonic clock."""
    return error.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() + RETRY_S < deadline_s


def has_some(answer: Answer) -> bool:
    """Whether an answer has steps or events."""
    return not isinstance(answer, GatewayError) and len(answer) > 0


def pulled_of(run_id: str, response: PullResponse | EventsResponse) -> Answer:
    """Converts the response to a pull of steps or events.

    Raises:
        GatewayError: the response does not contain Leyline packets.
    """
    return page_of(run_id, response) if isinstance(response, PullResponse) else event_page(response)


def pulling_of(
    several: SeveralGateways, request: PullRequest | EventsRequest, what: Kind, most: int
) -> Generator[Ask, Mapping[str, Answer], Any]:
    """Begins a pull from several gateways. See ``SeveralGateways.pulling``.

    Raises:
        ConfigurationError: it is a pull of a part of a run.
    """
    if isinstance(request, PullRequest) and request.shards:
        raise ConfigurationError("pull: shard= needs one address, that of the servers of a tier on Kafka")
    rank = request.rank if request.HasField("rank") else None
    return several.pulling(request.run_id, request.cursor, rank, most or _DEFAULT_PACKETS, request.wait_s, what)


def request_after(request: PullRequest | EventsRequest, cursor: str, wait_s: float) -> PullRequest | EventsRequest:
    """Returns the same request with another cursor and another time to wait."""
    changed = type(request).FromString(request.SerializeToString())
    changed.cursor, changed.wait_s = cursor, wait_s
    return changed


def newest_ranks(of_gateways: Iterable[RunRanks]) -> RunRanks:
    """Returns the comparison that has the newest step."""
    return max(of_gateways, key=lambda ranks: (ranks.attempt, ranks.last_step))


def raise_of(errors: Sequence[GatewayError]) -> NoReturn:
    """Raises the error of several gateways, none of which has an answer."""
    [error, *others] = sorted(errors, key=lambda each: isinstance(each, UnknownRun))
    raise type(error)("; ".join(map(str, (error, *others)))) from error


def raise_translated(error: Any, target: GatewayAddress) -> NoReturn:
    """Raises the matching error of this package for an error of gRPC."""
    raise translated(error, target) from error


def translated(error: Any, target: GatewayAddress) -> GatewayError:
    """Returns the matching error of this package for an error of gRPC."""
    kind = _ERRORS.get(error.code(), GatewayError)
    reason = f"{error.code().name}: {error.details()}"
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        how = "without TLS" if target.credentials is None else "over TLS"
        reason = f"no gateway answered there, {how}, within {target.timeout_s:g} s"
    return kind(f"gateway {target.address}: {reason}")


def pull_request(
    run_id: str,
    cursor: str | None,
    rank: int | None,
    max_packets: int,
    wait_s: float,
    shard: tuple[int, int] | None = None,
    *,
    values: bool = False,
) -> PullRequest:
    """Makes the request of a pull.

    Raises:
        ConfigurationError: a number is out of range.
    """
    try:
        request = PullRequest(
            run_id=run_id, cursor=cursor or "", max_packets=max_packets, wait_s=wait_s, with_values=values
        )
        if rank is not None:
            request.rank = rank
        if shard is not None:
            request.shard, request.shards = shard
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"pull: {error}") from error
    if shard is not None and (rank is not None or not request.shard < request.shards <= _MOST_SHARDS):
        raise ConfigurationError(f"pull: shard={shard}: give (i, n) with i from 0 to n - 1, n up to 1000, and no rank")
    return request


def events_request(run_id: str, cursor: str | None, rank: int | None, max_events: int, wait_s: float) -> EventsRequest:
    """Makes the request of a pull of events.

    Raises:
        ConfigurationError: a number is out of range.
    """
    try:
        request = EventsRequest(run_id=run_id, cursor=cursor or "", max_events=max_events, wait_s=wait_s)
        if rank is not None:
            request.rank = rank
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"events: {error}") from error
    return request


def page_of(run_id: str, response: PullResponse) -> Page:
    """Converts the response to a pull to packets.

    Raises:
        GatewayError: the response does not contain Leyline packets.
    """
    try:
        return _page_of(run_id, response)
    except DecodeError:
        raise GatewayError(f"the gateway's answer for run {run_id!r} does not contain valid Leyline packets") from None


def _page_of(run_id: str, response: PullResponse) -> Page:
    steps = tuple(
        Packets(
            state=messages.SystemStatePacket.FromString(step.state),
            telemetry=tuple(messages.TelemetryPacket.FromString(packet) for packet in step.telemetry),
            run_id=run_id,
            attempt=step.attempt,
            rank=step.rank,
            step=step.step,
            revision=step.revision,
            complete=step.complete,
            age_s=step.age_s,
            names=frozenset(step.names),
            writer=step.writer,
            number=step.number,
            values=dict(zip(step.value_names, step.values, strict=False)),
        )
        for step in response.steps
    )
    return Page(steps, response.cursor, response.gap)
