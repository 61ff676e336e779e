"""``telemetry.show()``: a figure that follows the run, in IPython itself."""

from __future__ import annotations

import html
import json
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

import esper_otel
from esper_otel import ConfigurationError, Telemetry
from esper_otel.session import show

pytestmark = pytest.mark.own_code


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a notebook is given to display."""
    shell = InteractiveShell.instance()
    publisher: Any = CapturingDisplayPublisher(shell=shell)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(shell, "display_pub", publisher)
    yield publisher.outputs
    InteractiveShell.clear_instance()
    for prompt in {"ps1", "ps2", "ps3"} & vars(sys).keys():  # otherwise later tests would seem to be at a prompt
        delattr(sys, prompt)


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(run_id="<b>run</b>") as telemetry:
        yield telemetry


def steps(telemetry: Telemetry, count: int) -> None:
    for step in range(count):
        with telemetry.step(epoch=0) as now:
            now.put(loss=float("nan") if step == 3 else 1.0 + step)


def frame(output: dict[str, Any]) -> str:
    """The document in the figure."""
    [document] = re.findall(r'srcdoc="([^"]*)"', output["data"]["text/html"])
    return html.unescape(document)


def test_it_follows_the_run_until_it_is_closed(
    telemetry: Telemetry, published: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps so far stand in the figure, later ones come in updates of one small output, the last at the end."""
    monkeypatch.setattr(show, "EVERY_S", 0.01)
    steps(telemetry, 5)
    telemetry.show()
    data = json.loads(re.search(r'id="data">(.*?)</script>', frame(published[0]), re.DOTALL)[1])  # type: ignore[index]
    series = data["runs"][0]["series"]
    assert series["columns"]["step"] == [1, 2, 3, 4, 5]
    assert series["metrics"]["loss"]["odd"] == [[3, 1, 0, 0, 4]]
    assert data["runs"][0]["name"] == "<b>run</b>"
    assert "<b>run</b>" not in published[0]["data"]["text/html"]
    steps(telemetry, 7)
    telemetry.close()
    last = published[-1]
    assert last["update"]
    assert len(last["data"]["text/html"]) < 100_000
    sent = json.loads(json.loads(re.search(r"const text = (.*);\n", last["data"]["text/html"])[1]))  # type: ignore[index]
    assert sent["runs"][0]["series"]["columns"]["step"] == [*range(1, 13)]
    assert not [thread for thread in threading.enumerate() if thread.name == "esper-otel-show" and not thread.daemon]


def test_a_notebook_that_is_gone_does_not_disturb_training(
    telemetry: Telemetry, published: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    telemetry.show()
    shell = InteractiveShell.instance()
    monkeypatch.setattr(shell.display_pub, "publish", lambda *_, **__: 1 / 0)
    steps(telemetry, 2)
    telemetry.close()
    assert telemetry.health()["faults"] == 1


def test_where_it_cannot_be_shown_it_says_what_to_do(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="outside of one: esper-otel ui"):
        telemetry.show()
    monkeypatch.setitem(__import__("sys").modules, "IPython.core.getipython", None)
    with pytest.raises(ConfigurationError, match="IPython is not installed"):
        telemetry.show()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it_and_what_comes_later(
    telemetry: Telemetry, published: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As a notebook's page does: the outputs one below the other, and the newest update."""
    steps(telemetry, 5)
    telemetry.show()
    steps(telemetry, 5)
    telemetry.close()
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "figure.html").write_text(frame(published[0]), encoding="utf-8")
    update = published[-1]["data"]["text/html"].removeprefix("<script>").removesuffix("</script>")
    with Browser(folder / "profile") as browser:
        browser.open((folder / "figure.html").as_uri())
        browser.until("document.querySelector('.chart .place > :not(.cursor)') !== null")
        assert browser.value("document.getElementById('said').textContent") == "5 steps"
        # In a notebook, the update's script finds the figure in the cell; here, the figure is the page itself.
        browser.value("document.getElementById = () => ({contentWindow: window}); 0")
        browser.value(f"{update}; delete document.getElementById; 0")
        browser.until("document.getElementById('said').textContent === '10 steps'")
        assert browser.uncaught == []
