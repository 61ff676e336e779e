"""The live page in a browser: what it shows of a gateway's answers, and what it does when something is wrong."""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import Browser
from made_up_gateway import START_MS, MadeUpGateway, MadeUpRun

from esper_otel.charts.event_list import ShownEvent

STATUS = "document.getElementById('connection').textContent"
DRAWN = "[...board.charts.values()].filter((chart) => chart.plot).length"


def tile(name: str) -> str:
    """JavaScript for the number under a name."""
    return f"[...document.querySelectorAll('.tile')].find((t) => t.firstChild.data === '{name}')?.lastChild.textContent"


def chart(name: str) -> str:
    """JavaScript for a chart."""
    return f"board.charts.get({json.dumps(name)})"


def test_every_metric_has_a_chart_and_each_is_drawn(browser: Browser) -> None:
    """In groups that fold; the filter leaves some; events are marked; nothing that the policy forbids is tried."""
    run = MadeUpRun("run", 300)
    run.events = [ShownEvent("esper.checkpoint", f"at <{step}>", 10**18, 9, step, 1) for step in (100, 200)]
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url)
        browser.value(
            "window.refused = []; addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI))"
        )
        browser.until(f"{DRAWN} > 3 && {STATUS} === ''")
        assert browser.value("[...board.charts.keys()].length") == 13  # and where the time goes
        groups = browser.value("[...document.querySelectorAll('.section:not([hidden]) h2')].map((h) => h.textContent)")
        assert groups == ["Learning", "Time", "Throughput", "Machine", "Your own"]
        assert browser.value(f"{chart('loss')}.sources.get('run line').data.y.length") == 300
        [wait, forward, hook, rest] = [
            browser.value(
                f"[...board.charts.get('where the time goes').sources.get('input wait,forward,hook,rest').data.top{i}]"
            )
            for i in range(4)
        ]
        assert all(list(each) == sorted(each) for each in zip(wait, forward, hook, rest, strict=True))
        assert forward[9] == pytest.approx(wait[9] + run.value("esper.forward_ms", 10))
        browser.until(f"{chart('loss')}.sources.get('events')?.data.x.length === 2")
        assert browser.value(f"[...{chart('loss')}.sources.get('events').data.x]") == [100, 200]
        assert browser.value("[...document.querySelectorAll('#events li b')].map((item) => item.textContent)") == [
            *("at <200>", "at <100>"),
        ]
        browser.value(f"board.point(200.4, {chart('loss')})")
        assert "┃ at <200>" in browser.value("document.querySelector('.readout').textContent")
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
        heads = "[...document.querySelectorAll('#table th button')].map((head) => head.textContent)"
        assert "validation loss" not in browser.value(heads)
        runs[5].info = {"validation_loss": 0.5, "validation_loss_is": ""}
        runs[5].steps += 1
        browser.until("document.querySelector('.chosen td:nth-child(8)')?.textContent === '0.5'")
        assert "validation loss" in browser.value(heads)
        browser.value("document.getElementById('search').value = 'run-1'")
        browser.value("document.getElementById('search').dispatchEvent(new Event('input'))")
        names = browser.value("[...document.querySelectorAll('#table td.run')].map((cell) => cell.textContent)")
        assert sorted(names) == sorted(f"run-{number}" for number in (1, *range(10, 20)))
        browser.value("document.getElementById('every').click(); 0")
        assert browser.value("[...runs.chosen].sort()") == sorted(names)
        assert browser.value("document.getElementById('every').hidden")
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
        run.info |= {"host": "a", "device": "NVIDIA H200, cuda:0, GPU-1", "world_size": 3}
        run.info["ranks"][1] |= {"host": "b", "device": "NVIDIA H200, cuda:1, GPU-2", "location": "Slurm job 7"}
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
        assert "device" in browser.value("[...document.querySelectorAll('#table th')].map((h) => h.textContent)")
        assert browser.value("document.getElementById('who-said').textContent") == (
            "2 on 1 host, 1 device, 1 of 3 have not come"
        )
        browser.value("document.getElementById('who').open = true")
        browser.until("document.querySelectorAll('#who tbody tr').length === 2")
        assert browser.value(
            "[...document.querySelectorAll('#who tbody td')].slice(6).map((td) => td.textContent)"
        ) == [
            *("1", "failed", "9", "b", "NVIDIA H200, cuda:1, GPU-2", "Slurm job 7"),
        ]
        assert browser.uncaught == []


