"""EventExporter: sends events as OTLP logs, after the steps that they belong to, in a thread of its own."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from opentelemetry.sdk.resources import Resource

from esper_otel.export.event_records import MOST_RECORDS, in_one_request, request_of
from esper_otel.export.event_source import EventSource
from esper_otel.export.outcome import LONGEST_PAUSE_S, pause_s
from esper_otel.export.transport import Outcome, Result, Sender
from esper_otel.frames.event_log import Event
from esper_otel.log import Warnings, announce
from esper_otel.native import Bell, threads
from esper_otel.text import printable
from esper_otel.untraced import untraced

_PAUSE_WHILE_CLOSING_S = 0.1
_LEAST_S = 0.5  # to close, if steps have taken all the time
_LONGEST_WITHOUT_LOGS_S = 60.0  # between two requests to an endpoint that has no logs
NO_LOGS = "the endpoint has no logs"


class EventExporter:
    """Sends events from a thread and over a connection of their own, so that steps never wait for them.

    Events are kept until the endpoint has acknowledged or refused them. An endpoint that has no logs is reported once
    and asked again, ever more seldom: it may be a proxy whose server is away. If it has taken none in the whole
    session, closing does not wait for it. Without a spool, the events are then counted by reason, like those that were
    refused; in a spool, they wait for the next session, but those of earlier sessions do so no longer.

    Args:
        sender: sends requests of logs; closed with the exporter.
        live: the events of this session; None if there is none.
        timeout_s: how long a request may take.
        fault: called with each internal error; it counts and logs the error.
        warnings: where failures are reported.

    Attributes:
        sent: how many events the endpoint has taken.
    """

    def __init__(
        self,
        sender: Sender,
        live: EventSource | None,
        *,
        timeout_s: float,
        fault: Callable[[str, Exception], None],
        warnings: Warnings,
    ) -> None:
        self.live = live
        self.sent: int = 0
        self._sender = sender
        self._timeout_s = timeout_s
        self._fault = fault
        self._warnings = warnings
        self._dropped: Counter[str] = Counter()
        self._leftovers: deque[EventSource] = deque()
        self._until_unix_ns: int | None = 0
        self._at_once = MOST_RECORDS
        self._failures = 0
        self._has_said_missing = self._gives_up = False
        self._deadline_s: float | None = None
        self._wake = Bell()
        self._closing = threads().Event()
        self._thread = threads().Thread(target=self._work, name="esper-otel-events", daemon=True)

    @property
    def dropped(self) -> dict[str, int]:
        """How many events were not delivered, by reason."""
        lost = 0 if self.live is None else self.live.log.dropped
        return self._dropped.copy() | ({"not kept": lost} if lost else {})

    @property
    def holds_back(self) -> bool:
        """Whether events of this session wait for steps to be delivered."""
        return self.live is not None and self.live.log.count > 0

    def start(self) -> None:
        """Starts sending."""
        self._thread.start()
        self._wake.set()

    def release(self, until_unix_ns: int) -> None:
        """Releases events up to this time: the steps before it are delivered."""
        if until_unix_ns > (self._until_unix_ns or 0):
            self._until_unix_ns = until_unix_ns
        if self.holds_back:
            self._wake.set()

    def adopt(self, source: EventSource) -> None:
        """Takes over the events of an earlier session, and its folder, which is deleted when they are delivered."""
        self._leftovers.append(source)
        self._wake.set()

    def abandon(self) -> None:
        """Closes the connection of an exporter that will never be started."""
        self._sender.close()

    def close(self, deadline_s: float) -> bool:
        """Sends what waits, at most until ``deadline_s`` of ``time.monotonic`` and half a second, then stops.

        Returns:
            Whether no event of this session waits any more. In a spool, those that do are sent by the next session.
        """
        self._until_unix_ns = None
        self._deadline_s = max(deadline_s, time.monotonic() + _LEAST_S)
        self._closing.set()
        self._wake.set()
        try:
            self._thread.join(self._deadline_s - time.monotonic())
        finally:
            self._end()
        return self.live is None or not self.live.log.count

    def _end(self) -> None:
        try:
            self._sender.close()
        except Exception as error:  # noqa: BLE001 - the folders are still given up
            self._fault("closing the sender of events", error)
        self._thread.join(0.5)
        if self.live is not None:
            self.live.end()
        for source in self._leftovers:
            source.end()
            if source.folder is not None:
                source.folder.release()

    def count_lost(self) -> None:
        """Counts the events that wait as dropped: nothing keeps them."""
        if self.live is not None and self.live.log.count:
            self._dropped[NO_LOGS if self._gives_up else "not sent before close"] += self.live.log.count
            self.live.log.delivered(self.live.log.last)

    # -- the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        with untraced():
            wait_s: float | None = None
            while self._deadline_s is None:
                (self._closing if self._failures else self._wake).wait(wait_s)
                self._wake.clear()
                wait_s = self._send_guarded()
            while self._send_guarded() is not None and not self._gives_up and (left_s := self._left_s()) > 0:
                time.sleep(min(_PAUSE_WHILE_CLOSING_S, left_s))
            if self._gives_up and self.live is not None:  # esper-otel send leaves them to its next call
                self._drop_leftovers()

    def _send_guarded(self) -> float | None:
        """Sends what may be sent. Returns how long to pause before the next attempt; None when all is sent."""
        try:
            for source in self._sources():
                wait_s = self._send(source)
                if wait_s is not None:
                    return wait_s
        except Exception as error:  # noqa: BLE001 - the thread must live as long as the session
            self._fault("sending events", error)
            return self._pause()
        self._failures = 0
        return None

    def _sources(self) -> Iterator[EventSource]:
        while self._leftovers:
            yield self._leftovers[0]
            self._forget(self._leftovers.popleft())
        if self.live is not None:
            yield self.live

    def _forget(self, source: EventSource) -> None:
        """Deletes the folder of an earlier session, of which everything is delivered."""
        source.end()
        try:
            if source.folder is not None:
                source.folder.remove()
        except OSError as error:
            path = source.folder.path if source.folder is not None else ""
            self._warnings.say("spool", "%s was sent but cannot be deleted: %s", path, error)

    def _send(self, source: EventSource) -> float | None:
        until_unix_ns = self._until_unix_ns if source is self.live else None
        while waiting := source.log.waiting(until_unix_ns, self._at_once):
            resource = source.resource()
            if resource is None:
                return None
            if self._left_s() <= 0:
                return 0.0
            some = in_one_request(waiting, self._at_once)
            body = self._encoded(source, some, resource)
            if body is None:
                continue
            outcome = self._sender.send(body, min(self._timeout_s, self._left_s()))
            wait_s = self._settled(source, some, outcome)
            if wait_s is not None:
                return wait_s
        return None

    def _encoded(self, source: EventSource, events: Sequence[Event], resource: Resource) -> bytes | None:
        """Returns the events as a request. After an error, halves their number until the failing one is found.

        That one is dropped and counted, so that it does not block those after it, of this and of other sessions.
        """
        try:
            return request_of(events, resource)
        except Exception as error:  # noqa: BLE001 - see above
            self._fault("encoding events", error)
        if len(events) > 1:
            self._at_once = len(events) // 2
        else:
            self._at_once = MOST_RECORDS
            self._dropped["cannot be encoded"] += 1
            self._advance(source, events[0].number)
        return None

    def _settled(self, source: EventSource, events: Sequence[Event], outcome: Outcome) -> float | None:
        """Handles the outcome of a request. Returns how long to pause before sending it again; None to continue."""
        if outcome.is_missing:
            if not self._has_said_missing:
                # Not a warning: with opentelemetry-instrument, logs are asked for where the user has set nothing.
                announce("sends no events", f"{printable(outcome.reason)}; it is asked again from time to time")
            self._has_said_missing = True
            self._gives_up = self._deadline_s is not None and not self.sent
            return self._pause(outcome, _LONGEST_WITHOUT_LOGS_S)
        if outcome.result in {Result.TEMPORARY, Result.UNAUTHENTICATED}:
            if self._deadline_s is None:
                self._warnings.say("events", "events do not reach the endpoint: %s", outcome.reason)
            return self._pause(outcome)
        if outcome.result is Result.TOO_LARGE and len(events) > 1:
            self._at_once = len(events) // 2
            return None
        if outcome.result is Result.DELIVERED:
            refused = min(outcome.rejected_points, len(events))
            self.sent += len(events) - refused
            if refused:
                self._dropped[Result.REFUSED.value] += refused
                self._warnings.say("events refused", "%d events were refused: %s", refused, outcome.reason)
        else:
            self._dropped[outcome.result.value] += len(events)
            self._warnings.say("events refused", "%d events were refused: %s", len(events), outcome.reason)
        self._failures = 0
        self._advance(source, events[-1].number)
        return None

    def _advance(self, source: EventSource, number: int) -> None:
        try:
            source.delivered(number)
        except OSError as error:
            self._warnings.say(
                "spool", "the spool cannot record which events were sent (%s): after a kill they are sent again", error
            )

    def _left_s(self) -> float:
        """Returns how much time there is; while the session lives, as much as for a request."""
        return self._timeout_s if self._deadline_s is None else self._deadline_s - time.monotonic()

    def _pause(self, outcome: Outcome | None = None, longest_s: float = LONGEST_PAUSE_S) -> float:
        """Returns how long to wait after a failure."""
        self._failures += 1
        return pause_s(self._failures, outcome, longest_s)

    def _drop_leftovers(self) -> None:
        """Drops the events of earlier sessions, which have waited for the whole of another one, and their folders."""
        while self._leftovers:
            source = self._leftovers.popleft()
            self._dropped[NO_LOGS] += source.log.count
            self._advance(source, source.log.last)
            self._forget(source)
