"""``--notify``: a real gateway, real runs, and a webhook that is away, busy, or refuses."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import requests
from frame_examples import RUN, make_frame
from gateways import RunningGateway
from programs import until
from wire import bodies

import esper_otel
from esper_otel.cli import main
from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.gateway.changes import ChangedRuns
from esper_otel.gateway.core import Core
from esper_otel.gateway.items import Origin, RunState, RunStatus
from esper_otel.gateway.notify import watcher
from esper_otel.gateway.notify.notice import ENDED, ENTERED, ESCALATED, LEFT, Alerts, Notice, as_slack
from esper_otel.gateway.notify.watcher import Watcher
from esper_otel.gateway.notify.webhook import Webhook, WebhookAddress
from esper_otel.gateway.security import Grant
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.settings import EsperSettings

pytestmark = pytest.mark.own_code


class Hook:
    """A webhook on loopback. ``answers`` are the next statuses; afterwards 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.taken: list[Any] = []
        self.seen = 0

    def notices(self, run_id: str) -> list[dict[str, Any]]:
        return [each for body in self.taken for each in body["notices"] if each["run_id"] == run_id]

    @contextmanager
    def listening(self) -> Iterator[str]:
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.seen += 1
                status = hook.answers.pop(0) if hook.answers else 200
                if status == 200:
                    hook.taken.append(body)
                self.send_response(status)
                if status == 503:
                    self.send_header("Retry-After", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/T000/secret"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def train(run_id: str, *losses: float, fails: bool = False) -> None:
    with esper_otel.start(run_id=run_id, settings=EsperSettings(export_every_s=0)) as telemetry:
        for loss in losses:
            telemetry.record_step({"loss": loss}, epoch=0)
        if fails:
            raise RuntimeError


def test_people_hear_of_what_begins_and_of_how_runs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Hook()
    hook.answers = [503, 302]  # busy once, then a redirect, which is not followed: it would carry the notices elsewhere
    with hook.listening() as url:
        file = tmp_path / "urls"
        file.write_text(f"{url}\n\n")
        with RunningGateway("--notify-file", str(file), "--store", str(tmp_path / "s")) as gateway:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
            train("lost", 1.0)
            until("the redirect was answered", lambda: hook.seen >= 2)
            train("good", 1.0, 0.9, math.nan, *[0.8] * 12)
            with pytest.raises(RuntimeError):
                train("bad", 1.0, fails=True)
            until("all is told", lambda: hook.notices("bad") and any(n["event"] == ENDED for n in hook.notices("good")))
            text = requests.get(f"http://{gateway.http}/metrics", timeout=30).text
        assert "secret" not in gateway.said
        begin, over, end = hook.notices("good")
        assert (begin["event"], begin["signal"], begin["step"], begin["rank"]) == (ENTERED, "loss_nonfinite", 3, 0)
        assert begin["level"] == "CRITICAL"
        assert begin["text"].startswith("run good: CRITICAL loss_nonfinite began in step 3")
        assert over["event"] == LEFT
        assert (end["event"], end["reason"], end["text"]) == (ENDED, "completed", "run good has completed")
        [failed] = hook.notices("bad")
        assert failed["text"] == "run bad has ended: RuntimeError (failed)"
        assert not hook.notices("lost")  # refused for good: counted and said
        assert hook.taken[0]["dropped"] == 1
        assert "\nesper_gateway_notices_dropped_total 1\n" in text
        assert "\nesper_gateway_notices_sent_total 4\n" in text
        before = len(hook.taken)
        with RunningGateway("--notify", url, "--store", str(tmp_path / "s")) as gateway:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
            train("next", 1.0)
            until("the next run is told", lambda: len(hook.taken) > before)
        told = {each["run_id"] for body in hook.taken[before:] for each in body["notices"]}
        assert told == {"next"}  # what was stored before is not told again


def notice(event: str, level: str = "HIGH", text: str = "t", run_id: str = "r") -> Notice:
    return Notice(event, run_id, 1_790_000_000_000, text, 1, 1, 7, "hook_budget", level, 2.0)


def test_too_many_notices_are_bounded_and_said() -> None:
    hook, counts = Hook(), Counter[str]()
    with hook.listening() as url:

        async def flood() -> None:
            webhook = Webhook(WebhookAddress.of(url, "--notify"), counts, every_s=0.0)
            for at in range(1500):
                webhook.put([notice(ENTERED, run_id=str(at))])
            await webhook.close(30.0)

        asyncio.run(flood())
    found = [each["run_id"] for body in hook.taken for each in body["notices"]]
    assert found == [str(at) for at in range(500, 1500)]  # the newest, in order
    assert [body["dropped"] for body in hook.taken] == [500, *[0] * 9]
    assert counts == {"sent": 1000, "dropped": 500}


def test_one_tenant_s_notices_do_not_take_the_place_of_another_s() -> None:
    """Nor do its alerts: who has most of either loses some."""
    hook, counts = Hook(), Counter[str]()
    honest = notice(ENTERED, run_id="honest")._replace(tenant="honest")
    rogue = [notice(ENTERED, run_id=f"rogue-{at}")._replace(tenant="rogue") for at in range(1_200)]
    with hook.listening() as url:

        async def flood() -> None:
            webhook = Webhook(WebhookAddress.of(url, "--notify"), counts, every_s=0.0)
            webhook.put([honest])
            webhook.put(rogue)
            await webhook.close(30.0)

        asyncio.run(flood())
    told = [each["run_id"] for body in hook.taken for each in body["notices"]]
    assert (len(told), "honest" in told) == (1_000, True)
    assert "tenant" not in hook.taken[0]["notices"][0]
    alerts = Alerts(most=3)
    alerts.of([honest, *rogue[:9]])
    assert [each["labels"]["run_id"] for each in alerts.active()] == ["honest", "rogue-7", "rogue-8"]


def test_a_tenant_with_very_many_runs_leaves_room_to_watch_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_MOST_RUNS", 4)
    core = Core(MemoryStore())
    watching = Watcher(core, [Told()])

    async def run() -> None:
        for whose, count in (("rogue", 5), ("honest", 1)):
            for number in range(count):
                run = replace(RUN, run_id=f"{whose}-{number}")
                [body] = bodies([make_frame(run=run, sequence=1, global_step=1)])
                core.receive(body, grant=Grant("", whose))
        await watching.look()

    asyncio.run(run())
    followed = [*watching._followed]
    assert len(followed) == 3
    assert "honest-0" in followed
    core.close()


def test_alertmanager_is_told_what_goes_on_and_what_is_over() -> None:
    """An escalated alert keeps the labels that identify it, so that its end is the end of the one that began."""
    alerts = Alerts()
    [begun] = alerts.of([notice(ENTERED)])
    [worse] = alerts.of([notice(ESCALATED, "CRITICAL", "worse")])
    assert begun["labels"] == worse["labels"]
    assert begun["labels"] == {
        "alertname": "EsperSignal",
        "run_id": "r",
        "signal": "hook_budget",
        "rank": "1",
        "severity": "warning",
    }
    assert worse["annotations"] == {"summary": "worse"}
    assert alerts.active() == [worse]
    [over] = alerts.of([notice(LEFT, "CRITICAL")])
    assert over["labels"] == begun["labels"]
    assert over["endsAt"] == "2026-09-21T14:13:20.000Z"
    assert not alerts.active()
    assert not alerts.of([Notice(ENDED, "r", 0, "t", reason="completed")])
    assert len(alerts.of([Notice(ENDED, "r", 0, "t", reason="RuntimeError")])) == 1


def test_text_from_outside_is_escaped_for_slack() -> None:
    assert as_slack([notice(ENTERED, text="<!channel> & \x1b[31m")], 3) == {
        "text": "&lt;!channel&gt; &amp; \\x1b[31m\n3 earlier notices were dropped"
    }


@pytest.mark.parametrize("url", ["ftp://secret", "hooks/secret", "slack+secret", "http://", "http://x:99999999/secret"])
def test_a_target_that_cannot_be_used_is_refused_without_its_secret(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gateway", "--notify", url, "--grpc", "127.0.0.1:0", "--http", "none"]) == 2
    said = capsys.readouterr().err
    assert "--notify: give http://... or https://..." in said
    assert "secret" not in said


def test_targets() -> None:
    assert WebhookAddress.of("slack+https://hooks/x", "o") == WebhookAddress("https://hooks/x", "slack")
    assert WebhookAddress.of("alertmanager+http://am:9093/", "o").url == "http://am:9093/api/v2/alerts"
    assert WebhookAddress.of("https://example/a+b", "o") == WebhookAddress("https://example/a+b", "")
    with pytest.raises(ConfigurationError, match="--notify-file"):
        WebhookAddress.of("nothing", "--notify-file f")


class Runs:
    """One run that falls silent, and is then dropped, or ends."""

    def __init__(self) -> None:
        self.changed = ChangedRuns()
        self.known = {"r"}
        self.state = RunStatus([], 0, None)

    def known_runs(self) -> set[str]:
        return self.known

    def tenant(self, run_id: str) -> str:
        return ""

    def state_of(self, run_id: str) -> RunStatus:
        return self.state

    def entries(self, run_id: str, cursor: str, most: int, rank: int | None = None) -> Any:
        raise UnknownRun("none")

    def last_number(self, run_id: str, rank: int) -> int:
        return 0

    async def packets(self, run_id: str, cursor: str, most: int) -> Any:
        raise UnknownRun("none")


class Told(Webhook):
    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def put(self, notices: Iterable[Notice]) -> None:
        self.notices += notices


@pytest.mark.parametrize("ends", [True, False])
def test_a_silent_run_is_silent_no_more_before_it_ends_or_is_forgotten(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, told = Runs(), Told()
    monkeypatch.setattr("esper_otel.gateway.notify.watcher._ALL_EVERY_S", 0.0)
    silent = RunState(Origin("r", 1, 0, ""), 1, "", 1, 9, 1, 1, is_silent=True)

    async def watch() -> None:
        watcher = Watcher(cast("Core", runs), [told])
        runs.state = RunStatus([silent], 9, None)
        await watcher.look()
        if ends:
            runs.state = RunStatus([silent], 9, "KeyError")
        else:
            runs.known = set()
        await watcher.look()

    asyncio.run(watch())
    assert [each.event for each in told.notices] == ["run_silent", "run_back", *(["run_ended"] if ends else [])]


def test_a_run_that_lives_without_steps_is_told_from_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that takes steps is enough; a silent rank beside one that lives makes no silent run."""
    runs, told = Runs(), Told()
    monkeypatch.setattr("esper_otel.gateway.notify.watcher._ALL_EVERY_S", 0.0)
    now_ns = time.time_ns()
    steps = RunState(Origin("r", 1, 0, ""), 2, "", 1, 9, now_ns, now_ns, step_received_unix_ns=now_ns)
    paused = replace(steps, step_received_unix_ns=now_ns - 301 * 10**9)
    silent = RunState(Origin("r", 1, 1, ""), 2, "", 1, 9, 1, 1, is_silent=True)

    async def watch() -> None:
        watcher = Watcher(cast("Core", runs), [told])
        for states in ([steps, silent], [paused, silent], [silent], [paused], [steps], [paused]):
            runs.state = RunStatus(states, 9, None)
            await watcher.look()
        runs.state = RunStatus([replace(paused, ended="KeyError")], 9, "KeyError")  # as in a long evaluation
        await watcher.look()

    asyncio.run(watch())
    assert [(each.event, each.text) for each in told.notices] == [
        ("run_without_steps", "run r has taken no step for 5 minutes, but its process lives"),
        ("run_silent", "run r has sent nothing for a minute"),
        ("run_without_steps", "run r has taken no step for 5 minutes, but its process lives"),
        ("run_back", "run r takes steps again"),
        ("run_without_steps", "run r has taken no step for 5 minutes, but its process lives"),
        ("run_back", "run r has ended"),
        ("run_ended", "run r has ended: KeyError (failed)"),
    ]
    assert len({alert["labels"]["alertname"] for alert in Alerts().of(told.notices[:-1])}) == 1
