"""The events of a run, for the live page and the report: a list as HTML, and marks for the charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, NamedTuple

from esper_otel.schema.events import Severity

_LARGEST_STEP = 2**53  # that JavaScript can represent; a larger one was guessed
_MOST_MARKS = 500


class ShownEvent(NamedTuple):
    """An event as it is shown. Its texts are printable.

    Attributes:
        name: which kind of event it is.
        text: the event as a sentence.
        time_unix_ns: when it happened.
        severity: severity number of OTLP; 0 if it is not known.
        step: the step in or after which it happened; None if it is not known.
        attempt: attempt of its process.
    """

    name: str
    text: str
    time_unix_ns: int
    severity: int
    step: int | None
    attempt: int


def events_html(events: Sequence[ShownEvent], left_out: int = 0) -> str:
    """Returns a list that folds, newest event first; empty if there are no events.

    Args:
        events: the events, in any order.
        left_out: how many older ones there are besides.
    """
    if not events:
        return ""
    # Of one time, such as that of an end, the last one comes first, too.
    newest_first = sorted(events, key=lambda event: event.time_unix_ns)[::-1]
    said = f"{len(events):,}, newest first" + (f", without {left_out:,} older ones" if left_out else "")
    items = "".join(map(_item, newest_first))
    return f"<details><summary><h2>Events</h2> <small>{said}</small></summary><ol>{items}</ol></details>"


def _item(event: ShownEvent) -> str:
    step = "" if event.step is None or event.step > _LARGEST_STEP else f" · step {event.step:,}"
    text = f"<b>{escape(event.text)}</b> <small>{escape(event.name)}, {_time(event.time_unix_ns)}{step}</small>"
    return f"<li{_class(event.severity)}>{text}</li>"


def _class(severity: int) -> str:
    tone = tone_of(severity)
    return f' class="{tone}"' if tone else ""


def _time(time_unix_ns: int) -> str:
    try:
        return f"{datetime.fromtimestamp(time_unix_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):  # a time that no calendar has
        return "at an unknown time"


def tone_of(severity: int) -> str:
    """Returns the style of an event: ``bad``, ``warn`` or none."""
    return "bad" if severity >= Severity.ERROR else "warn" if severity >= Severity.WARN else ""


def event_marks(events: Iterable[ShownEvent]) -> list[dict[str, Any]]:
    """Returns what the charts need of the newest events that belong to a step."""
    marks = [
        {"step": event.step, "text": event.text, "tone": tone_of(event.severity)}
        for event in events
        if event.step is not None and event.step <= _LARGEST_STEP
    ]
    return marks[-_MOST_MARKS:]
