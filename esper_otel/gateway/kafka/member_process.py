"""``esper-otel gateway --kafka``: the process of a member, with a port for operators."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.kafka.brokers import Brokers
from esper_otel.gateway.kafka.member import MEMBER_LIMITS, Member, MemberOptions
from esper_otel.gateway.kafka.metrics import member_text
from esper_otel.gateway.kafka.topics import tier_at
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.options import limits_of, ports_of
from esper_otel.gateway.serve.http_port import is_own_host, runner_of
from esper_otel.gateway.serve.ports import Ports
from esper_otel.log import Warnings, announce

_OTHERS = ("store", "oona", "oona_password_file", "send_tokens", "pull_tokens", "notify", "notify_file")
_LOOK_EVERY_S = 5.0
_STUCK = 70  # exit status
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def main(options: argparse.Namespace) -> int:
    """Works until SIGTERM or SIGINT, then returns 0.

    Raises:
        ConfigurationError: an option cannot be used.
        BrokerFault: the brokers refuse.
    """
    for name in _OTHERS:
        if getattr(options, name):
            raise ConfigurationError(
                f"--{name.replace('_', '-')} does not go with --kafka: a member keeps nothing itself, and "
                "controllers pull from esper-otel serve"
            )
    if options.ui:
        raise ConfigurationError("--ui does not go with --kafka: esper-otel serve --ui has the page")
    options.grpc = "none"
    ports = ports_of(options)
    connection = Brokers.of(options)
    tier = tier_at(connection, options.kafka_topics, is_member=True)
    name = options.member or socket.gethostname()
    member = Member(
        connection,
        tier,
        MemberOptions(
            name,
            limits=_limits_of(options.limit),
            hold_s=options.hold,
            linger_s=options.linger,
            idle_s=options.keep_hours * 3600,
        ),
    )
    return asyncio.run(
        _work(member, ports, f"{name}, {tier.partitions} partitions of {tier.topics.otlp}", options.json)
    )


def _limits_of(given: Sequence[str]) -> Limits:
    """Returns the limits of a member.

    Raises:
        ConfigurationError: an option cannot be used.
    """
    own = [f"{name}={getattr(MEMBER_LIMITS, name)}" for name in ("runs", "waiting_points")]
    limits, others = limits_of([*own, *given])
    if others != limits_of([])[1]:
        raise ConfigurationError(
            f"--limit: {', '.join(others)} do not go with --kafka: a member has neither a store nor pullers"
        )
    return limits


async def _work(member: Member, ports: Ports, what: str, as_json: bool) -> int:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    faults: list[Exception] = []

    def run() -> None:
        try:
            member.run()
        except Exception as error:  # noqa: BLE001 - it is raised again where the process ends
            faults.append(error)
        loop.call_soon_threadsafe(over.set)

    runner = runner_of(_application(member, ports), Warnings(), shutdown_timeout=1.0)
    await runner.setup()
    address = await _listening(runner, ports)
    thread = threading.Thread(target=run, name="esper-otel-kafka-member")
    thread.start()
    if as_json:
        sys.stdout.write(json.dumps({"grpc": None, "http": address}) + "\n")
        sys.stdout.flush()
    announce("kafka member", f"{what}; http {address}")
    watching = asyncio.create_task(_watch(member))
    try:
        await over.wait()
    finally:
        member.stop()
        await asyncio.to_thread(thread.join)
        watching.cancel()
        await runner.cleanup()
    if faults:
        raise faults[0]
    counts = member.counts
    announce("member ended", ", ".join(f"{name} {counts[name]}" for name in ("requests", "points", "steps")))
    return 0


async def _watch(member: Member) -> None:
    """Ends the process when a call of librdkafka does not return: whoever supervises it starts it again."""
    while not member.is_stuck:
        await asyncio.sleep(_LOOK_EVERY_S)
    announce("member ends", "the brokers' answer to a transaction does not come: it goes on when it is started again")
    os._exit(_STUCK)


def _application(member: Member, ports: Ports) -> web.Application:
    @web.middleware
    async def checked(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if ports.certificates is None and not is_own_host(request.headers.get("host", ""), ports.hosts):
            raise web.HTTPForbidden(
                text="this member is not known by that name: use its address, or give --http-name\n"
            )
        return await handler(request)

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        if member.is_ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="it has not joined the group, or the brokers do not answer\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=member_text(member).encode(), headers={"content-type": _PROMETHEUS})

    app = web.Application(client_max_size=1024, middlewares=[checked])
    for path, handler in (("/healthz", healthy), ("/readyz", ready), ("/metrics", metrics)):
        app.router.add_get(path, handler)
    return app


async def _listening(runner: web.AppRunner, ports: Ports) -> str:
    assert ports.http is not None
    host, _, port = ports.http.rpartition(":")
    context = None if ports.certificates is None else ports.certificates.context()
    try:
        site = web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=context)
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigurationError(f"--http {ports.http}: {error.strerror or error}") from None
    return f"{host}:{runner.addresses[0][1]}"
