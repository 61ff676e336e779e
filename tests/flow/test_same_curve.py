"""A training script with the README's twelve lines: the same curve, the right numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

import esper_otel
from esper_otel import Stage, Telemetry
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

torch = pytest.importorskip("torch")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        yield collector


def _train(telemetry: Telemetry | None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a small network with dropout, as the script itself sees them."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 2, (640,)))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    losses, norms = [], []

    def work(inputs: Any, targets: Any, now: esper_otel.Step | None) -> None:
        if now is not None:
            inputs, targets = now.to("cpu", inputs, targets)
        outputs = model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters())))
        if now is not None:
            now.gradients(model, sources={"first": list(model[0].parameters()), "again": list(model[0].parameters())})
        optimizer.step()
        losses.append(loss.item())
        if now is not None:
            now.put(loss=loss, accuracy=(outputs.argmax(1) == targets).float().mean())
            now.seed("seed-1", stage=Stage.TRAINING, gradient_norm=norms[-1])
            now.state()

    for epoch in range(3):
        if telemetry is None:
            for inputs, targets in loader:
                work(inputs, targets, None)
        else:
            for inputs, targets in telemetry.batches(loader):
                with telemetry.step(epoch=epoch, samples=len(targets)) as now:
                    work(inputs, targets, now)
    return losses, norms


def test_the_loss_curve_is_bit_for_bit_the_same_as_without_telemetry(collector: MemoryCollector) -> None:
    """Telemetry draws no random number, changes no tensor and no order."""
    without, _ = _train(None)
    with esper_otel.start(run_id="run") as telemetry:
        with_telemetry, _ = _train(telemetry)
    assert with_telemetry == without
    assert collector.frames_received == len(without)


def test_what_arrives_is_what_the_script_computed_and_what_pandas_derives_from_it(collector: MemoryCollector) -> None:
    """Loss, norm and everything derived, step by step, over a real socket."""
    with esper_otel.start(run_id="run") as telemetry:
        losses, norms = _train(telemetry)
    arrived: dict[str, list[float]] = {}
    for point in collector.points():
        if point.value is not None and not point.attributes:
            arrived.setdefault(point.name, []).append(point.value)
    assert arrived["loss"] == losses
    np.testing.assert_allclose(arrived["gradient_norm"], norms, rtol=1e-5)
    loss, norm = pd.Series(losses), pd.Series(arrived["gradient_norm"])
    smooth_loss = loss.ewm(alpha=0.2, adjust=False, ignore_na=True)
    smooth_norm = norm.ewm(alpha=0.2, adjust=False, ignore_na=True)
    np.testing.assert_allclose(arrived["loss_ewma"], smooth_loss.mean().to_numpy(), rtol=1e-12)
    np.testing.assert_allclose(arrived["loss_delta"], loss.diff().dropna().to_numpy(), rtol=1e-12, atol=1e-15)
    volatility = loss.rolling(9, min_periods=2).std(ddof=0).dropna().to_numpy()
    np.testing.assert_allclose(arrived["loss_volatility"], volatility, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(arrived["grad_norm_ewma"], smooth_norm.mean().to_numpy(), rtol=1e-12)
    np.testing.assert_allclose(arrived["grad_var"], smooth_norm.var(bias=True).to_numpy(), rtol=1e-9, atol=1e-12)
    assert set(arrived["grad_conflict_rate"]) == {0.0}  # a source does not conflict with itself
    assert {"input_wait_ms", "step_latency_ms", "samples_per_s"} <= arrived.keys()
    assert {"hook_latency_ms", "h2d_copy_ms", "gpu_util_percent"}.isdisjoint(arrived)
