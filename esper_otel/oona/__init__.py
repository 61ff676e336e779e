"""Oona: packets on the Esper bus, Redis Streams that Esper's own parts listen on. Needs the extra ``[oona]``."""

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
    """A session's own packets as a source; its ``pull()`` without a cursor is left alone."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def runs(self) -> Sequence[str]:
        """See ``Source``."""
        return (self._telemetry.run_id,)

    def tenant(self, run_id: str) -> None:
        """See ``Source``: it has all of its session's."""

    def page(self, run_id: str, cursor: str | None, most: int) -> Page:
        """See ``Source``."""
        del run_id
        return self._telemetry.pull(cursor or self._telemetry.beginning, most)


def publish(telemetry: Telemetry, url: str, *, secret: str | None = None, ttl_ms: int = TTL_MS) -> Publisher:
    """Publishes a session's steps on Oona, without a gateway; close what is returned after the session.

    Args:
        telemetry: the session.
        url: as of ``Publisher``, and what follows too.
        secret: signs the payloads.
        ttl_ms: entries older than this are trimmed.

    Raises:
        ConfigurationError: as of ``Publisher``.
    """
    return Publisher(TelemetrySource(telemetry), url, secret=secret, ttl_ms=ttl_ms, remembers=False)
