"""``esper-otel gateway``: its arguments, and the process from start to end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from logging import WARNING
from pathlib import Path
from typing import Any, TypedDict

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.core import Core
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.notify.notifier import Notifier
from esper_otel.gateway.notify.webhook import targets_of
from esper_otel.gateway.oona_source import GatewaySource
from esper_otel.gateway.quiet import quiet_grpc
from esper_otel.gateway.security import Certificates, Tokens, check_exposure, is_loopback
from esper_otel.gateway.serve.connections import MOST_CONNECTIONS, allow_connections
from esper_otel.gateway.serve.ports import Gateway, Ports
from esper_otel.gateway.store.base import StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.leyline.risk import Rule, configured, threshold_of
from esper_otel.log import announce
from esper_otel.oona.publisher import PASSWORD_VARIABLE, Publisher

_MIB = 1024 * 1024
_LARGEST_LIMIT, _LONG = 2**40, 1e6
_SEARCH_ALL_EVERY_S = 3600
# The interval after which Python switches threads. With the default of 5 ms, the event loop would wait that long after
# each system call while gRPC's thread is flooded with requests.
_SWITCH_S = 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel gateway``."""
    defaults = StoreLimits()
    add_access_arguments(parser)
    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--store", type=Path, metavar="DIR", help="keep steps in files, so that they survive a restart")
    kept.add_argument(
        "--keep-steps", type=int, default=defaults.steps, metavar="N", help="steps kept per run (%(default)s)"
    )
    kept.add_argument(
        "--keep-run-mib",
        type=int,
        default=defaults.run_bytes // _MIB,
        metavar="N",
        help="MiB kept per run (%(default)s)",
    )
    kept.add_argument(
        "--keep-mib", type=int, default=defaults.all_bytes // _MIB, metavar="N", help="MiB kept in total (%(default)s)"
    )
    kept.add_argument(
        "--keep-hours",
        type=float,
        default=defaults.idle_s / 3600,
        metavar="N",
        help="drop a run that has sent nothing for so many hours (%(default)g)",
    )
    how = parser.add_argument_group("how steps are put together")
    how.add_argument(
        "--hold", type=float, default=2.0, metavar="S", help="seconds to wait for missing points or steps (%(default)g)"
    )
    how.add_argument(
        "--linger",
        type=float,
        default=0.05,
        metavar="S",
        help="seconds to wait after a plain sender's last point (%(default)g)",
    )
    how.add_argument(
        *("--limit",),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"limit on senders: {', '.join(limit_names())}; docs/reference/limits.md says what each one bounds",
    )
    add_packet_arguments(parser)
    parser.set_defaults(idle_s=math.inf)
    member = add_kafka_arguments(parser)
    member.add_argument(
        "--member", metavar="NAME", help="the name of this member, which it keeps over restarts (the host's name)"
    )
    _add_listeners(parser)


def _add_listeners(parser: argparse.ArgumentParser) -> None:
    """Adds the options for those who hear of runs without asking: people and the Esper bus."""
    told = parser.add_argument_group("who is told")
    told.add_argument(
        *("--notify",),
        action="append",
        default=[],
        metavar="URL",
        help="webhook for urgent signals, ends of runs, and runs that fall silent or take no steps: JSON; slack+URL "
        "and alertmanager+URL for their forms; may be repeated",
    )
    told.add_argument(
        *("--notify-file",),
        type=Path,
        metavar="FILE",
        help="file with such URLs, one per line; every user of the machine could see an argument",
    )
    add_oona_arguments(parser)


