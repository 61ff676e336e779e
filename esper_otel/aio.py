"""``TamiyoClient`` for asyncio. It takes the same arguments as ``esper_otel.TamiyoClient``."""

from __future__ import annotations

from esper_otel.pull.aio import TamiyoClient

__all__ = ["TamiyoClient"]
