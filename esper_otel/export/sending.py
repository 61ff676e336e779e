"""Sending: requests to the endpoint, one at a time, and what its answers mean."""

from __future__ import annotations

import time

from esper_otel.export import outcome as outcomes
from esper_otel.export.encode import Request
from esper_otel.export.transport import Outcome, Result, Sender
from esper_otel.log import Warnings


class Sending:
    """Sends requests, and keeps account of how that goes. Threads: only the exporter's; others may read.

    Args:
        sender: sends a request.
        timeout_s: how long a request may take.
        warnings: where failures are reported.

    Attributes:
        failures: how many requests have failed since one was delivered.
        last_sent_s: when a request was sent last, as a time of ``time.monotonic``.
        rejected_points: points that the endpoint refused for good.
        retries: requests that had to be sent again.
        errors_unix_s: by kind of error, when it happened last.
        latency_ms: how long the last request took.
        last_error: the last error; None since a request was delivered whole.
    """

    def __init__(self, sender: Sender, timeout_s: float, warnings: Warnings) -> None:
        self._sender = sender
        self._timeout_s = timeout_s
        self._warnings = warnings
        self.failures: int = 0
        self.last_sent_s: float = float("-inf")
        self.rejected_points: int = 0
        self.retries: int = 0
        self.errors_unix_s: dict[str, float] = {}
        self.latency_ms: float | None = None
        self.last_error: str | None = None

    def send(self, body: bytes, left_s: float) -> Outcome:
        """Sends a request within this time; a time that is over becomes a short one."""
        left_s = min(self._timeout_s, max(left_s, 0.05))
        started_s = time.monotonic()
        outcome = self._sender.send(body, left_s)
        self.last_sent_s = time.monotonic()
        self.latency_ms = (self.last_sent_s - started_s) * 1e3
        return outcome

    def note_answer(self, request: Request, outcome: Outcome) -> None:
        """Counts and reports what the endpoint refused of a request that it has taken."""
        refused = min(outcome.rejected_points, request.points)  # the endpoint may report more points than were sent
        if refused:
            self.rejected_points += refused
            self.report(f"{refused} points were refused: {outcome.reason}", Result.REFUSED)
        else:
            self.last_error = None
            if outcome.reason:
                self._warnings.say("remark", "the endpoint took the steps and says: %s", outcome.reason)

    def is_to_be_repeated(self, outcome: Outcome) -> bool:
        """Whether the request must be sent again; reports why."""
        if outcome.result not in {Result.TEMPORARY, Result.UNAUTHENTICATED}:
            return False
        self.report(outcome.reason, outcome.result)
        self.retries += 1
        return True

    def pause(self, outcome: Outcome | None = None) -> float:
        """Returns how long to wait after a failure."""
        self.failures += 1
        return outcomes.pause_s(self.failures, outcome)

    def report(self, reason: str, result: Result | None = None, error: Exception | None = None) -> None:
        """Notes and reports an error."""
        self.last_error = reason
        self.errors_unix_s["internal" if result is None else result.value] = time.time()
        self._warnings.say("export", "steps do not reach the endpoint: %s", reason, exc_info=error)
