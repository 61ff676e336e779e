"""Steps for the page, and a page that asks as a browser does."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from esper_otel.frames.frame import Frame, Run
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.page_data.answers import SeriesRequest, series
from esper_otel.gateway.page_data.bucket_table import Range
from esper_otel.gateway.page_data.view_cache import TURN_S, Views
from esper_otel.gateway.store.base import Store
from esper_otel.gateway.turns import in_turns

BEGIN_NS = 1_764_000_000 * 10**9
ALL = Range()


class Made(NamedTuple):
    """A step that was stored; what a plain list knows of it."""

    attempt: int
    step: int
    time_ns: int
    values: dict[str, float]


def item(made: Made, revision: int = 1, run_id: str = "run") -> Item:
    frame = Frame(
        Run(run_id, made.attempt),
        *(0, made.step, made.step // 10, made.time_ns, tuple(made.values), tuple(made.values.values()), {}),
    )
    return Item(Origin(run_id, made.attempt, 0), frame, revision, True, 0)


class Page:
    """Asks as a browser does: puts what is new behind the rows that it keeps."""

    def __init__(self, store: Store, run_id: str = "run") -> None:
        self.views = Views(Core(store))
        self.run_id = run_id
        self.cursor = ""
        self.columns: dict[str, list[Any]] = {}
        self.metrics: dict[str, dict[str, list[Any]]] = {}
        self.answer: dict[str, Any] = {}

    @staticmethod
    def read(text: str) -> Any:
        return json.loads(text, parse_constant=pytest.fail)

    async def ask(self, steps: Range = ALL, most: int = 100) -> None:
        is_behind = True
        while is_behind:
            view = await self.views.view(self.run_id, 0)
            text = await in_turns(series(view, SeriesRequest((), steps, most, self.cursor)), TURN_S)
            answer = self.answer = self.read(text)
            self.cursor = answer["cursor"]
            keep = answer["keep"]
            for name, column in answer["columns"].items():
                self.columns[name] = self.columns.get(name, [])[:keep] + column
            for name, new in answer["metrics"].items():
                self._extend(self.metrics.setdefault(name, {}), new, keep)
            is_behind = answer["read"] < answer["stored"]

    def _extend(self, known: dict[str, list[Any]], new: dict[str, list[Any]], keep: int) -> None:
        known["odd"] = [odd for odd in known.get("odd", []) if odd[0] < keep] + new["odd"]
        for name in ("last", "min", "max", "mean"):
            before = known.get(name, [])[:keep]
            known[name] = before + [None] * (keep - len(before)) + new.get(name, new["last"])

    def whole(self) -> Any:
        return self.columns, self.metrics, self.answer["width"]
