"""The live page: what it is given, who is given it, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, Stage

TIMEOUT_S = 20
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
        (["--pull-tokens", "{tokens}"], "cannot show a token"),
    ],
)
def test_where_the_page_cannot_be_safe_it_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("token\n", encoding="utf-8")
    with (
        pytest.raises(AssertionError, match=message),
        RunningGateway("--ui", *[option.format(tokens=tmp_path / "tokens") for option in options]),
    ):
        pass


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_draws_it(gateway: RunningGateway, tmp_path: Path) -> None:
    """The numbers stand on the page, no script failed, and the curves are not blank."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
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
