"""A notice, and the forms in which webhooks take it: our own JSON, Slack's, and Alertmanager's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

from esper_otel.text import printable

VERSION = 1
ENTERED, ESCALATED, LEFT = "signal_entered", "signal_escalated", "signal_left"
ENDED, SILENT, NO_STEPS, BACK = "run_ended", "run_silent", "run_without_steps", "run_back"

_ALERTS = {
    **dict.fromkeys((ENTERED, ESCALATED, LEFT), "EsperSignal"),
    **dict.fromkeys((SILENT, NO_STEPS, BACK), "EsperRunSilent"),
    ENDED: "EsperRunEnded",
}
_RESOLVED = (LEFT, BACK)
_COMPLETED = "completed"

Alert: TypeAlias = dict[str, Any]  # of Alertmanager's API
_Key: TypeAlias = tuple[str, str, str, int | None]


class Notice(NamedTuple):
    """Something that people want to know about a run.

    Attributes:
        event: ``signal_entered``, ``signal_escalated``, ``signal_left``, ``run_ended``, ``run_silent``,
            ``run_without_steps`` or ``run_back``.
        run_id: the run.
        time_unix_ms: when it happened: the time of the step, or when the gateway noticed.
        text: one sentence for people.
        rank: rank of the process; None if it is about the whole run.
        attempt: which start of the run; None likewise.
        step: number of the step; None likewise.
        signal: name of the risk signal; empty if it is not about one.
        level: ``HIGH`` or ``CRITICAL`` for signals.
        value: the signal's value; NaN if it has none.
        reason: the signal's reason, or how the run ended.
        tenant: whose run it is; not told.
    """

    event: str
    run_id: str
    time_unix_ms: int
    text: str
    rank: int | None = None
    attempt: int | None = None
    step: int | None = None
    signal: str = ""
    level: str = ""
    value: float = math.nan
    reason: str = ""
    tenant: str = ""


def as_json(notices: Sequence[Notice], dropped: int) -> dict[str, Any]:
    """Returns our own form. What does not apply to a notice is left out."""
    return {"version": VERSION, "dropped": dropped, "notices": [_as_object(notice) for notice in notices]}


def _as_object(notice: Notice) -> dict[str, Any]:
    optional = {
        "rank": notice.rank,
        "attempt": notice.attempt,
        "step": notice.step,
        "signal": notice.signal or None,
        "level": notice.level or None,
        "value": None if not math.isfinite(notice.value) else notice.value,
        "reason": notice.reason or None,
    }
    return {
        "event": notice.event,
        "run_id": notice.run_id,
        "time": _time(notice.time_unix_ms),
        "text": notice.text,
        **{name: value for name, value in optional.items() if value is not None},
    }


def as_slack(notices: Sequence[Notice], dropped: int) -> dict[str, Any]:
    """Returns the form of Slack's incoming webhooks: one message, a line for each notice."""
    lines = [printable(notice.text, 1000) for notice in notices]
    if dropped:
        lines.append(f"{dropped} earlier notices were dropped")
    text = "\n".join(lines)
    return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}


def most_common(tenants: Iterable[str]) -> str:
    """Returns the tenant that occurs most often: the one to give way."""
    return Counter(tenants).most_common(1)[0][0]


def _labels(notice: Notice) -> dict[str, str]:
    labels = {"alertname": _ALERTS[notice.event], "run_id": printable(notice.run_id)}
    if notice.signal:
        severity = "critical" if notice.level == "CRITICAL" else "warning"
        labels |= {"signal": notice.signal, "rank": str(notice.rank or 0), "severity": severity}
    return labels


class Alerts:
    """The alerts that Alertmanager has to know: it forgets those that are not repeated, after five minutes by default.

    Args:
        most: how many alerts are repeated; if there are more, the tenant that has most loses its oldest.
    """

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._active: dict[_Key, Alert] = {}
        self._tenants: dict[_Key, str] = {}

    def of(self, notices: Sequence[Notice]) -> list[Alert]:
        """Returns the alerts of notices: those that begin, go on in a new way, or are over.

        An alert keeps the labels with which it began, because they identify it; what has changed is in its summary.
        """
        return [self._of(notice) for notice in notices if not (notice.event == ENDED and notice.reason == _COMPLETED)]

    def _of(self, notice: Notice) -> Alert:
        key = (_ALERTS[notice.event], notice.run_id, notice.signal, notice.rank)
        new = {"labels": _labels(notice), "startsAt": _time(notice.time_unix_ms)}
        summary = {"annotations": {"summary": printable(notice.text, 1000)}}
        if notice.event in _RESOLVED:
            self._tenants.pop(key, None)
            return {**self._active.pop(key, new), **summary, "endsAt": _time(notice.time_unix_ms)}
        alert = {**self._active.get(key, new), **summary}
        if notice.event != ENDED:
            self._active[key], self._tenants[key] = alert, notice.tenant
            if len(self._active) > self._most:
                largest = most_common(self._tenants.values())
                oldest = next(each for each, tenant in self._tenants.items() if tenant == largest)
                del self._active[oldest], self._tenants[oldest]
        return alert

    def active(self) -> list[Alert]:
        """Returns the alerts that go on."""
        return list(self._active.values())


def _time(unix_ms: int) -> str:
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


FORMS: Mapping[str, Callable[[Sequence[Notice], int], dict[str, Any]]] = {"": as_json, "slack": as_slack}
ALERTMANAGER = "alertmanager"
