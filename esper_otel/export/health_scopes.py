"""HealthScopes: the session's own metrics and the device's description, as they are sent with frames or alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics

from esper_otel.export.device_points import DevicePoint, DeviceScopes
from esper_otel.export.encode import Encoder

_MS = 1_000_000
_EXPORTED, _QUEUE = ("esper.frames.exported", ""), ("esper.export.queue", "")
_ENDED = "esper.run.ended"
_PHASE_MS = "esper.phase_ms"  # among the counts for readers; sent in a scope of its own


class HealthScopes:
    """Makes the scopes, and remembers what was sent last. Threads: only the exporter's.

    Args:
        counts: returns the session's own metrics by (name, reason).
        encoder: encodes them.
        device: describes the device.
        every_s: how often they are due.
        fault: called with each internal error; it counts and logs the error.

    Attributes:
        next_s: when they are due again, as a time of ``time.monotonic``.
        unix_ns: the newest time that they were sent with.
    """

    def __init__(
        self,
        counts: Callable[[], Mapping[tuple[str, str], float]],
        encoder: Encoder,
        device: Callable[[], Sequence[DevicePoint]],
        every_s: float,
        fault: Callable[[str, Exception], None],
    ) -> None:
        self._counts = counts
        self._encoder = encoder
        self._device = DeviceScopes(device)
        self._every_s = every_s
        self._fault = fault
        self._started_unix_ns = time.time_ns()
        self._said: list[ScopeMetrics] = []
        self._goodbye: tuple[int, Sequence[ScopeMetrics]] | None = None
        self.next_s: float = 0.0
        self.unix_ns: int = 0

    def is_due(self) -> bool:
        """Whether it is time to send them, or the device has become known."""
        return time.monotonic() >= self.next_s or self._device.has_news()

    def again(self, time_unix_ns: int) -> Sequence[ScopeMetrics]:
        """Returns what was sent last, or the counts at this time if it is later."""
        return self._said if self._said and _end_of_ms(time_unix_ns) <= self.unix_ns else self.at(time_unix_ns)

    def last(self, time_unix_ns: int, frames: int = 0) -> Sequence[ScopeMetrics]:
        """Returns the final counts. Further calls for the same time return the same counts."""
        if self._goodbye is None or self._goodbye[0] != time_unix_ns:
            self._goodbye = time_unix_ns, self.at(time_unix_ns, frames, is_end=True)
        return self._goodbye[1]

    def at(self, time_unix_ns: int, frames: int = 0, *, is_end: bool = False) -> Sequence[ScopeMetrics]:
        """Returns the counts at the end of a millisecond, as they will be once so many frames are accepted."""
        self.next_s = time.monotonic() + self._every_s
        self.unix_ns = time_unix_ns = _end_of_ms(time_unix_ns)
        # Closing may begin while these counts are made: only the last ones say how the run ended.
        left_out = {_PHASE_MS} if is_end else {_PHASE_MS, _ENDED}
        counts = {key: count for key, count in self._counts().items() if key[0] not in left_out}
        for name, more in ((_EXPORTED, frames), (_QUEUE, -frames)):
            if name in counts:
                counts[name] += more
        start_unix_ns = self._started_unix_ns
        scope = self._encoder.health_scope(counts, start_unix_ns=start_unix_ns, time_unix_ns=time_unix_ns)
        self._said = [scope]
        try:
            self._said += self._device.scopes(time_unix_ns)
        except Exception as error:  # noqa: BLE001 - the counts do without
            self._fault("describing the device", error)
        return self._said


def _end_of_ms(time_unix_ns: int) -> int:
    """Returns the last nanosecond of the time's millisecond.

    It is later than the frame of this time, earlier than the next frame, and the same time for a backend that counts
    milliseconds.
    """
    return time_unix_ns - time_unix_ns % _MS + _MS - 1
