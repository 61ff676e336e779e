"""``esper-otel replay``: a stored run again, and what a controller must stand."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import requests
import warm
from frame_examples import RUN, make_frame
from gateways import RunningGateway
from patience import patience
from programs import until

import esper_otel
from esper_otel import EsperSettings, Packets, Stage, StaleCursor, TamiyoClient, UnknownRun
from esper_otel.frames.frame import LAST_LOSS
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.replay import WEATHER, replayed
from esper_otel.gateway.serve.ports import OTLP_SERVICE

pytestmark = pytest.mark.lengthy

STEPS = 50
TIMEOUT_S = 120.0


class Stored(NamedTuple):
    """A run in a folder, and its packets as they were pulled in process."""

    folder: Path
    packets: list[Packets]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A run of two seconds."""
    folder = tmp_path_factory.mktemp("store")
    with RunningGateway("--store", str(folder)) as gateway, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        with esper_otel.start(run_id="stored", settings=EsperSettings(export_every_s=0)) as telemetry:
            for step in range(STEPS):
                with telemetry.step(epoch=0) as now:
                    now.put(loss=1 / (step + 1), hook_latency_ms=60.0 if step == 10 else 1.0)
                    now.seed("seed-1", stage=Stage.TRAINING, alpha=step / 64)
                time.sleep(0.04)
            mine = list(telemetry.pull(max_packets=STEPS))
    return Stored(folder, mine)


@contextmanager
def replaying(stored: Stored, *options: str) -> Iterator[str]:
    """The address of a replay."""
    command = ["-m", "esper_otel", "replay", str(stored.folder), "stored", "--json", "--grpc", "127.0.0.1:0"]
    process = warm.started(*command, *options, imported=warm.PACKAGE)
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate(timeout=TIMEOUT_S)[1])
    try:
        addresses = json.loads(line)
        assert addresses["http"] is None
        yield addresses["grpc"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def pulled(address: str, *, until: int) -> tuple[list[Packets], list[int]]:
    """Packets of a replay, and the gaps before each of its pages."""
    found: list[Packets] = []
    gaps = []
    cursor = None
    deadline_s = time.monotonic() + TIMEOUT_S
    with TamiyoClient(address) as client:
        while len(found) < until:
            assert time.monotonic() < deadline_s, len(found)
            try:
                page = client.pull("stored", cursor, wait_s=1, max_packets=7)
            except UnknownRun:
                continue
            found += page
            gaps.append(page.gap)
            cursor = page.cursor
        assert not client.pull("stored", cursor, wait_s=0.5)
    return found, [gap for gap in gaps if gap]


def test_a_replay_is_the_run_with_its_ages(stored: Stored) -> None:
    """Packet by packet; a step is as old as it was then, so that a controller does not find it stale."""
    with replaying(stored, "--speed", "20") as address:
        found, gaps = pulled(address, until=STEPS)
        with TamiyoClient(address) as client:
            [run] = client.runs()
            assert (run.run_id, run.ended, run.first_step, run.last_step) == ("stored", "completed", 1, STEPS)
            with pytest.raises(UnknownRun, match="this is a replay of run 'stored'"):
                client.pull("another")
            with pytest.raises(StaleCursor):
                client.pull("stored", "0:0:0")
    assert found == stored.packets
    assert gaps == []
    assert all(packets.age_s < patience(30) for packets in found)


def test_the_pace_is_the_runs_own_times_the_speed(stored: Stored) -> None:
    """Two seconds at ten times their pace take a fifth of one; nothing comes before its time."""
    started_s = time.monotonic()
    with replaying(stored, "--speed", "1") as address:
        begun_s = time.monotonic()
        pulled(address, until=STEPS)
        took_s = time.monotonic() - begun_s
    assert 1.5 < took_s < patience(10)
    assert time.monotonic() - started_s < patience(20)


def test_all_at_once(stored: Stored) -> None:
    with replaying(stored, "--speed", "0") as address:
        found, _ = pulled(address, until=STEPS)
    assert found == stored.packets


def test_all_the_weather_at_once(stored: Stored) -> None:
    """Each thing where the documentation says, and nothing else touched."""
    with replaying(stored, "--speed", "0", "--inject", ",".join(WEATHER)) as address:
        found, gaps = pulled(address, until=STEPS - 5 + 1 + 10)
        with TamiyoClient(address) as client:
            runs = client.runs()
            assert until("the run has ended", lambda: client.ended("stored")) == "completed"
    assert gaps == [5]
    assert [packets.step for packets in found] == [
        *range(1, 11),
        *range(16, 35),  # five are lost after a fifth
        31,  # a correction
        *range(35, 41),
        *range(31, 51),  # ten steps back after four fifths
    ]
    broken = next(packets for packets in found if packets.step == 21)
    assert "loss" in broken.names
    assert "loss" not in broken.state.training_metrics
    assert broken.state.training_loss == pytest.approx(1 / 20)
    assert "loss_nonfinite" in [e.description for t in broken.telemetry for e in t.events]
    part, whole = [packets for packets in found if packets.step == 31 and packets.attempt == found[0].attempt]
    assert (part.complete, part.revision, "loss" in part.names) == (False, 1, False)
    assert (whole.complete, whole.revision) == (True, 2)
    assert whole.state == stored.packets[30].state
    assert {packets.attempt for packets in found[-20:]} == {found[0].attempt + 1}
    assert [(run.attempt, run.resumed, run.ended) for run in runs] == [
        (found[0].attempt, False, None),
        (found[0].attempt + 1, True, "completed"),
    ]
    touched = {21, 22, 31}
    for packets in found:
        if packets.step not in touched and packets.attempt == found[0].attempt:
            assert packets == stored.packets[packets.step - 1]


def test_thresholds_and_tokens_hold_for_a_replay_too(stored: Stored, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("let-me-in\n")
    options = ["--speed", "0", "--threshold", "hook_budget=inf", "--pull-tokens", str(tokens)]
    with replaying(stored, *options) as address:
        with TamiyoClient(address) as client, pytest.raises(esper_otel.GatewayError, match="UNAUTHENTICATED"):
            client.runs()
        with TamiyoClient(address, token_file=tokens) as client:
            page = client.pull("stored", max_packets=STEPS, wait_s=5)
    assert [e.description for packets in page for t in packets.telemetry for e in t.events].count("hook_budget") == 0


def test_nothing_can_be_sent_to_a_replay(stored: Stored) -> None:
    """What is replayed is what was stored."""
    with replaying(stored) as address, grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{OTLP_SERVICE}/Export", None, None)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(requests.RequestException):
            requests.post(f"http://{address}/v1/metrics", b"", timeout=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "nobody"], "runs there: stored"),
        (["{folder}/nowhere", "stored"], "not found"),
        (["{folder}", "stored", "--inject", "rain"], "rain: known are gap, nan, late, resume"),
        (["{folder}", "stored", "--speed", "-1"], "not a number of at least 0"),
        (["{folder}", "stored", "--threshold", "hook=1"], "hook_budget"),
        (["{folder}", "stored", "--grpc", "0.0.0.0:0"], "--insecure"),
    ],
)
def test_a_mistake_is_said(stored: Stored, arguments: list[str], message: str) -> None:
    command = [each.format(folder=stored.folder) for each in arguments]
    done = warm.run("-m", "esper_otel", "replay", *command, imported=warm.PACKAGE)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("count", range(1, 14))
