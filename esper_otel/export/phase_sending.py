"""PhaseSending: which phases go with frames, and phases that are sent alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from esper_otel.export.closing_time import ClosingTime
from esper_otel.export.encode import NO_PHASES, PhasesAlong
from esper_otel.export.phase_points import in_one_request, phase_scope
from esper_otel.export.sending import Sending
from esper_otel.export.source import FrameSource, LiveSource
from esper_otel.export.transport import Result
from esper_otel.frames.phase_log import Phase, PhaseLog
from esper_otel.log import Warnings

PHASES_AFTER_S = 2.0  # a small request may overtake one with steps that was sent just before


class PhaseSending:
    """Sends the phases of all sources. Threads: only the exporter's.

    Args:
        live: this session's frames.
        log: this session's phases.
        sending: sends requests.
        closing: how much time there is.
        idle_ns: see ``StepExporter``.
        warnings: where failures are reported.

    Attributes:
        unix_ns: the newest time of the phases that were given to go with frames.
    """

    def __init__(
        self,
        live: LiveSource,
        log: PhaseLog,
        sending: Sending,
        closing: ClosingTime,
        idle_ns: Callable[[int], int | None],
        warnings: Warnings,
    ) -> None:
        self._live = live
        self._log = log
        self._sending = sending
        self._time = closing
        self._idle_ns = idle_ns
        self._warnings = warnings
        self.unix_ns: int = 0

    def along(self, source: FrameSource, time_unix_ns: int) -> PhasesAlong:
        """Returns the phases to send with frames up to this time."""
        self.unix_ns = time_unix_ns
        waiting = source.phases(time_unix_ns)
        if not waiting:
            return NO_PHASES
        along, end_unix_ns = self._along_with(source, waiting)
        self.unix_ns = max(time_unix_ns, end_unix_ns)  # late phases are moved, maybe beyond the frames
        return along

    def note(self, source: FrameSource, number: int, *, is_refused: bool = False) -> None:
        """Moves past the phases of a request that the endpoint has taken, or refused for good."""
        if not number:
            return
        if is_refused:
            self._log.dropped += sum(phase.number <= number for phase in source.phases(None))
        try:
            source.phases_delivered(number)
        except OSError as error:
            self._warnings.say(
                "spool", "the spool cannot record which phases were sent (%s): after a kill they are sent again", error
            )

    def send_live(self) -> float | None:
        """Sends phases that no frame carries: at the end, or if none follows for a while, as in a long evaluation.

        They are not sent while a step is open, whose frame would be older.
        """
        if self._time.deadline_s is not None:
            return self.send(self._live, None)
        if self._live.run is None or time.monotonic() < self._sending.last_sent_s + PHASES_AFTER_S:
            return None
        until_unix_ns = self._idle_ns(max(self._live.streams.last_unix_ns, 0))
        return None if until_unix_ns is None else self.send(self._live, until_unix_ns)

    def send(self, source: FrameSource, until_unix_ns: int | None) -> float | None:
        """Sends phases alone. Returns how long to pause before trying again, None when done."""
        while waiting := source.phases(until_unix_ns):
            run = source.phases_run
            if run is None:
                break
            if self._time.left_s() <= 0:
                return 0.0
            along, end_unix_ns = self._along_with(source, waiting)
            assert along.scope is not None
            outcome = self._sending.send(source.encoder.alone(run, along.scope), self._time.left_s())
            if self._sending.is_to_be_repeated(outcome):
                return self._sending.pause(outcome)
            is_refused = outcome.result is not Result.DELIVERED
            if is_refused:
                self._sending.report(outcome.reason, outcome.result)
            self.note(source, along.last, is_refused=is_refused)
            source.sent_unix_ns = max(source.sent_unix_ns, end_unix_ns)
        return None

    def _along_with(self, source: FrameSource, waiting: Sequence[Phase]) -> tuple[PhasesAlong, int]:
        """Returns the first of these phases, as many as fit into one request, and the newest end of them."""
        some = in_one_request(waiting, source.sent_unix_ns)
        scope = phase_scope(some, source.encoder.catalogue, source.start_unix_ns)
        return PhasesAlong(scope, some[-1].number), max(phase.end_unix_ns for phase in some)
