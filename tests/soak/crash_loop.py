"""The collector killed again and again: ``python tests/soak/crash_loop.py [--kills 20] [--random-seed 1]``.

A trainer takes 200 steps a second. The collector of ``agent.yaml`` is killed with -9 at random moments, also while it
starts and takes up its queue. In the end the gateway must have every step. The last line is
JSON: steps, kills, missing, wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "gateway" / "store")]

from gateways import RunningGateway  # noqa: E402
from programs import Collector  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel import EsperSettings, TamiyoClient, UnknownRun  # noqa: E402

RUN = "crash-loop"
CLOSE_S = 60.0


def train(over: threading.Event, times: list[int]) -> None:
    """Steps until told to end; the loss is the step."""
    with esper_otel.start(run_id=RUN, settings=EsperSettings(export_every_s=0.02)) as telemetry:
        while not over.wait(0.005):
            with telemetry.step(epoch=0) as now:
                now.put(loss=float(len(times)))
            times.append(now.time_unix_ns // 10**6)
        telemetry.close(timeout_s=CLOSE_S)


def received(address: str) -> dict[int, float]:
    """Losses by millisecond."""
    found: dict[int, float] = {}
    cursor = None
    with TamiyoClient(address) as client:
        try:
            while page := client.pull(RUN, cursor, max_packets=1000):
                found |= {p.state.timestamp_ns // 10**6: p.state.training_loss for p in page}
                cursor = page.cursor
        except UnknownRun:
            pass
    return found


def main() -> int:
    """Prints what came of it; 0 when nothing is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--random-seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.random_seed)
    over = threading.Event()
    times: list[int] = []
    with tempfile.TemporaryDirectory() as folder, RunningGateway("--keep-steps", "1000000") as gateway:
        unused = "http://127.0.0.1:1"
        agent = Collector(Path(folder), ESPER_GATEWAY=gateway.grpc, ESPER_PROMETHEUS_OTLP=unused).start()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{agent.grpc}"
        trainer = threading.Thread(target=train, args=(over, times))
        trainer.start()
        try:
            for _ in range(options.kills):
                time.sleep(chance.uniform(0.0, 1.0))
                agent.end(signal.SIGKILL)
                with Path(folder, "collector.log").open("ab") as log:  # not waiting: the next kill may meet its start
                    command, variables = list(agent.command()), {**os.environ, **agent.environ()}
                    agent.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        finally:
            over.set()
            trainer.join()
        deadline_s = time.monotonic() + 30.0
        while len(found := received(gateway.grpc)) < len(times) and time.monotonic() < deadline_s:
            time.sleep(0.5)
        agent.end(signal.SIGKILL)
    expected = {time_ms: float(step) for step, time_ms in enumerate(times)}
    missing = len(expected.keys() - found.keys())
    wrong = sum(expected.get(time_ms) != loss for time_ms, loss in found.items())
    print(json.dumps({"steps": len(times), "kills": options.kills, "missing": missing, "wrong": wrong}))
    return int(bool(missing or wrong))


if __name__ == "__main__":
    raise SystemExit(main())
