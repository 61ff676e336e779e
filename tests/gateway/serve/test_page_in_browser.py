"""The live page in a browser: what it shows of a gateway's answers, and what it does when something is wrong."""

from __future__ import annotations

import json

import pytest
from browser import Browser
from made_up_gateway import MadeUpGateway, MadeUpRun

STATUS = "document.getElementById('connection').textContent"
DRAWN = "[...board.charts.values()].filter((chart) => chart.plot).length"


def tile(name: str) -> str:
    """JavaScript for the number under a name."""
    return f"[...document.querySelectorAll('.tile')].find((t) => t.firstChild.data === '{name}')?.lastChild.textContent"


def chart(name: str) -> str:
    """JavaScript for a chart."""
    return f"board.charts.get({json.dumps(name)})"


def test_every_metric_has_a_chart_and_each_is_drawn(browser: Browser) -> None:
    """In groups that fold; the filter leaves some; nothing that the policy forbids is tried."""
    run = MadeUpRun("run", 300)
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url)
        browser.value(
            "window.refused = []; addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI))"
        )
        browser.until(f"{DRAWN} > 3 && {STATUS} === ''")
        assert browser.value("[...board.charts.keys()].length") == 12  # and where the time goes
        groups = browser.value("[...document.querySelectorAll('.section:not([hidden]) h2')].map((h) => h.textContent)")
        assert groups == ["Learning", "Time", "Throughput", "Machine", "Your own"]
        assert browser.value(f"{chart('loss')}.sources.get('run line').data.y.length") == 300
        [wait, hook, rest] = [
            browser.value(
                f"[...board.charts.get('where the time goes').sources.get('input wait,hook,rest').data.top{i}]"
            )
            for i in range(3)
        ]
        assert all(low < middle < high for low, middle, high in zip(wait, hook, rest, strict=True))
        assert wait[9] == run.value("input_wait_ms", 10)
        assert rest[9] == pytest.approx(wait[9] + run.value("step_latency_ms", 10))
        browser.value("board.set({filter: 'wait'}); document.querySelectorAll('.section:not([hidden]) .chart').length")
        assert browser.value(
            "[...document.querySelectorAll('.section:not([hidden]) .chart b')].map((b) => b.textContent)"
        ) == ["input_wait_ms"]
        assert browser.value("refused") == []
        assert browser.uncaught == []


def test_runs_are_compared_and_the_address_brings_the_view_back(browser: Browser) -> None:
    """Chosen in the table, with colors that stay; the read-out has the values of all of them at a step."""
    runs = [MadeUpRun(f"run-{number}", 400 + number) for number in range(60)]
    with MadeUpGateway(*runs) as gateway:
        browser.open(gateway.url)
        browser.until("runs.infos.size === 60")
        for name in ("run-3", "run-5", "run-7"):
            browser.value(f"choose([...(runs.isExplicit ? runs.chosen : []), '{name}'])")
        browser.value("choose(runs.chosen.filter((name) => name !== 'run-3'))")
        browser.value("board.set({base: 'run-5', x: 'since', smooth: 0.5}); changedChoice()")
        browser.until("data.get('run-7')?.series && new URLSearchParams(location.search).get('base') === 'run-5'")
        before = browser.value("runs.chosen.map(colorOf)")
        browser.open(browser.value("location.href"))
        browser.until(f"data.get('run-7')?.series && {DRAWN} > 0")
        assert browser.value("runs.chosen") == ["run-5", "run-7"]
        assert browser.value("runs.chosen.map(colorOf)") == before
        assert browser.value("[board.view.base, board.view.x, board.view.smooth]") == ["run-5", "since", 0.5]
        browser.value(
            f"{chart('loss')}.element.focus(); board.step(1, {chart('loss')}); board.step(1, {chart('loss')})"
        )
        rows = browser.value("[...document.querySelectorAll('.readout td')].map((cell) => cell.textContent)")
        assert {"run-5", "run-7"} <= set(rows)
        assert "step 2," in browser.value("document.querySelector('.readout').textContent")
        browser.value("document.getElementById('search').value = 'run-1'")
        browser.value("document.getElementById('search').dispatchEvent(new Event('input'))")
        names = browser.value("[...document.querySelectorAll('#table td.run')].map((cell) => cell.textContent)")
        assert sorted(names) == sorted(f"run-{number}" for number in (1, *range(10, 20)))
        assert browser.uncaught == []


