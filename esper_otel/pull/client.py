"""TamiyoClient: pulls the steps of training runs from a gateway. For asyncio, see ``esper_otel.aio``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import grpc
from google.protobuf.message import DecodeError, Message

from esper_otel.addresses import is_on_this_machine
from esper_otel.bearer import read_tokens, reason_of
from esper_otel.errors import ConfigurationError, GatewayError, GatewayUnavailable, StaleCursor, UnknownRun
from esper_otel.hours.bar import RunHours
from esper_otel.leyline import messages
from esper_otel.leyline.packets import Packets, Page
from esper_otel.log import Warnings
from esper_otel.pull.messages import (
    SERVICE,
    HoursRequest,
    HoursResponse,
    PullRequest,
    PullResponse,
    RanksRequest,
    RanksResponse,
    Run,
    RunsRequest,
    RunsResponse,
)
from esper_otel.pull.views import RunRanks, run_hours, run_ranks

RETRY_S = 0.1
_WARNINGS = Warnings()
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),  # a page has up to about 16 MiB, or a single larger step
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_ERRORS: dict[grpc.StatusCode, type[GatewayError]] = {
    grpc.StatusCode.NOT_FOUND: UnknownRun,
    grpc.StatusCode.FAILED_PRECONDITION: StaleCursor,
    grpc.StatusCode.UNAVAILABLE: GatewayUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: GatewayUnavailable,
}


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One writer of a run: a process of one attempt, as the gateway knows it.

    Attributes:
        run_id: the run's name.
        attempt: number of this start of the run.
        rank: rank of the process within the run.
        writer: tells two live processes of the same (run, attempt, rank) apart; empty for the first one.
        world_size: number of processes of the run; 0 if the writer has sent nothing since the gateway was started.
        experiment: name of the experiment.
        first_step: the first step released; None before the first release.
        last_step: the newest step released; None before the first release.
        last_time_unix_ns: time of the newest step.
        last_received_unix_ns: when something last arrived from this writer.
        ended: ``completed``, an exception's type, or a signal's name; None while it runs or is silent.
        resumed: whether an earlier attempt of its rank is known, or one of another rank that was over when it began.
        writers: number of live processes that claim this (run, attempt, rank).
        missing: steps that have not arrived although earlier and later ones have.
        incomplete: steps released without some of their points.
        stored: steps that can be pulled.
        differing: points that arrived twice with different values.
        too_late: steps that were repeated, or arrived after their place had been forgotten.
        unseen: steps before the first one that arrived: late, lost, or sent to another gateway.
        run_ended: how the whole run ended; see ``TamiyoClient.ended``.
        host: name of its host; empty if it is not known.
        revision: revision of its code; empty if it is not known.
        settings: its settings that differ from the defaults, as text; empty if there are none or they are not known.
    """

    run_id: str
    attempt: int
    rank: int
    writer: str
    world_size: int
    experiment: str
    first_step: int | None
    last_step: int | None
    last_time_unix_ns: int
    last_received_unix_ns: int
    ended: str | None
    resumed: bool
    writers: int
    missing: int
    incomplete: int
    stored: int
    differing: int
    too_late: int
    unseen: int
    run_ended: str | None
    host: str = ""
    revision: str = ""
    settings: str = ""