def add_oona_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for publishing on the Esper bus."""
    oona = parser.add_argument_group("the Esper bus")
    oona.add_argument("--oona", metavar="URL", help="publish the packets on this Redis: redis://HOST:PORT/0")
    oona.add_argument(
        *("--oona-password-file",),
        type=Path,
        metavar="FILE",
        help=f"file with its password, instead of {PASSWORD_VARIABLE}; every user of the machine could see an argument",
    )


def add_kafka_arguments(parser: argparse.ArgumentParser, *, is_needed: bool = False) -> argparse._ArgumentGroup:
    """Adds the options that control how Kafka is reached; returns their group.

    Args:
        parser: the parser that the options are added to.
        is_needed: whether ``--kafka`` must be given.
    """
    kafka = parser.add_argument_group("a tier on Kafka, for runs of very many ranks")
    kafka.add_argument(
        *("--kafka",),
        required=is_needed,
        metavar="HOST:PORT,...",
        help="the brokers"
        if is_needed
        else "take part in a tier on these brokers: requests come from Kafka, not from a port",
    )
    kafka.add_argument(
        *("--kafka-topics",),
        default="esper",
        metavar="PREFIX",
        help="what the names of the topics begin with (%(default)s)",
    )
    kafka.add_argument(
        *("--kafka-config",),
        type=Path,
        metavar="FILE",
        help="further properties of librdkafka as NAME=VALUE lines, such as security.protocol and sasl.password",
    )
    return kafka


def add_packet_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that control how packets are made."""
    made = parser.add_argument_group("how packets are made")
    made.add_argument(
        *("--latency-budget-ms",),
        type=float,
        default=10.0,
        metavar="MS",
        help="budget for a seed's kernel (%(default)g)",
    )
    made.add_argument(
        *("--threshold",),
        action="append",
        default=[],
        metavar="SIGNAL=VALUE",
        help="threshold of a risk signal; inf disables it",
    )


def add_access_arguments(
    parser: argparse.ArgumentParser, *, receives: bool = True, has_http: bool | None = None
) -> None:
    """Adds the options that control where a gateway listens, and who has access.

    Args:
        parser: the parser that the options are added to.
        receives: whether the gateway accepts OTLP; if not, it has no options for senders.
        has_http: whether it has an HTTP port; None: if it receives.
    """
    has_http = receives if has_http is None else has_http
    where = parser.add_argument_group("where it listens (port 0: any free port; none: do not listen)")
    where.add_argument(
        *("--grpc",),
        default="127.0.0.1:4327",
        metavar="HOST:PORT",
        help=f"{'OTLP, ' if receives else ''}pulls, health, reflection (%(default)s)",
    )
    if has_http:
        where.add_argument(
            *("--http",),
            default="127.0.0.1:4328",
            metavar="HOST:PORT",
            help=f"{'OTLP, ' if receives else ''}/healthz, /readyz, /metrics (%(default)s)",
        )
        where.add_argument(
            *("--http-name",),
            action="append",
            default=[],
            metavar="NAME",
            help="a name with dots to accept in HTTP requests without TLS; other names are refused, addresses are not",
        )
    who = parser.add_argument_group("access")
    who.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="certificate with its chain, PEM; reloaded when it changes"
    )
    who.add_argument("--tls-key", type=Path, metavar="FILE", help="key of the certificate, PEM")
    who.add_argument(
        "--client-ca", type=Path, metavar="FILE", help="authority that must have signed the clients' certificates"
    )
    who.add_argument("--insecure", action="store_true", help="allow plain text on an address that others can reach")
    tokens = "bearer tokens of {}, one per line, as TOKEN or 'TOKEN run=PREFIX'"
    if receives:
        who.add_argument("--send-tokens", type=Path, metavar="FILE", help=tokens.format("senders"))
    who.add_argument("--pull-tokens", type=Path, metavar="FILE", help=tokens.format("pullers"))
    parser.set_defaults(**{} if receives else {"send_tokens": None})
    parser.set_defaults(**{} if has_http else {"http": "none", "http_name": [], "ui": False})
    if has_http:
        where.add_argument("--ui", action="store_true", help="serve a live page of the runs at /, on this machine only")
    parser.add_argument(
        "--json", action="store_true", help="print the addresses as JSON, in the first line of standard output"
    )


