"""Serves the live page, which shows running runs from the gateway's own store, to browsers on this machine only."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from aiohttp import web

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.frames.frame import FINE, GUESSED_STEP, NO_SEEDS
from esper_otel.gateway.core import Core
from esper_otel.gateway.security import BadRequest, check_puller
from esper_otel.gateway.serve.page_files import HEADERS, add_files, check_local
from esper_otel.gateway.store.base import StoredFrame
from esper_otel.gateway.turns import Turn, in_turns, pause
from esper_otel.leyline.packets import state
from esper_otel.leyline.risk import Rule, signals
from esper_otel.schema import SEED_FIELDS

# Limits of one answer: steps, and approximately rows of seeds. The last number is how many steps are fetched at once.
_AT_ONCE, _MOST_ROWS, _FETCHED = 500, 50_000, 2
_TURN_S = 0.002  # short, since requests of trainers and controllers may wait for several turns
_STAGE, _ALPHA = SEED_FIELDS.index("stage"), SEED_FIELDS.index("alpha")


def add_page(app: web.Application, core: Core) -> None:
    """Adds ``/`` and the paths below ``/page`` that the page requests."""
    one_by_one = asyncio.Lock()
    add_files(app)

    async def runs(request: web.Request) -> web.Response:
        check_local(request)
        known = [
            {
                "run_id": run.run_id,
                "rank": run.rank,
                "attempt": run.attempt,
                "ended": run.ended or run.run_ended or None,
                "is_fine": (run.ended or run.run_ended) in FINE,
                "missing": run.missing,
                "incomplete": run.incomplete,
                "last_received_unix_ns": run.last_received_unix_ns,
                "last_step": run.last_step,
                "last_time_ms": run.last_time_unix_ns // 10**6,
            }
            for run in (await in_turns(core.listing())).runs
        ]
        return web.json_response({"runs": known}, headers=HEADERS)

    async def steps(request: web.Request) -> web.Response:
        check_local(request)
        try:
            check_puller(request.query.get("run", ""), None)
            async with one_by_one:  # several open windows together get no more turns of the event loop than one
                answer = await _steps(core, request.query.get("run", ""), request.query.get("cursor", ""))
        except BadRequest as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        except UnknownRun as error:
            raise web.HTTPNotFound(text=str(error)) from None
        except StaleCursor as error:
            raise web.HTTPConflict(text=str(error)) from None
        return web.Response(text=answer, content_type="application/json", headers=HEADERS)

    app.router.add_get("/page/runs", runs)
    app.router.add_get("/page/steps", steps)


async def _steps(core: Core, run_id: str, cursor: str) -> str:
    """Returns steps after a cursor as JSON, fewer if they have many seeds. Other tasks run in between.

    Raises:
        UnknownRun: nothing of the run is stored.
        StaleCursor: the cursor is not valid any more.
    """
    shown: list[str] = []  # encoded step by step, so that other tasks can run in between
    gap = seen = rows = 0
    has_more = True
    turn = Turn(_TURN_S)
    while seen < _AT_ONCE and rows < _MOST_ROWS:
        try:
            found = core.entries(run_id, cursor, _FETCHED)
        except (UnknownRun, StaleCursor):  # dropped in the meantime; the next request gets the error
            if seen:
                break
            raise
        if seen and found.gap:
            break
        gap += found.gap
        cursor = found.cursor
        for entry in found.entries:
            frame = entry.item.frame
            rows += len(frame.live.ids)
            # A step whose number was lost cannot be placed on the axis of steps; the run's counts include it.
            if frame.global_step < GUESSED_STEP:
                shown.append(json.dumps(_shown(entry, core.rules)))
            if turn.is_over:
                await pause()
                turn = Turn(_TURN_S)
        seen += len(found.entries)
        if len(found.entries) < _FETCHED:
            has_more = False
            break
    rest = json.dumps({"cursor": cursor, "gap": gap, "more": has_more})
    return f'{{"steps": [{", ".join(shown)}], {rest[1:]}'


def _shown(entry: StoredFrame, rules: tuple[Rule, ...]) -> dict[str, Any]:
    """Returns a step in the form that the page reads; numbers that JSON cannot express are null."""
    frame = entry.item.frame
    packet = state(frame._replace(seeds=NO_SEEDS, live=NO_SEEDS))  # no signal depends on a single seed
    found = signals(packet, loss_before=entry.loss_before, rules=rules)
    cells = frame.live.cells[:, [_STAGE, _ALPHA]].tolist()
    return {
        "rank": frame.run.rank,
        "attempt": frame.run.attempt,
        "step": frame.global_step,
        "time_ms": frame.time_unix_ns // 10**6,
        "revision": entry.item.revision,
        "values": {name: _number(value) for name, value in frame.values().items()},
        "seeds": [
            [seed_id, int(stage) if math.isfinite(stage) else 0, _number(alpha)]
            for seed_id, (stage, alpha) in zip(frame.live.ids, cells, strict=True)
        ],
        "signals": [[signal.name, signal.level, signal.reason, signal.route] for signal in found],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
