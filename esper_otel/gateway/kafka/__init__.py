"""Kafka: the gateway on a distributed log, for runs that are too large for one process; see docs/how-to/kafka.md."""
