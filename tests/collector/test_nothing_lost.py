"""Nothing is lost: backends that are down, a collector that is killed, a token that is wrong; each with its control."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gateways import RunningGateway
from patience import patience
from programs import ROOT, Collector, Prometheus, free_port, until

import esper_otel
from esper_otel import EsperSettings, TamiyoClient, UnknownRun

pytestmark = pytest.mark.collector

FAST = EsperSettings(export_every_s=0.05)
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"


@contextmanager
def training(address: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps while the block runs, about 200 a second; their times in milliseconds, with the step as the loss."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    over = threading.Event()
    times: list[int] = []

    def train() -> None:
        with esper_otel.start(run_id=run_id, settings=FAST) as telemetry:
            while not over.is_set():
                with telemetry.step(epoch=0) as now:
                    now.put(loss=float(len(times)))
                times.append(now.time_unix_ns // 10**6)
                time.sleep(0.005)
            telemetry.close(timeout_s=120)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        yield times
    finally:
        over.set()
        trainer.join(60)


def in_prometheus(prometheus: Prometheus, run_id: str) -> dict[int, float]:
    """Losses by millisecond."""
    return {time_ms: float(value) for _, time_ms, value in prometheus.samples(f'loss{{run_id="{run_id}"}}')}


def in_gateway(address: str, run_id: str) -> dict[int, float]:
    """The same."""
    found: dict[int, float] = {}
    cursor = None
    with TamiyoClient(address) as client:
        try:
            while page := client.pull(run_id, cursor, max_packets=1000):
                found |= {p.state.timestamp_ns // 10**6: p.state.training_loss for p in page}
                cursor = page.cursor
        except UnknownRun:
            pass
    return found


def expected(times: list[int]) -> dict[int, float]:
    return {time_ms: float(step) for step, time_ms in enumerate(times)}


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def test_backends_down_and_the_collector_killed_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends are down from the first step on; the collector is killed twice in between."""
    prometheus = Prometheus(tmp_path / "prometheus", PROMETHEUS)
    address = free_address()
    variables = {"ESPER_PROMETHEUS_OTLP": prometheus.otlp, "ESPER_GATEWAY": address}
    agent = Collector(tmp_path / "agent", **variables).start()
    try:
        with training(agent.grpc, "outage", monkeypatch) as times:
            for _ in range(2):
                time.sleep(1.5)
                agent.end(signal.SIGKILL)
                time.sleep(0.5)
                agent.start()
            time.sleep(0.5)
        with prometheus, RunningGateway("--grpc", address):
            count = len(times)
            until("Prometheus has it", lambda: len(in_prometheus(prometheus, "outage")) >= count)
            until("the gateway has it", lambda: len(in_gateway(address, "outage")) >= count)
            assert in_prometheus(prometheus, "outage") == expected(times)
            assert in_gateway(address, "outage") == expected(times)
    finally:
        agent.end(signal.SIGKILL)


def test_a_collector_in_a_crash_loop_loses_nothing() -> None:
    """Killed at random moments, also while it takes up its queue; ``make soak`` kills it twenty times."""
    script = ROOT / "tests" / "soak" / "crash_loop.py"
    done = subprocess.run([sys.executable, script, "--kills", "5"], capture_output=True, text=True, check=False)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["steps"] > 100
    assert (said["missing"], said["wrong"]) == (0, 0)


IN_MEMORY = """
exporters:
  otlp_http/prometheus: &memory
    sending_queue: {storage: null, sizer: requests, queue_size: 1000, batch: null}
  otlp_grpc/esper: *memory
"""


def test_without_the_queue_on_disk_it_does_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same outage with the collector's default queue, in memory."""
    (tmp_path / "memory.yaml").write_text(IN_MEMORY, encoding="utf-8")
    prometheus = Prometheus(tmp_path / "prometheus", PROMETHEUS)
    address = free_address()
    variables = {"ESPER_PROMETHEUS_OTLP": prometheus.otlp, "ESPER_GATEWAY": address}
    agent = Collector(tmp_path / "agent", "agent.yaml", tmp_path / "memory.yaml", **variables).start()
    try:
        with training(agent.grpc, "control", monkeypatch) as times:
            time.sleep(1.5)
            agent.end(signal.SIGKILL)
            agent.start()
            time.sleep(0.5)
        with prometheus, RunningGateway("--grpc", address):
            last = times[-1]
            until("the gateway has the rest", lambda: last in in_gateway(address, "control"))
            found = in_gateway(address, "control")
            assert len(found) < len(times) - 50
            assert found.items() <= expected(times).items()
    finally:
        agent.end(signal.SIGKILL)


FULL_SOON = """
exporters:
  otlp_http/prometheus: &small
    sending_queue: {queue_size: 800000}
  otlp_grpc/esper: *small
"""


