"""Where the hours went: a trainer that is killed and resumed, a gateway that is restarted, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from gateways import RunningGateway
from patience import patience

import esper_otel
from esper_otel import EsperSettings, TamiyoClient
from esper_otel.cli import main
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

# Says what it has spent, by clocks that it reads where telemetry does, and then does what it was told to.
TRAINER = """
import json, os, signal, sys, time
from contextlib import contextmanager
import esper_otel
spent, open_parts = {}, ["unknown"]
since = time.perf_counter()
def turn():
    global since
    now = time.perf_counter()
    spent[open_parts[-1]] = spent.get(open_parts[-1], 0.0) + (now - since) * 1e3
    since = now
@contextmanager
def part(name):
    turn()
    open_parts.append(name)
    yield
    turn()
    open_parts.pop()
def data(steps):
    for step in steps:
        with part("redone" if step <= known else "input_wait"):
            time.sleep(0.004)
        yield step
first, last, known = map(int, sys.argv[1:4])
telemetry = esper_otel.start(run_id="hours", rank=int(sys.argv[5]), world_size=2)
time.sleep(0.15)
with part("compile"), telemetry.phase("compile"):
    time.sleep(0.06)
turn()
spent = {"compile": spent["compile"]}
begun_ns = time.time_ns()
for step in telemetry.batches(data(range(first, last + 1))):
    is_again = step <= known
    with part("redone" if is_again else "productive"), telemetry.step(epoch=0, global_step=step) as now:
        time.sleep(0.008)
        with part("redone" if is_again else "hooks"), now.hook():
            time.sleep(0.003)
        if step % 10 == 0:
            with part("checkpoint"), telemetry.phase("checkpoint"):
                time.sleep(0.03)
    if step % 15 == 0:
        with part("evaluation"), telemetry.phase("evaluation"):
            time.sleep(0.04)
            with part("checkpoint"), telemetry.phase("checkpoint"):
                time.sleep(0.02)
    turn()
    ended_ns, until_now = time.time_ns(), dict(spent)
print(json.dumps([until_now, begun_ns, ended_ns]), flush=True)
exec(sys.argv[4])
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
CLOSE = "telemetry.close()"
ATTEMPTS = ((1, 40, 0, KILL), (31, 70, 40, KILL), (61, 90, 70, CLOSE))


class Trained:
    """What the attempts of a rank have spent, by their own account, in milliseconds."""

    def __init__(self, spool: Path, rank: int = 0) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.spool, self.rank = spool, rank
        self.began_ns = self.ended_ns = 0

    def train(self, endpoint: str, first: int, last: int, known: int, then: str) -> None:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "ESPER_SPOOL_DIR": str(self.spool),
        }
        arguments = (*map(str, (first, last, known)), then, str(self.rank))
        before_ns = time.time_ns()
        done = subprocess.run(
            [sys.executable, "-c", TRAINER, *arguments],
            stdout=subprocess.PIPE,
            timeout=300,
            check=False,
            env={**os.environ, **environment},
        )
        spent, begun_ns, ended_ns = json.loads(done.stdout)
        self.began_ns = self.began_ns or before_ns
        if self.ended_ns:
            self.spent["between_attempts"] += (before_ns - self.ended_ns) / 1e6
        self.spent["start_up"] += (begun_ns - before_ns) / 1e6 - spent["compile"]
        for part, spent_ms in spent.items():
            self.spent[part] += spent_ms
        self.ended_ns = ended_ns


def assert_right(trained: Trained, parts: Mapping[str, float], wall_ms: float) -> None:
    assert sum(parts.values()) == pytest.approx(wall_ms, rel=0.01)
    least_ms = patience(0.05) * 1e3  # a busy machine may stop a program between two readings of its clock
    assert wall_ms == pytest.approx((trained.ended_ns - trained.began_ns) / 1e6, rel=0.01, abs=least_ms)
    for part in {*parts, *trained.spent}:
        assert parts.get(part, 0.0) == pytest.approx(trained.spent[part], rel=0.02, abs=least_ms), part


