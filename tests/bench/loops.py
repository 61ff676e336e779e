"""What telemetry costs other people's loops: ``python tests/bench/loops.py [--rounds 5] [--loop plain]``.

The same small training in every way that there is, in turns, each in a process of its own: alone, with ours, and with
TraceML where that is installed (``pip install traceml-ai``). Shown are the
means over the steps of the process's CPU time, with all its threads, and of the time that passes, and what a way adds
to the same training without telemetry. Ours send each step to a receiver in another process, TraceML to its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

STEPS, WARM = 5_000, 500
WIDTH, BATCH = 64, 16
LOOPS = {"plain": "a script's own loop", "lightning": "Lightning", "transformers": "Hugging Face"}
OURS = {"plain": ("watch", "run"), "lightning": ("callback",), "transformers": ("callback",)}
TRACEML: dict[str, tuple[str, ...]] = {
    "plain": ("traceml manual", "traceml auto"),
    "lightning": ("traceml auto",),
    "transformers": (),  # traceml-ai 0.5.0: 5,500 steps had not ended after 13 minutes
}
NO_TRACEML = "TraceML is not installed (pip install traceml-ai)"


def no_traceml(loop: str) -> str:
    """Why there is no figure of TraceML."""
    return "" if not TRACEML[loop] or find_spec("traceml_ai") is not None else NO_TRACEML


class Cost(NamedTuple):
    """Microseconds a step."""

    cpu: float
    wall: float


class Clock:
    """Takes the time from the end of the warm-up to the last step."""

    def __init__(self, steps: int) -> None:
        self._last = steps + WARM
        self._number = 0
        self._marks: list[Cost] = []

    def tick(self) -> None:
        """A step begins."""
        self._number += 1
        if self._number == WARM or self._number == self._last:
            self._marks.append(Cost(time.process_time() * 1e6, time.perf_counter() * 1e6))

    def cost(self) -> Cost:
        before, after = self._marks
        steps = self._last - WARM
        return Cost((after.cpu - before.cpu) / steps, (after.wall - before.wall) / steps)


# -- the trainings -------------------------------------------------------------------------------------------


class Same(IterableDataset[Any]):
    """Gives one random batch again and again."""

    def __init__(self, steps: int) -> None:
        random = torch.Generator().manual_seed(1)
        self._batch = (torch.randn(BATCH, WIDTH, generator=random), torch.randint(0, 10, (BATCH,), generator=random))
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self._batch, self._steps)


def model() -> torch.nn.Module:
    """Some 9,000 parameters in 6 tensors: what telemetry costs shows best next to a step that is short."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))


def plain(way: str, steps: int) -> Cost:
    """A script's own loop."""
    clock, net = Clock(steps), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader: Any = DataLoader(Same(steps + WARM), batch_size=None)
    if way.startswith("traceml"):
        traced(clock, net, optimizer, loader, way.split()[1])
        return clock.cost()
    if way == "watch":
        import esper_otel

        loader = esper_otel.watch(net, optimizer, loader)
    is_watched = way == "watch"
    for inputs, targets in loader:
        clock.tick()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(inputs), targets)
        torch.autograd.backward(loss)
        optimizer.step()
        if is_watched:
            loader.put(loss=loss)
    if is_watched:
        loader.close()
    return clock.cost()


def traced(clock: Clock, net: Any, optimizer: Any, loader: Any, mode: str) -> None:
    """The same loop as TraceML's documentation changes it."""
    import traceml_ai as traceml  # type: ignore[import-not-found] # installed by hand

    traceml.init(mode=mode)
    if mode == "manual":
        loader, net = traceml.wrap_dataloader_fetch(loader), traceml.wrap_forward(net)
        optimizer = traceml.wrap_optimizer(optimizer)
    for inputs, targets in loader:
        clock.tick()
        with traceml.trace_step(net):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(inputs), targets)
            (traceml.wrap_backward(loss) if mode == "manual" else loss).backward()
            optimizer.step()


def lightning(way: str, steps: int) -> Cost:
    """Lightning's loop."""
    import lightning.pytorch as pl

    clock = Clock(steps)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.tick()
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callbacks: list[Any] = []
    if way == "callback":
        from esper_otel.integrations.lightning import EsperCallback

        callbacks = [EsperCallback()]
    quiet: Any = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(Module(), DataLoader(Same(steps + WARM), batch_size=None))
    return clock.cost()


