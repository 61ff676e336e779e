"""Delivers files and spools, with retries, until everything is acknowledged or the time is over."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from esper_otel.errors import ConfigurationError
from esper_otel.events.frame_events import EventReader
from esper_otel.export.encode import Encoder
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.event_exporter import EventExporter
from esper_otel.export.exporter import StepExporter
from esper_otel.export.outcome import Outcome, Result
from esper_otel.export.resource import resource_for
from esper_otel.export.source import leftovers_in
from esper_otel.export.transport import Sender
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings, logger
from esper_otel.schema import METRICS
from esper_otel.send.lines import Progress, RequestLine, has_more, lines_of
from esper_otel.send.notes import Notes, RefusedItems
from esper_otel.text import printable

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_NOTE_EVERY_S = 1.0
_LONGEST_S = 365 * 86_400.0  # of a thread's wait
_MEBI = 1024 * 1024
_MOST_RUNS = 3
_MOST_OF_A_LINE = 5_000
REFUSED = "refused.json"  # in a spool


def say(text: str) -> None:
    """Prints a line. Names of files may come from another machine."""
    sys.stdout.write(f"{printable(text, _MOST_OF_A_LINE)}\n")


class Delivery:
    """Delivers files of OTLP JSON lines.

    Args:
        sender: sends the requests.
        endpoint: where to.
        deadline_s: when to give up, of ``time.monotonic``.
    """

    def __init__(self, sender: Sender, endpoint: Endpoint, deadline_s: float) -> None:
        self._sender = sender
        self._endpoint = endpoint
        self._deadline_s = deadline_s
        self._sent = 0

    def deliver(self, path: Path) -> bool:
        """Delivers the rest of a file, and says what became of it. Returns whether all of it is delivered.

        What was refused in an earlier call is said again, until its note is removed.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        self._sent = 0
        try:
            progress = Progress(path, self._endpoint.target)
            is_over = self._deliver(path, progress)
            is_torn = is_over and has_more(path, progress.offset)
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror or error}") from None
        parts = [f"{self._sent} requests delivered to {self._endpoint.target}"]
        parts += progress.refusals.texts(progress.notes)
        parts += ["the last line has no end: its process writes it now, or was killed"] * is_torn
        parts += ["the rest is for the next call"] * (not is_over)
        say(f"{path}: {', '.join(parts)}")
        return is_over and not progress.refusals.counts

    def _deliver(self, path: Path, progress: Progress) -> bool:
        noted_s, offset = time.monotonic(), progress.offset
        try:
            for line in lines_of(path, progress.offset, self._endpoint.signal):
                if not self._is_settled(line, progress.refusals):
                    return False
                offset = line.end
                if time.monotonic() - noted_s > _NOTE_EVERY_S:
                    progress.note(offset)
                    noted_s = time.monotonic()
        finally:  # after a Ctrl-C as well
            if offset != progress.offset:
                progress.note(offset)
        return True

    def _is_settled(self, line: RequestLine, refusals: RefusedItems) -> bool:
        """Sends a line until the endpoint takes it or refuses it for good. Returns False when the time is over."""
        where = f"bytes {line.start} to {line.end}"
        if line.body is None:
            refusals.add(f"lines that are not OTLP {self._endpoint.signal} were left out", 1, where)
            return True
        where += _runs_of(line.body, self._endpoint.signal)
        outcome, pause_s = self._exchanged(line.body), _FIRST_PAUSE_S
        while outcome.result in {Result.TEMPORARY, Result.UNAUTHENTICATED}:
            pause_s = outcome.retry_after_s or pause_s
            has_no_logs = outcome.is_missing and self._endpoint.signal == "logs"  # which may be so for ever
            if has_no_logs or time.monotonic() + pause_s > self._deadline_s:
                logger.warning("%s", outcome.reason)
                return False
            self._warnings.say("send", "%s; trying again", outcome.reason)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            outcome = self._exchanged(line.body)
        if outcome.result is Result.DELIVERED:
            self._sent += 1
            if outcome.rejected_points:
                what = "events" if self._endpoint.signal == "logs" else "points"
                refusals.add(f"{what} refused", outcome.rejected_points, f"{where}: {outcome.reason}")
        else:
            refusals.add("refused for good", 1, f"{where}: {outcome.reason}")
            self._warnings.say("refused", "%s", outcome.reason)
        return True

    _warnings = Warnings()

    def _exchanged(self, body: bytes) -> Outcome:
        left_s = max(self._deadline_s - time.monotonic(), 0.1)
        return self._sender.send(body, min(self._endpoint.timeout_s, left_s))


