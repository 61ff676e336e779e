"""Loops that step in every way, each run with and without telemetry; see test_step_twins.py.

What a case prints is the same with and without. What it counts itself goes to a file: the gradient norm of each step as
its optimizer saw it, and the samples of the batches that the step is the first to use.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset


class Run:
    """One case: what it says, and what it counts."""

    def __init__(self, how: str) -> None:
        torch.manual_seed(0)
        self.how = how
        self.said: list[str] = []
        self.norms: list[float] = []
        self.samples: list[int | None] = []
        self.models: list[torch.nn.Module] = []
        self.batches = 0
        self.watched: Any = None

    def model(self, outputs: int = 1) -> torch.nn.Module:
        self.models.append(torch.nn.Linear(4, outputs))
        return self.models[-1]

    def over(self, optimizers: Sequence[Any], *, epochs: int = 1, size: int = 8) -> Iterator[Any]:
        """The batches, from a watched loader where one is asked for."""
        data = TensorDataset(torch.randn(28, 4), torch.randn(28, 1))
        loader: Any = DataLoader(data, batch_size=size, shuffle=True)
        if self.how == "watch":
            import esper_otel

            loader = self.watched = esper_otel.watch(self.models[0], optimizers, loader, run_id="twin")
        for _ in range(epochs):
            for inputs, targets in loader:
                self.batches += len(inputs)
                yield inputs, targets

    def count(self, parameters: Any) -> None:
        """A step is about to be made with these gradients, for the samples since the last one."""
        gradients = [each.grad.flatten() for each in parameters if each.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))
        self.samples.append(self.batches or None)
        self.batches = 0

    def say(self, value: Any) -> None:
        self.said.append(repr(value.item() if isinstance(value, torch.Tensor) else value))

    def put(self, **values: Any) -> None:
        if self.watched is not None:
            self.watched.put(values)

    def state(self) -> list[str]:
        weights = b"".join(each.detach().numpy().tobytes() for model in self.models for each in model.parameters())
        parts = (weights, torch.get_rng_state().numpy().tobytes())
        return [*self.said, *(hashlib.sha256(part).hexdigest()[:16] for part in parts)]

    def rows(self) -> list[dict[str, float]]:
        if self.watched is None:
            return []
        self.watched.close()
        pulled = self.watched.telemetry.pull(max_packets=1_000)
        return [{name: each.state.training_metrics[name] for name in each.names & METRICS} for each in pulled]


METRICS = {"gradient_norm", "samples_per_s", "input_wait_ms", "step_latency_ms", "accuracy"}


def plain(run: Run) -> None:
    model = run.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for inputs, targets in run.over([optimizer], epochs=2):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        run.count(model.parameters())
        optimizer.step()
        run.say(loss)


def closures(run: Run) -> None:
    model = run.model()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    for inputs, targets in run.over([optimizer]):

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> Any:
            optimizer.zero_grad()
            loss: Any = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        run.say(optimizer.step(closure))
        run.count(model.parameters())  # those of its last evaluation


def several(run: Run) -> None:
    """As a critic and a generator: two steps of two optimizers in each batch."""
    one, other = run.model(), run.model(4)
    first, second = (torch.optim.SGD(each.parameters(), lr=0.05) for each in (one, other))
    for inputs, _ in run.over([first, second]):
        for model, optimizer in ((one, first), (other, second)):
            optimizer.zero_grad()
            loss = one(other(inputs) if model is other else inputs).square().mean()
            loss.backward()
            run.count(model.parameters())
            optimizer.step()
            run.say(loss)


def accumulated(run: Run) -> None:
    model = run.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number, (inputs, targets) in enumerate(run.over([optimizer], epochs=3), start=1):
        loss = (model(inputs) - targets).square().mean() / 3
        loss.backward()
        if number % 3 == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            run.count(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        run.say(loss)


def skipped(run: Run) -> None:
    """A loss that is not finite is stepped over, as many scripts do."""
    model = run.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number, (inputs, targets) in enumerate(run.over([optimizer])):
        loss = (model(inputs) - targets).square().mean() * (math.inf if number == 1 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        run.say(loss)
        if not math.isfinite(loss.item()):
            run.batches = 0
            optimizer.zero_grad()
            continue
        run.count(model.parameters())
        optimizer.step()


CASES: list[Callable[[Run], None]] = [plain, closures, several, accumulated, skipped]


def main(counted: str, how: str) -> None:
    found = {}
    for case in CASES:
        run = Run(how)
        case(run)
        print(case.__name__, json.dumps(run.state()), flush=True)
        found[case.__name__] = {"norms": run.norms, "samples": run.samples, "rows": run.rows()}
    Path(counted).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
