"""Serves the live page, and what it shows of the runs in the gateway's own store, to browsers on this machine only.

The paths below ``/page`` answer in JSON. What is missing or not finite is null. Each answer has a cursor; given back
as ``since`` with otherwise the same question, it makes the next answer contain only what is new:

- ``/page/runs``: a row for each run that has changed, and the runs that are gone.
- ``/page/metrics?run=&rank=``: the metrics that were recorded, with unit, meaning and group.
- ``/page/series?run=&rank=&metrics=&from=&to=&buckets=``: the curves, thinned to a number of rows. The first ``keep``
  rows of the last answer stay, and the rows of this one follow. ``read`` of ``stored`` steps have been read.
- ``/page/seeds?run=&rank=``: stages as intervals of steps, and samples of alpha.
- ``/page/signals?run=&rank=``: risk signals as episodes.
- ``/page/ranks?run=``: the durations of the newest steps of each rank. It has no cursor.
- ``/page/events?run=&rank=``: the newest events as HTML, and their marks in the charts.
- ``/page/hours?run=``: where the hours of the run went, as HTML. It has no cursor.

An unknown cursor is not an error: the answer contains everything. Wrong arguments are answered with 400, and runs of
which no step is stored with 404.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from esper_otel.charts.event_list import ShownEvent, event_marks, events_html
from esper_otel.charts.hours_section import hours_html
from esper_otel.errors import UnknownRun
from esper_otel.gateway.page_data import answers
from esper_otel.gateway.page_data.answers import Answer, SeriesRequest
from esper_otel.gateway.page_data.bucket_table import Range
from esper_otel.gateway.page_data.heat_map import heat_map
from esper_otel.gateway.page_data.run_table import RunTable
from esper_otel.gateway.page_data.view import View
from esper_otel.gateway.page_data.view_cache import TURN_S, Views
from esper_otel.gateway.pull_core import PullCore
from esper_otel.gateway.security import BadRequest, check_puller
from esper_otel.gateway.serve.page_files import HEADERS, add_files, check_local
from esper_otel.gateway.turns import in_turns
from esper_otel.pull.messages import RanksRequest
from esper_otel.schema import is_check

_FEWEST_ROWS, _MOST_ROWS, _ROWS = 10, 4_000, 1_000
_MOST_RANK, _MOST_STEP = 2**31, 2**63
_MOST_METRICS = 512


def add_page(app: web.Application, core: PullCore) -> None:
    """Adds ``/`` and the paths below ``/page`` that the page requests."""
    add_files(app)
    data = _PageData(core)
    for name, answer in (
        ("runs", data.runs),
        (
            "metrics",
            data.of_rank(lambda view, query: answers.metrics(view, query.get("since", ""), _units(core, query))),
        ),
        ("series", data.of_rank(lambda view, query: answers.series(view, _wanted(query)))),
        ("seeds", data.of_rank(lambda view, query: answers.seeds(view, query.get("since", "")))),
        ("signals", data.of_rank(lambda view, query: answers.signals(view, query.get("since", "")))),
        ("ranks", data.ranks),
        ("hours", data.hours),
        ("events", data.events),
    ):
        app.router.add_get(f"/page/{name}", _handler(answer))


Query = Mapping[str, str]
_Answerer = Callable[[web.Request], Awaitable[str]]


class _PageData:
    """Answers one request after the other: several open windows together get no more turns than one."""

    def __init__(self, core: PullCore) -> None:
        self._core = core
        self._views = Views(core)
        self._table = RunTable(core)
        self._one_by_one = asyncio.Lock()

    async def runs(self, request: web.Request) -> str:
        async with self._one_by_one:
            await in_turns(self._table.refreshing(), TURN_S)
            return await in_turns(self._table.answer(request.query.get("since", "")), TURN_S)

    async def ranks(self, request: web.Request) -> str:
        run_id = _run(request)
        async with self._one_by_one:
            compared = await self._core.ranks(RanksRequest(run_id=run_id))
            recent = self._core.recent_steps(run_id)
            assert recent is not None  # otherwise there would be no comparison
            return await in_turns(heat_map(recent, compared), TURN_S)

    async def hours(self, request: web.Request) -> str:
        run_id = _run(request)
        async with self._one_by_one:
            return json.dumps({"html": hours_html(await self._core.run_hours(run_id))})

    async def events(self, request: web.Request) -> str:
        run_id, rank = _run(request), _whole(request.query, "rank", 0, _MOST_RANK) or 0
        cursor = self._core.events_mark(run_id)
        if cursor == request.query.get("since", ""):
            return json.dumps({"cursor": cursor, "is_same": True})
        events = [
            ShownEvent(event.name, event.text, event.time_unix_ns, event.severity, event.step, event.attempt)
            for event in self._core.newest_events(run_id, rank)
        ]
        return json.dumps(
            {"cursor": cursor, "is_same": False, "html": events_html(events), "marks": event_marks(events)}
        )

    def of_rank(self, made: Callable[[View, Query], Answer]) -> _Answerer:
        """Returns what answers a request for a rank from its view."""

        async def answer(request: web.Request) -> str:
            run_id, rank = _run(request), _whole(request.query, "rank", 0, _MOST_RANK) or 0
            async with self._one_by_one:
                view = await self._views.view(run_id, rank)
                return await in_turns(made(view, request.query), TURN_S)

        return answer


def _units(core: PullCore, query: Query) -> Mapping[str, str]:
    """Returns the units of the user's own metrics."""
    return {name: unit for state in core.state_of(query.get("run", "")).states for name, unit in state.units}


def _handler(answer: _Answerer) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        check_local(request)
        try:
            text = await answer(request)
        except BadRequest as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        except UnknownRun as error:
            raise web.HTTPNotFound(text=str(error)) from None
        return web.Response(text=text, content_type="application/json", headers=HEADERS)

    return handler


def _run(request: web.Request) -> str:
    """Returns the run that is asked for.

    Raises:
        BadRequest: there is none.
        UnknownRun: it is a check's.
    """
    run_id = request.query.get("run", "")
    check_puller(run_id, None)
    if is_check(run_id):
        raise UnknownRun(f"{run_id!r} is not a run: esper-otel check made it")
    return run_id


def _wanted(query: Query) -> SeriesRequest:
    names = tuple(filter(None, query.get("metrics", "").split(",")))[:_MOST_METRICS]
    first, last = _whole(query, "from", 0, _MOST_STEP), _whole(query, "to", 0, _MOST_STEP)
    steps = Range(*(() if first is None else (first,)))
    if last is not None:
        steps = steps._replace(last=last)
    if steps.first > steps.last:
        raise BadRequest("from must not be above to")
    most = _whole(query, "buckets", _FEWEST_ROWS, _MOST_ROWS + 1)
    return SeriesRequest(names, steps, most or _ROWS, query.get("since", ""))


def _whole(query: Query, name: str, least: int, limit: int) -> int | None:
    """Returns a whole number from the question; None if it has none.

    Raises:
        BadRequest: it is something else, or out of range.
    """
    text = query.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) < limit):
        raise BadRequest(f"{name} must be a whole number from {least} to {limit - 1}")
    return int(text)
