"""StepExporter: sends every frame of the ring to an OTLP endpoint, in order, and keeps it until acknowledged."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from esper_otel.export.encode import Encoder, Request
from esper_otel.export.streams import Stream, Streams
from esper_otel.export.transport import Outcome, Result, Sender
from esper_otel.frame import Frame, Run
from esper_otel.log import Warnings
from esper_otel.ring import Ring

_FRAMES_AT_ONCE = 1_000
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_PAUSE_WHILE_CLOSING_S = 0.2
HEALTH_EVERY_S = 10.0
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
        self._failures = 0
        self._streams = Streams()
        self._run: Run | None = None
        self._started_unix_ns = time.time_ns()
        self._next_health_s = 0.0
        self._deadline_s: float | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="esper-otel-export", daemon=True)
        self.exported = 0
        self.rejected_points = 0
        self.retries = 0
        self.outcome: str | None = None
        self.dropped: Counter[str] = Counter()
        self.latency_ms: float | None = None
        self.last_error: str | None = None

    @property
    def waiting(self) -> int:
        """Frames that have not been acknowledged."""
        return self._ring.last - self._cursor

    def abandon(self) -> None:
        """Never to be started: lets go of the connection."""
        self._sender.close()

    def start(self) -> None:
        """Starts sending."""
        self._thread.start()

    def wake(self) -> None:
        """Sends what is there without waiting for the next period."""
        self._wake.set()

    def join(self, deadline_s: float) -> None:
        """Waits for the thread to end, at most until ``deadline_s`` of ``time.monotonic``."""
        self._thread.join(max(deadline_s - time.monotonic(), 0.0))

    def close(self, deadline_s: float, outcome: str) -> None:
        """Sends what is left and how the run ended, and stops, by ``deadline_s`` of ``time.monotonic``.

        What could not be sent is counted.
        """
        self.outcome = outcome
        self._deadline_s = deadline_s
        self._closing.set()
        self._wake.set()
        self.join(deadline_s)
        self._sender.close()
        self._thread.join(0.5)
        if self.waiting:
            self.dropped["not sent before close"] += self.waiting
            self._cursor = self._ring.last

    # -- the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause_s: float | None = self._every_s or None
        while self._deadline_s is None:
            # After a failure a new step is no reason to try again at once.
            (self._closing if self._failures else self._wake).wait(pause_s)
            self._wake.clear()
            pause_s = self._send_guarded()
        while time.monotonic() < self._deadline_s and self._send_guarded() is not None:
            time.sleep(min(_PAUSE_WHILE_CLOSING_S, max(self._deadline_s - time.monotonic(), 0.0)))
        try:
            self._say_goodbye()
        except Exception as error:  # noqa: BLE001 - the frames are delivered; the end of the run is not
            self._report(f"{type(error).__name__}: {error}", error)

    def _send_guarded(self) -> float | None:
        """Sends everything there is; returns how long to pause, None for: until woken, or all is sent at the end."""
        try:
            self._prepare()
            pause_s = self._send_waiting()
        except Exception as error:  # noqa: BLE001 - the thread must live as long as the session
            self._report(f"{type(error).__name__}: {error}", error)
            pause_s = self._pause()
        if pause_s is not None:
            return pause_s
        self._failures = 0
        return (self._every_s or None) if self._deadline_s is None else None

    def _send_waiting(self) -> float | None:
        while self.waiting:
            frames, gone = self._ring.after(self._cursor, _FRAMES_AT_ONCE)
            if gone:
                self.dropped["buffer full"] += gone
                self._cursor += gone
            for request in self._encoder.requests(frames):
                pause_s = self._settled(request, self._sent(request.body), frames)
                if pause_s is not None:
                    return pause_s
                frames = frames[request.frames :]
        self._send_health()
        return None

    def _sent(self, body: bytes) -> Outcome:
        left_s = self._timeout_s
        if self._deadline_s is not None:
            left_s = min(left_s, max(self._deadline_s - time.monotonic(), 0.05))
        started_s = time.monotonic()
        outcome = self._sender.send(body, left_s)
        self.latency_ms = (time.monotonic() - started_s) * 1e3
        return outcome

    def _settled(self, request: Request, outcome: Outcome, frames: list[Frame]) -> float | None:
        """Moves the cursor past what is settled; returns how long to pause before trying again, None to go on."""
        if outcome.result is Result.TOO_LARGE and self._encoder.shrink(request.points // 2):
            return 0.0
        if outcome.result in {Result.TEMPORARY, Result.UNAUTHENTICATED}:
            self._report(outcome.reason)
            self.retries += 1
            return self._pause(outcome.retry_after_s)
        self._cursor += request.frames
        settled = frames[: request.frames]
        if outcome.result is not Result.DELIVERED:
            self._report(outcome.reason)
            # What the endpoint says would make a series of its own for each of its wordings.
            self.dropped["too large" if outcome.result is Result.TOO_LARGE else "refused"] += request.frames
            return None
        self._failures = 0
        self.exported += request.frames
        if outcome.rejected_points:
            self.rejected_points += outcome.rejected_points
            self._report(f"{outcome.rejected_points} points were refused: {outcome.reason}")
        else:
            self.last_error = None
        for frame in settled:
            self._run = frame.run
            if frame.retired:
                self._end(self._streams.ended(frame.retired), frame.time_unix_ns)
            self._streams.sent(frame)
        return None

    def _pause(self, hint_s: float | None = None) -> float:
        """How long to wait after a failure: what the endpoint asks for, else twice as long each time."""
        self._failures += 1
        longest_s = min(_FIRST_PAUSE_S * 2 ** (self._failures - 1), _LONGEST_PAUSE_S)
        return min(hint_s, _LONGEST_PAUSE_S) if hint_s is not None else longest_s * random.uniform(0.5, 1.0)  # noqa: S311

    def _report(self, reason: str, error: Exception | None = None) -> None:
        self.last_error = reason
        self._warnings.say("export", "steps do not reach the endpoint: %s", reason, exc_info=error)

    # -- what goes beside the frames ---------------------------------------------------------------------

    def _end(self, streams: Sequence[Stream], time_unix_ns: int) -> None:
        if streams and self._run is not None:
            for body in self._encoder.stale(self._run, streams, time_unix_ns=time_unix_ns):
                self._sent(body)

    def _send_health(self, *, now: bool = False) -> None:
        is_due = self._deadline_s is None and time.monotonic() >= self._next_health_s
        if self._run is None or not (now or is_due):
            return
        self._next_health_s = time.monotonic() + HEALTH_EVERY_S
        values: dict[str, float | dict[str, float]] = {}
        for (name, reason), count in self._health().items():
            if not reason:
                values[name] = count
            else:
                by_reason = values.setdefault(name, {})
                if isinstance(by_reason, dict):
                    by_reason[reason] = count
        self._sent(
            self._encoder.health(self._run, values, start_unix_ns=self._started_unix_ns, time_unix_ns=time.time_ns())
        )

    def _say_goodbye(self) -> None:
        """The last counts, and the end of every series; only to an endpoint that took everything."""
        if self.waiting or self._deadline_s is None or time.monotonic() >= self._deadline_s:
            return
        self._send_health(now=True)
        self._end(self._streams.all_ended(), self._streams.last_unix_ns + _MS)
