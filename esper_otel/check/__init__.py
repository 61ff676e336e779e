"""Implements ``esper-otel check``, which finds faults between a trainer and the receivers of its telemetry."""
