"""Serves the page, and answers that are made up: very many runs and steps, or states that a real gateway seldom has."""

from __future__ import annotations

import bisect
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from esper_otel import Stage
from esper_otel.charts import files
from esper_otel.charts.event_list import ShownEvent, event_marks, events_html

START_MS = 1_764_450_000_000
METRICS = [
    *(("loss", "loss", "learning"), ("loss_ewma", "loss", "learning"), ("loss_volatility", "loss", "learning")),
    *(("accuracy", "ratio", "learning"), ("esper.validation.loss", "loss", "learning")),
    *(("step_latency_ms", "ms", "time"), ("input_wait_ms", "ms", "time"), ("hook_latency_ms", "ms", "time")),
    ("esper.forward_ms", "ms", "time"),
    *(("samples_per_s", "rate", "throughput"), ("cpu_util_percent", "%", "machine"), ("my.metric", "1", "other")),
]


class MadeUpRun:
    """A run that a test may change while the page looks.

    Args:
        name: its id.
        steps: how many steps it has.
        info: what differs in its row of the table.
    """

    def __init__(self, name: str, steps: int, **info: Any) -> None:
        self.name = name
        self.steps = steps
        self.read = math.inf
        self.info = info
        self.odd: dict[str, list[list[int]]] = {}
        self.segments: list[dict[str, Any]] = []
        self.episodes: list[dict[str, Any]] = []
        self.seeds: list[dict[str, Any]] = []
        self.ranks: dict[str, Any] | None = None
        self.events: list[ShownEvent] = []
        self.shift = sum(map(ord, name)) % 7

    def row(self) -> dict[str, Any]:
        """Its row in the answer about runs."""
        row = {
            "run_id": self.name,
            "state": "live",
            "outcome": None,
            "experiment": "digits",
            "host": "gpu-3",
            "revision": "0b1c2d3e4f",
            "start_ms": START_MS,
            "received_ms": START_MS,
            "first_step": 1,
            "last_ms": START_MS + self.steps * 100,
            "last_step": self.steps or None,
            "last_loss": self.value("loss", self.steps),
            "last_loss_is": "",
            "steps_stored": self.steps,
            "world_size": 1,
            "missing": 0,
            "incomplete": 0,
            "is_behind": False,
            "attempt_count": 1,
            "rank_count": 1,
            "attempts": [
                {
                    "attempt": 1,
                    "number": 1,
                    "state": "live",
                    "outcome": None,
                    "first_step": 1,
                    "last_step": self.steps,
                    "resumed": False,
                }
            ],
            "ranks": [{"rank": 0, "state": "live", "last_step": self.steps}],
        }
        return row | self.info

    def value(self, name: str, step: int) -> float:
        """A value of a metric."""
        noise = math.sin(step * 12.9898 + self.shift) * 43758.5453 % 1
        fall = 2.3 * math.exp(-step / (400 + 60 * self.shift)) + 0.1 + 0.02 * self.shift
        return {
            "loss": fall * (0.85 + 0.3 * noise),
            "loss_ewma": fall,
            "loss_volatility": fall * 0.1,
            "accuracy": 1 - fall / 2.5,
            "esper.validation.loss": fall * 1.1,
            "step_latency_ms": 20 + 4 * noise + self.shift,
            "input_wait_ms": 3 + 2 * noise,
            "hook_latency_ms": 1 + noise,
            "esper.forward_ms": 6 + noise,
            "samples_per_s": 1000 - 100 * noise,
            "cpu_util_percent": 60 + 30 * noise,
            "my.metric": step % 100,
        }[name]

    def series(self, first: int, last: int, buckets: int) -> dict[str, Any]:
        """Columns and metrics from a step to another, thinned to at most so many rows."""
        width = 1
        while (last - first + 1) / width > buckets:
            width *= 2
        starts = range(first, last + 1, width)
        ends = [min(start + width - 1, last) for start in starts]
        metrics: dict[str, Any] = {}
        for name, _, _ in METRICS:
            values: list[float | None] = [self.value(name, step) for step in ends]
            found: dict[str, Any] = {"last": values, "odd": []}
            for row, step in enumerate(ends):
                for at, *counts in self.odd.get(name, ()):
                    if step - width < at <= step:
                        values[row] = None
                        found["odd"].append([row, *counts, at])
            if width > 1:
                found |= {"mean": values}
                found["min"] = [value and value * 0.8 for value in values]
                found["max"] = [value and value * 1.2 for value in values]
            metrics[name] = found
        segments = self.segments or [{"number": 1, "why": "start", "first_step": 1}]
        begins = [segment["first_step"] for segment in segments]
        columns = {
            "segment": [max(bisect.bisect_right(begins, step) - 1, 0) for step in ends],
            "step": ends,
            "first_step": list(starts),
            "steps": [width] * len(ends),
            "epoch": [step // 500 for step in ends],
            "is_again": [0] * len(ends),
            "time_ms": [START_MS + step * 100 for step in ends],
            "elapsed_s": [step / 10 for step in ends],
        }
        read = min(self.read, self.steps)
        return {
            "cursor": f"{self.steps}/{read}",
            "keep": 0,
            "is_thinned": width > 1,
            "width": width,
            "read": read,
            "stored": self.steps,
            "gap": 0,
            "start_ms": START_MS,
            "first_step": 1,
            "last_step": self.steps,
            "segments": segments,
            "columns": columns,
            "metrics": metrics,
        }


class MadeUpGateway:
    """Answers as the page asks.

    Args:
        runs: what it has; may be changed while the page looks.

    Attributes:
        broken: what it answers instead of curves, if anything: a status and a text.
        held: while it is set, questions wait.
        asked: paths and queries, in the order in which they came.
    """

    def __init__(self, *runs: MadeUpRun) -> None:
        self.runs = {run.name: run for run in runs}
        self.broken: tuple[int, str] | None = None
        self.go = threading.Event()
        self.go.set()
        self.asked: list[str] = []
        folder = resources.files("esper_otel.gateway.serve").joinpath("page")
        charts = files.scripts(needed_by="a test")
        names = [*charts, "runs.js", "page.js", "events.js"]
        tags = "".join(f'<script src="/page/{name}" nonce="n" defer></script>' for name in names)
        own = {
            name: folder.joinpath(name).read_text(encoding="utf-8")
            for name in ("runs.js", "page.js", "events.js", "page.css")
        }
        self._files = {f"/page/{name}": text for name, text in (charts | own | {files.STYLE: files.style()}).items()}
        self._files["/"] = folder.joinpath("index.html").read_text(encoding="utf-8").replace("<!-- scripts -->", tags)

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, text = outer.answer(self.path)
                body = text.encode()
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-security-policy", POLICY)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called there
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, target: str) -> tuple[int, str, str]:
        """Status, type and text for a path."""
        path = urlsplit(target)
        if path.path in self._files:
            kind = {"css": "text/css", "js": "text/javascript"}.get(path.path.rpartition(".")[2], "text/html")
            return 200, kind, self._files[path.path]
        self.asked.append(target)
        self.go.wait()
        query = {name: values[0] for name, values in parse_qs(path.query).items()}
        what = path.path.removeprefix("/page/")
        if what == "runs":
            rows = [run.row() for run in self.runs.values()]
            cursor = json.dumps([[run.name, run.steps, str(run.read)] for run in self.runs.values()])
            if query.get("since") == cursor:
                rows = []
            return _json(
                {"cursor": cursor, "is_all": "since" not in query, "now_ms": START_MS + 10**6, "runs": rows, "gone": []}
            )
        run = self.runs.get(query.get("run", ""))
        if run is None or not run.steps:
            return 404, "text/plain", "nothing is here"
        if self.broken is not None:
            return self.broken[0], "text/plain", self.broken[1]
        if what == "series":
            first, last = int(query.get("from", 1)), min(int(query.get("to", run.steps)), int(min(run.read, run.steps)))
            found = run.series(first, last, int(query["buckets"]))
            if query.get("since") == found["cursor"]:  # nothing is new
                found |= {"keep": len(found["columns"]["step"]), "columns": {}, "metrics": {}}
            return _json(found)
        if what == "metrics":
            metrics = [
                {"name": name, "unit": unit, "description": f"About {name}.", "group": group, "level": "step"}
                for name, unit, group in METRICS
            ]
            if run.seeds:
                metrics[0]["level"] = "seed"
            return _json({"cursor": "1", "is_same": False, "metrics": metrics})
        if what == "signals":
            return _json(
                {"cursor": "1", "is_same": False, "read": 1, "stored": 1, "left_out": 0, "episodes": run.episodes}
            )
        if what == "seeds":
            found = {"stages": [stage.name for stage in Stage], "count": len(run.seeds), "seeds": run.seeds}
            return _json({"cursor": "1", "is_all": True, "read": 1, "stored": 1} | found)
        if what == "events":
            cursor = str(len(run.events))
            if query.get("since", "0") == cursor:
                return _json({"cursor": cursor, "is_same": True})
            shown = {"html": events_html(run.events), "marks": event_marks(run.events)}
            return _json({"cursor": cursor, "is_same": False} | shown)
        if what == "ranks" and run.ranks is not None:
            return _json(run.ranks)
        return 404, "text/plain", "nothing is here"


POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-n'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _json(answer: dict[str, Any]) -> tuple[int, str, str]:
    return 200, "application/json", json.dumps(answer)
