"""Oona: publishes packets on the Esper bus, the Redis Streams that Esper's components read.

It needs the extra ``[oona]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper_otel.oona.publisher import TTL_MS, Publisher
from esper_otel.oona.stream import STREAMS, StreamEntry, entries

if TYPE_CHECKING:
    from esper_otel.leyline.packets import Page
    from esper_otel.session.telemetry import Telemetry

__all__ = ["STREAMS", "TTL_MS", "Publisher", "StreamEntry", "TelemetrySource", "entries", "publish"]


class TelemetrySource:
    """A ``PacketSource`` of a session's own packets. It does not disturb the session's ``pull()`` without a cursor."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def runs(self) -> Sequence[str]:
        """See ``PacketSource``."""
        return (self._telemetry.run_id,)

    def tenant(self, run_id: str) -> None:
        """See ``PacketSource``: None, because only this session publishes here."""

    def page(self, run_id: str, cursor: str | None, most: int) -> Page:
        """See ``PacketSource``."""
        del run_id
        return self._telemetry.pull(cursor or self._telemetry.beginning, most)


def publish(telemetry: Telemetry, url: str, *, secret: str | None = None, ttl_ms: int = TTL_MS) -> Publisher:
    """Publishes a session's steps on Oona, without a gateway. Close the returned publisher after the session.

    Args:
        telemetry: the session.
        url: see ``Publisher``.
        secret: see ``Publisher``.
        ttl_ms: see ``Publisher``.

    Raises:
        ConfigurationError: see ``Publisher``.
    """
    return Publisher(TelemetrySource(telemetry), url, secret=secret, ttl_ms=ttl_ms, remembers=False)
