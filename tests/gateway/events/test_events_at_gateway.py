"""Events at a gateway, over real sockets: received, pulled once each, shown, and still there after kill -9."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateways import TIMEOUT_S, RunningGateway, post
from google.protobuf.json_format import MessageToJson
from log_requests import body, request
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.logs.v1.logs_pb2 import SeverityNumber
from wire import CATALOGUE, body_of, encoder

import esper_otel
from esper_otel import EsperSettings, EventInfo, Stage, StaleCursor, TamiyoClient, UnknownRun, aio
from esper_otel.cli import main
from esper_otel.export.phase_points import phase_scope
from esper_otel.frames.frame import Run
from esper_otel.frames.phase_log import Phase
from esper_otel.gateway.core import Core
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.security import Grant, NotAllowed
from esper_otel.gateway.store.base import StoreLimits
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.pull.messages import EventsRequest
from esper_otel.schema import new_check_id

EXPORT = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"


def sent(
    gateway: RunningGateway, content: bytes, kind: str = "x-protobuf", **headers: str
) -> ExportLogsServiceResponse:
    """Sends log records over HTTP; the answer."""
    status, answer = refused(gateway, content, kind, **headers)
    assert status == 200, answer
    return ExportLogsServiceResponse.FromString(answer) if kind == "x-protobuf" else json.loads(answer)


def refused(gateway: RunningGateway, content: bytes, kind: str = "x-protobuf", **headers: str) -> tuple[int, bytes]:
    """As above; the status, and the answer as it came."""
    about = {"content-type": f"application/{kind}", **{name.replace("_", "-"): text for name, text in headers.items()}}
    asked = urllib.request.Request(f"http://{gateway.http}/v1/logs", content, about)
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def metrics(gateway: RunningGateway) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{gateway.http}/metrics", timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def numbers(events: Any) -> list[int]:
    return [event.number for event in events]


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """A gateway with the page, for all tests that need no other."""
    with RunningGateway("--ui", "--limit", "events=50") as running:
        yield running


def test_events_come_in_every_form_and_are_pulled_once_each(gateway: RunningGateway) -> None:
    """Over both ports, in both encodings, compressed or not, again and out of order; in pages, of a rank, of all."""
    sent(gateway, body("forms", 1))
    sent(gateway, gzip.compress(body("forms", 2, 1)), content_encoding="gzip")
    assert sent(gateway, MessageToJson(request("forms", [3])).encode(), "json") == {}
    with gateway.channel() as channel:
        assert channel.unary_unary(EXPORT, None, None)(body("forms", 5, 3), timeout=TIMEOUT_S) == b""
    sent(gateway, body("forms", 1, rank=1))
    with TamiyoClient(gateway.grpc) as client:
        first = client.events("forms", max_events=3)
        second = client.events("forms", first.cursor)
        assert numbers(first) == [1, 2, 3]
        assert (first[0].name, first[0].text, first[0].step, first[0].severity) == (
            *("esper.checkpoint", "checkpoint 1", 10, 9),
        )
        assert dict(first[0].attributes) == {"esper.phase.duration_ms": 1.5}
        assert [(event.rank, event.number) for event in second] == [(0, 5), (1, 1)]
        assert (first.gap, second.gap) == (0, 1)
        assert numbers(client.events("forms", rank=1)) == [1]
        assert not client.events("forms", second.cursor)
        with pytest.raises(StaleCursor, match="all ranks"):
            client.events("forms", second.cursor, rank=1)
        with pytest.raises(UnknownRun, match="nothing of run 'none' is here"):
            client.events("none")


def test_a_puller_that_waits_is_answered_when_an_event_comes(gateway: RunningGateway) -> None:
    """Also if nothing of the run was there when it began; the client for asyncio has the same method."""

    async def pulled() -> list[EventInfo]:
        async with aio.TamiyoClient(gateway.grpc) as client:
            waiting = asyncio.ensure_future(client.events("waited", wait_s=60))
            while metrics(gateway)["esper_gateway_waiting_pulls"] < 1:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(sent, gateway, body("waited", 1))
            return [*await waiting]

    assert numbers(asyncio.run(pulled())) == [1]


def test_what_is_not_ours_is_ignored_and_too_many_are_refused_in_words(gateway: RunningGateway) -> None:
    """A collector that sends everything retries nothing; the counts are in the gateway's metrics."""
    before = metrics(gateway)
    other = request("ignored", [])
    other.resource_logs[0].scope_logs.add().log_records.add()
    assert sent(gateway, other.SerializeToString()) == ExportLogsServiceResponse()
    answer = sent(gateway, body("many", *range(1, 61), 7)).partial_success
    assert (answer.rejected_log_records, answer.error_message) == (10, "10 too many events of the run")
    after = metrics(gateway)
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed["esper_gateway_events_total"] == 50
    assert changed["esper_gateway_repeated_events_total"] == 1
    assert changed["esper_gateway_ignored_log_records_total"] == 1
    assert changed['esper_gateway_refused_events_total{reason="too many events of the run"}'] == 10


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"\xff" * 100, "x-protobuf", 400, b"not an ExportLogsServiceRequest"),
        (b"\x0a\x00" * 500_000, "x-protobuf", 413, b"resources, scopes and metrics"),
        (b"[" * 300 + b"]" * 300, "json", 400, b"deeper"),
        (b"", "text", 415, b"the body must be"),
    ],
)
def test_what_costs_too_much_is_refused_for_good(
    gateway: RunningGateway, content: bytes, kind: str, status: int, reason: bytes
) -> None:
    """And counted, as for metrics; the gateway goes on."""
    found = refused(gateway, content, kind)
    assert found[0] == status
    assert reason in found[1]
    assert sent(gateway, body("after", 1)) == ExportLogsServiceResponse()