class Target(NamedTuple):
    """The address and credentials of a gateway, shared by both clients."""

    address: str
    credentials: grpc.ChannelCredentials | None
    token_file: Path | None
    timeout_s: float

    @classmethod
    def of(
        cls,
        target: str,
        token_file: Path | str | None,
        ca_file: Path | str | None,
        certificate_file: Path | str | None,
        key_file: Path | str | None,
        timeout_s: float,
    ) -> Target:
        """Checks a client's arguments and makes a target from them.

        Raises:
            ConfigurationError: the arguments cannot be used.
        """
        scheme, has_scheme, address = target.rpartition("://")
        if scheme not in {"", "http", "https"} or not address:
            raise ConfigurationError(f"target {target!r}: give host:port, or https://host:port for TLS")
        if (certificate_file is None) != (key_file is None):
            raise ConfigurationError("certificate_file and key_file: a client's certificate needs both files")
        is_secure = scheme == "https" or (not has_scheme and (ca_file is not None or certificate_file is not None))
        if not is_secure and (ca_file is not None or certificate_file is not None):
            raise ConfigurationError(f"target {target!r} does not use TLS, but a certificate is given: use https://")
        token = None if token_file is None else Path(token_file)
        try:
            credentials = (
                grpc.ssl_channel_credentials(_content(ca_file), _content(key_file), _content(certificate_file))
                if is_secure
                else None
            )
            if token is not None:
                read_tokens(token)
        except OSError as error:
            raise ConfigurationError(f"client of {target}: {error}") from error
        except ValueError as error:
            raise ConfigurationError(f"client of {target}: token file {token}: {error}") from error
        if token is not None and not is_secure and not is_on_this_machine(address):
            message = "the token of %s goes to %s over plain text, readable on the way: give https://"
            _WARNINGS.say(address, message, token, address)
        return cls(address, credentials, token, timeout_s)

    @property
    def options(self) -> Sequence[tuple[str, Any]]:
        """Options of the gRPC channel."""
        return _OPTIONS

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call: the token that is in its file now."""
        if self.token_file is None:
            return ()
        try:
            return (("authorization", f"Bearer {read_tokens(self.token_file)[0].text}"),)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"token file {self.token_file}: {reason_of(error)}") from error


def _content(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


class TamiyoClient:
    """Pulls packets from a gateway: ``TamiyoClient("127.0.0.1:4327").pull("digits-7")``.

    If the gateway is unavailable, a call is retried until ``timeout_s`` has passed. The client is thread-safe.

    Args:
        target: host:port, or https://host:port.
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
        self._target = Target.of(target, token_file, ca_file, certificate_file, key_file, timeout_s)
        address, credentials, options = self._target.address, self._target.credentials, self._target.options
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._runs = self._channel.unary_unary(*method("Runs"), RunsResponse.FromString)
        self._pull = self._channel.unary_unary(*method("Pull"), PullResponse.FromString)
        self._ranks = self._channel.unary_unary(*method("Ranks"), RanksResponse.FromString)
        self._hours = self._channel.unary_unary(*method("Hours"), HoursResponse.FromString)

    def runs(self, run_id: str = "") -> list[RunInfo]:
        """Returns the runs that the gateway knows, one entry per writer.

        Args:
            run_id: return this run only, even if ``esper-otel check`` sent it; empty returns all but those.

        Raises:
            GatewayError: the gateway refused, or did not answer in time.
        """
        return run_infos(self._call(self._runs, RunsRequest(run_id=run_id), 0.0))

    def pull(
        self,
        run_id: str,
        cursor: str | None = None,
        *,
        rank: int | None = None,
        max_packets: int = 64,
        wait_s: float = 0.0,
    ) -> Page:
        """Returns the steps after a cursor, oldest first.

        Args:
            run_id: the run.
            cursor: ``Page.cursor`` of an earlier pull with the same rank; None begins with the oldest step stored.
            rank: return only this rank's steps; None returns those of all ranks, in order of release.
            max_packets: the maximum number of steps to return, up to 1000.
            wait_s: seconds to wait if there is no step yet, up to 60.

        Raises:
            UnknownRun: no step of the run is stored, even after the wait.
            StaleCursor: the cursor belongs to an earlier store of this run that no longer exists.
            GatewayUnavailable: the gateway did not answer in time.
            GatewayError: the gateway refused for another reason.
        """
        request = pull_request(run_id, cursor, rank, max_packets, wait_s)
        return page_of(run_id, self._call(self._pull, request, wait_s))

    def ranks(self, run_id: str, *, steps: int = 256) -> RunRanks:
        """Compares the ranks of a run over its newest ``steps`` steps, up to 256.

        Raises:
            UnknownRun: the gateway does not know the run's newest steps.
            GatewayError: the gateway refused, or did not answer in time.
        """
        return run_ranks(self._call(self._ranks, RanksRequest(run_id=run_id, steps=steps), 0.0))

    def hours(self, run_id: str) -> RunHours:
        """Returns where the hours of a run went, over all its attempts: which part of its wall time was what.

        Raises:
            UnknownRun: nothing of the run is stored.
            GatewayError: the gateway refused, or did not answer in time.
        """
        return run_hours(self._call(self._hours, HoursRequest(run_id=run_id), 0.0))

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
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: Callable[..., Any], request: Message, wait_s: float) -> Any:
        deadline_s = time.monotonic() + self._target.timeout_s + wait_s
        while True:
            try:
                return call(
                    request,
                    timeout=deadline_s - time.monotonic(),
                    metadata=self._target.metadata(),
                    wait_for_ready=True,  # otherwise a channel that failed once may not reconnect while calls come
                )
            except grpc.RpcError as error:
                if not may_retry(error, deadline_s):
                    raise_translated(error, self._target)
            time.sleep(RETRY_S)


def method(name: str) -> tuple[str, Callable[[Any], bytes]]:
    """Returns a method's path and the function that serializes its request."""
    return f"/{SERVICE}/{name}", lambda message: message.SerializeToString()


def may_retry(error: Any, deadline_s: float) -> bool:
    """Returns whether a failed call should be retried before the deadline, given on the monotonic clock."""
    return error.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() + RETRY_S < deadline_s


def raise_translated(error: Any, target: Target) -> NoReturn:
    """Raises the matching error of this package for an error of gRPC."""
    kind = _ERRORS.get(error.code(), GatewayError)
    reason = f"{error.code().name}: {error.details()}"
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        how = "without TLS" if target.credentials is None else "over TLS"
        reason = f"no gateway answered there, {how}, within {target.timeout_s:g} s"
    raise kind(f"gateway {target.address}: {reason}") from error


def pull_request(run_id: str, cursor: str | None, rank: int | None, max_packets: int, wait_s: float) -> PullRequest:
    """Makes the request of a pull.

    Raises:
        ConfigurationError: a number is out of range.
    """
    try:
        request = PullRequest(run_id=run_id, cursor=cursor or "", max_packets=max_packets, wait_s=wait_s)
        if rank is not None:
            request.rank = rank
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"pull: {error}") from error
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
        )
        for step in response.steps
    )
    return Page(steps, response.cursor, response.gap)


def run_infos(response: RunsResponse) -> list[RunInfo]:
    """Converts the response to a ``Runs`` call."""
    return [_run_info(run) for run in response.runs]


def run_outcome(runs: Iterable[RunInfo], run_id: str) -> str | None:
    """Returns how the whole run ended, from a gateway's list of runs."""
    return next((run.run_ended for run in runs if run.run_id == run_id), None)


def _run_info(run: Run) -> RunInfo:
    said = {name: getattr(run, name) for name in RunInfo.__slots__}
    for name in ("first_step", "last_step", "ended", "run_ended"):
        if not run.HasField(name):
            said[name] = None
    return RunInfo(**said)