def _runs_of(body: bytes, signal: str) -> str:
    """Names the first runs of a request, or nothing if it does not say them."""
    resources = (
        [each.resource for each in ExportLogsServiceRequest.FromString(body).resource_logs]
        if signal == "logs"
        else [each.resource for each in ExportMetricsServiceRequest.FromString(body).resource_metrics]
    )
    attributes = (each for resource in resources for each in resource.attributes if each.key == "esper.run.id")
    runs = list(dict.fromkeys(each.value.string_value for each in attributes))
    return f", run {', '.join(runs[:_MOST_RUNS])}" if runs else ""


def send_spool(
    directory: Path,
    sender: Sender,
    endpoint: Endpoint,
    deadline_s: float,
    warnings: Warnings,
    logs: tuple[Sender, Endpoint] | None = None,
) -> bool:
    """Delivers what sessions have left in a spool, as the next session there would. Returns whether nothing is left.

    Folders of sessions that are alive are left alone. What the endpoint has refused is noted in the spool, and said
    again by each call until that note is removed.

    Args:
        directory: the setting ``spool_dir`` of those sessions.
        sender: sends the requests; closed at the end.
        endpoint: where to.
        deadline_s: when to give up, of ``time.monotonic``.
        warnings: where failures are reported.
        logs: sends events, and where to; None if the sessions have noted none.
    """
    faults: list[str] = []

    def fault(where: str, error: Exception) -> None:
        faults.append(where)
        warnings.say(f"fault {where}", "%s: %s", where, error, exc_info=error)

    catalogue = {metric.name: metric for metric in METRICS}
    events = None
    if logs is not None:
        events = EventExporter(logs[0], None, timeout_s=logs[1].timeout_s, fault=fault, warnings=warnings)
    leftovers = leftovers_in(
        directory,
        Encoder,
        fault,
        most_bytes=sys.maxsize,
        warnings=warnings,
        reader_of=None if events is None else EventReader,
    )
    exporter = StepExporter(
        Ring(_MEBI),
        Encoder(catalogue, resource_for),
        sender,
        every_s=0.0,
        timeout_s=endpoint.timeout_s,
        prepare=lambda: None,
        health=dict,
        idle_ns=lambda _: None,
        fault=fault,
        warnings=warnings,
        leftovers=lambda are_all: () if are_all else leftovers,
        events=events,
    )
    exporter.start()
    exporter.close(min(deadline_s, time.monotonic() + _LONGEST_S), "completed")
    left = sum(1 for leftover in leftovers if leftover.folder.path.exists())
    notes = Notes(directory / REFUSED, endpoint.target)
    refusals = RefusedItems(notes.mine)
    _add_losses(refusals, exporter)
    if refusals.counts != refusals.earlier:
        notes.write(refusals.noted())
    parts = [f"{exporter.recovered} steps delivered to {endpoint.target}"]
    if logs is not None and events is not None:
        parts.append(f"{events.sent} events to {logs[1].target}")
    parts += refusals.texts(notes.path)
    parts += [f"{left} sessions are not delivered yet"] * bool(left)
    say(f"{directory}: {', '.join(parts)}")
    return not left and not refusals.counts and not faults


def _add_losses(refusals: RefusedItems, exporter: StepExporter) -> None:
    """Adds what an exporter could not deliver."""
    why = exporter.sending.last_error or "see the log"
    for reason, count in exporter.dropped.items():
        refusals.add(f"steps lost: {reason}", count, f"{reason}: {why}")
    if exporter.sending.rejected_points:
        refusals.add("points refused", exporter.sending.rejected_points, why)
    if exporter.events is not None:
        for reason, count in exporter.events.dropped.items():
            refusals.add(f"events lost: {reason}", count, reason)
