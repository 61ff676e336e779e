"""Notes the events of a session that are not read from its frames: its start, checkpoints and mistakes."""

from __future__ import annotations

import os

from esper_otel.events.happenings import checkpoint, mistake, run_started
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.transport import Sender
from esper_otel.frames.event_log import EventLog
from esper_otel.frames.phase_log import CHECKPOINT
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.recorder import Recorder


class EventNotes:
    """Adds events to the journal of a session where they happen. Does nothing in a forked child.

    Threads: any.

    Args:
        recorder: the recorder of the session.
        mistakes: notes the mistakes of the program; None if they are raised.
        endpoint: where events are sent.
        sender: sends them; closed by the exporter that gets it.

    Attributes:
        endpoint: where events are sent.
        sender: sends them.
        log: the journal.
    """

    def __init__(self, recorder: Recorder, mistakes: Mistakes | None, endpoint: Endpoint, sender: Sender) -> None:
        self.endpoint = endpoint
        self.sender = sender
        self.log: EventLog = EventLog(recorder.phases.log.start_unix_ns, now_ns=recorder.clock.now_ns)
        self._recorder = recorder
        self._mistakes = mistakes
        self._process_id = os.getpid()

    def begin(self) -> None:
        """Notes the start, and everything from now on."""
        recorder = self._recorder
        self.log.add(run_started(recorder.clock.now_ns()))
        recorder.phases.ended = self._ended_phase
        if self._mistakes is not None:
            self._mistakes.noted = self._noted_mistake

    def _ended_phase(self, name: str, start_unix_ns: int, end_unix_ns: int) -> None:
        if name == CHECKPOINT and os.getpid() == self._process_id:
            self.log.add(checkpoint(start_unix_ns, end_unix_ns, *self._place()))

    def _noted_mistake(self, kind: str, text: str) -> None:
        if os.getpid() == self._process_id:
            self.log.add(mistake(kind, text, self._recorder.clock.now_ns(), *self._place()))

    def _place(self) -> tuple[int | None, int | None]:
        """Returns number and epoch of the open step, or of the newest one; None before the first."""
        step, ring = self._recorder.open_step, self._recorder.publisher.ring
        if step is not None:
            return step.global_step, step.epoch
        newest = ring.row(ring.last)
        return (None, None) if newest is None else (newest.global_step, newest.epoch)