class Odd(MadeUpRun):
    """A run with other losses."""

    loss = math.nan

    def series(self, first: int, last: int, buckets: int) -> dict[str, Any]:
        found = super().series(first, last, buckets)
        steps = found["columns"]["step"]
        losses = found["metrics"]["loss"]
        if math.isfinite(self.loss):
            losses["last"] = [self.loss if step % 2 else -self.loss for step in steps]
        else:
            losses |= {"last": [None] * len(steps), "odd": [[row, 1, 0, 0, row + 1] for row in range(len(steps))]}
        return found


class AgainFromTheFirst(MadeUpRun):
    """Its second attempt does all steps again."""

    def series(self, first: int, last: int, buckets: int) -> dict[str, Any]:
        found = super().series(first, last, buckets)
        columns = found["columns"]
        columns |= {name: 2 * columns[name] for name in columns}
        count = len(columns["step"]) // 2
        columns |= {"segment": [0] * count + [1] * count, "is_again": [1] * count + [0] * count}
        for values in found["metrics"].values():
            values["last"] *= 2
        return found


def test_what_cannot_be_drawn_is_said_and_names_are_shown_as_they_are(browser: Browser) -> None:
    """NaN alone, values at the end of what a number expresses, characters that turn a text, a run called 0.5."""
    huge, turned = Odd("huge", 30), "evil-\u202egnp.exe"
    huge.loss = 1e308
    names = ["huge", "0.5", turned]
    with MadeUpGateway(huge, Odd("0.5", 30), MadeUpRun(turned, 30)) as gateway:
        browser.open(f"{gateway.url}?{urlencode({'run': names[:2], 'colors': '3,1'}, doseq=True)}")
        browser.until(f"{chart('loss')}?.plot != null && {STATUS} === ''")
        note = browser.value(f"{chart('loss')}.note.textContent")
        assert note == (
            "no value that can be drawn:   ✕ NaN at 30 places, first in step 1   "
            "▲ above 1e300 at 15 places, first in step 1   ▼ below -1e300 at 15 places, first in step 2"
        )
        assert (
            browser.value(f"[{chart('loss')}.figure.y_range.start, {chart('loss')}.figure.y_range.end]") != [None] * 2
        )
        assert browser.value("[runs.chosen, runs.chosen.map(slotOf)]") == [["huge", "0.5"], [3, 1]]
        browser.value(f"choose({json.dumps(names)})")
        browser.until("document.querySelector('.names').textContent.includes('gnp')")
        legend = browser.value("[...document.querySelectorAll('.names span')].map((name) => name.textContent)")
        assert legend == ["huge", "0.5", "evil-\\u202egnp.exe"]
        assert "\u202e" not in browser.value("document.body.innerText + document.title")
        browser.until("new URLSearchParams(location.search).getAll('run').length === 3")
        assert browser.value("new URLSearchParams(location.search).get('colors')") == "3,1,0"
        assert browser.uncaught == []


def test_a_run_that_was_begun_again_shows_its_seam_and_its_attempts(browser: Browser) -> None:
    run = AgainFromTheFirst("again", 40)
    run.segments = [{"number": n, "why": why, "first_step": 1} for n, why in ((1, "start"), (2, "resumed"))]
    attempt = {"outcome": None, "first_step": 1, "last_step": 40, "resumed": False}
    run.info = {"attempt_count": 2, "settings": "export_every_s = 5.0", "attempts": []}
    for number, state in ((1, "killed"), (2, "live")):
        run.info["attempts"].append({**attempt, "attempt": 10 * number, "number": number, "state": state})
    run.episodes = [{"text": "hook_budget, step 30", "level": "HIGH", "reason": "above 50", "route": "PAUSE"}]
    run.episodes = [{**run.episodes[0], "attempt": number, "is_open": False} for number in (10, 20)]
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url)
        browser.until(f"{chart('loss')}?.plot != null && document.querySelector('#episodes li') !== null")
        assert browser.value(f"{chart('loss')}.note.textContent") == "┊ attempt 2 again from step 1 (dotted: before)"
        assert browser.value(f"{chart('loss')}.spans.length") == 1
        signals = browser.value("[...document.querySelectorAll('#episodes li')].map((li) => li.textContent)")
        assert signals == [f"HIGH attempt {n}: hook_budget, step 30 (above 50) → PAUSE" for n in (2, 1)]
        about = browser.value("document.getElementById('about').textContent")
        assert about.startswith("attempt 2: 1 killed, steps 1 to 40; 2 live, steps 1 to 40 · ")
        assert about.endswith("host gpu-3 · revision 0b1c2d3e4f · settings export_every_s = 5.0")
        assert browser.uncaught == []