def test_three_attempts_two_of_them_killed_add_up(tmp_path: Path) -> None:
    """The endpoint is down when the first one is killed: the second one sends what it had spooled."""
    trained, store = Trained(tmp_path / "spool"), str(tmp_path / "store")
    with RunningGateway("--store", store) as gateway:
        trained.train("http://127.0.0.1:1", *ATTEMPTS[0])
        for attempt in ATTEMPTS[1:]:
            trained.train(f"http://{gateway.grpc}", *attempt)
        with TamiyoClient(gateway.grpc) as client:
            hours = client.hours("hours")
        assert_right(trained, hours.ranks[0].parts, hours.ranks[0].wall_ms)
        assert dict(hours.run.parts) == pytest.approx(dict(hours.ranks[0].parts))
        assert hours.run.attempts == 3
        numbers = [[phase.number for phase in hours.phases if phase.attempt == attempt] for attempt in attempts(hours)]
        assert numbers == [[*range(1, len(each) + 1)] for each in numbers]
        assert {phase.step for phase in hours.phases if phase.name == "checkpoint"} == {None, *range(10, 91, 10)}
        gateway.process.kill()
    with RunningGateway("--store", store) as gateway, TamiyoClient(gateway.grpc) as client:
        again = client.hours("hours")
        assert again.phases == hours.phases
        assert dict(again.run.parts) == pytest.approx(dict(hours.run.parts))
        assert client.ended("hours") == "completed"


def attempts(hours: esper_otel.RunHours) -> list[int]:
    return sorted({phase.attempt for phase in hours.phases})


def test_sent_again_nothing_counts_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the command says what the client does."""
    trained = Trained(tmp_path / "spool", rank=1)
    with MemoryCollector() as collector, RunningGateway() as gateway, TamiyoClient(gateway.grpc) as client:
        trained.train(collector.grpc_endpoint, 1, 30, 0, CLOSE)
        for _ in range(3):
            resend(collector, gateway)
            hours = client.hours("hours")
            assert_right(trained, hours.ranks[1].parts, hours.ranks[1].wall_ms)
        assert main(["pull", "hours", "--hours", "--target", gateway.grpc]) == 0
        said = capsys.readouterr().out
        assert " in 1 attempt, " in said
        assert "checkpoint " in said
        assert main(["pull", "hours", "--hours", "--json", "--target", gateway.grpc]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["run"]["parts"] == dict(hours.run.parts)
        assert sum(found["run"]["parts"].values()) == pytest.approx(found["run"]["wall_ms"], rel=1e-6)
        assert main(["pull", "nothing", "--hours", "--target", gateway.grpc]) != 0


def resend(collector: MemoryCollector, gateway: RunningGateway) -> None:
    """Sends everything that a collector has received, the last request first."""
    with gateway.channel() as channel:
        export = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export", None, None)
        for request in reversed(collector.requests):
            export(request.SerializeToString(), timeout=60)


def test_phases_that_no_step_follows_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long evaluation follows a checkpoint: nobody should have to wait for its end."""
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        with esper_otel.start(run_id="alone", settings=EsperSettings(export_every_s=0.05)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            with telemetry.phase("checkpoint"):
                pass
            deadline_s = time.monotonic() + 60.0
            while "checkpoint" not in phases_at(collector) and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert phases_at(collector) == ["start_up", "checkpoint"]
            with telemetry.phase("evaluation"):
                pass
        assert phases_at(collector) == ["start_up", "checkpoint", "evaluation"]
        points = [point for point in collector.points() if point.scope == "esper_otel.phases"]
        assert len(points) == 3 * 5
        assert not [point for point in collector.points() if point.name == "esper.phases.dropped" and point.value]


def phases_at(collector: MemoryCollector) -> list[str]:
    """In the order in which they were sent."""
    return [point.attributes["phase"] for point in collector.points() if point.name == "esper.phase.number"]
