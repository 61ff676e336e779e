"""The live page: what it is given, who is given it, and how it looks in a browser."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from browser import CHROMIUM, Browser
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, Stage

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


def test_steps_come_page_by_page_with_what_is_drawn(gateway: RunningGateway) -> None:
    """Strict JSON; NaN is null, what is missing is not there."""
    url = f"http://{gateway.http}/page"
    answer = json.loads(
        requests.get(f"{url}/steps", params={"run": "ended"}, timeout=TIMEOUT_S).text, parse_constant=pytest.fail
    )
    steps = answer["steps"]
    assert [step["step"] for step in steps] == [*range(1, 61)]
    assert steps[30]["values"]["loss"] is None
    assert "accuracy" not in steps[0]["values"]
    assert steps[59]["seeds"] == [["seed-1", Stage.BLENDING, 59 / 60]]
    assert steps[50]["signals"][0][:2] == ["hook_budget", "HIGH"]
    again = requests.get(f"{url}/steps", params={"run": "ended", "cursor": answer["cursor"]}, timeout=TIMEOUT_S).json()
    assert again["steps"] == []
    runs = {run["run_id"]: run for run in requests.get(f"{url}/runs", timeout=TIMEOUT_S).json()["runs"]}
    assert (runs["ended"]["ended"], runs["going on"]["ended"]) == ("completed", None)
    assert runs["ended"]["last_step"] == 60
    assert runs["ended"]["last_time_ms"] == steps[59]["time_ms"]
    assert runs["ended"]["attempt"] == steps[59]["attempt"]
    assert answer["more"] is False
    assert requests.get(f"{url}/steps", params={"run": "nobody"}, timeout=TIMEOUT_S).status_code == 404
    stale = requests.get(f"{url}/steps", params={"run": "ended", "cursor": "x"}, timeout=TIMEOUT_S)
    assert stale.status_code == 409


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/page.css", "/page/runs", "/page/steps?run=ended"])
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
    """The numbers stand on the page, no script failed, and the curves are not blank."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=5000", "--window-size=1400,1300", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, "--dump-dom", f"http://{gateway.http}/"], capture_output=True, text=True, check=False, timeout=90
    )
    page = re.sub(r"<[^>]+>", "\n", done.stdout)
    assert "Uncaught" not in done.stderr
    assert "Refused to" not in done.stderr
    assert "the gateway does not answer" not in page
    tiles = dict(re.findall(r'class="tile[^"]*">([^<]+)<b>([^<]*)</b>', done.stdout))
    assert (tiles["state"], tiles["step"], tiles["live seeds"]) == ("running", "60", "1")
    assert tiles["loss"] == "0.03333"
    assert "hook_budget (hook_latency_ms 60 above 50)" in page
    assert "BLENDING" in page
    shot = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", f"http://{gateway.http}/"], capture_output=True, check=True, timeout=90
    )
    blank = tmp_path / "blank.png"
    subprocess.run([*command, f"--screenshot={blank}", "about:blank"], capture_output=True, check=True, timeout=90)
    assert shot.stat().st_size > 5 * blank.stat().st_size


# -- the page against a gateway that answers as a test wants ----------------------------------------------


