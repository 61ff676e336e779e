"""``esper-otel gateway``: its arguments, and the process from start to end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.core import Core
from esper_otel.gateway.notify.notifier import Notifier
from esper_otel.gateway.notify.webhook import targets_of
from esper_otel.gateway.oona_source import GatewaySource
from esper_otel.gateway.options import (
    add_access_arguments,
    add_kafka_arguments,
    add_oona_arguments,
    add_packet_arguments,
    check_number,
    limit_names,
    limits_of,
    packet_options,
    password_of,
    ports_of,
)
from esper_otel.gateway.pull_core import PullCore
from esper_otel.gateway.quiet import quiet_grpc
from esper_otel.gateway.serve.connections import allow_connections
from esper_otel.gateway.serve.ports import Gateway
from esper_otel.gateway.store.base import StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.log import announce
from esper_otel.oona.publisher import Publisher

_MIB = 1024 * 1024
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
    """Adds the options for receivers that do not pull: people and the Esper bus."""
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
async def publishing(core: PullCore, url: str | None, password: str | None) -> AsyncIterator[None]:
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


def core_of(options: argparse.Namespace) -> Core:
    """Returns the core that handles the requests.

    Raises:
        ConfigurationError: an option cannot be used, or a threshold names a signal that does not exist.
    """
    for name in ("hold", "linger", "keep_steps", "keep_run_mib", "keep_mib", "keep_hours"):
        check_number(options, name)
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
