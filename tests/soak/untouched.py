"""Is training untouched? ``python tests/soak/untouched.py [--blocks 60] [--steps 100]``.

A small network is trained on one core, in blocks with and without telemetry that take turns, exported to a receiver in
another process; with it goes what a user would have: loss, gradient norm, timings and 8 seeds x 10. Prints a row of
the table that `make bench` writes: the step's time without and with, and their ratio, at p50 and p99.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import numpy as np
import torch
from soak import Endpoint
from torch import nn

import esper_otel
from esper_otel import Telemetry
from esper_otel.schema import SEED_METRICS

_CELLS = {metric.field: 4.0 if metric.field == "stage" else 0.5 for metric in SEED_METRICS}


class Training:
    """A network, its data and its optimizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._inputs, self._targets = torch.randn(128, 256), torch.randint(0, 10, (128,))

    def step(self) -> torch.Tensor:
        """One optimizer step; its loss."""
        self._optimizer.zero_grad()
        loss: torch.Tensor = nn.functional.cross_entropy(self._model(self._inputs), self._targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss

    def block(self, steps: int, telemetry: Telemetry | None) -> list[float]:
        """So many steps; milliseconds of each, with all that is done for it."""
        spent = []
        for _ in range(steps):
            started = time.perf_counter()
            if telemetry is None:
                self.step().item()
            else:
                with telemetry.step(epoch=0, samples=128) as now:
                    loss = self.step().item()
                    now.put(loss=loss, gradient_norm=1.0, grad_var=0.5)
                    for number in range(8):
                        now.seed(f"seed-{number}", **_CELLS)
            spent.append((time.perf_counter() - started) * 1e3)
        return spent


def row(blocks: int, steps: int) -> str:
    """The Markdown row."""
    endpoint = Endpoint()
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{endpoint.port}"
    endpoint.start()
    training = Training()
    training.block(200, None)
    without: list[float] = []
    with_it: list[float] = []
    try:
        with esper_otel.start(run_id="untouched") as telemetry:
            training.block(200, telemetry)
            for number in range(blocks):
                for is_on in (number % 2 == 0, number % 2 == 1):
                    spent = training.block(steps, telemetry if is_on else None)
                    (with_it if is_on else without).extend(spent)
    finally:
        endpoint.stop()
    bare, ours = np.percentile(without, [50, 99]), np.percentile(with_it, [50, 99])
    return (
        f"| a training step on one core, with telemetry, against without ({len(with_it):,} each) "
        f"| {ours[0]:.2f} ms (p99 {ours[1]:.2f}) | {bare[0]:.2f} ms (p99 {bare[1]:.2f}) "
        f"| {ours[0] / bare[0]:.3f}x (p99 {ours[1] / bare[1]:.2f}x) |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60, help="of each kind")
    parser.add_argument("--steps", type=int, default=100, help="in a block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(row(options.blocks, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