class MadeUpGateway:
    """Serves the page, and steps that are made up: very many of them, or answers that a real gateway seldom gives.

    Args:
        runs: how many steps each run has.

    Attributes:
        runs: may be changed while the page looks.
        broken: what it answers instead of steps, if anything: a status and a text.
        held_from: from this step of a run on it lets the page wait until ``release``.
        release: lets it answer.
        given: steps that it gives instead, each once, when there are any.
        asked: how often it was asked for steps.
    """

    def __init__(self, **runs: int) -> None:
        self.runs = runs
        self.broken: tuple[int, str] | None = None
        self.held_from = math.inf
        self.release = threading.Event()
        self.given: Sequence[dict[str, Any]] = ()
        self.asked = 0
        folder = resources.files("esper_otel.gateway.serve").joinpath("page")
        self._files = {
            "/": folder.joinpath("index.html"),
            "/page/page.js": folder.joinpath("page.js"),
            "/page/page.css": folder.joinpath("page.css"),
        }

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, text = outer.answer(self.path)
                body = text.encode()
                self.send_response(status)
                self.send_header("content-type", kind)
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
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, target: str) -> tuple[int, str, str]:
        """Status, type and text for a path."""
        path = urlsplit(target)
        if path.path in self._files:
            kind = {"s": "text/css", "j": "text/javascript"}.get(path.path[-2:-1], "text/html")
            return 200, kind, self._files[path.path].read_text(encoding="utf-8")
        if path.path == "/page/runs":
            return 200, "application/json", json.dumps({"runs": [self._info(*run) for run in self.runs.items()]})
        if path.path != "/page/steps":
            return 404, "text/plain", "nothing is here"
        if self.broken is not None:
            return self.broken[0], "text/plain", self.broken[1]
        self.asked += 1
        query = parse_qs(path.query)
        [name], place = query["run"], int(query.get("cursor", ["0"])[0])
        if not self.runs[name]:
            return 404, "text/plain", "no step is here"
        numbers = range(place + 1, min(place + 500, self.runs[name]) + 1)
        if numbers and numbers[0] > self.held_from:
            self.release.wait()
        given, self.given = self.given, ()
        steps = json.dumps(given) if given else self._steps(numbers)
        more = json.dumps(len(numbers) == 500)
        return 200, "application/json", f'{{"steps":{steps},"cursor":"{place + len(numbers)}","gap":0,"more":{more}}}'

    @staticmethod
    @functools.lru_cache
    def _steps(numbers: range) -> str:
        return json.dumps([MadeUpGateway.step(number) for number in numbers])

    @staticmethod
    def step(number: int, **others: Any) -> dict[str, Any]:
        """One step as the page reads it."""
        values = {"loss": 1 / number, "loss_ewma": 1 / number, "step_latency_ms": 20.0, "samples_per_s": 9.0}
        step = {"rank": 0, "attempt": 1, "step": number, "time_ms": number, "revision": 1, "values": values}
        return step | {"seeds": [["seed-1", 3, None]], "signals": []} | others

    @staticmethod
    def _info(name: str, steps: int) -> dict[str, Any]:
        numbers = {"rank": 0, "attempt": 1, "missing": 0, "incomplete": 0, "last_step": steps, "last_time_ms": steps}
        return {"run_id": name, "ended": None, "last_received_unix_ns": steps} | numbers


STATUS = "document.getElementById('connection').textContent"


def tile(name: str) -> str:
    """JavaScript for the number under a name."""
    return f"[...document.querySelectorAll('.tile')].find((t) => t.firstChild.data === '{name}')?.lastChild.textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_forty_runs_of_4000_steps_are_shown_and_the_page_goes_on(browser: Browser) -> None:
    """160,000 numbers in one chart; then there is one more."""
    with MadeUpGateway(**{f"run-{number}": 4000 + number for number in range(40)}) as gateway:
        browser.open(gateway.url)
        browser.until(f"runs.size === 40 && ![...runs.values()].some((run) => run.isBehind) && {STATUS} === ''")
        assert browser.value("[...runs.values()].every((run) => run.steps.length === MOST)")
        assert browser.value(tile("step")) == "4,039"
        gateway.runs["run-39"] += 1
        browser.until(f"{tile('step')} === '4,040'")
        assert browser.value(STATUS) == ""
        assert browser.uncaught == []


def test_a_page_that_catches_up_says_how_far_it_is(browser: Browser) -> None:
    with MadeUpGateway(long=93_000) as gateway:
        gateway.held_from = 36_500
        browser.open(gateway.url, hurry=10)
        browser.until(f"{tile('step')} === '36,500 of 93,000, catching up'")
        assert "catching up with long" in browser.value(STATUS)
        gateway.release.set()
        browser.until(f"{tile('step')} === '93,000' && {STATUS} === ''")
        assert browser.value("runs.get('long').steps.map((step) => step.step).join()") == ",".join(
            map(str, range(89_001, 93_001))
        )


def test_a_run_of_which_nothing_is_stored_yet_is_waited_for(browser: Browser) -> None:
    """Neither a fault nor catching up; and the gateway is asked for it about once a second."""
    with MadeUpGateway(run=0) as gateway:
        browser.open(gateway.url)
        browser.until(f"{tile('step')} === 'none'")
        browser.value("new Promise((done) => setTimeout(done, 1500))")
        assert browser.value(STATUS) == ""
        assert gateway.asked <= 4
        gateway.runs["run"] = 3
        browser.until(f"{tile('step')} === '3'")


