"""A plain script in three lines: one step for each step of the optimizer, and the same curve as without."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from programs import until

import esper_otel
from esper_otel import InvalidValue, Packets, UnknownMetric
from esper_otel.session import ending
from esper_otel.testing import MemoryCollector

torch = pytest.importorskip("torch")

BATCH, BATCHES = 8, 6


class Slow:
    """A loader whose batches take their time."""

    def __init__(self, delay_s: float = 0.0, batches: int = BATCHES) -> None:
        self.delay_s = delay_s
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        random = torch.Generator().manual_seed(5)
        for _ in range(self.batches):
            time.sleep(self.delay_s)
            yield torch.randn(BATCH, 4, generator=random), torch.randint(0, 2, (BATCH,), generator=random)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


def setting() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def pulled(watched: Any) -> list[Packets]:
    watched.close()
    return list(watched.telemetry.pull(max_packets=1000))


def train(
    loader: Any, *, watched: bool, epochs: int = 2, clip: float | None = None
) -> tuple[list[float], list[Packets]]:
    """A script's loop; with telemetry it has three lines more."""
    model, optimizer = setting()
    if watched:
        loader = esper_otel.watch(model, optimizer, loader, run_id="watched")
    losses = []
    for _ in range(epochs):
        for inputs, targets in loader:
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
            if watched:
                loader.put(loss=loss)
    return losses, pulled(loader) if watched else []


def test_three_lines_give_what_can_be_measured_and_the_same_curve() -> None:
    losses, packets = train(Slow(0.01), watched=True)
    assert train(Slow(), watched=False)[0] == losses
    assert [p.step for p in packets] == [*range(1, 2 * BATCHES + 1)]
    assert [p.state.current_epoch for p in packets] == [0] * BATCHES + [1] * BATCHES
    assert [p.state.training_loss for p in packets] == pytest.approx(losses)
    for p in packets:
        assert {"gradient_norm", "samples_per_s", "input_wait_ms", "step_latency_ms", "loss_ewma"} <= p.names
        metrics = p.state.training_metrics
        cycle_ms = metrics["input_wait_ms"] + metrics["step_latency_ms"]
        assert metrics["samples_per_s"] == pytest.approx(BATCH * 1e3 / cycle_ms, rel=1e-3)
        assert metrics["input_wait_ms"] >= 9.9


def test_the_gradient_norm_is_the_one_that_the_optimizer_sees() -> None:
    """After clipping, when the script clips."""
    _, packets = train(Slow(), watched=True, clip=0.01)
    for p in packets:
        assert p.state.training_metrics["gradient_norm"] == pytest.approx(0.01, rel=1e-3)


def test_accumulated_batches_are_one_step() -> None:
    """Waits and samples add up; the waits inside are no part of the step's latency."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, Slow(0.02), run_id="run")
    started_s = time.perf_counter()
    for number, (inputs, targets) in enumerate(watched, start=1):
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        time.sleep(0.005)
        if number % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    packets = pulled(watched)
    spent_ms = (time.perf_counter() - started_s) * 1e3
    assert [p.step for p in packets] == [1, 2]
    for p in packets:
        assert p.state.training_metrics["input_wait_ms"] >= 59.9
        assert p.state.training_metrics["step_latency_ms"] >= 14.9
        assert "loss" not in p.names
    names = ("input_wait_ms", "step_latency_ms")
    assert sum(p.state.training_metrics[name] for p in packets for name in names) <= spent_ms


def test_an_epoch_that_trains_nothing_and_one_that_is_left_early() -> None:
    """Evaluating on the watched loader is no step; a break ends the step that was under way."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, Slow(), run_id="run")
    for inputs, _ in watched:
        model(inputs)
    for inputs, targets in watched:
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        break
    watched.validation(loss=0.25)
    assert [p.state.current_epoch for p in pulled(watched)] == [1]


def test_amp_is_unscaled() -> None:
    """GradScaler unscales before the optimizer's step; steps that it skips are none where nothing was put."""
    model, optimizer = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watched = esper_otel.watch(model, optimizer, Slow(), run_id="run")
    norms = []
    for number, (inputs, targets) in enumerate(watched):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        scaler.step(optimizer)
        scaler.update()
    del norms[2]
    found = [p.state.training_metrics["gradient_norm"] for p in pulled(watched)]
    assert found == pytest.approx(norms, rel=1e-5)


