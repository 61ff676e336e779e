"""TamiyoClient for asyncio; see ``esper_otel.TamiyoClient``, which takes the same arguments."""

from __future__ import annotations

from esper_otel.pull.aio import TamiyoClient

__all__ = ["TamiyoClient"]
