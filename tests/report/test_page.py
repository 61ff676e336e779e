"""What stands in the page of a report besides its findings."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings
from esper_otel.pull.client import TamiyoClient
from esper_otel.report.findings import compared
from esper_otel.report.page import is_page, page
from esper_otel.report.recording import Recording, Row, of_file, of_gateway


def data_of(html: str) -> dict[str, Any]:
    """What the charts draw."""
    [text] = re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def recording(name: str, **values: float) -> Recording:
    rows = tuple(Row(step, 0, 1.7e9 + step, {"loss": 1.0 / step, **values}, {}) for step in range(1, 5_001))
    return Recording(name, 0, 1, "completed", rows, name)


def test_host_settings_and_date_of_a_black_box_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    settings = EsperSettings(black_box_dir=tmp_path, black_box_frames=8, probe_period_s=77.0)
    with contextlib.suppress(KeyError), esper_otel.start(run_id="run", settings=settings) as telemetry:
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
        raise KeyError
    deadline_s = time.monotonic() + 20
    while not (boxes := list(tmp_path.glob("*.gz"))):  # close() waits for it for a second only
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    [box] = boxes
    html = page(of_file(box))
    assert f"host {socket.gethostname()}" in html
    assert "settings black_box_frames = 8, probe_period_s = 77.0" in html
    assert str(tmp_path) not in html
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d to", html)


def test_only_what_was_recorded_is_drawn_and_the_other_run_is_named() -> None:
    """Both runs in each chart, thinned; what only the other has is there too."""
    html = page(recording("one"), recording("two", accuracy=0.5))
    data = data_of(html)
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    assert [metric["name"] for metric in data["metrics"]] == ["loss", "accuracy"]
    assert "accuracy" not in data["runs"][0]["series"]["metrics"]
    assert len(data["runs"][0]["series"]["columns"]["step"]) <= 2_000
    for words in ("<h2>one</h2>", "<h2>two</h2>", "The last steps of one", "The last steps of two"):
        assert words in html


def test_a_page_of_an_older_version_is_still_ours(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        'content="x"><meta name="esper-otel-report" content="box"><title>run</title>',
        encoding="utf-8",
    )
    assert is_page(tmp_path / "old.html")
    (tmp_path / "new.html").write_text(page(recording("one")), encoding="utf-8")
    assert is_page(tmp_path / "new.html", recording("one"))
    assert not is_page(tmp_path / "new.html", recording("two"))


def test_a_run_from_a_gateway_has_the_names_of_the_live_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets have other keys for some values, and repeat the loss. The validation loss says which run is better."""
    with RunningGateway() as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        for run_id, loss in (("one", 0.5), ("two", 0.25)):
            with esper_otel.start(run_id=run_id, settings=EsperSettings(probe_period_s=3600)) as telemetry:
                for _ in range(4):
                    telemetry.validation(loss=loss)
                    with telemetry.step(epoch=0) as now:
                        now.put(loss=1.0, optimizer_lr=0.1)
        with TamiyoClient(gateway.grpc) as client:
            one, two = (of_gateway(client, run_id, 0) for run_id in ("one", "two"))
    drawn = {metric["name"] for metric in data_of(page(one, two))["metrics"]}
    assert {"loss", "esper.validation.loss", "esper.optimizer.lr"} <= drawn
    assert not drawn & {"training_loss", "esper.training.loss", "validation_loss", "optimizer_lr"}
    [found] = compared(one, two)
    assert "esper.validation.loss at the end: 0.5, compared with 0.25 (worse)" in found.answer
