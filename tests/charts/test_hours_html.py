"""The bar of the hours on the page, in a real browser, and in the report: the same numbers, nothing forbidden."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import Browser
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, TamiyoClient
from esper_otel.charts.hours_section import hours_html
from esper_otel.cli import main
from esper_otel.hours.bar import Bar, RunHours

SECTION = "document.getElementById('hours')"


def widths(html: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect x="[\d.]+%" width="([\d.]+)%"', html)]


def bar(**parts: float) -> Bar:
    return Bar(10**18, 10**18 + round(sum(parts.values()) * 10**6), parts, 2)


def test_the_bar_is_whole_and_names_are_text() -> None:
    evil = {"<script>alert(1)</script>": 500.0, '"><img src=x>': 250.0}
    run = bar(productive=2_250.0, **evil)
    html = hours_html(RunHours(run, {0: run}, ()))
    assert widths(html) == [75.0, pytest.approx(16.6667, abs=1e-3), pytest.approx(8.3333, abs=1e-3)]
    assert "<script" not in html
    assert "<img" not in html
    assert "style=" not in html  # the pages' policy forbids it
    assert "3.0 s in 2 attempts, 75.0% productive" in html
    assert "By rank" not in html


def test_ranks_are_shown_and_of_very_many_the_least_productive() -> None:
    ranks = {rank: bar(productive=1_000.0 + rank, unknown=100.0) for rank in range(100)}
    html = hours_html(RunHours(ranks[0], ranks, ()))
    assert "By rank, without 36 more productive ones" in html
    assert "rank 63:" in html
    assert "rank 64:" not in html
    assert hours_html(RunHours(Bar(0, 0, {}, 0), {}, ())) == ""


def test_the_page_and_the_report_show_it(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunningGateway("--ui") as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        for rank in range(2):
            settings = EsperSettings(export_every_s=0)
            with esper_otel.start(run_id="run", rank=rank, world_size=2, settings=settings) as telemetry:
                telemetry.record_step({"loss": 1.0, "step_latency_ms": 20.0, "input_wait_ms": 5.0}, epoch=0)
                with telemetry.phase("a<b"):
                    pass
        browser.open(f"http://{gateway.http}/")
        browser.value(
            "window.refused = []; addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI))"
        )
        browser.until(f"!{SECTION}.hidden && {SECTION}.querySelectorAll('.hours-bar').length === 3")
        with TamiyoClient(gateway.grpc) as client:
            parts = client.hours("run").run.parts
        drawn = f"[...{SECTION}.querySelector('.hours-bar').children]"
        assert browser.value(f"{drawn}.length") == len(parts)
        names = browser.value(
            f"[...{SECTION}.querySelectorAll('.hours-parts tr')].map((r) => r.cells[0].textContent.trim())"
        )
        assert names == [part.replace("_", " ") for part in parts]
        assert "a<b" in names
        whole = browser.value(f"{SECTION}.querySelector('.hours-bar').getBoundingClientRect().width")
        sum_of_all = f"{drawn}.reduce((sum, each) => sum + each.getBoundingClientRect().width, 0)"
        assert browser.value(sum_of_all) == pytest.approx(whole, rel=0.01)
        assert browser.value("refused") == []
        assert browser.uncaught == []
        path = tmp_path / "run.html"
        assert main(["report", "run", "--target", gateway.grpc, "--html", str(path)]) == 0
    said = capsys.readouterr().out
    assert "Where did the hours go?" in said
    assert " in 1 attempt, " in said
    html = path.read_text()
    assert sum(widths(html)) == pytest.approx(300.0, abs=0.1)  # the run's and those of its ranks
    assert "a&lt;b" in html
