"""The live page: what it is given, who is given it, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from browser import CHROMIUM, Browser
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, Stage

pytestmark = pytest.mark.own_code

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """A gateway with the page, and two runs: one has ended, one goes on and has a NaN."""
    with RunningGateway("--ui") as gateway, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        settings = EsperSettings(export_every_s=0, probe_period_s=3600)
        for run_id in ("ended", "going on"):
            telemetry = esper_otel.start(run_id=run_id, settings=settings)
            for step in range(60):
                with telemetry.step(epoch=0) as now:
                    now.put(
                        loss=math.nan if step == 30 else 2 / (step + 1), hook_latency_ms=60.0 if step == 50 else 1.0
                    )
                    now.seed("seed-1", stage=Stage.BLENDING, alpha=step / 60)
            if run_id == "ended":
                telemetry.close()
        while json.loads(requests.get(f"http://{gateway.http}/page/runs", timeout=TIMEOUT_S).text)["runs"] == []:
            pass
        yield gateway
        telemetry.close()


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/board.js", "/page/charts.css", "/page/runs"])
def test_only_this_machine_is_answered_and_nothing_comes_from_elsewhere(gateway: RunningGateway, path: str) -> None:
    """A name that leads to loopback by a trick with DNS is not this machine's."""
    url = f"http://{gateway.http}{path}"
    port = gateway.http.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert requests.get(url, headers={"host": host}, timeout=TIMEOUT_S).status_code in {400, 403}, host
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost", f"[::1]:{port}"):
        answer = requests.get(url, headers={"host": host}, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert not re.search(r"https?://", answer.text)


def test_without_the_flag_there_is_no_page() -> None:
    with RunningGateway() as gateway:
        for path in ("/", "/page/runs"):
            assert requests.get(f"http://{gateway.http}{path}", timeout=TIMEOUT_S).status_code == 404


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--http", "0.0.0.0:0", "--insecure"], "for this machine"),
        (["--http", "none"], "for this machine"),
        (["--pull-tokens", "{tokens}"], "cannot send a token"),
    ],
)
def test_where_the_page_cannot_be_safe_it_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("token\n", encoding="utf-8")
    with (
        pytest.raises(AssertionError, match=message),
        RunningGateway("--ui", *[option.format(tokens=tmp_path / "tokens") for option in options]),
    ):
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it(gateway: RunningGateway, tmp_path: Path) -> None:
    """The newest run first; then both, chosen by the address. The policy forbids nothing that the page does."""
    with Browser(tmp_path) as browser:
        browser.open(f"http://{gateway.http}/")
        browser.value(
            "window.refused = []; addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI))"
        )
        browser.until("data.get('going on')?.series?.columns.step.length === 60")
        browser.until("Boolean(board.charts.get('loss')?.plot)")
        pairs = "[...document.querySelectorAll('.tile')].map((t) => [t.firstChild.data, t.lastChild.textContent])"
        tiles = f"Object.fromEntries({pairs})"
        browser.until(f"{tiles}['live seeds'] === '1'")
        found = browser.value(tiles)
        assert (found["state"], found["step"], found["loss"]) == ("live", "60", "0.033333")
        assert "hook_budget" in browser.value("document.getElementById('episodes').textContent")
        assert "✕ NaN in step 31" in browser.value("board.charts.get('loss').note.textContent")
        mean = "Esper.meanOf(data.get('going on').series, 'loss', 'step')"
        assert 31 not in browser.value(f"{mean}.x"), "the average has no value there, which is not 0"
        assert min(browser.value(f"{mean}.y")) > 0
        assert browser.value("refused") == []
        browser.open(f"http://{gateway.http}/?run=ended&run=going+on&x=epoch&log=1")
        browser.until("data.get('ended')?.series && Boolean(board.charts.get('loss')?.plot)")
        states = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.children[2].textContent)"
        assert sorted(browser.value(states)) == ["completed", "live"]
        assert browser.uncaught == []
        browser.open(f"http://{gateway.http}/?run=ended&run=%3Cb%3Egone&x=toString&smooth=x&from=9&to=1&sort=__proto__")
        browser.until("data.get('ended')?.series && Boolean(board.charts.get('loss')?.plot)")
        assert "does not have the run <b>gone" in browser.value("document.getElementById('connection').textContent")
        assert "1 shown in the charts" in browser.value("document.getElementById('runs-said').textContent")
        assert browser.value("board.view.x") == "step"
        assert ", goes on" not in browser.value("document.getElementById('episodes').textContent")
        assert browser.uncaught == []


def test_what_is_narrow_or_level_is_seen(gateway: RunningGateway, tmp_path: Path) -> None:
    """A spike in a thinned curve has a line, since its band is a pale pixel; a level curve has its own range."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}"}
    settings = EsperSettings(export_every_s=0, probe_period_s=3600)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with esper_otel.start(run_id="spike", settings=settings) as telemetry:
            for step in range(4000):
                with telemetry.step(epoch=0) as now:
                    now.put(loss=50.0 if step == 2001 else 1.0, optimizer_lr=0.001)
    with Browser(tmp_path) as browser:
        browser.open(f"http://{gateway.http}/?run=spike")
        browser.until("data.get('spike')?.series?.stored === 4000 && !data.get('spike').isBehind")
        browser.until("Boolean(board.charts.get('loss')?.plot && board.charts.get('esper.optimizer.lr')?.plot)")
        lines = "board.charts.get('loss').figure.renderers.filter((each) => each.glyph.type === 'Line')"
        drawn = f"{lines}.map((each) => each.glyph.y.field)"
        browser.until(f"{drawn}.includes('high')")
        y = "board.charts.get('esper.optimizer.lr').figure.y_range"
        browser.until(f"{y}.end - {y}.start < 0.001")
        assert browser.uncaught == []