def test_a_full_queue_on_disk_is_refused_to_the_trainer_which_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outage is longer than the collector's queue: the trainer's buffer takes over, and nothing is lost."""
    (tmp_path / "small.yaml").write_text(FULL_SOON, encoding="utf-8")
    prometheus = Prometheus(tmp_path / "prometheus", PROMETHEUS)
    address = free_address()
    variables = {"ESPER_PROMETHEUS_OTLP": prometheus.otlp, "ESPER_GATEWAY": address}
    with Collector(tmp_path / "agent", "agent.yaml", tmp_path / "small.yaml", **variables) as agent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")

        def is_full() -> bool:
            with esper_otel.start(run_id="filler", settings=FAST) as filler:
                filler.seeds([f"seed-{row}" for row in range(1000)], alpha=[0.5] * 1000)
                filler.record_step({"loss": 1.0}, epoch=0)
                filler.close(timeout_s=1)
                return bool(filler.health()["dropped"])

        until("the queue is full", is_full)
        with training(agent.grpc, "full", monkeypatch) as times:
            refused = agent.counts().get("otelcol_receiver_refused_metric_points", 0.0)
            until("it refuses", lambda: agent.counts()["otelcol_receiver_refused_metric_points"] > refused)
            prometheus.start()
            with RunningGateway("--grpc", address):
                time.sleep(0.5)
                count = len(times)
                until("Prometheus has what was recorded", lambda: len(in_prometheus(prometheus, "full")) >= count)
                until("the gateway has it", lambda: len(in_gateway(address, "full")) >= count)
                known = dict(list(expected(times).items())[:count])
                assert known.items() <= in_prometheus(prometheus, "full").items()
                assert known.items() <= in_gateway(address, "full").items()
        prometheus.end()


def test_a_network_that_is_cut_and_comes_back_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections stand, and nobody answers on them: for the trainer, then for the collector."""
    with RunningGateway() as gateway:
        variables = {"ESPER_PROMETHEUS_OTLP": f"http://{free_address()}/api/v1/otlp", "ESPER_GATEWAY": gateway.grpc}
        (tmp_path / "soon.yaml").write_text("exporters: {otlp_grpc/esper: {timeout: 1s}}", encoding="utf-8")
        with Collector(tmp_path / "agent", "agent.yaml", tmp_path / "soon.yaml", **variables) as agent:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
            with training(agent.grpc, "cut", monkeypatch) as times:
                until("the first step is there", lambda: in_gateway(gateway.grpc, "cut"))
                assert agent.process is not None
                for cut in (agent.process, gateway.process):
                    cut.send_signal(signal.SIGSTOP)
                    time.sleep(2.5)  # longer than a request may take
                    cut.send_signal(signal.SIGCONT)
                    time.sleep(0.5)
            until("the gateway has it", lambda: len(in_gateway(gateway.grpc, "cut")) >= len(times))
            assert in_gateway(gateway.grpc, "cut") == expected(times)


def test_one_backend_down_does_not_hold_up_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller goes on while Prometheus is away."""
    with RunningGateway() as gateway:
        variables = {"ESPER_PROMETHEUS_OTLP": f"http://{free_address()}/api/v1/otlp", "ESPER_GATEWAY": gateway.grpc}
        with (
            Collector(tmp_path, **variables) as agent,
            training(agent.grpc, "half", monkeypatch) as times,
            TamiyoClient(gateway.grpc) as client,
        ):
            until("the first step is there", lambda: in_gateway(gateway.grpc, "half"))
            for _ in range(5):
                time.sleep(0.2)
                [run] = [run for run in client.runs() if run.run_id == "half"]
                assert run.last_step is not None
                assert time.time() - times[run.last_step - 1] / 1000 < patience(2)


GUARDED = """
extensions:
  bearertokenauth/trainers: {{scheme: Bearer, filename: "{tokens}"}}
receivers:
  otlp:
    protocols:
      grpc: {{auth: {{authenticator: bearertokenauth/trainers}}}}
service:
  extensions: [health_check, file_storage/queue, bearertokenauth/trainers]
"""


def test_a_trainer_with_a_wrong_token_keeps_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, keeps everything, and sends it when the token is right; tokens can be exchanged without a loss."""
    tokens, token = tmp_path / "tokens", tmp_path / "token"
    tokens.write_text("right\n")
    token.write_text("wrong\n")
    (tmp_path / "guarded.yaml").write_text(GUARDED.format(tokens=tokens), encoding="utf-8")
    monkeypatch.setenv("ESPER_TOKEN_FILE", str(token))
    with RunningGateway() as gateway:
        variables = {"ESPER_PROMETHEUS_OTLP": f"http://{free_address()}/api/v1/otlp", "ESPER_GATEWAY": gateway.grpc}
        with Collector(tmp_path / "agent", "agent.yaml", tmp_path / "guarded.yaml", **variables) as agent:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
            with esper_otel.start(run_id="token", settings=EsperSettings(export_every_s=0.05)) as telemetry:
                for step in range(1, 5):
                    telemetry.record_step({"loss": float(step)}, epoch=0)
                until("it is refused", lambda: "refuses the credentials" in str(telemetry.health()["last_error"]))
                assert in_gateway(gateway.grpc, "token") == {}
                token.write_text("right\n")
                until("it has been sent", lambda: len(in_gateway(gateway.grpc, "token")) == 4)
                assert telemetry.health()["dropped"] == 0
                tokens.write_text("right\nnew\n")  # both are accepted for a while
                time.sleep(1.5)
                token.write_text("new\n")
                telemetry.record_step({"loss": 5.0}, epoch=0)
                until("the new token is good", lambda: len(in_gateway(gateway.grpc, "token")) == 5)
                assert "Bearer" not in agent.said