def test_the_command_prints_json_lines(gateway: RunningGateway, capsys: pytest.CaptureFixture[str]) -> None:
    sent(gateway, body("printed", 1, 3))
    assert main(["pull", "printed", "--events", "--target", gateway.grpc]) == 0
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines())
    assert (first["name"], first["step"], second["number"]) == ("esper.checkpoint", 10, 3)
    assert "1 events before the next one were dropped, or have not arrived" in printed.err
    for option in ("--ranks", "--binary"):
        assert main(["pull", "printed", "--events", option, "--target", gateway.grpc]) == 2
        assert f"--events cannot be combined with {option}" in capsys.readouterr().err


def test_the_program_of_the_guide_prints_events(gateway: RunningGateway, capsys: pytest.CaptureFixture[str]) -> None:
    sent(gateway, body("digits-7", 1, 2))
    guide = (Path(__file__).parents[3] / "docs" / "how-to" / "run-a-gateway.md").read_text(encoding="utf-8")
    [program] = re.findall(r"<!-- example: events -->\n```python\n(.*?)```", guide, re.DOTALL)
    exec(program.replace("127.0.0.1:4327", gateway.grpc), {})
    assert capsys.readouterr().out.splitlines() == [
        "10 esper.checkpoint checkpoint 1",
        "20 esper.checkpoint checkpoint 2",
    ]


def test_the_page_has_marks_and_a_list(gateway: RunningGateway) -> None:
    """Of a rank; texts are escaped, and a check's events are not shown."""

    def asked(run_id: str, **query: Any) -> Any:
        about = "&".join(f"{name}={value}" for name, value in {"run": run_id, **query}.items())
        with urllib.request.urlopen(f"http://{gateway.http}/page/events?{about}", timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read())

    made = request("shown", [1, 2])
    made.resource_logs[0].scope_logs[0].log_records[1].body.string_value = "<script>"
    made.resource_logs[0].scope_logs[0].log_records[1].severity_number = SeverityNumber.SEVERITY_NUMBER_ERROR
    sent(gateway, made.SerializeToString())
    sent(gateway, body("shown", 1, rank=1))
    answer = asked("shown")
    assert answer["marks"] == [
        {"step": 10, "text": "checkpoint 1", "tone": ""},
        {"step": 20, "text": "<script>", "tone": "bad"},
    ]
    assert '<li class="bad"><b>&lt;script&gt;</b>' in answer["html"]
    assert asked("shown", since=answer["cursor"])["is_same"]
    assert len(asked("shown", rank=1)["marks"]) == 1
    assert asked("nothing") == {"cursor": "", "is_same": True}
    check = new_check_id()
    sent(gateway, body(check, 1))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        asked(check)


