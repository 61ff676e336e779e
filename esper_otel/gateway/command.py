"""``esper-otel gateway``: its arguments, and the process from the first line to the last."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.core import Core
from esper_otel.gateway.memory import MemoryStore
from esper_otel.gateway.security import Certificates, Tokens, check_exposure
from esper_otel.gateway.serve import Gateway, Ports
from esper_otel.gateway.store import FileStore
from esper_otel.gateway.stored import StoreLimits
from esper_otel.log import announce
from esper_otel.risk import configured

_MIB = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``esper-otel gateway``."""
    defaults = StoreLimits()
    where = parser.add_argument_group("where it listens (port 0: a free one; none: not at all)")
    where.add_argument("--grpc", default="127.0.0.1:4327", metavar="HOST:PORT", help="OTLP, pulls, health, reflection")
    where.add_argument(
        "--http", default="127.0.0.1:4328", metavar="HOST:PORT", help="OTLP, /healthz, /readyz, /metrics"
    )
    who = parser.add_argument_group("who may come")
    who.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="certificate with its chain, PEM; read anew when it changes"
    )
    who.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    who.add_argument("--client-ca", type=Path, metavar="FILE", help="who must have signed the clients' certificates")
    who.add_argument("--insecure", action="store_true", help="plain text on an address that others can reach")
    who.add_argument(
        "--send-tokens", type=Path, metavar="FILE", help="bearer tokens of senders, one a line, or 'TOKEN run=PREFIX'"
    )
    who.add_argument("--pull-tokens", type=Path, metavar="FILE", help="the same for pullers")
    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--store", type=Path, metavar="DIR", help="keep steps in files that outlive this process")
    kept.add_argument("--keep-steps", type=int, default=defaults.steps, metavar="N", help="of one run (%(default)s)")
    kept.add_argument(
        "--keep-run-mib", type=int, default=defaults.run_bytes // _MIB, metavar="N", help="of one run (%(default)s)"
    )
    kept.add_argument(
        "--keep-mib", type=int, default=defaults.all_bytes // _MIB, metavar="N", help="of all runs (%(default)s)"
    )
    kept.add_argument(
        "--keep-hours", type=float, default=defaults.idle_s / 3600, metavar="N", help="a run without news (%(default)g)"
    )
    how = parser.add_argument_group("how steps are put together")
    how.add_argument(
        "--hold", type=float, default=2.0, metavar="S", help="wait for missing points or steps (%(default)g)"
    )
    how.add_argument(
        "--linger", type=float, default=0.05, metavar="S", help="wait after a plain sender's last point (%(default)g)"
    )
    how.add_argument(
        *("--latency-budget-ms",), type=float, default=10.0, metavar="MS", help="of a seed's kernel (%(default)g)"
    )
    how.add_argument(
        *("--threshold",), action="append", default=[], metavar="SIGNAL=VALUE", help="of a risk; inf silences it"
    )
    parser.add_argument(
        "--json", action="store_true", help="the first line on standard output says the addresses, as JSON"
    )


def main(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; 0 then."""
    return asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> int:
    ports = ports_of(options)
    core = core_of(options)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    async with Gateway(core, ports) as gateway:
        addresses = {"grpc": gateway.grpc_address, "http": gateway.http_address}
        if options.json:
            sys.stdout.write(json.dumps(addresses) + "\n")
            sys.stdout.flush()
        where = ", ".join(f"{name} {address}" for name, address in addresses.items() if address)
        kept = "memory" if options.store is None else str(options.store)
        announce("gateway listens", f"{where}; steps are kept in {kept}")
        await over.wait()
    announce("gateway ended", "")
    return 0


def ports_of(options: argparse.Namespace) -> Ports:
    """Where to listen.

    Raises:
        ConfigurationError: an option that cannot be used, or that would expose what is received.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigurationError("--tls-cert and --tls-key belong together: give both")
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
    return Ports(addresses["grpc"], addresses["http"], certificates, tokens["send"], tokens["pull"])


def core_of(options: argparse.Namespace) -> Core:
    """What requests go to.

    Raises:
        ConfigurationError: an option that cannot be used.
        UnknownMetric: a threshold of a signal that does not exist.
    """
    numbers = ("hold", "linger", "keep_steps", "keep_run_mib", "keep_mib", "keep_hours", "latency_budget_ms")
    for name in numbers:
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number from 0 on")
    limits = StoreLimits(
        steps=max(options.keep_steps, 1),
        run_bytes=options.keep_run_mib * _MIB,
        all_bytes=options.keep_mib * _MIB,
        idle_s=options.keep_hours * 3600,
    )
    rules = configured(dict(map(_threshold, options.threshold)))
    store = MemoryStore(limits) if options.store is None else FileStore(options.store, limits)
    return Core(
        store,
        hold_s=options.hold,
        linger_s=options.linger,
        rules=rules,
        latency_budget_ms=options.latency_budget_ms,
    )


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigurationError(f"--threshold {text}: give SIGNAL=VALUE, such as hook_budget=80") from None
