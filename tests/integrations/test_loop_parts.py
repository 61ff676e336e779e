"""Forward, backward and optimizer: told apart in loops that do not say so, and adding up to less than the step."""

from __future__ import annotations

import time
from typing import Any

import pytest

import esper_otel
from esper_otel import Telemetry
from esper_otel.record.names import PARTS

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

FORWARD_S, BACKWARD_S, OPTIMIZER_S = 0.012, 0.024, 0.018


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Telemetry:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    return esper_otel.start(run_id="parts")


class Slow(torch.autograd.Function):  # type: ignore[misc, name-defined]
    """Takes its time in both directions."""

    @staticmethod
    def forward(_context: Any, values: Any) -> Any:
        time.sleep(FORWARD_S)
        return values.clone()

    @staticmethod
    def backward(_context: Any, gradients: Any) -> Any:
        time.sleep(BACKWARD_S)
        return gradients


@pytest.fixture(autouse=True, scope="module")
def _hooks_of_sgd() -> None:
    """From now on PyTorch's hooks run for SGD's own step, too, when SlowSgd's calls it."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


class SlowSgd(torch.optim.SGD):  # type: ignore[misc, name-defined]
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        time.sleep(OPTIMIZER_S)
        return super().step()


def loader(count: int) -> Any:
    data = torch.utils.data.TensorDataset(torch.randn(4 * count, 4), torch.randint(0, 2, (4 * count,)))
    return torch.utils.data.DataLoader(data, 4)


def recorded(telemetry: Telemetry) -> list[dict[str, float]]:
    frames, _ = telemetry._recorder.publisher.ring.after(0, 1_000)
    return [frame.recorded for frame in frames]


def assert_told_apart(step: dict[str, float], times: int = 1) -> None:
    """Each part has at least its own delay, and together they are no longer than the step."""
    forward, backward, optimizer = (step[metric] for metric in PARTS.values())
    assert forward >= times * FORWARD_S * 1e3
    assert backward >= times * BACKWARD_S * 1e3
    assert optimizer >= OPTIMIZER_S * 1e3
    assert forward + backward + optimizer <= step["step_latency_ms"] + 1e-6


def loss_of(model: Any, inputs: Any, targets: Any) -> Any:
    return torch.nn.functional.cross_entropy(Slow.apply(model(inputs)), targets)


def test_watch_tells_them_apart(telemetry: Telemetry) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = SlowSgd(model.parameters(), 0.1)
    watched = esper_otel.watch(model, optimizer, loader(3), telemetry=telemetry)
    for inputs, targets in watched:
        loss_of(model, inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    watched.close()
    steps = recorded(telemetry)
    assert len(steps) == 3
    for step in steps:
        assert_told_apart(step)


def test_batches_of_one_step_are_added(telemetry: Telemetry) -> None:
    """Gradients of two batches are accumulated."""
    model = torch.nn.Linear(4, 2)
    optimizer = SlowSgd(model.parameters(), 0.1)
    watched = esper_otel.watch(model, optimizer, loader(4), telemetry=telemetry)
    for number, (inputs, targets) in enumerate(watched):
        loss_of(model, inputs, targets).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    watched.close()
    steps = recorded(telemetry)
    assert len(steps) == 2
    for step in steps:
        assert_told_apart(step, times=2)


def test_a_closure_counts_once(telemetry: Telemetry) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = SlowSgd(model.parameters(), 0.1)
    watched = esper_otel.watch(model, optimizer, loader(2), telemetry=telemetry)
    for inputs, targets in watched:

        def closure(inputs: Any = inputs, targets: Any = targets) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, inputs, targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    watched.close()
    for step in recorded(telemetry):
        assert step[PARTS["backward"]] >= BACKWARD_S * 1e3
        assert step[PARTS["optimizer"]] >= (FORWARD_S + OPTIMIZER_S) * 1e3
        assert sum(step.get(metric, 0.0) for metric in PARTS.values()) <= step["step_latency_ms"] + 1e-6


def test_lightning_tells_them_apart(telemetry: Telemetry) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from esper_otel.integrations.lightning import EsperCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, _batch_idx: int) -> Any:
            return loss_of(self.layer, *batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[EsperCallback(telemetry)],
    ).fit(Module(), loader(3))
    steps = recorded(telemetry)
    telemetry.close()
    assert len(steps) == 3
    for step in steps:
        assert step[PARTS["backward"]] >= BACKWARD_S * 1e3
        assert step[PARTS["optimizer"]] > 0.0
        assert sum(step.get(metric, 0.0) for metric in PARTS.values()) <= step["step_latency_ms"] + 1e-6


def test_another_thread_and_a_closed_loop_are_not_told_apart(telemetry: Telemetry) -> None:
    """And PyTorch works as before."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = esper_otel.watch(model, optimizer, loader(1), telemetry=telemetry)
    for inputs, targets in watched:
        loss_of(model, inputs, targets).backward()
        optimizer.step()
    watched.close()
    values = torch.ones(3, requires_grad=True)
    (values * 2).sum().backward()
    assert values.grad.tolist() == [2.0, 2.0, 2.0]
    torch.autograd.backward((values * 3).sum())
    assert values.grad.tolist() == [5.0, 5.0, 5.0]