def test_the_report_lists_events(gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the gateway; the charts have their marks."""
    monkeypatch.chdir(tmp_path)
    post(gateway.http, body_of("reported"))
    sent(gateway, body("reported", 1))
    assert main(["report", "reported", "--target", gateway.grpc]) == 0
    page = (tmp_path / "reported.html").read_text()
    assert "<h2>Events</h2> <small>1, newest first</small>" in page
    assert '"events":[{"step":10,"text":"checkpoint 1","tone":""}]' in page


def test_a_trainer_s_events_arrive_without_a_gap(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind that this run has, with the step at which it happened; they are of the run that has the steps."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    with esper_otel.start(run_id="trained", settings=EsperSettings(export_every_s=0)) as telemetry:
        for step in range(1, 21):
            with telemetry.step(epoch=step // 10) as now:
                now.put(loss=1.0)
                now.seed("seed-1", stage=Stage.TRAINING if step < 10 else Stage.BLENDING)
        with telemetry.phase("checkpoint"):
            pass
    with TamiyoClient(gateway.grpc) as client:
        page = client.events("trained")
        assert page.gap == 0
        assert sorted(numbers(page)) == [*range(1, len(page) + 1)]
        found = {(event.name, event.step) for event in page}
        assert {
            ("esper.run.started", None),
            ("esper.seed.stage", 1),
            ("esper.seed.stage", 10),
            ("esper.checkpoint", 20),
            ("esper.run.ended", 20),
        } <= found
        [run] = client.runs("trained")
        assert {(event.attempt, event.rank) for event in page} == {(run.attempt, run.rank)}


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path, gateway: RunningGateway) -> None:
    """A cursor stays valid, a repeated event is left out; two gateways are read as one."""
    with RunningGateway("--store", str(tmp_path)) as first:
        sent(first, body("killed", 1, 2))
        with TamiyoClient(first.grpc) as client:
            cursor = client.events("killed", max_events=1).cursor
        sent(first, body("killed", 3))
        first.end(signal.SIGKILL)
    sent(gateway, body("killed", 3, 4, 6))
    with RunningGateway("--store", str(tmp_path)) as again:
        sent(again, body("killed", 3, 5))
        with TamiyoClient(again.grpc) as client:
            assert numbers(client.events("killed", cursor)) == [2, 3, 5]
        with TamiyoClient(f"{again.grpc},{gateway.grpc}") as both:
            found, cursor = [], ""
            while page := both.events("killed", cursor, max_events=2):
                assert page.gap == 0
                found += numbers(page)
                cursor = page.cursor
            assert sorted(found) == [1, 2, 3, 4, 5, 6]
            sent(gateway, body("killed", 8))
            last = both.events("killed", cursor)
            assert (numbers(last), last.gap) == ([8], 1)

            async def pulled() -> list[int]:
                async with aio.TamiyoClient(f"{again.grpc},{gateway.grpc}") as client:
                    return numbers(await client.events("killed"))

            assert sorted(asyncio.run(pulled())) == [1, 2, 3, 4, 5, 6]


def test_without_a_store_a_cursor_from_before_a_restart_is_stale() -> None:
    async def run() -> None:
        cursors = []
        for _ in range(2):
            core = Core(MemoryStore())
            await core.take_logs(body("run", 1))
            cursors.append((await core.events(EventsRequest(run_id="run"))).cursor)
            if len(cursors) > 1:
                with pytest.raises(StaleCursor, match="events not pulled from it are gone"):
                    await core.events(EventsRequest(run_id="run", cursor=cursors[0]))
            core.close()

    asyncio.run(run())


def phase_only(run_id: str) -> bytes:
    phase = Phase(1, "checkpoint", 1_800_000_000 * 10**9, 1_800_000_001 * 10**9, 1.0, None, 1.0, 0.0)
    return encoder().alone(Run(run_id, 1), phase_scope([phase], CATALOGUE, 0))


@pytest.mark.parametrize(
    ("take", "content"),
    [(Core.take_logs, lambda run: body(run, 1)), (Core.take, phase_only)],
    ids=["events", "phases"],
)
def test_a_token_for_a_prefix_writes_to_no_other_run(take: Any, content: Callable[[str], bytes]) -> None:
    """Nor does it read there; with a request that has no steps as little as with one that has."""
    core, grant = Core(MemoryStore()), Grant("mine-", "run=mine-")

    async def run() -> None:
        await take(core, content("mine-1"), grant=grant)
        with pytest.raises(NotAllowed, match="not for run 'other'"):
            await take(core, content("other"), grant=grant)
        with pytest.raises(NotAllowed):
            await core.events(EventsRequest(run_id="other"), grant)

    asyncio.run(run())
    core.close()


def test_events_are_dropped_with_their_run(tmp_path: Path) -> None:
    clock = [0.0]

    async def run() -> None:
        core = Core(FileStore(tmp_path, StoreLimits(idle_s=10.0), clock=lambda: clock[0]), limits=Limits())
        core.start()
        core.receive(body_of("run"))
        await core.take_logs(body("run", 1))
        clock[0] = 100.0
        core._tidy()
        with pytest.raises(UnknownRun):
            await core.events(EventsRequest(run_id="run"))
        core.close()

    asyncio.run(run())


def test_grpc_refuses_what_http_refuses(gateway: RunningGateway) -> None:
    with gateway.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(EXPORT, None, None)(b"\xff" * 100, timeout=TIMEOUT_S)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