def main(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT, then returns 0."""
    _, limits = limits_of(options.limit)
    allow_connections({"http": limits["http_connections"], "grpc": limits["grpc_connections"]})
    if options.kafka is not None:
        return _work(options)
    sys.setswitchinterval(_SWITCH_S)
    quiet_grpc()
    return asyncio.run(_serve(options))


def _work(options: argparse.Namespace) -> int:
    """Works as a member of a tier on Kafka until SIGTERM or SIGINT, then returns 0.

    Raises:
        ConfigurationError: confluent-kafka is not installed, or an option cannot be used.
    """
    try:
        module = import_module("esper_otel.gateway.kafka.member_process")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "confluent_kafka":
            raise
        raise ConfigurationError('--kafka needs confluent-kafka: pip install "esper-otel[kafka]"') from None
    status: int = module.main(options)
    return status


async def _serve(options: argparse.Namespace) -> int:
    ports = ports_of(options)
    kept = "memory" if options.store is None else str(options.store)
    password = password_of(options)
    targets = targets_of(options.notify, options.notify_file)
    core = core_of(options)
    async with Gateway(core, ports) as gateway:
        sparing = asyncio.create_task(_spare_stored())
        notifier = Notifier(core, targets, core.notices) if targets else None
        try:
            async with publishing(core, options.oona, password):
                await until_told(gateway, f"steps are kept in {kept}", as_json=options.json, idle_s=options.idle_s)
        finally:
            sparing.cancel()
            if notifier is not None:
                await notifier.close(2.0)
    counted = (
        f"{name.replace('_', ' ')} {core.counts[name]}" for name in ("requests", "points", "steps", "pulled_steps")
    )
    announce("gateway ended", ", ".join(counted))
    return 0


@asynccontextmanager
async def publishing(core: Core, url: str | None, password: str | None) -> AsyncIterator[None]:
    """Publishes the packets on the Esper bus meanwhile, if its URL is given."""
    publisher = None if url is None else Publisher(GatewaySource(core), url, password=password)
    core.publisher = publisher
    try:
        yield
    finally:
        if publisher is not None:
            await asyncio.to_thread(publisher.close, 2.0)


async def _spare_stored() -> None:
    """Excludes stored steps from garbage collection, which would block the event loop longer with each step.

    Stored steps contain no reference cycles: they are freed when they are dropped. Once an hour, a full collection is
    allowed nevertheless.
    """
    while True:
        for _ in range(_SEARCH_ALL_EVERY_S):
            await asyncio.sleep(1.0)
            gc.collect(1)
            gc.freeze()
        gc.unfreeze()


async def until_told(gateway: Gateway, what: str, *, as_json: bool, idle_s: float = math.inf) -> None:
    """Announces where the gateway listens, and waits for SIGTERM or SIGINT, or for so long without a request."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, over.set)
        except NotImplementedError:  # as on Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(over.set))
    addresses = {"grpc": gateway.grpc_address, "http": gateway.http_address}
    if as_json:
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
    where = ", ".join(f"{name} {address}" for name, address in addresses.items() if address)
    if gateway.page is not None:
        where += f", the live page {gateway.page}"
    announce("gateway listens", f"{where}; {what}")
    if gateway.page is not None:
        announce("live page", f"open {gateway.page} in a browser")
    requests = -1
    while not over.is_set() and requests != gateway.requests:
        requests = gateway.requests
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), None if math.isinf(idle_s) else idle_s)


