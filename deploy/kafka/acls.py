#!/usr/bin/env python3
"""Allows the users of a tier what they need, and nothing else: python deploy/kafka/acls.py --kafka kafka-1:9092 ...

Needs confluent-kafka, and a user that may change the rules: pip install "esper-otel[kafka]".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from topics import access_arguments, properties

READ, WRITE, DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
WRITER = (WRITE, DESCRIBE, AclOperation.DESCRIBE_CONFIGS)  # the last, to ask how large a record may be
TOPIC, GROUP, TRANSACTIONS = ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID
LITERAL, PREFIXED = ResourcePatternType.LITERAL, ResourcePatternType.PREFIXED


def rules(prefix: str, collector: str, member: str, server: str) -> Iterator[AclBinding]:
    """What each of them may do."""
    for user, kind, name, pattern, operations in (
        (collector, TOPIC, f"{prefix}.otlp", LITERAL, (WRITE, DESCRIBE)),
        (collector, TOPIC, f"{prefix}.events", LITERAL, (WRITE, DESCRIBE)),
        (member, TOPIC, f"{prefix}.otlp", LITERAL, (READ, DESCRIBE)),
        (member, TOPIC, f"{prefix}.frames", LITERAL, (READ, *WRITER)),
        (member, TOPIC, f"{prefix}.runs", LITERAL, (READ, *WRITER)),
        (member, TOPIC, f"{prefix}.dead", LITERAL, WRITER),
        (member, GROUP, f"{prefix}-gateway", LITERAL, (READ, DESCRIBE)),
        (member, GROUP, f"{prefix}-readers", LITERAL, (DESCRIBE,)),
        (member, TRANSACTIONS, f"{prefix}.frames-", PREFIXED, (WRITE, DESCRIBE)),
        (server, GROUP, f"{prefix}-readers", LITERAL, (DESCRIBE,)),
        (server, TOPIC, f"{prefix}.frames", LITERAL, (READ, DESCRIBE)),
        (server, TOPIC, f"{prefix}.runs", LITERAL, (READ, DESCRIBE)),
        (server, TOPIC, f"{prefix}.events", LITERAL, (READ, DESCRIBE)),
    ):
        for operation in operations:
            yield AclBinding(kind, name, pattern, f"User:{user}", "*", operation, AclPermissionType.ALLOW)


def main() -> int:
    """Makes the rules; returns 1 if one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    access_arguments(parser)
    for role in ("collector", "member", "server"):
        parser.add_argument(f"--{role}", default=role, metavar="USER", help=f"the user of the {role}s ({role})")
    options = parser.parse_args()
    client = AdminClient(properties(options))
    failed = 0
    made = client.create_acls(list(rules(options.topics, options.collector, options.member, options.server)))
    for rule, future in made.items():
        try:
            future.result(30)
        except KafkaException as error:
            failed += 1
            sys.stdout.write(f"{rule.principal} {rule.operation.name} {rule.name}: {error.args[0].str()}\n")
    sys.stdout.write(f"{len(made) - failed} of {len(made)} rules made\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