def test_what_fails_is_said_and_the_rest_goes_on(browser: Browser) -> None:
    """A part of the drawing, an answer, the looking itself: each on its own, and what was said goes when it is over."""
    with MadeUpGateway(run=10) as gateway:
        browser.open(gateway.url, hurry=10)
        browser.until(f"{tile('step')} === '10'")

        browser.value("window.saved = {}")

        def goes_on(said: str) -> None:
            browser.until(f"{STATUS} === {json.dumps(said)}")
            gateway.runs["run"] += 1
            browser.until(f"{tile('step')} === '{gateway.runs['run']}'")

        parts = {"loss": "the loss", "seeds": "the seeds", "compare": "the comparison"}
        for part in parts:
            browser.value(f"saved.{part} = {part}; {part} = () => {{ throw new Error('boom'); }}; redraw()")
        goes_on("; ".join(f"{name} cannot be shown: boom" for name in parts.values()))
        browser.value("Object.assign(window, saved); redraw()")
        goes_on("")
        browser.value("saved.look = look; look = () => { throw new Error('boom'); }; 0")
        browser.until(f'{STATUS} === "the gateway\'s answer cannot be shown: boom"')
        browser.value("Object.assign(window, saved); 0")
        goes_on("")
        for broken, said in (((500, "on fire"), "500 on fire"), ((200, "{"), "JSON")):
            gateway.broken = broken
            browser.until(f'{STATUS}.startsWith("the gateway\'s answer cannot be shown: ")')
            assert said in browser.value(STATUS)
            gateway.broken = None
            goes_on("")
        for broken in ((404, "no such run"), (409, "another life")):  # dropped since; begun anew: neither is a fault
            gateway.broken = broken
            goes = gateway.runs["run"]
            browser.until("new Promise((done) => setTimeout(() => done(true), 3000))")
            gateway.broken = None
            browser.until(f"{tile('step')} === '{goes}' && !{STATUS}.includes('{broken[1]}')")
        assert browser.uncaught == []


def test_late_and_corrected_steps_stand_in_the_order_of_their_times(browser: Browser) -> None:
    """Against sorting: whatever order they come in, the newest step is the last one, and each is there once."""
    with MadeUpGateway(run=20) as gateway:
        browser.open(gateway.url, hurry=10)
        browser.until(f"{tile('step')} === '20'")
        gateway.given = [
            gateway.step(7, revision=2, values={"loss": 99.0}),  # corrected
            gateway.step(12, rank=1),  # of another rank, at the same time
            gateway.step(15, time_ms=15, attempt=0),  # of an earlier start
        ]
        gateway.runs["run"] += 3
        browser.until("runs.get('run').steps.length === 22")
        assert browser.value(tile("step")) == "20"
        assert browser.value("runs.get('run').steps.filter((s) => s.step === 7).map((s) => s.values.loss)") == [99.0]
        wrong = """(() => {
          let seed = 1;
          const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
          for (let round = 0; round < 300; round++) {
            const steps = [];
            const all = new Map();
            for (let i = 0; i < 60; i++) {
              const [attempt, step, rank] = [random(2), random(20), random(2)];
              const made = { attempt, step, rank, time_ms: step * 2 + rank * random(2), revision: i };
              if (all.has(`${attempt}/${step}/${rank}`)) made.time_ms = all.get(`${attempt}/${step}/${rank}`).time_ms;
              all.set(`${attempt}/${step}/${rank}`, made);
              keep(steps, made);
            }
            const byTime = (a, b) => a.attempt - b.attempt || a.time_ms - b.time_ms;
            const order = (a, b) => byTime(a, b) || a.rank - b.rank || a.step - b.step;
            const oracle = [...all.values()].sort(order);
            if (JSON.stringify([...steps].sort(order)) !== JSON.stringify(oracle)) return "lost or twice";
            if (steps.some((step, i) => i && byTime(steps[i - 1], step) > 0)) return "order";
          }
          return "";
        })()"""
        assert browser.value(wrong) == ""


def test_a_gateway_that_is_lost_is_missed_aloud(browser: Browser) -> None:
    """It hangs, comes back, is killed: nothing looks live meanwhile, and what was there stays."""
    with RunningGateway("--ui") as gateway, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        with esper_otel.start(run_id="run", settings=EsperSettings(export_every_s=0, probe_period_s=3600)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            browser.open(f"http://{gateway.http}/")
            browser.until(f"{tile('state')} === 'running' && {tile('step')} === '1' && {STATUS} === ''")
            os.kill(gateway.process.pid, signal.SIGSTOP)
            try:
                browser.until(f"{STATUS}.startsWith('the gateway does not answer (for ')")
                assert browser.value(tile("state")) == "not known"
                assert browser.value(tile("step")) == "1"
            finally:
                os.kill(gateway.process.pid, signal.SIGCONT)
            telemetry.record_step({"loss": 0.5}, epoch=0)
            browser.until(f"{tile('state')} === 'running' && {tile('step')} === '2' && {STATUS} === ''")
        gateway.end(signal.SIGKILL)
        browser.until(f"{STATUS}.startsWith('the gateway does not answer (for ') && {STATUS}.includes('): ')")
        browser.until(f"{tile('state')} === 'not known' && {tile('step')} === '2'")
        assert browser.uncaught == []
