"""Sends the events of a run to the endpoint of logs, as a run would that sends events."""

from __future__ import annotations

import time
from pathlib import Path

from esper_otel.check.stages import FIXES, CheckStage
from esper_otel.errors import ConfigurationError
from esper_otel.events.happenings import run_ended, run_started
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.event_records import request_of
from esper_otel.export.outcome import Result
from esper_otel.export.resource import resource_for
from esper_otel.export.transport import open_sender
from esper_otel.frames.event_log import EventLog
from esper_otel.frames.frame import Run

_NO_LOGS = "give one that takes logs in OTEL_EXPORTER_OTLP_LOGS_ENDPOINT, or send no events: OTEL_LOGS_EXPORTER=none"


def at_logs(endpoint: Endpoint, token_file: Path | None, run: Run) -> CheckStage:
    """Sends start and end of a run, as events, and describes the outcome.

    Args:
        endpoint: where logs are sent.
        token_file: the file with the token for it.
        run: the run.
    """
    now_ns = time.time_ns()
    log = EventLog(now_ns)
    log.add_all([run_started(now_ns), run_ended("completed", now_ns, None, None)])
    try:
        sender = open_sender(endpoint, token_file)
    except ConfigurationError as error:
        return CheckStage("events", False, str(error))
    try:
        outcome = sender.send(request_of(log.waiting(None, 2), resource_for(run)), endpoint.timeout_s)
    finally:
        sender.close()
    if outcome.result is not Result.DELIVERED:
        return CheckStage("events", False, outcome.reason, _NO_LOGS if outcome.is_missing else FIXES[outcome.result])
    if outcome.rejected_points:
        reason = f"{endpoint.target} refused {outcome.rejected_points} events: {outcome.reason}"
        return CheckStage("events", False, reason, "the endpoint's log says what it does not accept")
    return CheckStage("events", True, f"{endpoint.target} took the start and the end of a run as logs")
