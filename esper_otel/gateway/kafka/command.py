"""``esper-otel serve``: a pull server of a tier on Kafka."""

from __future__ import annotations

import argparse
import asyncio
import sys

from esper_otel.gateway.command import publishing, until_told
from esper_otel.gateway.kafka.brokers import Brokers
from esper_otel.gateway.kafka.tier_core import TierCore
from esper_otel.gateway.kafka.topics import tier_at
from esper_otel.gateway.options import (
    add_access_arguments,
    add_kafka_arguments,
    add_oona_arguments,
    add_packet_arguments,
    packet_options,
    password_of,
    ports_of,
)
from esper_otel.gateway.quiet import quiet_grpc
from esper_otel.gateway.serve.connections import allow_connections
from esper_otel.gateway.serve.ports import Gateway, Ports
from esper_otel.log import announce

_SWITCH_S = 0.0005  # as in ``esper-otel gateway``


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel serve``."""
    add_access_arguments(parser, receives=False, has_http=True)
    add_packet_arguments(parser)
    add_kafka_arguments(parser, is_needed=True)
    add_oona_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT, then returns 0."""
    allow_connections()
    sys.setswitchinterval(_SWITCH_S)
    quiet_grpc()
    ports, password = ports_of(options), password_of(options)
    connection = Brokers.of(options)
    tier = tier_at(connection, options.kafka_topics, is_member=False)
    return asyncio.run(
        _serve(options, TierCore(connection, tier, **packet_options(options)), ports, tier.topics.frames, password)
    )


async def _serve(options: argparse.Namespace, core: TierCore, ports: Ports, topic: str, password: str | None) -> int:
    async with Gateway(core, ports) as gateway:
        try:
            async with publishing(core, options.oona, password):
                await until_told(gateway, f"steps come from {topic} at {options.kafka}", as_json=options.json)
        finally:
            await core.stop()
    announce("server ended", f"pulled steps {core.counts['pulled_steps']}")
    return 0
