"""A live figure below a notebook's cell, with the charts of the live page."""

from __future__ import annotations

import html
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from esper_otel.charts.document import PageContent, document
from esper_otel.charts.groups import described
from esper_otel.charts.thinned import ChartStep, ThinnedSteps
from esper_otel.errors import ConfigurationError
from esper_otel.frames.ring import Ring
from esper_otel.native import threads
from esper_otel.schema import Metric

EVERY_S = 2.0
_MOST_BUCKETS = 500  # of a curve
_MOST_STEPS = 5_000  # read in one round: a loop that is faster has a gap in the figure
_AT_ONCE = 500
_HEIGHT = 640
_WHAT = "telemetry.show()"


class Figure:
    """Shows the steps of a ring and keeps showing new ones until ``end``. Threads: any; one reads at a time.

    Args:
        ring: the steps.
        name: the run's id.
        entries: the declared metrics by name.
        fault: called with what failed in the thread that keeps the figure up to date.

    Raises:
        ConfigurationError: this is not a notebook, or Bokeh is not installed.
    """

    def __init__(
        self, ring: Ring, name: str, entries: Mapping[str, Metric], fault: Callable[[str, Exception], None]
    ) -> None:
        self._ring = ring
        self._name = name
        self._entries = entries
        self._fault = fault
        self._id = secrets.token_hex(8)
        self._thinned = ThinnedSteps(_MOST_BUCKETS)
        self._position = 0
        self._version = 0
        self._left_out = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        display = _display()
        with self._lock:
            self._read()
        display(_content(self._frame()), raw=True)
        self._handle = display(_content(""), raw=True, display_id=True)
        thread = threads().Thread(target=self._follow, name="esper-otel-show", daemon=True)
        thread.start()

    def end(self) -> None:
        """Shows the last steps, and stops."""
        if not self._is_over.is_set():
            self._is_over.set()
            self._update()

    def _follow(self) -> None:
        while not self._is_over.wait(EVERY_S):
            self._update()

    def _update(self) -> None:
        """Sends what is new to the figure. A notebook that is gone must not disturb training."""
        try:
            with self._lock:
                if not self._read():
                    return
                text = json.dumps(json.dumps(self._data(), allow_nan=False)).replace("<", "\\u003c")
            self._handle.update(_content(_SEND.replace("ID", self._id).replace("TEXT", text)), raw=True)
        except Exception as error:  # noqa: BLE001 - see above
            self._is_over.set()
            self._fault("the notebook's figure", error)

    def _read(self) -> bool:
        """Adds the steps that are new, and returns whether there are any."""
        before = self._position
        behind = self._ring.last - self._position - _MOST_STEPS
        if behind > 0:
            self._position += behind
            self._left_out += behind
        self._thinned.add(self._new())
        if self._position != before:
            self._version += 1
        return self._position != before

    def _new(self) -> Iterator[ChartStep]:
        for _ in range(_MOST_STEPS // _AT_ONCE):
            frames, gap = self._ring.after(self._position, _AT_ONCE)
            self._left_out += gap
            if not frames:
                return
            for frame in frames:
                yield ChartStep(frame.global_step, frame.epoch, frame.time_unix_ns / 1e9, frame.values())
            self._position = frames[-1].sequence

    def _data(self) -> dict[str, Any]:
        series = self._thinned.series()
        metrics = []
        for each in described(series["metrics"]):
            own = self._entries.get(each.name)
            known = each if own is None else each._replace(unit=own.unit, description=own.description)
            metrics.append(known._asdict())
        left_out = (
            f"; {self._left_out:,} steps came too fast for this figure and are left out" if self._left_out else ""
        )
        return {
            "id": self._id,
            "isLive": True,
            "version": self._version,
            "runs": [{"id": "0", "name": self._name, "series": series}],
            "metrics": metrics,
            "said": f"{self._thinned.steps:,} steps{left_out}",
        }

    def _frame(self) -> str:
        """Returns the figure as a frame of its own, so that the notebook's styles and ours stay apart."""
        title = f"run {self._name}"
        above = f'<p class="sub"><b>{html.escape(title)}</b> <span id="said"></span></p>'
        page = document(PageContent(title, "", (above, ""), self._data()), needed_by=_WHAT)
        return (
            f'<iframe id="esper-{self._id}" sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
            f'title="{html.escape(title)}" style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        )


_SEND = """<script>
(() => {
  const text = TEXT;
  const send = (left) => {
    const frame = document.getElementById("esper-ID");
    if (frame) frame.contentWindow.postMessage({esper: "ID", text}, "*");
    if (left) setTimeout(send, 1000, left - 1);
  };
  send(window.esperID ? 0 : 3);
  window.esperID = true;
})();
</script>"""


def _content(content: str) -> dict[str, str]:
    return {"text/html": content, "text/plain": ""}


def _display() -> Callable[..., Any]:
    """Returns IPython's ``display``.

    Raises:
        ConfigurationError: there is no notebook.
    """
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        raise ConfigurationError(
            f"{_WHAT} works in a notebook, and IPython is not installed: pip install 'esper-otel[ui]' jupyterlab"
        ) from None
    if get_ipython() is None:
        raise ConfigurationError(f"{_WHAT} works in a notebook; outside of one: esper-otel ui")
    return display
