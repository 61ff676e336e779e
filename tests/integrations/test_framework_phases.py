"""Phases of frameworks, for real: validations and checkpoints by themselves, none of them counted as input wait."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import esper_otel
from esper_otel import Telemetry

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

SLOW_S = 0.05


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Telemetry:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    return esper_otel.start(run_id="phases")


def named(telemetry: Telemetry) -> Counter[str]:
    """How many phases of each name there were."""
    return Counter(phase.name for phase in telemetry._recorder.phases.log.waiting(None, 10**6))


def own_ms(telemetry: Telemetry, name: str) -> float:
    return telemetry._recorder.phases.log.totals().get(name, 0.0)


def waits(telemetry: Telemetry) -> list[float]:
    frames, _ = telemetry._recorder.publisher.ring.after(0, 1_000)
    return [frame.recorded["input_wait_ms"] for frame in frames]


def assert_times_add_up(telemetry: Telemetry, begun_s: float) -> None:
    """Steps, waits and phases do not overlap: together they are no longer than the training was."""
    frames, _ = telemetry._recorder.publisher.ring.after(0, 1_000)
    totals = telemetry._recorder.phases.log.totals()
    inside = sum(phase.own_ms for phase in phases(telemetry) if phase.step is not None)
    steps = sum(frame.recorded["input_wait_ms"] + frame.recorded["step_latency_ms"] for frame in frames)
    spent = sum(totals.values()) - totals["start_up"] - inside + steps
    assert spent <= (time.perf_counter() - begun_s) * 1e3 + 1.0


def phases(telemetry: Telemetry) -> list[Any]:
    return telemetry._recorder.phases.log.waiting(None, 10**6)


def rows(count: int) -> Any:
    return torch.utils.data.TensorDataset(torch.randn(count, 4), torch.randint(0, 2, (count,)))


def test_lightnings_validations_and_checkpoints(telemetry: Telemetry, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from esper_otel.integrations.lightning import EsperCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, _batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(SLOW_S)
            self.log("val_loss", self.training_step(batch, batch_idx))

        def on_save_checkpoint(self, _checkpoint: Any) -> None:
            time.sleep(SLOW_S)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(rows(12), 4)
    begun_s = time.perf_counter()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            EsperCallback(telemetry),
            lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1),
        ],
    )
    trainer.fit(Module(), loader, torch.utils.data.DataLoader(rows(4), 4))
    assert named(telemetry) == {"start_up": 1, "evaluation": 2, "checkpoint": 3}
    assert own_ms(telemetry, "evaluation") >= 2 * SLOW_S * 1e3
    assert own_ms(telemetry, "checkpoint") >= 3 * SLOW_S * 1e3
    assert max(waits(telemetry)) < SLOW_S * 1e3
    assert_times_add_up(telemetry, begun_s)
    telemetry.close()
    assert "esper_otel" not in lightning.Trainer.save_checkpoint.__code__.co_filename


def test_hugging_faces_evaluations_and_checkpoints(telemetry: Telemetry, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from esper_otel.integrations.transformers import EsperCallback

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
            if not self.training:
                time.sleep(SLOW_S)
            logits = self.layer(inputs)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

        def state_dict(self, *arguments: Any, **named: Any) -> Any:
            time.sleep(SLOW_S / 5)
            return super().state_dict(*arguments, **named)

    data = [{"inputs": torch.randn(4), "labels": torch.tensor(1)} for _ in range(12)]
    begun_s = time.perf_counter()
    trainer = transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=12,
            num_train_epochs=2,
            eval_strategy="epoch",
            save_strategy="steps",
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[EsperCallback(telemetry)],
    )
    trainer.train()
    assert named(telemetry) == {"start_up": 1, "evaluation": 2, "checkpoint": 3}
    assert own_ms(telemetry, "evaluation") >= 2 * SLOW_S * 1e3
    assert max(waits(telemetry)) < SLOW_S * 1e3
    assert_times_add_up(telemetry, begun_s)
    telemetry.close()


def test_accelerates_checkpoints_under_watch(telemetry: Telemetry, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    original = accelerate.Accelerator.save_state
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows(12), 4))
    watched = esper_otel.watch(model, optimizer, loader, telemetry=telemetry)
    begun_s = time.perf_counter()
    for number, (inputs, targets) in enumerate(watched):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        watched.put(loss=loss)
        if number == 1:
            accelerator.save_state(str(tmp_path))
    watched.close()
    saved = [phase for phase in phases(telemetry) if phase.name == "checkpoint"]
    assert [phase.step for phase in saved] == [2]  # inside the step, which lasts until the next batch is asked for
    assert saved[0].own_ms > 0.0
    assert_times_add_up(telemetry, begun_s)
    assert accelerate.Accelerator.save_state is original


def test_a_phase_of_ones_own_under_watch(telemetry: Telemetry) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = esper_otel.watch(model, optimizer, torch.utils.data.DataLoader(rows(12), 4), telemetry=telemetry)
    for _ in range(2):
        with telemetry.phase("epoch"):
            for inputs, targets in watched:
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                time.sleep(0.01)
        with telemetry.phase("evaluation"):
            time.sleep(SLOW_S)
    watched.close()
    assert own_ms(telemetry, "epoch") < 2 * 3 * 10.0  # without its steps
    assert own_ms(telemetry, "evaluation") >= 2 * SLOW_S * 1e3
    assert max(waits(telemetry)) < SLOW_S * 1e3
