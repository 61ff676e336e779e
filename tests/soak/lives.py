"""Who lives, whoever is killed: ``python tests/soak/lives.py [--kills 20] [--random-seed 1]``.

A trainer takes 300 steps a second; its seeds come, are silent, die and come back. It and the gateway are killed with
-9 at random moments and started again, the trainer with its spool, the gateway with its store. In the end each step
that the trainer finished must be there once, complete, with the seeds that lived. The last line is JSON: steps,
kills, missing, wrong, incomplete. ``tests/gateway/store/test_kill.py`` runs it with few kills.
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
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

from gateways import RunningGateway  # noqa: E402
from programs import free_port, until  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel import Packets, TamiyoClient  # noqa: E402

RUN = "lives"
CLOSE_S = 60.0

TRAINER = """
import json, os, random, sys, time
import esper_otel
luck = random.Random(int(sys.argv[1]))
alive = set()
with esper_otel.start(run_id="lives") as telemetry:
    while True:
        with telemetry.step(epoch=0) as now:
            now.put(loss=0.5)
            for number in range(8):
                if luck.random() < 0.3:
                    now.seed(f"seed-{number}", stage=3, alpha=luck.random())
                    alive.add(f"seed-{number}")
        os.write(1, json.dumps([now.time_unix_ns, sorted(alive)]).encode() + b"\\n")
        for seed in sorted(alive):
            if luck.random() < 0.1:
                telemetry.retire_seed(seed)
                alive.discard(seed)
        time.sleep(0.003)
"""


def finished(folder: Path) -> dict[int, list[str]]:
    """The steps that trainers finished: by time, who lived."""
    steps: dict[int, list[str]] = {}
    for path in folder.glob("*.said"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                time_unix_ns, alive = json.loads(line)
                steps[time_unix_ns] = alive
    return steps


def received(address: str) -> list[Packets]:
    """All that a puller is given."""
    found: list[Packets] = []
    cursor = None
    with TamiyoClient(address, timeout_s=CLOSE_S) as client:
        while page := client.pull(RUN, cursor, max_packets=1000):
            found += page
            cursor = page.cursor
    return found


def loop(folder: Path, kills: int, chance: random.Random, options: list[str]) -> None:
    """Runs both programs and kills one of them, or both, again and again."""
    trainer: subprocess.Popen[bytes] | None = None
    for kill in range(kills):
        with RunningGateway(*options) as gateway:
            is_gateway = chance.random() < 0.5
            for again in range(1 if is_gateway else 2):
                if trainer is None:
                    with (folder / f"{kill}-{again}.said").open("wb") as said:
                        trainer = subprocess.Popen(
                            [sys.executable, "-c", TRAINER, str(chance.random())[2:]], stdout=said
                        )
                    until("the trainer has begun", lambda: Path(said.name).stat().st_size > 0)
                time.sleep(chance.uniform(0.1, 1.5))
                if not is_gateway or chance.random() < 0.3:
                    trainer.kill()
                    trainer.wait()
                    trainer = None
            gateway.process.send_signal(signal.SIGKILL)
    if trainer is not None:
        trainer.kill()
        trainer.wait()


def main() -> int:
    """Prints what came of it; 0 when nothing is missing, wrong or marked as incomplete."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--random-seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        address = f"127.0.0.1:{free_port()}"
        gateway = ["--grpc", address, "--http", "none", "--store", str(folder / "store"), "--hold", "0.1"]
        os.environ |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}",
            "ESPER_SPOOL_DIR": str(folder / "spool"),
            "ESPER_EXPORT_EVERY_S": "0.05",
        }
        loop(folder, options.kills, random.Random(options.random_seed), gateway)
        with RunningGateway(*gateway):
            with esper_otel.start(run_id="last") as telemetry:  # sends what the killed ones left
                telemetry.record_step({"loss": 1.0}, epoch=0)
                telemetry.close(timeout_s=CLOSE_S)
            time.sleep(0.5)
            packets = received(address)
        expected = finished(folder)
    newest: dict[int, Packets] = {}
    twice = 0
    for step in packets:
        before = newest.get(step.state.timestamp_ns)
        twice += before is not None and before.revision >= step.revision
        newest[step.state.timestamp_ns] = step
    missing = len(expected.keys() - newest.keys())
    wrong = sum(
        time_unix_ns in newest and [seed.seed_id for seed in newest[time_unix_ns].state.seed_states] != alive
        for time_unix_ns, alive in expected.items()
    )
    incomplete = sum(not step.complete for step in newest.values())
    said = {"steps": len(expected), "kills": options.kills, "missing": missing, "wrong": wrong}
    print(json.dumps({**said, "incomplete": incomplete, "twice": twice}))
    return int(bool(missing or wrong or incomplete or twice or not expected))


if __name__ == "__main__":
    raise SystemExit(main())
