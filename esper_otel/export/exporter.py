"""StepExporter: sends every frame of the ring to an OTLP endpoint, in order, and keeps it until acknowledged."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

from esper_otel.export.encode import Encoder, Request
from esper_otel.export.streams import Streams
from esper_otel.export.transport import Outcome, Result, Sender
from esper_otel.frame import Frame, Run
from esper_otel.record.counters import Warnings
from esper_otel.record.ring import Ring

_FRAMES_AT_ONCE = 1_000
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_PAUSE_WHILE_CLOSING_S = 0.2
_HEALTH_EVERY_S = 10.0
_MS = 1_000_000


class StepExporter:
    """One thread that follows the ring with a cursor of its own; the cursor moves when a frame is acknowledged.

    A failure that may pass, and a refused credential, keep the data; what is refused for good is dropped and
    counted by reason, as is what the ring had to drop meanwhile. A forked child has no such thread.

    Args:
        ring: the frames.
        encoder: makes requests of them.
        sender: sends requests; closed with the exporter.
        every_s: least time between two requests; 0 sends when ``wake`` is called.
        timeout_s: how long a request may take.
        prepare: called before frames are looked for.
        health: session metrics by (name, reason).
        warnings: where failures are reported.
    """

    def __init__(
        self,
        ring: Ring,
        encoder: Encoder,
        sender: Sender,
        *,
        every_s: float,
        timeout_s: float,
        prepare: Callable[[], None],
        health: Callable[[], Mapping[tuple[str, str], float]],
        warnings: Warnings,
    ) -> None:
        self._ring = ring
        self._encoder = encoder
        self._sender = sender
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._prepare = prepare
        self._health = health
        self._warnings = warnings
        self._cursor = 0
        self._frames_at_once = _FRAMES_AT_ONCE
        self._failures = 0
        self._streams = Streams()
        self._run: Run | None = None
        self._started_unix_ns = time.time_ns()
        self._next_health_s = 0.0
        self._deadline_s: float | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="esper-otel-export", daemon=True)
        self.exported = 0
        self.rejected_points = 0
        self.dropped: Counter[str] = Counter()
        self.latency_ms: float | None = None
        self.last_error: str | None = None

    @property
    def waiting(self) -> int:
        """Frames that have not been acknowledged."""
        return self._ring.last - self._cursor

    def start(self) -> None:
        """Starts sending."""
        self._thread.start()

    def wake(self) -> None:
        """Sends what is there without waiting for the next period."""
        self._wake.set()

    def close(self, deadline_s: float) -> None:
        """Sends what is left and stops, by ``deadline_s`` of ``time.monotonic``; counts what could not be sent."""
        self._deadline_s = deadline_s
        self._wake.set()
        self._thread.join(max(deadline_s - time.monotonic(), 0.0))
        self._sender.close()
        self._thread.join(0.5)
        if self.waiting:
            self.dropped["not sent before close"] += self.waiting
            self._cursor = self._ring.last

    # -- the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause_s = self._every_s
        while self._deadline_s is None:
            self._wake.wait(None if pause_s == 0.0 and not self._failures else pause_s)
            self._wake.clear()
            pause_s = self._guarded_send()
        while self._guarded_send() and time.monotonic() < self._deadline_s and self.waiting:
            time.sleep(min(_PAUSE_WHILE_CLOSING_S, max(self._deadline_s - time.monotonic(), 0.0)))
        if not self.waiting and time.monotonic() < self._deadline_s:
            self._say_goodbye()

    def _guarded_send(self) -> float:
        try:
            self._prepare()
            return self._send_waiting()
        except Exception as error:  # noqa: BLE001 - the thread must live as long as the session
            self._failed(f"{type(error).__name__}: {error}", error)
            return self._pause(None)

    def _send_waiting(self) -> float:
        """Sends everything there is; returns how long to pause before the next time, 0.0 when all is sent."""
        while self.waiting:
            frames, gone = self._ring.after(self._cursor, self._frames_at_once)
            if gone:
                self.dropped["buffer full"] += gone
                self._cursor += gone
            for request in self._encoder.requests(frames):
                pause_s = self._send(request, frames)
                if pause_s is not None:
                    return pause_s
        self._send_health()
        return self._every_s if self._deadline_s is None else 0.0
