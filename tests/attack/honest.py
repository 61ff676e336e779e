"""The honest ones: a trainer that sends steps, a puller that waits for them, and a look at /healthz, in one process.

Run as ``python -m attack.honest``; reads commands from standard input, answers each with a line of JSON. It ends when
its standard input does.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import threading
import time
import urllib.request
from collections import Counter
from typing import Any

from patience import patience

import esper_otel
from esper_otel import EsperSettings, GatewayError, Stage, StaleCursor, TamiyoClient

PER_S = 25.0
SEEDS = 4
_HEALTH_EVERY_S = 0.2
_HEALTH_TIMEOUT_S = 5.0
_CATCH_UP_S = 5.0
_LAST_S = 20.0  # on a quiet machine


class Honest:
    """What is known of both sides of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._over, self._pulled = threading.Event(), threading.Event()
        self._ended: dict[int, float] = {}
        self._came: dict[int, float] = {}
        self._seen: Counter[tuple[int, int]] = Counter()
        self._health: list[tuple[float, float]] = []
        self._window = (0.0, 0.0)
        self._trainer = threading.Thread(target=self._train, daemon=True)
        for each in (self._trainer, *(threading.Thread(target=do, daemon=True) for do in (self._pull, self._look))):
            each.start()

    def ready(self) -> dict[str, Any]:
        """Waits until steps go from end to end."""
        deadline_s = time.monotonic() + 30
        while len(self._came) < 5 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return {"ready": len(self._came) >= 5}

    def begin(self) -> dict[str, Any]:
        """From now on delays count."""
        self._window = (time.monotonic(), float("inf"))
        return {}

    def end_window(self) -> dict[str, Any]:
        """Up to now they did. Waits a little for what is on its way."""
        begin_s, end_s = self._window[0], time.monotonic()
        steps = [step for step, at_s in list(self._ended.items()) if begin_s <= at_s <= end_s]
        deadline_s = end_s + _CATCH_UP_S
        while time.monotonic() < deadline_s and not all(step in self._came for step in steps):
            time.sleep(0.02)
        now_s = time.monotonic()
        delays = [(self._came.get(step, now_s) - self._ended[step]) * 1e3 for step in steps]
        health = [took_s * 1e3 for at_s, took_s in list(self._health) if begin_s <= at_s <= end_s]
        return {"delays_ms": delays, "health_ms": health}

    def finish(self) -> dict[str, Any]:
        """Ends the run, and says what became of each step."""
        self._over.set()
        self._trainer.join(patience(_LAST_S) + 5)
        deadline_s = time.monotonic() + patience(_LAST_S)
        while time.monotonic() < deadline_s and not self._ended.keys() <= self._came.keys():
            time.sleep(0.02)
        self._pulled.set()
        return {
            "recorded": len(self._ended),
            "missing": len(self._ended.keys() - self._came.keys()),
            "twice": sum(count - 1 for count in self._seen.values()),
        }

    def _train(self) -> None:
        with esper_otel.start(run_id=self._options.run, settings=EsperSettings(export_every_s=0)) as telemetry:
            begun_s, step = time.monotonic(), 0
            while not self._over.is_set():
                step += 1
                with telemetry.step(epoch=0, global_step=step) as now:
                    now.put(loss=1.0 / step, gradient_norm=1.0)
                    for number in range(SEEDS):
                        now.seed(f"seed-{number}", stage=Stage.TRAINING, alpha=step / 100_000)
                self._ended[step] = time.monotonic()
                time.sleep(max(begun_s + step / PER_S - time.monotonic(), 0.0))
            telemetry.close(timeout_s=patience(_LAST_S))

    def _pull(self) -> None:
        cursor = None
        options = self._options
        client = TamiyoClient(options.grpc, token_file=options.pull_token, ca_file=options.ca, timeout_s=3)
        while not self._pulled.is_set():
            try:
                page = client.pull(options.run, cursor, wait_s=2)
            except StaleCursor:
                cursor = None
                continue
            except GatewayError:
                time.sleep(0.1)
                continue
            now_s = time.monotonic()
            for packets in page:
                self._seen[packets.step, packets.revision] += 1
                self._came.setdefault(packets.step, now_s)
            cursor = page.cursor

    def _look(self) -> None:
        context = None if self._options.ca is None else ssl.create_default_context(cafile=self._options.ca)
        while not self._pulled.is_set():
            begun_s = time.monotonic()
            try:
                with urllib.request.urlopen(self._options.health, timeout=_HEALTH_TIMEOUT_S, context=context) as answer:
                    is_well = answer.status == 200
            except OSError:
                is_well = False
            self._health.append((begun_s, time.monotonic() - begun_s if is_well else float("inf")))
            time.sleep(_HEALTH_EVERY_S)


def main() -> None:
    """Obeys standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grpc", required=True, help="the gateway's address, for the puller")
    parser.add_argument("--health", required=True, help="URL of /healthz")
    parser.add_argument("--run", required=True)
    parser.add_argument("--pull-token", help="a file")
    parser.add_argument("--ca", help="who signed the gateway's certificate")
    honest = Honest(parser.parse_args())
    commands = {"ready": honest.ready, "begin": honest.begin, "end": honest.end_window, "finish": honest.finish}
    for line in sys.stdin:
        sys.stdout.write(json.dumps(commands[line.strip()]()) + "\n")
        sys.stdout.flush()
    os._exit(0)  # whatever a thread still waits for


if __name__ == "__main__":
    main()
