"""What the telemetry costs other people's loops: ``python tests/bench/loops.py [--rounds 5]``.

The same training with and without, in turns; the medians and 99th percentiles of the time from one step to the next,
and their ratios. Steps are sent to a receiver on loopback in another process. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import esper_otel

STEPS = 300
WIDTH = 256
Times = list[float]


class Loader:
    """Gives the same random batch again and again."""

    def __init__(self, *shape: int, steps: int = STEPS) -> None:
        random = torch.Generator().manual_seed(1)
        self._batch = (
            torch.randn(shape or (64, WIDTH), generator=random),
            torch.randint(0, 10, (64,), generator=random),
        )
        self._steps = steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.repeat(self._batch, self._steps)


def model() -> torch.nn.Module:
    """Some 200,000 parameters: a step of about a millisecond."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))


def images() -> torch.nn.Module:
    """Convolutions, as many parameters: a step of some tens of milliseconds."""
    torch.manual_seed(0)
    channels = (3, 32, 64, 128, 128)
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 2 * 2, 10))


def convolutions(*, watched: bool) -> Times:
    """A script's own loop over images of 32 x 32."""
    return plain(watched=watched, net=images(), loader=Loader(64, 3, 32, 32, steps=STEPS // 3))


def plain(*, watched: bool, net: torch.nn.Module | None = None, loader: Any = None) -> Times:
    """A script's own loop."""
    net = net or model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = loader or Loader()
    if watched:
        loader = esper_otel.watch(net, optimizer, loader, run_id=f"bench-{time.time_ns()}")
    stamps = []
    for inputs, targets in loader:
        loss = torch.nn.functional.cross_entropy(net(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if watched:
            loader.put(loss=loss)
        stamps.append(time.perf_counter())
    if watched:
        loader.close()
    return np.diff(stamps[20:]).tolist()


def lightning(*, watched: bool) -> Times:
    """Lightning's."""
    import lightning.pytorch as pl

    from esper_otel.integrations.lightning import EsperCallback

    stamps = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            stamps.append(time.perf_counter())
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet: Any = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks: Any = [EsperCallback(run_id=f"bench-{time.time_ns()}")] if watched else []
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(Module(), Loader())
    return np.diff(stamps[20:]).tolist()


def measured(run: Callable[..., Times], rounds: int) -> tuple[Times, Times]:
    """Without and with, in turns."""
    without: Times = []
    with_it: Times = []
    for _ in range(rounds):
        without += run(watched=False)
        with_it += run(watched=True)
    return without, with_it


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    receiver = subprocess.Popen(
        [sys.executable, "-m", "esper_otel", "gateway", "--json", "--grpc", "127.0.0.1:0", "--http", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert receiver.stdout is not None
    address = json.loads(receiver.stdout.readline())["grpc"]
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{address}"
    try:
        print("| loop | step without | with | p50 | p99 without | with | p99 |\n|---|---|---|---|---|---|---|")
        for name, run in (("plain, `watch`", plain), ("images, `watch`", convolutions), ("Lightning", lightning)):
            run(watched=False)
            without, with_it = (np.array(times) * 1e6 for times in measured(run, rounds))
            cells = [name]
            for share in (50, 99):
                one, other = np.percentile(without, share), np.percentile(with_it, share)
                cells += [f"{one:,.0f} us", f"{other:,.0f} us", f"{other / one:.2f}x"]
            print(f"| {' | '.join(cells)} |")
    finally:
        receiver.terminate()
        receiver.wait()


if __name__ == "__main__":
    main()