def transformers(way: str, steps: int) -> Cost:
    """Hugging Face's loop."""
    from transformers import Trainer, TrainingArguments

    clock = Clock(steps)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, inputs: Any, labels: Any) -> Any:
            clock.tick()
            return {"loss": torch.nn.functional.cross_entropy(self.net(inputs), labels)}

    class Ours(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(
                Same(steps + WARM),
                batch_size=None,
                collate_fn=lambda batch: dict(zip(("inputs", "labels"), batch, strict=True)),
            )

    callbacks: list[Any] = []
    if way == "callback":
        from esper_otel.integrations.transformers import EsperCallback

        callbacks = [EsperCallback()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps + WARM,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            optim="sgd",
        )
        Ours(Net(), arguments, train_dataset=Same(steps + WARM), callbacks=callbacks).train()
    return clock.cost()


# -- in turns ------------------------------------------------------------------------------------------------


def command_of(loop: str, way: str, steps: int, file: Path) -> list[str]:
    """The process that runs one way once."""
    given = ["--loop", loop, "--way", way, "--steps", str(steps), "--into", str(file)]
    if way == "run":
        return [sys.executable, "-m", "esper_otel", "run", __file__, *given]
    if way.startswith("traceml"):
        logs = ["--logs-dir", str(file.parent), "--run-name", f"{time.time_ns()}"]
        return [sys.executable, "-m", "traceml_ai.launcher.cli", "run", *logs, __file__, "--args", *given]
    return [sys.executable, __file__, *given]


def fault_of_traceml(done: subprocess.CompletedProcess[str], folder: Path, steps: int) -> str:
    """Why the figure of a run under TraceML does not count: it failed, or it did not trace each step."""
    if done.returncode:
        return f"{done.stdout}{done.stderr}".strip().splitlines()[-1]
    summaries = sorted(folder.glob("*/final_summary.json"), key=lambda each: each.stat().st_mtime)
    if not summaries:
        return "it wrote no summary"
    traced = json.loads(summaries[-1].read_text(encoding="utf-8"))["step_time"]["metadata"]["training_total_steps"]
    return "" if traced == steps else f"it traced {traced} of {steps} steps"


def measured(rounds: int, steps: int = STEPS, only: str | None = None) -> dict[tuple[str, str], Cost]:
    """The cost of each way by (loop, way), over all rounds; the median of their means."""
    loops = [loop for loop in LOOPS if only in {None, loop}]
    ways = [(loop, way) for loop in loops for way in ("alone", *OURS[loop])]
    if find_spec("traceml_ai") is not None:
        ways += [(loop, way) for loop in loops for way in TRACEML[loop]]
    receiver = subprocess.Popen(
        [sys.executable, "-m", "esper_otel", "gateway", "--json", "--grpc", "127.0.0.1:0", "--http", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    found = defaultdict(list)
    failed: dict[tuple[str, str], str] = {}
    try:
        assert receiver.stdout is not None
        address = json.loads(receiver.stdout.readline())["grpc"]
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}", "ESPER_BLACK_BOX_FRAMES": "0"}
        environment.pop("OTEL_METRICS_EXPORTER", None)
        with tempfile.TemporaryDirectory() as folder:
            for loop, way in ways * rounds:
                file = Path(folder) / "cost.json"
                command = command_of(loop, way, steps, file)
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if way.startswith("traceml") and (fault := fault_of_traceml(done, Path(folder), steps + WARM)):
                    failed[loop, way] = fault
                    continue
                if done.returncode:
                    raise RuntimeError(f"{loop}, {way}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
                found[loop, way].append(Cost(*json.loads(file.read_text(encoding="utf-8"))))
                print(loop, way, found[loop, way][-1], file=sys.stderr, flush=True)
                file.unlink()
    finally:
        receiver.terminate()
        receiver.wait()
    for (loop, way), reason in failed.items():
        print(f"{loop}, {way}: {reason}", file=sys.stderr)
    return {key: Cost(*map(statistics.median, zip(*costs, strict=True))) for key, costs in found.items()}


def main() -> None:
    """Measures and prints; or runs one way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--loop", choices=LOOPS, help="only this one")
    parser.add_argument("--way", help="of the process that runs one way")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    if options.way is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        training = {"plain": plain, "lightning": lightning, "transformers": transformers}[options.loop]
        options.into.write_text(json.dumps(training(options.way, options.steps)), encoding="utf-8")
        return
    costs = measured(options.rounds, options.steps, options.loop)
    print("| loop | | CPU a step | added | time a step | added |\n|---|---|---|---|---|---|")
    for (loop, way), cost in sorted(costs.items(), key=lambda each: [*LOOPS].index(each[0][0])):
        alone = costs[loop, "alone"]
        added = [f"{cost.cpu - alone.cpu:+,.1f} µs", f"{cost.wall - alone.wall:+,.1f} µs"]
        if way == "alone":
            added = ["", ""]
        print(f"| {LOOPS[loop]} | {way} | {cost.cpu:,.1f} µs | {added[0]} | {cost.wall:,.1f} µs | {added[1]} |")
    if find_spec("traceml_ai") is None:
        print(f"\n{NO_TRACEML}.")


if __name__ == "__main__":
    main()
