"""Brokers: how the brokers are reached, and what is said when they refuse."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from esper_otel.errors import ConfigurationError, EsperOtelError
from esper_otel.log import Warnings

SESSION_MS = TRANSACTION_MS = 10_000
# The largest record: a step of 20,000 seeds takes some 6 MB, a request of a process up to 3.5 MB.
MOST_RECORD_BYTES = 8 * 1024 * 1024
_MOST_ADDED_BYTES = 64 * 1024  # of headers, and by the protocol
_BATCH_BYTES = 1_000_000
_FETCHED_KIB = 16 * 1024  # waits in a consumer, in addition to what is on its way
_OURS = frozenset(
    {
        *("bootstrap.servers", "client.id", "group.id", "group.instance.id", "group.protocol", "transactional.id"),
        *("enable.auto.commit", "enable.auto.offset.store", "isolation.level", "auto.offset.reset"),
        *("enable.idempotence", "acks", "partition.assignment.strategy", "session.timeout.ms"),
        *("transaction.timeout.ms", "message.max.bytes", "allow.auto.create.topics"),
    }
)
_AWAY = frozenset({KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN})  # noqa: SLF001 - public, but for their names
_LOG = logging.getLogger("esper_otel.kafka.librdkafka")
_LOG.addHandler(logging.NullHandler())
_LOG.propagate = False


class BrokerFault(EsperOtelError):
    """The brokers refused something, or cannot be reached; the message says what to do."""


class MemberEnds(BrokerFault):
    """A member cannot go on, also not after a while; the message says what to do."""


class Brokers:
    """The way to the brokers.

    Args:
        brokers: ``host:port``, several separated by commas.
        properties: further properties of librdkafka, such as those for TLS and SASL.
        readers: a name of a group, which librdkafka wants even where no group is used.

    Attributes:
        is_name_taken: whether the brokers have reported that another member has the name of this one.
    """

    def __init__(self, brokers: str, properties: Mapping[str, str], readers: str = "esper-readers") -> None:
        self.brokers: str = brokers
        self._readers = readers
        self._properties = dict(properties)
        self._warnings = Warnings()
        self._last = ""
        self.is_name_taken: bool = False
        self._away_s = -math.inf

    @classmethod
    def of(cls, options: argparse.Namespace) -> Brokers:
        """Makes a connection from the command line.

        Raises:
            ConfigurationError: an option cannot be used.
        """
        for address in options.kafka.split(","):
            host, _, port = address.strip().rpartition(":")
            if not host or not port.isdecimal():
                raise ConfigurationError(f"--kafka {options.kafka}: give HOST:PORT, several separated by commas")
        properties = {} if options.kafka_config is None else read_properties(options.kafka_config)
        return cls(options.kafka, properties, f"{options.kafka_topics}-readers")

    def consumer(self, **own: Any) -> Consumer:
        """Makes a consumer that sees committed records only; it commits nothing by itself.

        Raises:
            ConfigurationError: a property cannot be used.
        """
        given = {
            "group.id": self._readers,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "allow.auto.create.topics": False,
            "fetch.message.max.bytes": MOST_RECORD_BYTES,
            "queued.max.messages.kbytes": _FETCHED_KIB,
            "fetch.wait.max.ms": 100,
            "fetch.error.backoff.ms": 100,
            **own,
        }
        consumer: Consumer = self._made(Consumer, given)
        return consumer

    def producer(
        self, transactional_id: str, *, most_bytes: int = MOST_RECORD_BYTES, has_batches: bool = True
    ) -> Producer:
        """Makes a transactional producer.

        Args:
            transactional_id: its name at the brokers.
            most_bytes: how large records that are sent together may be in all.
            has_batches: whether records are sent together.

        Raises:
            ConfigurationError: a property cannot be used.
        """
        own = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": TRANSACTION_MS,
            "message.max.bytes": MOST_RECORD_BYTES + _MOST_ADDED_BYTES,  # a member looks itself
            "compression.type": "lz4",
            "linger.ms": 0,
            "batch.size": min(most_bytes, _BATCH_BYTES),
            "queue.buffering.max.messages": 1_000_000,
            # librdkafka waits without a limit for a coordinator that it still takes to be away (its issues 5456 and
            # 5511), until a connection changes: so one that is idle is closed, and what it knows is soon too old.
            "connections.max.idle.ms": 10_000,
            "metadata.max.age.ms": 30_000,
        }
        if not has_batches:
            own["batch.num.messages"] = 1
        producer: Producer = self._made(Producer, own)
        return producer

    def admin(self) -> AdminClient:
        """Makes a client that asks for topics.

        Raises:
            ConfigurationError: a property cannot be used.
        """
        client: AdminClient = self._made(AdminClient, {})
        return client

    def _made(self, kind: Callable[..., Any], own: Mapping[str, Any]) -> Any:
        given = {
            "bootstrap.servers": self.brokers,
            "client.id": "esper-otel",
            "error_cb": self._note,
            "reconnect.backoff.max.ms": 2_000,
            **self._properties,
            **own,
        }
        try:
            return kind(given, logger=_LOG)
        except KafkaException as error:
            raise ConfigurationError(f"--kafka-config: {error.args[0].str()}") from None

    def _note(self, error: KafkaError) -> None:
        """Keeps what librdkafka reports by itself, such as wrong credentials; says it once a minute."""
        self._last = error.str()
        if error.code() in _AWAY:
            self._away_s = time.monotonic()
        self.note_name(error)
        self._warnings.say(f"kafka {error.name()}", "Kafka at %s: %s", self.brokers, meaning(error))

    def note_name(self, error: KafkaError) -> None:
        """Notes whether an error means that another member has the name of this one."""
        self.is_name_taken |= error.code() == KafkaError.FENCED_INSTANCE_ID or "group.instance.id" in error.str()

    def was_away(self, within_s: float) -> bool:
        """Whether brokers could not be reached within the last so many seconds."""
        return time.monotonic() - self._away_s < within_s

    def asked(self, question: Callable[[], Any], client: AdminClient) -> Any:
        """Returns the answer to a client's question to the brokers.

        Raises:
            BrokerFault: there is none; the reason is the one that librdkafka gave.
        """
        self._last = ""
        try:
            return question()
        except KafkaException as error:
            fault = error.args[0]
            if fault.code() not in _AWAY:
                raise BrokerFault(f"Kafka at {self.brokers}: {meaning(fault)}") from None
            client.poll(0.2)  # calls what notes the reason
            reason = self._last or fault.str()
            raise BrokerFault(
                f"no broker could be reached at --kafka {self.brokers}: {reason}; check the address, and that "
                "security.protocol and the credentials in --kafka-config are those of the brokers' listener"
            ) from None


def read_properties(path: Path) -> dict[str, str]:
    """Reads a file with lines ``name=value`` and comments that begin with ``#``.

    Raises:
        ConfigurationError: it cannot be read or used. The message names no value.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--kafka-config {path}: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, has_value, value = (part.strip() for part in text.partition("="))
        if not has_value or not name:
            raise ConfigurationError(f"--kafka-config {path}, line {number}: give NAME=VALUE")
        if name in _OURS:
            raise ConfigurationError(f"--kafka-config {path}, line {number}: {name} is set by esper-otel; leave it out")
        found[name] = value
    return found


