"""StepExporter: sends every frame of the ring to an OTLP endpoint, in order, and keeps it until acknowledged."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics

from esper_otel.export.closing_time import ClosingTime
from esper_otel.export.device_points import DevicePoint
from esper_otel.export.encode import NO_PHASES, AccompanyingData, Encoder, Request
from esper_otel.export.event_exporter import EventExporter
from esper_otel.export.health_scopes import HealthScopes
from esper_otel.export.journal_file import JournalFile
from esper_otel.export.phase_sending import PHASES_AFTER_S, PhaseSending
from esper_otel.export.sending import Sending
from esper_otel.export.source import FrameSource, LeftoverSource, LiveSource, put_goodbye
from esper_otel.export.spool import Spool
from esper_otel.export.streams import Stream, before_a_return
from esper_otel.export.transport import Outcome, Result, Sender
from esper_otel.frames.block import Block
from esper_otel.frames.frame import FINE, Run
from esper_otel.frames.phase_log import Phase, PhaseLog
from esper_otel.frames.quarantine import Quarantine
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings, announce
from esper_otel.native import Bell, threads
from esper_otel.untraced import untraced

_FRAMES_AT_ONCE = 1_000
_PAUSE_WHILE_CLOSING_S = 0.2
HEALTH_EVERY_S = 10.0
# When to send what other ranks left: they send it themselves if they have been started again, before their new steps.
_OTHERS_AFTER_S = 30.0
_MS = 1_000_000
_NO_SCOPES: Sequence[ScopeMetrics] = ()

_T = TypeVar("_T")


class StepExporter:
    """Sends frames from a thread that reads the ring through its own cursor.

    The cursor moves past a frame when the endpoint has acknowledged or finally refused it. After a temporary failure
    or refused credentials, the data is kept and sent again. Frames that are finally refused, or that the ring dropped
    before they could be sent, are counted by reason. With a spool, frames that earlier sessions left there are sent
    first. A forked child does not have this thread.

    Args:
        ring: the frames.
        encoder: encodes frames as requests.
        sender: sends requests; closed with the exporter.
        every_s: shortest time between two requests; with 0 the exporter sends whenever ``wake`` is called.
        timeout_s: how long a request may take.
        prepare: called before each look for new frames.
        health: returns the session's own metrics by (name, reason).
        idle_ns: takes the time of the last frame sent and returns a time that no later frame can precede; None while a
            step is open, since there is no such time then.
        fault: called with each internal error; it counts and logs the error.
        warnings: where failures are reported.
        spool: keeps frames on disk that must outlive the process.
        leftovers: returns the frames that earlier sessions left: of the same rank, or with True of all; called in the
            exporter's thread.
        phases: the phases, which are sent with the frames.
        phase_file: keeps phases on disk that must outlive the process.
        run_of: returns the session's run once it is closing, for phases and an end without any step.
        device: describes the device; sent with the session's own metrics, and as soon as it is known.
        events: sends what happens in the run, after the steps; None if events are not sent.
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
        idle_ns: Callable[[int], int | None],
        fault: Callable[[str, Exception], None],
        warnings: Warnings,
        spool: Spool | None = None,
        leftovers: Callable[[bool], Iterable[LeftoverSource]] = lambda _: (),
        phases: PhaseLog | None = None,
        phase_file: JournalFile[Phase] | None = None,
        run_of: Callable[[], Run | None] = lambda: None,
        events: EventExporter | None = None,
        device: Callable[[], Sequence[DevicePoint]] = tuple,
    ) -> None:
        self._sender = sender
        self._events = events
        self._idle_ns = idle_ns
        self._every_s = every_s
        self._prepare = prepare
        self._fault = fault
        self._warnings = warnings
        self._spool = spool
        self._leftovers_of = leftovers
        self._leftovers: deque[LeftoverSource] = deque()
        self._phase_file = phase_file
        self._log = phases or PhaseLog()
        if phase_file is not None:
            self._log.added = phase_file.write
        self._live = LiveSource(
            ring, encoder, spool, self._log, phase_file, run_of, None if events is None else events.live
        )
        self._at_once = _FRAMES_AT_ONCE
        self._has_said_goodbye = self._has_said_waiting = False
        self._health = HealthScopes(health, encoder, device, HEALTH_EVERY_S, fault)
        self._owes_health = False
        self._exit_status: int | None = None
        self._time = ClosingTime(timeout_s)
        self._wake = Bell()
        self._closing = threads().Event()
        self._thread = threads().Thread(target=self._work_untraced, name="esper-otel-export", daemon=True)
        self.sending: Sending = Sending(sender, timeout_s, warnings)
        self._phases = PhaseSending(self._live, self._log, self.sending, self._time, idle_ns, warnings)
        self.recovered: int = 0
        self.kept: int = 0
        self.outcome: str | None = None
        self.dropped: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Frames that have not been acknowledged."""
        return self._live.waiting

    @property
    def exported(self) -> int:
        """Frames of this session that the endpoint took."""
        return self._live.delivered

    @property
    def events(self) -> EventExporter | None:
        """What sends events; None if they are not sent."""
        return self._events

    def abandon(self) -> None:
        """Closes the connections and the spool of an exporter that will never be started."""
        self._sender.close()
        if self._events is not None:
            self._events.abandon()
        if self._spool is not None:
            self._spool.close("", is_delivered=True)

    def published(self) -> Callable[[], None] | None:
        """Returns the callback to run for each published frame, or None.

        The thread that publishes the frame runs it once the frame is in the ring.
        """
        write = None if self._spool is None else self._spool.write
        if self._every_s:
            return write

        def told() -> None:
            if write is not None:
                write()
            self._wake.set()

        return told

    def start(self) -> None:
        """Starts sending."""
        self._thread.start()
        if self._events is not None:
            self._events.start()

    def wake(self) -> None:
        """Sends the waiting frames now instead of at the end of the period."""
        self._wake.set()

    def join(self, deadline_s: float) -> None:
        """Waits for the thread to end, at most until ``deadline_s`` of ``time.monotonic`` or what it has become."""
        is_first = True
        while (
            left_s := max(deadline_s, self._time.deadline_s or 0.0) - time.monotonic()
        ) > 0 and self._thread.is_alive():
            if not is_first:
                self._say_how_many_wait()
            is_first = False
            self._thread.join(left_s)

    def hurry(self, deadline_s: float) -> None:
        """Brings forward the end of closing, as when a signal arrives meanwhile: by ``deadline_s`` at the latest."""
        self._time.hurry(deadline_s)

    def _say_how_many_wait(self) -> None:
        left_s = self._time.latest_s - time.monotonic()
        if self.waiting and not self._has_said_waiting:
            self._has_said_waiting = True
            announce("closing", f"steps left to send: {self.waiting}, for {left_s:.0f} s at most; Ctrl-C gives them up")

    def close(
        self, deadline_s: float, outcome: str, latest_s: float = float("-inf"), exit_status: int | None = None
    ) -> None:
        """Sends the remaining frames and the outcome of the run, then stops.

        Frames that could not be sent stay in the spool; without a spool they are counted as dropped, and the outcome
        is sent without them.

        Args:
            deadline_s: when to stop, as a time of ``time.monotonic``. Each time the endpoint takes frames, it is moved
                so that as much time is left as now,
            outcome: how the run ended.
            latest_s: but never beyond this time.
            exit_status: that of the process, if it is known.
        """
        self.outcome = outcome
        self._exit_status = exit_status
        self._time.begin(deadline_s, latest_s)
        self._closing.set()
        self._wake.set()
        try:
            self.join(deadline_s)
        except BaseException:  # if the steps are given up, the events are not waited for either
            self._time.deadline_s = time.monotonic()
            raise
        finally:  # after a Ctrl-C the remaining steps are still spooled or counted
            self._end(outcome)

    def _end(self, outcome: str) -> None:
        self._guarded("closing the sender", self._sender.close)
        self._thread.join(0.5)
        waiting = self.waiting
        has_events = self._events is not None
        try:
            if self._events is not None:
                has_events = not self._given("sending the last events", False, self._end_events, self._events, outcome)
        finally:  # a Ctrl-C here gives up the events only
            self._end_files(outcome, waiting, has_events=has_events)

    def _end_files(self, outcome: str, waiting: int, *, has_events: bool) -> None:
        """Leaves what was not sent to the next session, or counts it. ``waiting`` are the steps."""
        self._log.end()
        if self._phase_file is not None:
            self._guarded("closing the file of phases", self._phase_file.close)
        if self._spool is not None:
            self._guarded("writing the last steps to the spool", partial(self._spool.tend, now=True))
            self.kept = min(waiting, max(self._spool.last - self._live.cursor, 0))
            is_delivered = self._has_said_goodbye and not waiting and not self._live.waiting_phases
            self._spool.close(outcome, is_delivered=is_delivered, has_events=has_events)
        else:
            self._log.drop(self._log.last)
            if self._events is not None:
                self._events.count_lost()
        for leftover in self._leftovers:
            leftover.folder.release()
        if waiting > self.kept:
            self.dropped["not sent before close"] += waiting - self.kept

    # -- the thread --------------------------------------------------------------------------------------

    def _work_untraced(self) -> None:
        with untraced():  # all of the thread, so that its warnings are not sent over OTLP either
            self._work()

    def _work(self) -> None:
        self._adopt(are_all=False)
        others_at_s = time.monotonic() + _OTHERS_AFTER_S
        pause_s: float | None = self._every_s or HEALTH_EVERY_S
        while self._time.deadline_s is None:
            if time.monotonic() > others_at_s:
                others_at_s = math.inf
                self._adopt(are_all=True)
            # After a failure, a new step does not trigger an early retry.
            (self._closing if self.sending.failures else self._wake).wait(pause_s)
            self._wake.clear()
            pause_s = self._send_guarded()
        while (left_s := self._time.left_for_frames_s()) > 0 and self._send_guarded() is not None:
            time.sleep(min(_PAUSE_WHILE_CLOSING_S, left_s))
        try:
            self._give_up_frames()
            self._has_said_goodbye = self._say_goodbye()
        except Exception as error:  # noqa: BLE001 - the frames are delivered; the end of the run is not
            self.sending.report(f"{type(error).__name__}: {error}", error=error)

    def _guarded(self, where: str, work: Callable[..., None], *arguments: Any) -> None:
        """Runs secondary work. An internal error in it is only counted, so that it never delays or repeats steps."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 - see above
            self._fault(where, error)

    def _given(self, where: str, otherwise: _T, give: Callable[..., _T], *arguments: Any) -> _T:
        """Returns the result of ``give``, or ``otherwise`` after an internal error, which is only counted."""
        try:
            return give(*arguments)
        except Exception as error:  # noqa: BLE001 - as in _guarded
            self._fault(where, error)
            return otherwise

    def _send_guarded(self) -> float | None:
        """Sends all waiting frames. Returns the longest pause before the next call; None once closing is complete."""
        try:
            self._prepare()
            if self._events is not None:
                self._events.release(0)
            pause_s = self._send_waiting()
        except Exception as error:  # noqa: BLE001 - the thread must live as long as the session
            self.sending.report(f"{type(error).__name__}: {error}", error=error)
            pause_s = self.sending.pause()
        if pause_s is not None:
            return pause_s
        self.sending.failures = 0
        if self._time.deadline_s is not None:
            return None
        pause_s = self._every_s or HEALTH_EVERY_S
        is_more = self._live.waiting_phases or (self._events is not None and self._events.holds_back)
        return min(pause_s, PHASES_AFTER_S) if is_more else pause_s

    def _adopt(self, *, are_all: bool) -> None:
        try:
            for leftover in self._leftovers_of(are_all):
                self._leftovers.append(leftover)
                if leftover.deleted:
                    self.dropped["spool full"] += leftover.deleted
        except Exception as error:  # noqa: BLE001 - this session's frames are still sent
            self._warnings.say("spool", "what earlier sessions left cannot be sent: %s", error, exc_info=error)

    def _send_waiting(self) -> float | None:
        while self._leftovers:
            pause_s = self._send_leftover(self._leftovers[0])
            if pause_s is not None:
                return pause_s
            self._leftovers.popleft()
        pause_s = self._deliver(self._live)
        if pause_s is None and self._live.waiting_phases:
            pause_s = self._phases.send_live()
        if pause_s is None:
            self._guarded("sending health", self._send_health)
            self._guarded("sending events", self._release_events)
        return pause_s

    def _send_leftover(self, leftover: LeftoverSource) -> float | None:
        path = leftover.folder.path
        try:
            pause_s = self._deliver(leftover)
            if pause_s is None:
                pause_s = self._phases.send(leftover, None)
            if pause_s is None and not leftover.has_said_goodbye:
                self._guarded("ending the series of an earlier session", leftover.say_goodbye)
                pause_s = self._send_beside(leftover)
            if pause_s is not None:
                return pause_s
        except Exception as error:  # noqa: BLE001 - one damaged folder must not hold up everything else
            leftover.folder.release()
            self._warnings.say("spool", "%s cannot be sent and is left alone: %s", path, error, exc_info=error)
            return None
        self._put_aside(leftover)
        if self._given("reading events", False, self._hand_over, leftover):
            return None
        try:
            leftover.folder.remove()
        except OSError as error:
            self._warnings.say("spool", "%s was sent but cannot be deleted: %s", path, error)
        self._say_recovered(leftover)
        return None

    @staticmethod
    def _say_recovered(leftover: LeftoverSource) -> None:
        if leftover.delivered:
            announce("sent", f"{leftover.delivered} steps that an earlier session had left in {leftover.folder.path}")

    def _put_aside(self, leftover: LeftoverSource) -> None:
        """Keeps what could not be used of a folder, before the folder is deleted."""
        path, damage = leftover.folder.path, leftover.damage
        if not damage and not leftover.skipped:
            return
        aside = Quarantine(path.parent)
        name = aside.put("records", b"".join(each.content for each in damage)) if damage else ""
        self._warnings.say(
            "spool records",
            "in %s %d records could not be used%s; %s",
            path,
            max(leftover.skipped, len(damage)),
            f" (the first at {damage[0]})" if damage else "",
            f"their bytes are kept in {aside.path / name}" if name else "they are not kept",
        )

    def _deliver(self, source: FrameSource) -> float | None:
        """Sends the source's frames. Returns how long to pause before the next attempt; None when none is left.

        If there is a period, frames published in the meantime are sent in the next one: two requests that follow each
        other at once may be reordered on the way.
        """
        due = self._live.cursor + self._live.waiting
        while True:
            if self._time.left_for_frames_s() <= 0:
                return 0.0
            blocks, gone = source.after(self._at_once)
            if gone:
                self.dropped[source.lost] += gone
                self._advance(source, gone)
            if not blocks:
                return None
            blocks = before_a_return(blocks)
            settled = blocks[0].first - 1
            for request in self._requests(source, blocks):
                pause_s = self._settled(
                    source, request, self.sending.send(request.body, self._time.left_for_frames_s()), blocks, settled
                )
                if pause_s is not None:
                    return pause_s
                settled += request.frames
            if source is self._live and settled >= due and self._every_s and self._time.deadline_s is None:
                return None

    def _requests(self, source: FrameSource, blocks: Sequence[Block]) -> Iterator[Request]:
        """Yields the frames as requests. After an encoding error, halves the batch until the failing frame is found.

        That frame is dropped and counted, so that it does not block the frames after it.
        """
        try:
            yield from source.encoder.requests(blocks, self._along(source, blocks))
        except Exception as error:  # noqa: BLE001 - see above
            self._fault("encoding steps", error)
            rows = blocks[-1].last + 1 - blocks[0].first
            if rows > 1:
                self._at_once = rows // 2
            else:
                self.dropped["cannot be encoded"] += 1
                self._advance(source, 1)
        else:
            self._at_once = _FRAMES_AT_ONCE

    def _give_up_frames(self) -> None:
        """Counts the frames that can neither be sent in time nor kept, so that the counts sent last have them."""
        count = self.waiting
        if count and self._spool is None and self._live.run is not None:
            self._advance(self._live, count)
            self.dropped["not sent before close"] += count

    def _settled(
        self, source: FrameSource, request: Request, outcome: Outcome, blocks: Sequence[Block], settled: int
    ) -> float | None:
        """Handles the outcome of a request. Returns how long to pause before sending it again; None to continue.

        Args:
            source: where its frames are from.
            request: the request.
            outcome: the endpoint's answer.
            blocks: the frames of this request and of others.
            settled: sequence number of the last frame that earlier requests have settled.
        """
        if outcome.result is Result.TOO_LARGE and source.encoder.shrink(request.points // 2):
            return 0.0
        if self.sending.is_to_be_repeated(outcome):
            return self.sending.pause(outcome)
        if outcome.result is not Result.DELIVERED:
            self.sending.report(outcome.reason, outcome.result)
            self.dropped[outcome.result.value] += request.frames
            self._owes_health = self._owes_health or request.has_health
            self._phases.note(source, request.last_phase, is_refused=True)
            self._guarded("reading events", self._read_events, source, blocks, settled, request.frames)
            self._advance(source, request.frames)
            return None
        self.sending.failures = 0
        self._guarded("reading events", self._read_events, source, blocks, settled, request.frames)
        source.delivered += request.frames
        if source is not self._live:
            self.recovered += request.frames
        self._advance(source, request.frames)  # first, so that an error below does not send delivered frames again
        source.has_said_goodbye = source.has_said_goodbye or request.is_goodbye
        self._phases.note(source, request.last_phase)
        health_unix_ns = self._health.unix_ns if request.has_health else 0
        source.sent_unix_ns = max(source.sent_unix_ns, health_unix_ns, self._phases.unix_ns)
        last = settled + request.frames
        source.run = next(block.run for block in blocks if block.last >= last)
        self._guarded("noting an answer", self.sending.note_answer, request, outcome)
        self._guarded("noting the series sent", source.streams.named, request.names)
        if request.frames:
            self._guarded("noting the series ended", source.streams.settled, last)
        return None

    def _advance(self, source: FrameSource, count: int) -> None:
        """Moves past settled frames, even if the disk cannot record that."""
        if source is self._live:
            self._time.extend()
        try:
            source.advance(count)
        except OSError as error:
            self._warnings.say(
                "spool", "the spool cannot record what was sent (%s): after a kill it is sent again", error
            )

    def _send_beside(self, source: FrameSource) -> float | None:
        """Sends the requests after the last frame. Returns how long to pause before trying again, None when done."""
        while source.beside:
            outcome = self.sending.send(source.beside[0], self._time.left_s())
            if self.sending.is_to_be_repeated(outcome):
                return self.sending.pause(outcome)
            if outcome.result is not Result.DELIVERED:
                self.sending.report(outcome.reason, outcome.result)
            source.beside.popleft()
        return None

    # -- data sent in addition to the frames -------------------------------------------------------------

    def _along(self, source: FrameSource, blocks: Sequence[Block]) -> AccompanyingData:
        """Collects the data to send with the frames of a source. An internal error in it does not delay the frames."""
        is_over = source is not self._live or (self._time.deadline_s is not None and not self._leftovers)
        all_ended = partial(self._given, "ending the series", list[Stream](), source.streams.all_ended)
        return AccompanyingData(
            self._given("noting the series sent", {}, source.streams.note, blocks),
            partial(self._given, "saying the counts", _NO_SCOPES, partial(self._health_of, source)),
            all_ended if is_over and source.are_last(blocks) else None,
            partial(self._given, "sending phases", NO_PHASES, self._phases.along, source),
        )

    # -- events ------------------------------------------------------------------------------------------

    @staticmethod
    def _read_events(source: FrameSource, blocks: Sequence[Block], settled: int, frames: int) -> None:
        """Reads the events of frames that are settled, before the spool forgets these."""
        if source.events is not None and frames:
            source.events.reader.read(blocks, settled + 1, settled + frames)

    def _release_events(self) -> None:
        """Releases events that happened before what was sent, or at a time that no later frame can precede."""
        if self._events is not None:
            last_unix_ns = max(self._live.streams.last_unix_ns, 0)
            self._events.release(max(last_unix_ns, self._idle_ns(last_unix_ns) or 0))

    def _hand_over(self, leftover: LeftoverSource) -> bool:
        """Leaves the folder of an earlier session to the exporter of events, if there are any."""
        if leftover.events is None or self._events is None:
            return False
        if leftover.run is not None:  # the session may have noted its first events before the ranks agreed on its name
            leftover.events.settle(leftover.run, leftover.encoder.resource(leftover.run))
        leftover.events.reader.end(leftover.outcome, leftover.newest_unix_ns)
        leftover.folder.delete_delivered()  # so that the end of the run is not sent again if its events have to wait
        self._events.adopt(leftover.events)
        self._say_recovered(leftover)
        return True

    def _end_events(self, events: EventExporter, outcome: str) -> bool:
        """Adds the end of the run, unless the next session sends it, and sends the last events. Returns whether all.

        With steps in a spool that were not sent, more may have happened.
        """
        is_next = self._spool is not None and (self.waiting or not self._has_said_goodbye)
        live, run = events.live, self._live.run
        try:
            if live is not None and run is not None:
                live.resource = partial(self._live.encoder.resource, run)
            if live is not None and not is_next:
                live.reader.end(outcome, live.log.now_ns(), self._exit_status)
                if live.resource() is None:  # no step, no phase, and nothing went wrong: no run for anybody to see
                    live.log.delivered(live.log.last)
        finally:
            is_all = events.close(self._time.deadline_s or 0.0)
        return is_all

    # -- health ------------------------------------------------------------------------------------------

    def _health_of(self, source: FrameSource, time_unix_ns: int, frames: int, is_end: bool) -> Sequence[ScopeMetrics]:
        """Returns the session's own metrics if they are due, as they will be once the request's frames are accepted.

        They are sent with the frames and get the millisecond of the newest frame. With the current time they would be
        later than the frame of a step that is still open, and that frame would then arrive out of order. The counts are
        not sent again when a request is repeated: newer counts follow, and a repeated request must not report
        different counts for the same time.
        """
        if isinstance(source, LeftoverSource):
            return source.health(time_unix_ns) if is_end else ()
        if is_end:
            return self._health.last(time_unix_ns, frames)
        is_due = self._time.deadline_s is None and self._health.is_due()
        return self._health.at(time_unix_ns, frames) if is_due and time_unix_ns > self._health.unix_ns else ()

    def _send_health(self) -> None:
        """Sends the session's own metrics in a separate request, in the two cases where no frames can carry them.

        The first case: the endpoint refused a request that contained them. If it refuses all frames, the counts are
        the only sign of that. The second: no steps are recorded for a while, for example during validation. They are
        then sent at intervals, but not soon after frames, which a small request may overtake on the way. While a step
        is open, its frame would be older than new counts: the counts of what was sent last are sent again, as a sign
        that the process lives.
        """
        run, last_unix_ns = self._live.run, self._live.streams.last_unix_ns
        if run is None or self._time.deadline_s is not None:
            return
        if not self._owes_health:
            if time.monotonic() < max(self._health.next_s, self.sending.last_sent_s + HEALTH_EVERY_S):
                return
            idle_unix_ns = self._idle_ns(last_unix_ns)
            if idle_unix_ns is None:
                scopes = self._health.again(max(last_unix_ns, self._live.sent_unix_ns))
            elif idle_unix_ns > max(last_unix_ns, self._health.unix_ns):
                scopes = self._health.at(idle_unix_ns)
            else:
                return
        else:
            scopes = self._health.at(last_unix_ns)
        self._owes_health = False
        self.sending.send(self._live.encoder.alone(run, *scopes), self._time.left_s())
        self._live.sent_unix_ns = max(self._live.sent_unix_ns, self._health.unix_ns)

    def _say_goodbye(self) -> bool:
        """Sends the final counts, the outcome of the run, and the end of every series.

        Frames that are kept in a spool are sent before them, by a later session. Returns whether everything that could
        be sent was delivered.
        """
        live = self._live
        if self.waiting or self._leftovers or self._time.deadline_s is None:
            return False
        if live.has_said_goodbye:
            return True  # it went with the last frames
        if live.run is None:
            if self.outcome in FINE and not live.sent_unix_ns:
                return True  # nothing was ever sent, and nothing went wrong: no run for anybody to see
            live.run, live.sent_unix_ns = live.phases_run, max(live.sent_unix_ns, time.time_ns())
        time_unix_ns = max(live.streams.last_unix_ns, self._health.unix_ns, live.sent_unix_ns) + _MS
        health = self._given("saying how the run ended", _NO_SCOPES, self._health.last, time_unix_ns)
        put_goodbye(live, health, time_unix_ns, self._fault)
        while time.monotonic() < self._time.deadline_s:
            if self._send_beside(live) is None:
                return True
            time.sleep(_PAUSE_WHILE_CLOSING_S)
        return False