def ports_of(options: argparse.Namespace) -> Ports:
    """Returns the ports to listen on.

    Raises:
        ConfigurationError: an option cannot be used, or would expose received data.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigurationError("--tls-cert and --tls-key must be given together")
    if options.client_ca is not None and options.tls_cert is None:
        raise ConfigurationError("--client-ca needs --tls-cert and --tls-key")
    certificates = None
    if options.tls_cert is not None:
        certificates = Certificates(options.tls_cert, options.tls_key, options.client_ca)
        certificates.context()
    addresses: dict[str, str | None] = {}
    for name in ("grpc", "http"):
        address = getattr(options, name)
        addresses[name] = None if address == "none" else address
        if address != "none":
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65_535:
                raise ConfigurationError(f"--{name} {address}: give HOST:PORT, such as 127.0.0.1:4327, or none")
            check_exposure(host, f"--{name}", has_tls=certificates is not None, is_insecure=options.insecure)
    if not any(addresses.values()):
        raise ConfigurationError("--grpc none --http none: nothing is left to listen on")
    tokens = {
        name: None if path is None else Tokens(path, f"--{name}-tokens")
        for name, path in (("send", options.send_tokens), ("pull", options.pull_tokens))
    }
    if options.ui:
        http = addresses["http"]
        if http is None or not is_loopback(http.rpartition(":")[0]):
            raise ConfigurationError("--ui is only for this machine: give --http an address such as 127.0.0.1:4328")
        if tokens["pull"] is not None:
            raise ConfigurationError("--ui cannot send a token: leave out --pull-tokens or --ui")
    names = frozenset(name.lower().rstrip(".") for name in options.http_name)
    return Ports(addresses["grpc"], addresses["http"], certificates, tokens["send"], tokens["pull"], options.ui, names)


def password_of(options: argparse.Namespace) -> str | None:
    """Reads Oona's password from its file; logs a warning if the URL on the command line contains one.

    Raises:
        ConfigurationError: the file cannot be read, or is empty.
    """
    if options.oona is not None and "@" in options.oona and ":" in options.oona.rpartition("@")[0].partition("//")[2]:
        other = f"give {PASSWORD_VARIABLE} or --oona-password-file instead"
        announce("gateway warns", f"every user of this machine can see the password in --oona; {other}", WARNING)
    if options.oona_password_file is None:
        return None
    if options.oona is None:
        raise ConfigurationError("--oona-password-file needs --oona")
    try:
        password: str = options.oona_password_file.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--oona-password-file {options.oona_password_file}: {error}") from None
    if not password:
        raise ConfigurationError(f"--oona-password-file {options.oona_password_file}: the file is empty")
    return password


def core_of(options: argparse.Namespace) -> Core:
    """Returns the core that handles the requests.

    Raises:
        ConfigurationError: an option cannot be used.
        UnknownMetric: a threshold names a signal that does not exist.
    """
    for name in ("hold", "linger", "keep_steps", "keep_run_mib", "keep_mib", "keep_hours"):
        _check_number(options, name)
    limits, others = limits_of(options.limit)
    of_store = StoreLimits(
        steps=max(options.keep_steps, 1),
        run_bytes=options.keep_run_mib * _MIB,
        all_bytes=options.keep_mib * _MIB,
        idle_s=options.keep_hours * 3600,
        writers=others["stored_writers"],
    )
    store = MemoryStore(of_store) if options.store is None else FileStore(options.store, of_store)
    return Core(
        store,
        limits=limits,
        hold_s=options.hold,
        linger_s=options.linger,
        **packet_options(options),
    )


def limit_names() -> list[str]:
    """Returns the names that --limit accepts, each with its default."""
    defaults = {**asdict(Limits()), **_OTHER_LIMITS}
    return [f"{name}={value:g}" if value < _LONG else f"{name}={value:.0f}" for name, value in defaults.items()]


def limits_of(given: Iterable[str]) -> tuple[Limits, OtherLimits]:
    """Returns the limits on senders, and the others.

    Raises:
        ConfigurationError: a text is not NAME=VALUE, its name is not a limit, or its value cannot be one.
    """
    known: dict[str, Any] = {**asdict(Limits()), **_OTHER_LIMITS}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            hint = get_close_matches(name, known, 1)
            did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
            raise ConfigurationError(
                f"--limit {text}: there is no limit {name!r}, only {', '.join(known)}{did_you_mean}"
            )
        kind = type(known[name])
        try:
            known[name] = kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number of seconds"
            raise ConfigurationError(f"--limit {text}: give {what}, such as {name}={known[name]:.0f}") from None
        if not 1 <= known[name] <= _LARGEST_LIMIT:
            raise ConfigurationError(f"--limit {text}: give a value from 1 to {_LARGEST_LIMIT}")
    others: OtherLimits = {
        "stored_writers": known.pop("stored_writers"),
        "http_connections": known.pop("http_connections"),
        "grpc_connections": known.pop("grpc_connections"),
    }
    return Limits(**known), others


class OtherLimits(TypedDict):
    """Limits of the store and of the ports."""

    stored_writers: int
    http_connections: int
    grpc_connections: int


_OTHER_LIMITS: OtherLimits = {
    "stored_writers": StoreLimits().writers,
    "http_connections": MOST_CONNECTIONS["http"],
    "grpc_connections": MOST_CONNECTIONS["grpc"],
}


class PacketOptions(TypedDict):
    """Arguments of ``Core`` that control how packets are made."""

    rules: tuple[Rule, ...]
    latency_budget_ms: float


def packet_options(options: argparse.Namespace) -> PacketOptions:
    """Returns the arguments of ``Core`` that control how packets are made.

    Raises:
        ConfigurationError: an option cannot be used.
        UnknownMetric: a threshold names a signal that does not exist.
    """
    _check_number(options, "latency_budget_ms")
    rules = configured(dict(map(threshold_of, options.threshold)))
    return {"rules": rules, "latency_budget_ms": options.latency_budget_ms}


def _check_number(options: argparse.Namespace, name: str) -> None:
    if not 0 <= getattr(options, name) < float("inf"):
        raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number of at least 0")
