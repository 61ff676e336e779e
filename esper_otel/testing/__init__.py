"""For tests and demos: a real OTLP receiver on loopback that keeps received points in memory."""

from esper_otel.testing.collector import MemoryCollector
from esper_otel.testing.received import Point

__all__ = ["MemoryCollector", "Point"]
