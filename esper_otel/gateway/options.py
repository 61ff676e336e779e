"""Options that several commands of the gateway share, and what they stand for: ports, limits, rules, a password."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from difflib import get_close_matches
from logging import WARNING
from pathlib import Path
from typing import Any, TypedDict

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.security import Certificates, Tokens, check_exposure, is_loopback
from esper_otel.gateway.serve.connections import MOST_CONNECTIONS
from esper_otel.gateway.serve.ports import Ports
from esper_otel.gateway.store.base import StoreLimits
from esper_otel.leyline.risk import Rule, configured, threshold_of
from esper_otel.log import announce
from esper_otel.oona.publisher import PASSWORD_VARIABLE

_LARGEST_LIMIT, _LONG = 2**40, 1e6


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
        ConfigurationError: an option cannot be used, or a threshold names a signal that does not exist.
    """
    check_number(options, "latency_budget_ms")
    rules = configured(dict(map(threshold_of, options.threshold)))
    return {"rules": rules, "latency_budget_ms": options.latency_budget_ms}


def check_number(options: argparse.Namespace, name: str) -> None:
    """Raises ConfigurationError if an option is not a number of at least 0."""
    if not 0 <= getattr(options, name) < float("inf"):
        raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number of at least 0")
