"""TamiyoClient: pulls the steps of training runs from a gateway. For asyncio, see ``esper_otel.aio``."""

from __future__ import annotations

import threading
import time
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
from esper_otel.pull.messages import (
    EventsRequest,
    HoursRequest,
    PullRequest,
    RanksRequest,
    RunsRequest,
)
from esper_otel.pull.several import EVENTS, STEPS, Answer, Ask, Kind, NoAnswer, SeveralGateways, merged_runs
from esper_otel.pull.views import RunRanks, merged_hours, run_ranks


class TamiyoClient:
    """Pulls packets from a gateway: ``TamiyoClient("127.0.0.1:4327").pull("digits-7")``.

    If the gateway is unavailable, a call is retried until ``timeout_s`` has passed. The client is thread-safe.

    With several gateways, ``TamiyoClient("a:4327,b:4327")``, a run is found on those that have its steps, and each step
    is returned once. Steps at a gateway that does not answer count in ``gap``, and are returned when it answers again.

    Args:
        target: host:port, or https://host:port; several with commas between them.
        token_file: file with the bearer token; it is read at each call, so that the token can be replaced.
        ca_file: PEM file of the authority that signed the gateway's certificate; enables TLS.
        certificate_file: the client's own certificate, for mutual TLS.
        key_file: key of the client's certificate.
        timeout_s: how long a call may take, in addition to the ``wait_s`` of ``pull``.

    Raises:
        ConfigurationError: arguments contradict each other, or a file cannot be read.
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
        self._gateways = {each.address: _GatewayChannel(each) for each in targets}
        self._timeout_s = timeout_s
        self._several = SeveralGateways(tuple(self._gateways), timeout_s) if len(targets) > 1 else None

    def runs(self, run_id: str = "") -> list[RunInfo]:
        """Returns the runs that the gateway knows, one entry per writer.

        Args:
            run_id: return this run only, even if ``esper-otel check`` sent it; empty returns all but those.

        Raises:
            GatewayError: the gateway refused, or did not answer in time.
        """
        return merged_runs(map(run_infos, self._of_all("Runs", RunsRequest(run_id=run_id))))

    def pull(
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
        """Returns the steps after a cursor, oldest first.

        Args:
            run_id: the run.
            cursor: ``Page.cursor`` of an earlier pull with the same rank and shard; None begins with the oldest step
                stored.
            rank: return only this rank's steps; None returns those of all ranks, in order of release.
            shard: ``(i, n)`` returns part ``i`` of ``n``, from 0 on, for controllers that share a large run. Each rank
                is in one part. Only servers of a tier on Kafka have parts.
            max_packets: the maximum number of steps to return, up to 1000.
            wait_s: seconds to wait if there is no step yet, up to 60.
            values: return what the packets have no place for, too: ``Packets.values``. Gateways of an older version
                have none.

        Raises:
            UnknownRun: no step of the run is stored, even after the wait.
            StaleCursor: the cursor belongs to an earlier store of this run that no longer exists.
            GatewayUnavailable: the gateway did not answer in time.
            GatewayError: the gateway refused for another reason.
        """
        request = pull_request(run_id, cursor, rank, max_packets, wait_s, shard, values=values)
        return self._pulled(request, STEPS, max_packets)  # type: ignore[no-any-return]

    def events(
        self,
        run_id: str,
        cursor: str | None = None,
        *,
        rank: int | None = None,
        max_events: int = 64,
        wait_s: float = 0.0,
    ) -> EventPage:
        """Returns the events of a run after a cursor, in the order in which they arrived at the gateway.

        Each event is returned once. They have cursors of their own, which are not those of ``pull``.

        Args:
            run_id: the run.
            cursor: ``EventPage.cursor`` of an earlier call with the same rank; None begins with the first event stored.
            rank: return only this rank's events; None returns those of all ranks.
            max_events: the maximum number of events to return, up to 1000.
            wait_s: seconds to wait if there is no event yet, up to 60.

        Raises:
            UnknownRun: nothing of the run is stored, even after the wait.
            StaleCursor: the cursor belongs to an earlier store of this run that no longer exists.
            GatewayUnavailable: the gateway did not answer in time.
            GatewayError: the gateway refused for another reason, or has no events, since it is of an earlier version.
        """
        request = events_request(run_id, cursor, rank, max_events, wait_s)
        return self._pulled(request, EVENTS, max_events)  # type: ignore[no-any-return]

    def _pulled(self, request: PullRequest | EventsRequest, what: Kind, most: int) -> Any:
        """Asks the gateway, or several of them until there is a page."""
        if self._several is None:
            [gateway] = self._gateways.values()
            return pulled_of(request.run_id, gateway.call(what.method, request, request.wait_s))
        pulling = pulling_of(self._several, request, what, most)
        ask = next(pulling)
        while True:
            answers = self._answers(what.method, request, ask)
            try:
                ask = pulling.send(answers)
            except StopIteration as end:
                return end.value

    def ranks(self, run_id: str, *, steps: int = 256) -> RunRanks:
        """Compares the ranks of a run over its newest ``steps`` steps, up to 256.

        Raises:
            UnknownRun: the gateway does not know the run's newest steps.
            GatewayError: the gateway refused, or did not answer in time.
        """
        return newest_ranks(map(run_ranks, self._of_all("Ranks", RanksRequest(run_id=run_id, steps=steps))))

    def hours(self, run_id: str) -> RunHours:
        """Returns where the hours of a run went, over all its attempts: which part of its wall time was what.

        Raises:
            UnknownRun: nothing of the run is stored.
            GatewayError: the gateway refused, or did not answer in time.
        """
        request = HoursRequest(run_id=run_id, with_accounts=len(self._gateways) > 1)
        return merged_hours(self._of_all("Hours", request))

    def ended(self, run_id: str) -> str | None:
        """Returns how the whole run ended, over all attempts and ranks; None while a rank may be running.

        The outcome is ``completed`` if all ranks completed. Otherwise it is the first reported outcome that is not
        ``completed``, or ``lost`` if a rank has been silent for a minute without reporting its end and the others have
        completed. An attempt that was followed by a later one does not count. A run that was killed and not restarted
        has no outcome, because nothing distinguishes it from a silent run. If a run that has ended is started again,
        the result is None again.

        Raises:
            GatewayError: the gateway refused, or did not answer in time.
        """
        return run_outcome(self.runs(run_id), run_id)

    def close(self) -> None:
        """Closes the connections."""
        for gateway in self._gateways.values():
            gateway.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _of_all(self, name: str, request: Message) -> list[Any]:
        """Returns the answers of the gateways that have one.

        Raises:
            GatewayError: none of them has.
        """
        found: list[Any] = []
        errors: list[GatewayError] = []
        for gateway in self._gateways.values():
            try:
                found.append(gateway.call(name, request, 0.0, is_only=len(self._gateways) == 1))
            except (UnknownRun, GatewayUnavailable) as error:
                errors.append(error)
        return found or raise_of(errors)

    def _answers(self, name: str, request: PullRequest | EventsRequest, ask: Ask) -> dict[str, Answer]:
        """Asks several gateways at once; does not wait for all of them if they wait for steps and one has some."""
        time.sleep(ask.pause_s)
        deadline_s = time.monotonic() + ask.timeout_s
        calls, heard = {}, threading.Semaphore(0)
        for address, cursor in ask.cursors.items():
            asked = request_after(request, cursor, ask.wait_s)
            calls[address] = self._gateways[address].begin(name, asked, ask.timeout_s)
            calls[address].add_done_callback(lambda _: heard.release())
        answers: dict[str, Answer] = {}
        while len(answers) < len(calls) and heard.acquire(timeout=max(deadline_s - time.monotonic(), 0.0)):
            for address, call in calls.items():
                if address not in answers and call.done():
                    answers[address] = self._gateways[address].answer(request.run_id, call)
            if ask.wait_s and any(map(has_some, answers.values())):
                break
        for address, call in calls.items():
            if address not in answers:
                call.cancel()
                if not ask.wait_s:
                    answers[address] = NoAnswer(f"gateway {address}: no answer within {ask.timeout_s:g} s")
        return answers


class _GatewayChannel:
    """The connection to one gateway."""

    def __init__(self, target: GatewayAddress) -> None:
        self._target = target
        self.channel = (
            grpc.insecure_channel(target.address, target.options)
            if target.credentials is None
            else grpc.secure_channel(target.address, target.credentials, target.options)
        )
        self._calls = {name: self.channel.unary_unary(*method(name), kind.FromString) for name, kind in ANSWERS.items()}

    def call(self, name: str, request: Message, wait_s: float, *, is_only: bool = True) -> Any:
        """Calls a method; if the gateway is unavailable and there is no other, retries until the time is over."""
        deadline_s = time.monotonic() + self._target.timeout_s + wait_s
        while True:
            try:
                return self._calls[name](
                    request,
                    timeout=deadline_s - time.monotonic(),
                    metadata=self._target.metadata(),
                    wait_for_ready=is_only,  # otherwise a channel that failed once may not reconnect while calls come
                )
            except grpc.RpcError as error:
                if not (is_only and may_retry(error, deadline_s)):
                    raise_translated(error, self._target)
            time.sleep(RETRY_S)

    def begin(self, name: str, request: Message, timeout_s: float) -> Any:
        """Begins a pull of steps or events, and returns it as a future."""
        return self._calls[name].future(request, timeout=timeout_s, metadata=self._target.metadata())

    def answer(self, run_id: str, call: Any) -> Answer:
        """Returns the outcome of a pull that is done."""
        try:
            return pulled_of(run_id, call.result())
        except grpc.RpcError as error:
            return translated(error, self._target)
        except GatewayError as error:
            return error
        except grpc.FutureCancelledError:
            return GatewayUnavailable(f"gateway {self._target.address}: the call was cancelled")