def test_steps_quicker_than_a_millisecond_do_not_make_a_run_longer(browser: Browser) -> None:
    """Their times are 1 ms apart, and so ahead of the clock."""
    run = MadeUpRun("quick", 2_000)
    run.info = {"state": "completed", "last_ms": START_MS + 2_000, "received_ms": START_MS + 400}
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url)
        browser.until(f"{tile('duration')} === '0.4 s'")


def test_a_finger_shows_the_values_at_a_step_until_it_touches_something_else(browser: Browser) -> None:
    with MadeUpGateway(MadeUpRun("run", 300)) as gateway, browser.as_a_phone():
        browser.open(gateway.url)
        browser.until(f"{chart('loss')}?.plot != null && {STATUS} === ''")
        browser.value(f"{chart('loss')}.element.scrollIntoView({{block: 'center'}}); 0")
        browser.touch(f"{chart('loss')}.place")
        browser.until("!board.readout.hidden && board.readout.textContent.includes('run')")
        assert browser.value("getComputedStyle(document.querySelector('.bar .drag')).display") == "none"
        browser.touch("document.querySelector('.learning summary small')")
        browser.until("board.readout.hidden")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")


def test_a_chart_becomes_large_is_pinned_and_gives_its_picture_and_its_table(browser: Browser) -> None:
    """What is pinned stands in the address. A curve that is level stays level when it is smoothed."""
    run = MadeUpRun("=run, of mine", 30)
    run.odd["loss"] = [[7, 1, 0, 0]]
    with MadeUpGateway(run) as gateway:
        browser.open(gateway.url)
        browser.until(f"{chart('loss')}?.plot != null")
        size = f"(({{width, height}}) => [width, height])({chart('loss')}.place.getBoundingClientRect())"
        width, height = browser.value(size)
        browser.value(f"{chart('loss')}.acts.querySelector('button').click(); 0")
        browser.until(f"{chart('loss')}.plot != null && {chart('loss')}.plot.bbox.width > {2 * width}")
        assert browser.value(size)[1] > 1.5 * height
        browser.value(f"{chart('loss')}.acts.querySelector('button').click(); 0")
        browser.until(f"{chart('loss')}.plot != null && {chart('loss')}.plot.bbox.width === {width}")
        sections = "[...document.querySelectorAll('.section:not([hidden])')].map((s) => s.className.split(' ')[1])"
        browser.value(f"board.pin({chart('accuracy')})")
        assert browser.value(f"[{sections}[0], {chart('accuracy')}.element.closest('.pinned') !== null]") == [
            *("pinned", True),
        ]
        browser.until("location.search.includes('pin=accuracy')")
        browser.value(f"board.pin({chart('accuracy')})")
        assert browser.value(f"{sections}[0]") == "learning"
        browser.value("window.saved = []; Esper.save = (name, blob) => saved.push([name, blob]); 0")
        browser.value(f"{chart('loss')}.save()")
        assert browser.value("saved.map(([name, blob]) => [name, blob.type, blob.size > 5000])") == [
            ["loss.png", "image/png", True]
        ]
        level = (
            "(() => { const s = data.values().next().value.series; "
            "s.metrics.level = {last: s.columns.step.map(() => 0.1), odd: []};"
        )
        level += " return [...new Set(Esper.curve(s, 'level', {x: 'step', smooth: 0.9}).y)]; })()"
        assert browser.value(level) == [0.1]
        press = "{0}.key(new KeyboardEvent('keydown', {{key: '{1}'}}))"
        browser.value(f"board.point(2, {chart('loss')}); {press.format(chart('loss'), '+')}")
        assert browser.value("board.view.range") == [1, 15.5], "not beyond the first step"
        browser.value(press.format(chart("loss"), "0"))
        assert browser.value("board.view.range") is None
        head, *lines = browser.value("Esper.csv('loss', board)").splitlines()
        assert head == "run,attempt,first_step,last_step,epoch,time,loss,min,max"
        assert len(lines) == 30
        assert lines[6].startswith('"\'=run, of mine",1,7,7,0,20')
        assert lines[6].endswith("Z,NaN,,")
        assert float(lines[7].split(",")[7]) == run.value("loss", 8)
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
