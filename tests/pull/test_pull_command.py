"""``esper-otel pull``: what it prints, and what it does when the gateway is away."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, Packets, Stage
from esper_otel.leyline import SystemStatePacket, TelemetryPacket
from esper_otel.pull.command import as_json
from esper_otel.pull.messages import Step
from esper_otel.varint import read_varint

pytestmark = pytest.mark.lengthy

TIMEOUT_S = 120.0


def trained(address: str, run_id: str, monkeypatch: pytest.MonkeyPatch, steps: int = 5) -> list[Packets]:
    """Trains a little with telemetry to the gateway; the packets pulled in process."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    with esper_otel.start(run_id=run_id, settings=EsperSettings(export_every_s=0)) as telemetry:
        for step in range(steps):
            with telemetry.step(epoch=0) as now:
                now.put(loss=float("nan") if step == 3 else 1 / (step + 1))
                now.seed("seed-1", stage=Stage.TRAINING)
        return list(telemetry.pull(max_packets=steps))


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningGateway]:
    """A gateway for tests that need no other."""
    with RunningGateway() as gateway:
        yield gateway


def command(address: str, *arguments: str) -> list[str]:
    return ["-m", "esper_otel", "pull", "--target", address, *arguments]


def printed(address: str, *arguments: str) -> warm.Done:
    return warm.run(*command(address, *arguments), imported=warm.PACKAGE)


def test_json_lines_say_everything(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strict parser reads them; NaN is in no packet."""
    mine = trained(shared.grpc, "lines", monkeypatch)
    done = printed(shared.grpc, "lines", "--json")
    assert done.returncode == 0
    lines = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]
    expected = [as_json(packets) for packets in mine]
    for line in lines + expected:
        assert isinstance(line.pop("age_s"), float)
    assert lines == expected
    assert "loss" not in lines[3]["state"]["training_metrics"]
    assert "loss" in lines[3]["names"]
    assert done.stderr.startswith("esper-otel: cursor ")
    cursor = done.stderr.split()[-1]
    assert printed(shared.grpc, "lines", "--cursor", cursor).stdout == ""


def test_binary_messages_follow_their_lengths(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A varint, then a Step, again and again."""
    mine = trained(shared.grpc, "binary", monkeypatch)
    pulling = [sys.executable, *command(shared.grpc, "binary", "--binary")]
    content = subprocess.run(pulling, capture_output=True, check=True, timeout=TIMEOUT_S).stdout
    steps = []
    while content:
        length, start = read_varint(content, 0)
        steps.append(Step.FromString(content[start : start + length]))
        content = content[start + length :]
    assert [SystemStatePacket.FromString(step.state) for step in steps] == [packets.state for packets in mine]
    for step, packets in zip(steps, mine, strict=True):
        assert tuple(map(TelemetryPacket.FromString, step.telemetry)) == packets.telemetry
        assert (step.attempt, step.revision, set(step.names)) == (packets.attempt, 1, {*packets.names})


def test_text_is_a_line_a_step_and_runs_a_line_a_writer(
    shared: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(shared.grpc, "text", monkeypatch)
    lines = printed(shared.grpc, "text").stdout.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("step 1  loss 1  seeds 1  rank 0  attempt ")
    assert "loss_nonfinite" in lines[3]
    [run] = [line for line in printed(shared.grpc).stdout.splitlines() if line.startswith("text ")]
    assert run.endswith("rank 0 of 1  steps 1 to 5  stored 5  ended completed")
    [said] = [json.loads(line) for line in printed(shared.grpc, "--json").stdout.splitlines() if '"text"' in line]
    assert (said["run_id"], said["last_step"], said["ended"]) == ("text", 5, "completed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no step of run 'nobody'"),
        (["lines", "--rank", "-1"], "whole number"),
        (["lines", "--token-file", "/nowhere"], "/nowhere"),
        (["lines", "--json", "--binary"], "not allowed with"),
    ],
)
def test_a_mistake_is_said(shared: RunningGateway, arguments: list[str], message: str) -> None:
    done = printed(shared.grpc, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_no_gateway_is_said() -> None:
    done = printed("127.0.0.1:1", "run")
    assert done.returncode == 2
    assert "127.0.0.1:1" in done.stderr


def test_following_goes_on_over_a_gateway_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun before the run and before the gateway; ended by Ctrl-C. Each step once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--grpc", address, "--store", str(tmp_path)]
    output = tmp_path / "output"
    with output.open("wb") as file:
        following = subprocess.Popen(
            [sys.executable, *command(address, "followed", "--follow", "--json")], stdout=file, stderr=subprocess.PIPE
        )
    try:
        with RunningGateway(*options) as gateway:
            first = trained(address, "followed", monkeypatch)
            lines_of(output, 5)
            gateway.process.send_signal(signal.SIGKILL)
        with RunningGateway(*options):
            second = trained(address, "followed", monkeypatch)
            lines = lines_of(output, 10)
            following.send_signal(signal.SIGINT)
            _, said = following.communicate(timeout=TIMEOUT_S)
    finally:
        following.kill()
        following.communicate()
    assert following.returncode == 130
    assert [json.loads(line)["attempt"] for line in lines] == [packets.attempt for packets in first + second]
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5] * 2
    assert said.rstrip().splitlines()[-1].startswith(b"esper-otel: cursor ")


def lines_of(output: Path, count: int) -> list[bytes]:
    """The lines of a file, when it has so many."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(lines := output.read_bytes().splitlines()) < count:
        assert time.monotonic() < deadline_s, lines
        time.sleep(0.05)
    return lines