def train_scaled(batches: Any, *, watched: bool) -> tuple[list[float], list[Any]]:
    """The third batch overflows; the scaler skips its step."""
    model, optimizer = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if watched:
        batches = esper_otel.watch(model, optimizer, batches, run_id="run")
    losses = []
    for number, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets) * (float("inf") if number == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if watched:
            batches.put(loss=loss, accuracy=number / 8)
    weights = [each.tolist() for each in (*model.parameters(), torch.tensor(scaler.get_scale()))]
    return losses, [weights, pulled(batches) if watched else [], batches]


def test_a_step_that_the_scaler_skips_is_a_failed_row_with_what_was_put() -> None:
    _, (expected, _, _) = train_scaled(Slow(), watched=False)
    losses, (weights, packets, watched) = train_scaled(Slow(), watched=True)
    assert weights == expected
    found = [p.state.training_metrics for p in packets]
    assert [row["accuracy"] for row in found] == [number / 8 for number in range(BATCHES)]
    assert ["gradient_norm" in row for row in found] == [number != 2 for number in range(BATCHES)]
    assert [row.get("loss") for row in found] == [None if number == 2 else each for number, each in enumerate(losses)]
    health = watched.telemetry.health()
    assert (health["recorded"], health["failed"], health["nonfinite"]) == (BATCHES, 1, 1)


def test_mistakes_are_said_at_once() -> None:
    model, optimizer = setting()
    with pytest.raises(InvalidValue, match="optimizer"):
        esper_otel.watch(model, model, Slow())
    with pytest.raises(InvalidValue, match="model"):
        esper_otel.watch("model", optimizer, Slow())  # type: ignore[arg-type]
    with esper_otel.start(run_id="run") as telemetry:
        with pytest.raises(InvalidValue, match="run_id"):
            esper_otel.watch(model, optimizer, Slow(), telemetry=telemetry, run_id="other")
        watched = esper_otel.watch(model, optimizer, Slow(), telemetry=telemetry)
        assert len(watched) == BATCHES
        with pytest.raises(UnknownMetric, match="loss"):
            watched.put(los=1.0)
        watched.close()


class Loaded(torch.utils.data.DataLoader):  # type: ignore[misc, name-defined] # torch may be absent
    """Something that can be referred to weakly, as its dataset."""

    def __init__(self) -> None:
        super().__init__(torch.utils.data.TensorDataset(torch.ones(BATCH, 4)), batch_size=4)


def steps(loader: Any, model: Any, optimizer: Any) -> None:
    for (inputs,) in loader:
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()


def references(*objects: Any) -> list[weakref.ref[Any]]:
    return [weakref.ref(each) for each in objects]


def cell(lr: float, *, closes: bool = False) -> tuple[list[weakref.ref[Any]], Any]:
    """A notebook's cell, or one turn of a sweep; returns what is to be freed, and its session."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loader = Loaded()
    watched = esper_otel.watch(model, optimizer, loader)
    steps(watched, model, optimizer)
    if closes:
        watched.close()
    return references(model, optimizer, loader, loader.dataset, watched), watched.telemetry


def is_over(telemetry: Any) -> bool:
    return telemetry not in ending._live


@pytest.mark.parametrize("closes", [True, False])
def test_what_was_watched_is_freed_at_once(monkeypatch: pytest.MonkeyPatch, *, closes: bool) -> None:
    """Without waiting for the collector, as without us, and though the session may still be live."""
    monkeypatch.setattr(ending, "_exits", ending._Exits())
    gc.collect()
    gc.disable()
    try:
        freed, telemetry = cell(0.1, closes=closes)
        assert [each() for each in freed] == [None] * 5
    finally:
        gc.enable()
    telemetry.close()


def test_the_sessions_of_a_sweep_end_one_after_another() -> None:
    sessions = []
    for lr in (0.1, 0.2, 0.3):
        sessions.append(cell(lr)[1])
        assert [is_over(each) for each in sessions] == [True] * (len(sessions) - 1) + [False]
    sessions[-1].close()
    assert [each.health()["recorded"] for each in sessions] == [2, 2, 2]


def in_a_function(loader: Any) -> Any:
    """The last turn of a sweep; returns what watched, of which no script knows."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader)
    steps(watched, model, optimizer)
    watched.put(accuracy=0.5)
    return watched._watching


def test_the_last_session_of_a_sweep_ends_when_nothing_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last step, though the process goes on."""
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        in_a_function(Loaded())
        until("the session has ended", lambda: not ending._live)
        points = [point for point in collector.points() if point.value is not None]
    assert [point.value for point in points if point.name == "accuracy"] == [0.5]
    assert {point.attributes["outcome"] for point in points if point.name == "esper.run.ended"} == {"completed"}


def test_a_session_that_can_be_used_does_not_end() -> None:
    """Its model and optimizer, the loader that is watched, an iterator of it, or the session itself are kept."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, Loaded())
    watching: Any = watched._watching
    steps(watched, model, optimizer)
    assert not watching.is_abandoned
    del model, optimizer
    assert not watching.is_abandoned
    iterator = iter(watched)
    next(iterator)
    del watched
    assert not watching.is_abandoned
    del iterator
    assert watching.is_abandoned
    watching.telemetry.close()
    shared = esper_otel.watch(*setting(), Loaded())
    telemetry = shared.telemetry
    watching = shared._watching
    del shared
    assert not watching.is_abandoned
    telemetry.close()


def test_the_next_watch_ends_a_loop_that_is_over_though_its_model_is_kept() -> None:
    kept, sessions = [], []
    for _ in range(3):
        model, optimizer = setting()
        loader = Loaded()
        watched = esper_otel.watch(model, optimizer, loader)
        sessions.append(watched.telemetry)
        kept.append((model, optimizer, loader))
        iterator = iter(watched)
        del watched
        steps(iterator, model, optimizer)
        del iterator
    assert [is_over(each) for each in sessions] == [True, True, False]
    sessions[-1].close()


def test_a_watch_that_is_still_of_use_goes_on_beside_another() -> None:
    """One that is kept, one whose loop is under way, and one that has not begun; also without their loaders."""
    settings = [setting() for _ in range(4)]
    watches: list[Any] = [esper_otel.watch(*each, Loaded()) for each in settings[:3]]
    sessions = [each.telemetry for each in watches]
    steps(watches[0], *settings[0])
    watches[1] = iter(watches[1])
    steps([next(watches[1])], *settings[1])
    watches[2] = torch.utils.data.DataLoader(watches[2].dataset, batch_size=2)  # as Accelerate's prepare
    last = esper_otel.watch(*settings[3], Loaded())
    assert not any(is_over(each) for each in sessions)
    for watched, trained in zip(watches, settings, strict=False):
        steps(watched, *trained)
    for each in (*sessions, last.telemetry):
        each.close()
    assert [each.health()["recorded"] for each in sessions] == [4, 2, 4]


def test_watches_in_one_session_do_not_pile_up() -> None:
    with esper_otel.start() as telemetry:
        freed = []
        for _ in range(3):
            model, optimizer = setting()
            watched = esper_otel.watch(model, optimizer, Loaded(), telemetry=telemetry)
            steps(watched, model, optimizer)
            freed += references(watched._watching)
        del watched
        gc.collect()
        assert [each() is None for each in freed] == [True, True, False]


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import esper_otel, torch
from test_watch import Slow, setting
from esper_otel.testing import MemoryCollector
model, optimizer = setting()
collector = MemoryCollector().__enter__()
import os
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.grpc_endpoint
os.environ.pop("OTEL_METRICS_EXPORTER", None)
watched = esper_otel.watch(model, optimizer, Slow(), run_id="dies")
for number, (inputs, targets) in enumerate(watched):
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    watched.put(loss=float(number))
    loss.backward()
    if number == 2:
        raise KeyError("in the middle")
    optimizer.step()
"""


@pytest.mark.lengthy
def test_an_exception_ends_the_run_as_it_does_without_us(tmp_path: Path) -> None:
    """The traceback and the exit status are the script's; the step under way is there, marked as failed."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    done = warm.run("-c", SCRIPT.format(paths=paths), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("esper_otel closed: run dies KeyError, frames recorded 3")
    assert "KeyError: 'in the middle'" in done.stderr
