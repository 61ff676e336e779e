"""Curves for the page: thinned to a number of rows without hiding anything, and brought up to date row by row."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from page_client import BEGIN_NS, Made, Page, item

from esper_otel.gateway.core import Core
from esper_otel.gateway.page_data import bucket_table
from esper_otel.gateway.page_data.answers import SeriesRequest, series
from esper_otel.gateway.page_data.bucket_table import Range
from esper_otel.gateway.page_data.view import View
from esper_otel.gateway.store.memory import MemoryStore

pytestmark = pytest.mark.own_code

ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def expected(steps: Sequence[Made], name: str) -> dict[str, Any]:
    """What a row says of a metric, found in the list of its steps."""
    said = [(made.step, made.values[name]) for made in steps if name in made.values]
    finite = [value for _, value in said if math.isfinite(value)]
    odd = [(step, value) for step, value in said if not math.isfinite(value)]
    counts = [sum(map(test, (value for _, value in odd))) for test in (math.isnan, math.inf.__eq__, (-math.inf).__eq__)]
    return {
        "last": said[-1][1] if said and math.isfinite(said[-1][1]) else None,
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "mean": pytest.approx(sum(finite) / len(finite)) if finite else None,
        "odd": [*counts, min(step for step, _ in odd)] if odd else None,
    }


def compare(page: Page, steps: Sequence[Made]) -> None:
    """Compares all that the page has with a list of the steps that were stored."""
    segments = page.answer["segments"]
    ends = [segment["start_ms"] for segment in segments[1:]] + [math.inf]
    total = 0
    for row, first in enumerate(page.columns["first_step"]):
        segment = page.columns["segment"][row]
        here = [
            made
            for made in steps
            if first <= made.step <= page.columns["step"][row]
            and made.attempt == segments[segment]["attempt"]
            and segments[segment]["start_ms"] <= made.time_ns // 10**6
            and not (
                segment + 1 < len(segments)
                and segments[segment + 1]["attempt"] == made.attempt
                and made.time_ns // 10**6 >= ends[segment]
            )
        ]
        here.sort(key=lambda made: made.time_ns)
        assert len(here) == page.columns["steps"][row]
        assert page.columns["epoch"][row] == here[-1].step // 10
        assert page.columns["time_ms"][row] == here[-1].time_ns // 10**6
        total += len(here)
        for name, metric in page.metrics.items():
            want = expected(here, name)
            odd = [each[1:] for each in metric["odd"] if each[0] == row]
            assert {
                **{key: metric[key][row] for key in ("last", "min", "max", "mean")},
                "odd": (odd or [None])[0],
            } == want
    assert total == len(steps)


value = st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from(list(ODD.values())))
content = st.dictionaries(st.sampled_from(["loss", "accuracy", "mine"]), value, max_size=3)
# What happens: a further step (and by how many numbers the step goes on), a correction of one before, a new attempt,
# a step number that goes back.
event = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 3), content),
    st.tuples(st.just("step"), st.just(1), content),
    st.tuples(st.just("correct"), st.integers(0, 200), content),
    st.tuples(st.just("late"), st.integers(0, 200), content),
    st.tuples(st.just("attempt"), st.integers(1, 40), content),
    st.tuples(st.just("back"), st.integers(1, 40), content),
)


TWICE = [*[("step", 1, {})] * 10, ("correct", 0, {}), ("correct", 0, {"loss": 0.0})]


@example(TWICE, 7, 10)
@given(st.lists(event, min_size=1, max_size=120), st.sampled_from([7, 40]), st.integers(10, 30))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_is_hidden_and_what_is_new_is_enough(
    monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, int, dict[str, float]]], rows: int, most: int
) -> None:
    """A page that asked after every few steps has what a new page gets, and both what a plain list has."""
    monkeypatch.setattr(bucket_table, "MOST_ROWS", rows)
    store = MemoryStore()
    kept: dict[tuple[int, int], Made] = {}
    revisions: dict[tuple[int, int], int] = {}
    order: list[tuple[int, int]] = []
    attempt, step, time_ns = 1, 0, BEGIN_NS

    async def scenario() -> None:
        nonlocal attempt, step, time_ns
        page = Page(store)
        for number, (what, much, values) in enumerate(events):
            time_ns += 10**9
            if what in ("correct", "late") and order:
                key = order[-1 - much % min(len(order), 50)]
                if what == "correct":
                    revisions[key] += 1
                    made = kept[key] = kept[key]._replace(values={**kept[key].values, **values})
                    store.add([item(made, revisions[key])])
                    continue
                # between that step and the next one, so that it belongs to the same segment, and at a time of its own
                second_ns = kept[key].time_ns // 10**9 * 10**9
                made = kept[key]._replace(time_ns=second_ns + 10**6 * (number + 1), values=values)
            else:
                attempt += what == "attempt"
                step = step + much if what == "step" else max(step - much, 0) + 1
                made = Made(attempt, step, time_ns, values)
            key = made.attempt, made.time_ns
            kept[key], revisions[key] = made, 1
            order.append(key)
            store.add([item(made)])
            if number % 7 == 6:
                await page.ask(most=most)
        if not kept:
            return
        await page.ask(most=most)
        compare(page, list(kept.values()))
        new = Page(store)
        new.views = page.views
        await new.ask(most=most)
        assert new.whole() == page.whole()
        assert len(new.columns["step"]) <= max(most, len(new.answer["segments"]))

    asyncio.run(scenario())


def test_a_large_answer_is_made_in_small_parts() -> None:
    """So that the event loop has turns for others: none makes more than a thousand numbers into text."""
    store = MemoryStore()
    values = {f"metric-{number}": number / 3 for number in range(10)}
    store.add([item(Made(1, step, BEGIN_NS + step * 10**6, values)) for step in range(1, 4_001)])
    view = View(Core(store), "run", 0)
    for _ in view.following():
        pass
    parts = 0
    making = series(view, SeriesRequest((), Range(), 4_000, ""))
    while True:
        try:
            next(making)
        except StopIteration as end:
            answer = json.loads(end.value)
            break
        parts += 1
    assert len(answer["columns"]["step"]) == 4_000
    assert parts >= 4 * (len(answer["columns"]) + len(values))
