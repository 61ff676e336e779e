"""Reads a partition up to its end, for a member that takes it over and for servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from esper_otel.gateway.kafka.brokers import REFUSALS, BrokerFault, Brokers, MemberEnds, meaning

_AT_ONCE = 2_000
_POLL_S = 0.2
_PATIENCE_S = 60.0


class PartitionReader:
    """Reads partitions to their ends. Threads: one at a time; its calls wait for the brokers.

    Close it after each burst of reads: a consumer that nobody asks keeps whatever is written to the partition that it
    read last, although that is unassigned (librdkafka 2.16, some 4 kB for each record). The next read opens new ones.

    Args:
        connection: the way to the brokers.
    """

    def __init__(self, connection: Brokers) -> None:
        self._connection = connection
        self._consumers: tuple[Consumer, Consumer] | None = None  # one of them sees transactions that are open
        self.end: int = 0

    def read(self, topic: str, partition: int, offset: int = OFFSET_BEGINNING) -> Iterator[Message]:
        """Yields the records of a partition from an offset on, up to the end that it has now; sets ``end``.

        Transactions that are still open there are waited for: those of a member that has died end with its time-out.

        Raises:
            BrokerFault: the brokers refuse, or do not answer.
        """
        consumer, of_all = self._opened()
        until_s = time.monotonic() + _PATIENCE_S
        try:
            _, end = of_all.get_watermark_offsets(TopicPartition(topic, partition), timeout=_PATIENCE_S / 2)
            consumer.assign([TopicPartition(topic, partition, offset)])
            self.end = 0
            while self.end < end:
                for message in consumer.consume(_AT_ONCE, _POLL_S):
                    error = message.error()
                    if error is None:
                        yield message
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - public, but for its name
                        self.end = max(message.offset() or 0, self.end)
                    elif error.code() in REFUSALS:
                        raise MemberEnds(f"{topic}: {meaning(error)}")
                    elif not error.retriable():
                        raise BrokerFault(f"{topic}: {meaning(error)}")
                if time.monotonic() > until_s:
                    raise BrokerFault(
                        f"{topic}, partition {partition}: its end could not be read within {_PATIENCE_S:g} s"
                    )
        except KafkaException as error:
            raise BrokerFault(f"{topic}: {meaning(error.args[0])}") from None
        finally:
            consumer.unassign()

    def close(self) -> None:
        """Ends its connections."""
        consumers, self._consumers = self._consumers, None
        for consumer in consumers or ():
            consumer.close()

    def _opened(self) -> tuple[Consumer, Consumer]:
        if self._consumers is None:
            self._consumers = (
                self._connection.consumer(**{"enable.partition.eof": True}),
                self._connection.consumer(**{"isolation.level": "read_uncommitted"}),
            )
        return self._consumers


def value_of(message: Any) -> bytes:
    """Returns the value of a record; empty if it has none."""
    value = message.value()
    return b"" if value is None else bytes(value)
