"""The gateway and its pullers are killed, again and again, while a run goes on: nothing is missing in the end."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, GatewayUnavailable, Packets, Stage, TamiyoClient, UnknownRun

pytestmark = pytest.mark.lengthy

TIMEOUT_S = 120.0


class Controller(threading.Thread):
    """Pulls until it is told to stop and nothing is left; each time as a new client that knows only the cursor."""

    def __init__(self, address: str, run_id: str) -> None:
        super().__init__()
        self.found: list[Packets] = []
        self.gaps = 0
        self.over = threading.Event()
        self._address = address
        self._run_id = run_id

    def run(self) -> None:
        cursor = None
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            is_over = self.over.is_set()
            try:
                with TamiyoClient(self._address, timeout_s=1) as client:
                    page = client.pull(self._run_id, cursor, max_packets=50, wait_s=0.2)
            except (GatewayUnavailable, UnknownRun):
                continue
            self.found += page
            self.gaps += page.gap
            cursor = page.cursor
            if is_over and not page:
                return


def test_nothing_is_missing_and_nothing_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the gateway at random moments under load; packets are equal to those pulled in process."""
    luck = random.Random(0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    options = ["--grpc", address, "--http", "none", "--store", str(tmp_path)]
    controller = Controller(address, "killed")
    mine: list[Packets] = []
    over = threading.Event()

    def train() -> None:
        with esper_otel.start(run_id="killed", settings=EsperSettings(export_every_s=0)) as telemetry:
            step = 0
            while not over.is_set():
                step += 1
                with telemetry.step(epoch=0) as now:
                    now.put(loss=1 / step, gradient_norm=float(step))
                    for seed_id in ("seed-1", "seed-2", f"seed-{3 + step // 100}"):
                        now.seed(seed_id, stage=Stage.TRAINING, alpha=step / 10_000)
                if step % 100 == 99:
                    telemetry.retire_seed(f"seed-{3 + step // 100}")
                time.sleep(0.003)
                mine.extend(telemetry.pull(max_packets=100))
            telemetry.close(timeout_s=120)

    trainer = threading.Thread(target=train)
    controller.start()
    trainer.start()
    try:
        for _ in range(5):
            with RunningGateway(*options) as gateway:
                time.sleep(luck.uniform(0.1, 1.0))
                gateway.process.send_signal(signal.SIGKILL)
        with RunningGateway(*options):
            over.set()
            trainer.join(TIMEOUT_S)
            controller.over.set()
            controller.join(TIMEOUT_S)
            with TamiyoClient(address) as client:
                [run] = client.runs()
    finally:
        over.set()
        controller.over.set()
        trainer.join(TIMEOUT_S)
        controller.join(TIMEOUT_S)
    assert len(mine) > 100
    assert (run.missing, run.incomplete, run.ended) == (0, 0, "completed")
    assert controller.gaps == 0
    assert [packets.step for packets in controller.found] == [packets.step for packets in mine]
    assert controller.found == mine
    assert run.stored == len(mine)


def test_who_lives_is_right_whoever_is_killed() -> None:
    """The trainer, with its spool, and the gateway, with its store; its long form is run by hand."""
    script = Path(__file__).parents[2] / "soak" / "lives.py"
    command = [sys.executable, str(script), "--kills", "2", "--random-seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("steps") > 20
    assert said == {"kills": 2, "missing": 0, "wrong": 0, "incomplete": 0, "twice": 0}
