"""The list of a run's events, as the live page and the report show it."""

from __future__ import annotations

import pytest

from esper_otel.charts.event_list import ShownEvent, events_html

pytestmark = pytest.mark.own_code


def test_the_newest_event_is_on_top_and_of_one_time_the_last() -> None:
    """A run's end has the time of its last step, and so have the signals that it ends."""
    texts = ["started", "a signal ended", "the run ended"]
    events = [ShownEvent("e", text, time_unix_ns, 9, 1, 1) for text, time_unix_ns in zip(texts, [1, 2, 2], strict=True)]
    html = events_html([events[1], events[2], events[0]])
    assert sorted(texts, key=html.index) == texts[::-1]