def test_any_weather_fits_into_a_short_run(count: int) -> None:
    """A run of a few steps has fewer to lose and to go back, and no index out of it."""
    items = [
        Item(
            Origin("short", 1, 0),
            make_frame(run=RUN, sequence=step, global_step=step, time_unix_ns=10**18 + step * 10**9),
            1,
            complete=True,
            received_unix_ns=0,
        )
        for step in range(1, count + 1)
    ]
    events, _ = replayed(items, {}, frozenset(WEATHER))
    assert [event.after_ns for event in events] == sorted(event.after_ns for event in events)
    assert sum(event.is_lost for event in events) <= 5
    assert {event.item.origin.attempt for event in events} <= {1, 2}


def test_the_loss_that_a_gateway_has_found_out_goes_with_the_one_that_is_taken_away() -> None:
    """A plain sender says no last loss: what was found out for its step is not that of another one."""
    frames = [
        make_frame(run=RUN, sequence=0, global_step=step, time_unix_ns=10**18 + step * 10**9, recorded={"loss": step})
        for step in range(1, 14)
    ]
    items = [
        Item(Origin("plain", 1, 0), frame._replace(context={LAST_LOSS: frame.global_step}), 1, True, 0)
        for frame in frames
    ]
    events, _ = replayed(items, {}, frozenset({"late"}))
    [late] = [event.item for event in events if not event.item.complete]
    assert not {"loss", LAST_LOSS} & late.frame.values().keys()
