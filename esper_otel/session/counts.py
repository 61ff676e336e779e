"""SessionCounts: what a session has recorded, sent and lost, for instruments, ``Telemetry.health`` and the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from esper_otel.export.event_exporter import NO_LOGS
from esper_otel.export.exporter import StepExporter
from esper_otel.record.frame_publisher import FramePublisher
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.recorder import Recorder
from esper_otel.settings import EsperSettings


class SessionCounts:
    """Counts what a session has recorded, sent and lost.

    Args:
        recorder: the recorder.
        publisher: publishes its steps.
        mistakes: mistakes that are left out; None if they raise.
        settings: the settings.
        attributes: the session's Resource.
        pulled: returns the number of the last step that was pulled.

    Attributes:
        exporter: sends the steps; None if they are not sent.
    """

    def __init__(
        self,
        recorder: Recorder,
        publisher: FramePublisher,
        mistakes: Mistakes | None,
        settings: EsperSettings,
        attributes: Mapping[str, object],
        pulled: Callable[[], int],
    ) -> None:
        self.exporter: StepExporter | None = None
        self._recorder, self._publisher, self._mistakes = recorder, publisher, mistakes
        self._for_alerts = _for_alerts(settings.risk_thresholds, attributes)
        self._pulled = pulled

    def by_name(self) -> Mapping[tuple[str, str], float]:
        """Returns the session metrics by (name, reason)."""
        publisher, exporter = self._publisher, self.exporter
        publisher.tally.catch_up()
        counters = publisher.counters
        counts: dict[tuple[str, str], float] = {
            ("esper.steps", ""): publisher.ring.last,
            ("esper.steps.failed", ""): counters.failed,
            ("esper.steps.without_device_values", ""): counters.without_device_values,
            ("esper.values.nonfinite", ""): counters.nonfinite + publisher.tally.nonfinite,
            ("esper.values.out_of_range", ""): counters.out_of_range + publisher.tally.out_of_range,
            ("esper.clock.jumps", ""): self._recorder.clock.jumps,
            ("esper.errors.internal", ""): counters.faults,
            ("esper.phases.dropped", ""): self._recorder.phases.log.dropped,
            ("esper.frames.recorded", ""): publisher.ring.last,
            ("esper.buffer.bytes", ""): publisher.ring.size,
            ("esper.pull.lag", ""): publisher.ring.last - self._pulled(),
        }
        for name, total_ms in self._recorder.phases.log.totals().items():
            counts["esper.phase_ms", name] = total_ms
        if self._mistakes is not None:
            counts["esper.mistakes", ""] = self._mistakes.count
        counts.update(self._for_alerts)
        if exporter is not None:
            counts["esper.frames.exported", ""] = exporter.exported
            counts["esper.export.queue", ""] = exporter.waiting
            counts["esper.frames.recovered", ""] = exporter.recovered
            counts["esper.export.retries", ""] = exporter.sending.retries
            counts["esper.points.rejected", ""] = exporter.sending.rejected_points
            if exporter.outcome is not None:
                counts["esper.run.ended", exporter.outcome] = 1
            if exporter.sending.latency_ms is not None:
                counts["esper.export.latency_ms", ""] = exporter.sending.latency_ms
            for reason, dropped in exporter.dropped.copy().items():
                counts["esper.frames.dropped", reason] = dropped
            if exporter.events is not None:
                counts["esper.events.sent", ""] = exporter.events.sent
            for reason, dropped in self._dropped_events().items():
                counts["esper.events.dropped", reason] = dropped
            for reason, unix_s in exporter.sending.errors_unix_s.copy().items():
                counts["esper.export.last_error", reason] = unix_s
        return counts

    def health(self) -> Mapping[str, int | float | str | None]:
        """See ``Telemetry.health``."""
        publisher, exporter = self._publisher, self.exporter
        publisher.tally.catch_up()
        return {
            "recorded": publisher.ring.last,
            "exported": 0 if exporter is None else exporter.exported,
            "dropped": 0 if exporter is None else exporter.dropped.total(),
            "queue": 0 if exporter is None else exporter.waiting,
            "kept": 0 if exporter is None else exporter.kept,
            "buffer_bytes": publisher.ring.size,
            "retries": 0 if exporter is None else exporter.sending.retries,
            "latency_ms": None if exporter is None else exporter.sending.latency_ms,
            "failed": publisher.counters.failed,
            "nonfinite": publisher.counters.nonfinite + publisher.tally.nonfinite,
            "out_of_range": publisher.counters.out_of_range + publisher.tally.out_of_range,
            "faults": publisher.counters.faults,
            "mistakes": 0 if self._mistakes is None else self._mistakes.count,
            "events": 0 if exporter is None or exporter.events is None else exporter.events.sent,
            "events_dropped": sum(self._dropped_events().values()),
            "last_error": None if exporter is None else exporter.sending.last_error,
        }

    def summary(self, outcome: str) -> str:
        """Returns the sentence with which a session ends."""
        health = self.health()
        summary = f"run {self._publisher.run.run_id} {outcome}, frames recorded {health['recorded']}"
        if self.exporter is not None:
            summary += f", exported {health['exported']}, dropped {health['dropped']}"
            if self.exporter.dropped:
                reasons_why = ", ".join(f"{reason}: {count}" for reason, count in self.exporter.dropped.items())
                summary += f" ({reasons_why})"
            if self.exporter.kept:
                summary += f", kept for the next start {health['kept']}"
            if events := self._dropped_events():
                reasons_why = ", ".join(f"{reason}: {count}" for reason, count in events.items())
                summary += f", events dropped {sum(events.values())} ({reasons_why})"
        if health["mistakes"]:
            summary += f", mistakes left out {health['mistakes']}"
        return summary

    def has_lost(self) -> bool:
        """Returns whether steps or events were dropped, or mistakes left out."""
        is_dropped = self.exporter is not None and bool(
            self.exporter.dropped.total() or self._dropped_events().keys() - {NO_LOGS}
        )
        return is_dropped or (self._mistakes is not None and self._mistakes.count > 0)

    def _dropped_events(self) -> dict[str, int]:
        """Returns the number of dropped events by reason."""
        return {} if self.exporter is None or self.exporter.events is None else self.exporter.events.dropped


def _for_alerts(thresholds: Mapping[str, float], attributes: Mapping[str, object]) -> dict[tuple[str, str], float]:
    """Returns what the rules for Prometheus must know of a run: its own thresholds, and whether it is muted.

    A disabled signal has the threshold 1e308, because not every receiver takes infinity.
    """
    own = {("esper.risk.threshold", name): min(value, 1e308) for name, value in thresholds.items()}
    return own | ({("esper.alerts.muted", ""): 1.0} if attributes.get("esper.alerts") == "off" else {})