def test_what_is_thinned_is_said_and_every_step_comes_when_zoomed_in(browser: Browser) -> None:
    """100,000 steps; NaN and both infinities are marked apart, and the seam of an attempt is named."""
    run = MadeUpRun("long", 100_000, attempt_count=2)
    run.odd["loss"] = [[50_000, 1, 0, 0], [55_000, 0, 1, 0], [90_000, 0, 0, 1]]
    run.segments = [
        {"number": 1, "why": "start", "first_step": 1},
        {"number": 2, "why": "resumed", "first_step": 60_001},
    ]
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url)
        browser.until(f"{DRAWN} > 3")
        assert "thinned: a point stands for up to 128 steps" in browser.value("board.said.textContent")
        note = browser.value(f"{chart('loss')}.note.textContent")
        assert [word in note for word in ("✕ NaN", "▲ +Inf", "▼ -Inf")] == [True] * 3
        assert "attempt 2 from step" in note
        browser.value("board.zoom([49_500, 50_500])")
        browser.until("data.get('long').detail?.width === 1 && board.said.textContent === ''")
        steps = browser.value(f"[...{chart('accuracy')}.sources.get('long line').data.x]")
        assert {*range(49_500, 50_501)} <= set(steps)
        assert (
            browser.value("[...board.charts.values()].filter((c) => c.range && c.range.start !== 49_500).length") == 0
        )
        assert browser.uncaught == []


def test_states_are_told_apart(browser: Browser) -> None:
    """No run, one that catches up, one that failed, several ranks; signals are episodes."""
    with MadeUpGateway() as gateway:
        browser.open(gateway.url, hurry=10)
        browser.until("!document.getElementById('nothing').hidden")
        assert f"OTEL_EXPORTER_OTLP_ENDPOINT={gateway.url[:-1]} " in browser.value(
            "document.getElementById('lines').textContent"
        )
        run = MadeUpRun("long", 93_000)
        run.read = 36_500
        gateway.runs["long"] = run
        browser.until(f"{tile('step')} === '36,500 of 93,000, catching up'")
        assert "catching up with long" in browser.value(STATUS)
        run.read = 93_000
        browser.until(f"{tile('step')} === '93,000' && {STATUS} === ''")
        run.info = {"state": "failed", "outcome": "ValueError", "rank_count": 2}
        run.info["ranks"] = [{"rank": rank, "state": "failed", "last_step": 9} for rank in (0, 1)]
        run.ranks = {"steps": [[1, 5], [6, 9]], "ranks": [0, 1], "step_ms": [[1.0, 1.0], [1.0, 9.0]]}
        run.ranks |= {"slowest": 1, "slowest_by": "input_wait_ms", "slowest_ms": 4.0}
        run.episodes = [{"name": "hook_budget", "level": "HIGH", "first_step": 12, "last_step": 340}]
        run.episodes[0] |= {"text": "hook_budget, steps 12 to 340, worst 60"}
        run.episodes[0] |= {"reason": "above 50", "route": "PAUSE", "segment": 0, "is_open": False}
        run.steps += 1
        browser.until(f"{tile('state')} === 'failed: ValueError'")
        browser.until("document.querySelector('#episodes li') !== null && board.charts.has('ranks')")
        assert browser.value("[...document.querySelectorAll('#episodes li')].map((li) => li.textContent)") == [
            "HIGH hook_budget, steps 12 to 340, worst 60 (above 50) → PAUSE"
        ]
        browser.until(f"{tile('slowest rank')} === '1, by 4 ms'")
        assert browser.uncaught == []


def test_what_fails_is_said_and_the_rest_goes_on(browser: Browser) -> None:
    """A part of the page, an answer, a gateway that is gone and comes back."""
    run = MadeUpRun("run", 10)
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url, hurry=10)
        browser.until(f"{tile('step')} === '10' && {STATUS} === ''")
        browser.value("window.saved = {drawSignals}; drawSignals = () => { throw new Error('boom'); }; 0")
        browser.until(f"{STATUS} === 'the signals cannot be shown: boom'")
        run.steps += 1
        browser.until(f"{tile('step')} === '11'")
        browser.value("Object.assign(window, saved); 0")
        run.steps += 1
        browser.until(f"{STATUS} === '' && {tile('step')} === '12'")
        for broken, said in (((500, "on fire"), "500 on fire"), ((200, "{"), "JSON")):
            gateway.broken = broken
            run.steps += 1
            browser.until(
                f'{STATUS}.startsWith("the gateway\'s answer cannot be shown: ") && {STATUS}.includes("{said}")'
            )
        gateway.broken = None
        browser.until(f"{STATUS} === '' && data.get('run').series.columns.step.length === {run.steps}")
        gateway.go.clear()
        browser.value("gateway.askedMs = Math.min(gateway.askedMs, performance.now()) - 3001; 0")
        browser.until(f"{STATUS}.startsWith('the gateway does not answer (for ')")
        assert browser.value(tile("state")) == "not known"
        gateway.go.set()
        browser.until(f"{STATUS} === ''")
        assert browser.uncaught == []
