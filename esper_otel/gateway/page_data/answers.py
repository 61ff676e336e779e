"""Answers: what the page is given of a view, as JSON, with a cursor by which the next answer has only what is new."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.charts.groups import described
from esper_otel.gateway.page_data.bucket_table import Range, Rows, Table
from esper_otel.gateway.page_data.buckets import NO_STEP, Floats, Values
from esper_otel.gateway.page_data.seed_timelines import STAGES
from esper_otel.gateway.page_data.seed_timelines import shown as shown_seed
from esper_otel.gateway.page_data.view import View
from esper_otel.schema import SEED_CELLS

_OF_SEEDS = {metric.name for metric in SEED_CELLS}

_AT_ONCE = 1_000  # numbers that become text in one part

Answer = Generator[None, None, str]  # an answer that is made in parts
_Lists = Iterator[tuple[str, list[Any]]]


class SeriesRequest(NamedTuple):
    """The arguments of a request for a series.

    Attributes:
        metrics: names; empty for all.
        steps: the steps.
        most: how many rows there may be.
        since: the cursor of the last answer; empty for all.
    """

    metrics: tuple[str, ...]
    steps: Range
    most: int
    since: str


def series(view: View, wanted: SeriesRequest) -> Answer:
    """Returns the curves of a rank."""
    table = yield from view.detail(wanted.steps, wanted.most)
    life, width, version, count = _cursor(wanted.since, 4)
    is_known = life == table.life
    names = {
        name: view.columns.names[name] for name in wanted.metrics or view.columns.names if name in view.columns.names
    }
    head = _head(view)
    if is_known and version == str(view.version):  # nothing is new
        rest = {"cursor": wanted.since, "keep": int(count), "width": int(width), "is_thinned": int(width) > 1}
        return _object({**head, **rest, "columns": {}, "metrics": {}})
    shown_width, shown = table.shown(wanted.steps, wanted.most)
    yield
    total = sum(len(rows.starts) for rows in shown)
    keep = 0
    if is_known and width == str(shown_width):
        keep = _first_changed(shown, int(version))
    parts = list(_left_out(shown, keep))
    yield
    columns = yield from _text(_columns(view, parts))
    texts = []
    for name, column in names.items():
        text = yield from _text(_metric(table, parts, column, keep, is_of_seeds=name in _OF_SEEDS))
        texts.append(f"{json.dumps(name)}: {text}")
    cursor = f"{table.life}:{shown_width}:{view.version}:{total}"
    rest = {"cursor": cursor, "keep": keep, "width": shown_width, "is_thinned": shown_width > 1}
    return f'{_object({**head, **rest})[:-1]}, "columns": {columns}, "metrics": {{{", ".join(texts)}}}}}'


def metrics(view: View, since: str, units: Mapping[str, str]) -> Answer:
    """Returns the metrics that a rank has recorded; ``units`` are those of the user's own ones."""
    cursor = f"{view.life}:{len(view.columns.names)}:{view.columns.left_out}:{len(units)}"
    yield
    if since == cursor:
        return _object({**_progress(view), "cursor": cursor, "is_same": True})
    return _object(
        {
            **_progress(view),
            "cursor": cursor,
            "is_same": False,
            "left_out": view.columns.left_out,
            "metrics": [each._asdict() for each in described(view.columns.names, units)],
        }
    )


def seeds(view: View, since: str) -> Answer:
    """Returns the stages and alphas of a rank's seeds."""
    life, version = _cursor(since, 2)
    is_known = life == view.life
    changed = view.seeds.changed(int(version) if is_known else -1)
    texts = []
    for seed in changed:
        texts.append(json.dumps(shown_seed(seed)))
        yield
    rest = {
        "cursor": f"{view.life}:{view.version}",
        "is_all": not is_known,
        "stages": STAGES,
        "count": len(view.seeds),
        "left_out": view.seeds.left_out,
    }
    return f'{_object({**_head(view), **rest})[:-1]}, "seeds": [{", ".join(texts)}]}}'


def signals(view: View, since: str) -> Answer:
    """Returns the episodes of risk signals of a rank."""
    cursor = f"{view.life}:{view.episodes.changed}"
    head = {**_progress(view), "cursor": cursor, "is_same": since == cursor, "left_out": view.episodes.left_out}
    yield
    if since == cursor:
        return _object(head)
    shown = [
        {
            "name": episode.name,
            "level": episode.level,
            "first_step": episode.first,
            "last_step": episode.last,
            "times": episode.times,
            "worst": _number(episode.worst),
            "worst_step": episode.worst_step,
            "reason": episode.reason,
            "route": episode.route,
            "attempt": episode.sender.attempt,
            "is_open": episode.goes_on,
            "text": str(episode),
        }
        for episode in view.episodes.all()
    ]
    return _object({**head, "episodes": shown})


def _cursor(since: str, parts: int) -> tuple[str, ...]:
    """Returns the parts of a cursor; empty ones if this gateway did not issue it."""
    found = since.split(":")
    is_ours = len(found) == parts and all(each.isdecimal() and len(each) < 19 for each in found[1:])
    return tuple(found) if is_ours else ("",) * parts