_MEANINGS = {
    KafkaError.UNKNOWN_TOPIC_OR_PART: "the topic does not exist: create it with deploy/kafka/topics.py",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "no access to the topic: allow this user what deploy/kafka/acls.py lists",
    KafkaError.GROUP_AUTHORIZATION_FAILED: (
        "no access to the consumer group: allow this user to READ it, as in deploy/kafka/acls.py"
    ),
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: (
        "no access to the transactional id: allow this user to WRITE and DESCRIBE it, as in deploy/kafka/acls.py"
    ),
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "no access to the cluster: see deploy/kafka/acls.py",
    KafkaError.SASL_AUTHENTICATION_FAILED: "wrong credentials: check sasl.username and sasl.password in --kafka-config",
    KafkaError._AUTHENTICATION: (  # noqa: SLF001
        "wrong credentials: check sasl.username, sasl.password and the certificates in --kafka-config"
    ),
    KafkaError.MSG_SIZE_TOO_LARGE: "a record is too large: raise max.message.bytes of the topic to 8388608",
}


REFUSALS = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,  # noqa: SLF001
    }
)


def meaning(error: KafkaError) -> str:
    """Returns what an error means and what to do about it."""
    known = _MEANINGS.get(error.code())
    return error.str() if known is None else f"{known} ({error.str()})"
