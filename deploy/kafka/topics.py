#!/usr/bin/env python3
"""Creates the topics of a tier: python deploy/kafka/topics.py --kafka kafka-1:9092 --partitions 64 --replication 3.

Topics that are there already stay as they are. Needs confluent-kafka: pip install "esper-otel[kafka]".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

LARGEST = 8 * 1024 * 1024
LARGEST_EVENTS = 256 * 1024 * 1024
HOUR_MS = 3_600_000


def topics(options: argparse.Namespace) -> list[NewTopic]:
    """The five topics. The last two have one partition; none may ever have another number."""
    common = {
        "max.message.bytes": str(LARGEST),
        "min.insync.replicas": str(max(options.replication - 1, 1)),
        "message.timestamp.type": "LogAppendTime",
    }
    kept = {"retention.ms": str(int(options.keep_hours * HOUR_MS))}
    # Requests are needed until a member has used them: as long as an outage of all members may take.
    requests = {"retention.ms": str(int(options.keep_request_hours * HOUR_MS))}
    # Members and servers read all of it when they start: only whole segments are compacted, so these are small.
    compacted = {
        "cleanup.policy": "compact",
        "segment.ms": str(HOUR_MS),
        "segment.bytes": str(2 * LARGEST),
        "min.cleanable.dirty.ratio": "0.3",
    }
    dead = {"retention.ms": str(14 * 24 * HOUR_MS), "retention.bytes": str(2**30)}
    # Servers read all of them when they start.
    events = {"retention.ms": str(7 * 24 * HOUR_MS), "retention.bytes": str(LARGEST_EVENTS)}
    return [
        NewTopic(f"{options.topics}.{name}", partitions, options.replication, config={**common, **own})
        for name, partitions, own in (
            ("otlp", options.partitions, requests),
            ("frames", options.partitions, kept),
            ("runs", options.partitions, compacted),
            ("dead", 1, dead),
            ("events", 1, events),
        )
    ]


def access_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the brokers are."""
    parser.add_argument("--kafka", required=True, metavar="HOST:PORT,...", help="the brokers")
    parser.add_argument("--kafka-config", type=Path, metavar="FILE", help="as for esper-otel gateway --kafka")
    parser.add_argument("--topics", default="esper", metavar="PREFIX", help="what the topics' names begin with (esper)")


def properties(options: argparse.Namespace) -> dict[str, str]:
    """What a client needs to reach them."""
    given = {"bootstrap.servers": options.kafka, "log_level": "0"}  # else a line each 50 ms until the brokers are there
    for line in [] if options.kafka_config is None else options.kafka_config.read_text().splitlines():
        name, has_value, value = (part.strip() for part in line.partition("="))
        if has_value and not name.startswith("#"):
            given[name] = value
    return given


def main() -> int:
    """Creates what is missing; returns 1 if something could not be created."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    access_arguments(parser)
    parser.add_argument("--partitions", type=int, default=64, metavar="N", help="for ever (64)")
    parser.add_argument("--replication", type=int, default=3, metavar="N", help="copies of each record (3)")
    parser.add_argument("--keep-hours", type=float, default=24.0, metavar="N", help="how long steps can be pulled (24)")
    parser.add_argument("--keep-request-hours", type=float, default=24.0, metavar="N", help="of requests (24)")
    options = parser.parse_args()
    failed = 0
    client = AdminClient(properties(options))
    for name, future in client.create_topics(topics(options), request_timeout=30).items():
        try:
            future.result()
        except KafkaException as error:
            is_there = error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS
            failed += not is_there
            sys.stdout.write(f"{name}: {'is there already' if is_there else error.args[0].str()}\n")
        else:
            sys.stdout.write(f"{name}: created\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