def _progress(view: View) -> dict[str, Any]:
    return {"read": view.read, "stored": view.stored}


def _head(view: View) -> dict[str, Any]:
    """Returns what is said of a rank as a whole."""
    all_segments, numbers = view.segments.all, view.segments.attempts()
    return {
        **_progress(view),
        "gap": view.gap,
        "start_ms": _ms(min((each.first_unix_ns for each in all_segments), default=0)),
        "first_step": min((each.first_step for each in all_segments), default=None),
        "last_step": max((each.last_step for each in all_segments), default=None),
        "segments": [
            {
                "attempt": each.origin.attempt,
                "number": numbers[each.origin.attempt],
                "why": each.why,
                "first_step": each.first_step,
                "last_step": each.last_step,
                "start_ms": _ms(each.first_unix_ns),
                "again_from": each.again_from,
            }
            for each in all_segments
        ],
    }


def _first_changed(shown: Sequence[Rows], version: int) -> int:
    """Returns the first row that has changed after a version."""
    count = 0
    for rows in shown:
        (changed,) = (rows.heads.changed > version).nonzero()
        if len(changed):
            return count + int(changed[0])
        count += len(rows.starts)
    return count


def _left_out(shown: Sequence[Rows], keep: int) -> Generator[tuple[Rows, int], None, None]:
    """Yields the rows from the given one on: by segment, with how many to leave out at the beginning."""
    for rows in shown:
        count = len(rows.starts)
        if keep < count:
            yield rows, keep
        keep = max(keep - count, 0)


def _text(lists: Iterable[tuple[str, list[Any]]]) -> Answer:
    """Returns named lists as a JSON object, made in parts."""
    texts = []
    for name, values in lists:
        pieces = []
        for start in range(0, len(values), _AT_ONCE):
            pieces.append(json.dumps(values[start : start + _AT_ONCE], allow_nan=False)[1:-1])
            yield
        texts.append(f'"{name}": [{", ".join(pieces)}]')
    return f"{{{', '.join(texts)}}}"


def _columns(view: View, parts: Sequence[tuple[Rows, int]]) -> _Lists:
    """Yields what rows have besides metrics: a name and a list each."""
    start_ns = min((each.first_unix_ns for each in view.segments.all), default=0)

    def of(field: str) -> list[int]:
        return [value for rows, first in parts for value in getattr(rows.heads, field)[first:].tolist()]

    yield "segment", [rows.segment for rows, first in parts for _ in range(len(rows.starts) - first)]
    yield "step", of("last_step")
    yield "first_step", of("first_step")
    yield "steps", of("size")
    yield "epoch", of("epoch")
    times = np.concatenate([rows.heads.time[first:] for rows, first in parts]) if parts else np.empty(0, np.int64)
    yield "time_ms", (times // 10**6).tolist()
    yield "elapsed_s", ((times - start_ns) // 10**6 / 1e3).tolist()
    is_again: list[int] = []
    for rows, first in parts:
        again_from, begins = view.segments.all[rows.segment].again_from, rows.heads.first_step[first:]
        is_again += [0] * len(begins) if again_from is None else (begins >= again_from).astype(np.int64).tolist()
    yield "is_again", is_again


def _metric(table: Table, parts: Sequence[tuple[Rows, int]], column: int, keep: int, *, is_of_seeds: bool) -> _Lists:
    """Yields what rows have of a metric: a name and a list each."""
    is_single = not is_of_seeds and all((rows.heads.size[first:] == 1).all() for rows, first in parts)
    values = [table.values(rows, column, first) for rows, first in parts]
    yield "last", [number for each in values for number in _numbers(each.last)]
    if not is_single:
        yield "min", [number for each in values for number in _numbers(each.low)]
        yield "max", [number for each in values for number in _numbers(each.high)]
        with np.errstate(all="ignore"):
            means = [each.total / each.finite for each in values]  # without finite values 0 / 0, which is NaN
        yield "mean", [number for each in means for number in _numbers(each)]
    odd: list[list[int]] = []
    for each in values:
        odd += _odd(each, keep)
        keep += len(each.last)
    yield "odd", odd


def _odd(values: Values, row: int) -> list[list[int]]:
    """Returns the rows with values that are not finite: row, number of NaN, +Inf and -Inf, first step."""
    if values.odd is None or values.odd_step is None:
        return []
    (places,) = (values.odd_step < NO_STEP).nonzero()
    kinds = values.odd[:, places]
    return np.column_stack([places + row, *kinds, values.odd_step[places]]).astype(np.int64).tolist()  # type: ignore[no-any-return]


def _numbers(values: Floats | npt.NDArray[Any]) -> list[float | None]:
    is_finite = np.isfinite(values)
    numbers: list[float | None] = values.tolist()
    for place in np.flatnonzero(~is_finite).tolist():
        numbers[place] = None
    return numbers


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ms(time_unix_ns: int) -> int | None:
    return time_unix_ns // 10**6 or None


def _object(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False)
