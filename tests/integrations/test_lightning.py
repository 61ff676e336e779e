"""Lightning for real, on a tiny module: the right steps, and the same curve as without the callback."""

from __future__ import annotations

import copy
import os
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gateways import RunningGateway
from programs import until

import esper_otel
from esper_otel import InvalidValue, Packets, TamiyoClient
from esper_otel.session.ending import _live

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from esper_otel.integrations.lightning import EsperCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]  # warnings of Lightning's own


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """One layer; notes what the optimizer saw."""

    def __init__(self, fails_at: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error or KeyError("in the middle")
        self.layer = torch.nn.Linear(4, 2)
        self.fails_at = fails_at
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fails_at:
            raise self.error
        inputs, targets = batch
        outputs = self.layer(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        self.log("train_acc", (outputs.argmax(1) == targets).float().mean())
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(torch.cat([parameter.grad.flatten() for parameter in self.parameters()]).norm().item())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.layer(inputs), targets))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


def fit(
    callback: EsperCallback | None,
    *,
    epochs: int = 2,
    resume: Path | None = None,
    module: Any = None,
    **more: Any,
) -> Any:
    """Trains 8 batches an epoch; returns the module and the trainer."""
    lightning.seed_everything(0)
    module = (Module if module is None else module)()
    random = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 4, generator=random), torch.randint(0, 2, (64,), generator=random)
    )
    loaders = [torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)]
    trainer = lightning.Trainer(
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [] if callback is None else [callback],
            **more,
        },
    )
    module.loader = loaders[1]
    trainer.fit(module, *loaders, ckpt_path=resume)
    return module, trainer


def pulled(callback: EsperCallback) -> list[Packets]:
    assert callback.telemetry is not None
    return list(callback.telemetry.pull(max_packets=1000))


def parameters(module: Any) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in module.parameters()]


def test_each_optimizer_step_is_a_step_and_the_curve_is_the_same() -> None:
    without, _ = fit(None, val_check_interval=4)
    callback = EsperCallback(run_id="lightning", metrics={"accuracy": "train_acc"})
    module, _ = fit(callback, val_check_interval=4)
    assert (module.losses, parameters(module)) == (without.losses, parameters(without))
    packets = pulled(callback)
    assert [p.step for p in packets] == [*range(1, 17)]
    assert [p.state.current_epoch for p in packets] == [0] * 8 + [1] * 8
    assert [p.state.training_loss for p in packets] == pytest.approx(module.losses)
    assert [p.state.training_metrics["gradient_norm"] for p in packets] == pytest.approx(module.norms)
    assert "validation_loss" not in packets[3].state.training_metrics
    assert packets[4].state.validation_loss > 0
    for p in packets:
        expected = {"accuracy", "samples_per_s", "input_wait_ms", "step_latency_ms", "loss_ewma", "grad_var"}
        assert expected <= p.names
        metrics = p.state.training_metrics
        assert metrics["optimizer_lr"] == pytest.approx(0.1)
        assert metrics["samples_per_s"] == pytest.approx(
            8e3 / (metrics["input_wait_ms"] + metrics["step_latency_ms"]), rel=1e-3
        )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accumulated_batches_are_one_step_and_clipping_comes_after_the_norm(precision: str) -> None:
    callback = EsperCallback(run_id="lightning")
    module, _ = fit(callback, accumulate_grad_batches=3, gradient_clip_val=0.01, precision=precision)
    packets = pulled(callback)
    groups = [module.losses[at : at + size] for at, size in ((0, 3), (3, 3), (6, 2), (8, 3), (11, 3), (14, 2))]
    assert [p.state.training_loss for p in packets] == pytest.approx([sum(group) / len(group) for group in groups])
    assert [p.state.training_metrics["gradient_norm"] for p in packets] == pytest.approx(module.norms)
    assert min(module.norms) > 0.01


def test_a_resumed_run_goes_on_with_its_numbers_and_averages(tmp_path: Path) -> None:
    whole = EsperCallback(run_id="resumed")
    fit(whole, epochs=2)
    first = EsperCallback(run_id="resumed")
    _, trainer = fit(first, epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = EsperCallback(run_id="resumed")
    fit(second, epochs=2, resume=tmp_path / "last.ckpt")
    parts = [*pulled(first), *pulled(second)]
    assert [p.step for p in parts] == [*range(1, 17)]
    uninterrupted = pulled(whole)
    for name in ("loss", "loss_ewma", "grad_var", "loss_volatility"):
        found = [p.state.training_metrics.get(name) for p in parts]
        assert found == [p.state.training_metrics.get(name) for p in uninterrupted], name


def test_an_exception_goes_on_and_the_step_is_recorded_as_failed() -> None:
    callback = EsperCallback(run_id="fails")
    with pytest.raises(KeyError, match="in the middle"):
        fit(callback, module=lambda: Module(2))
    assert callback.telemetry is not None
    assert callback.telemetry.health()["failed"] == 1
    assert [p.step for p in pulled(callback)] == [1, 2, 3]


def test_a_session_that_is_there_is_used_and_left_open() -> None:
    with esper_otel.start(run_id="mine") as telemetry:
        callback = EsperCallback(telemetry)
        fit(callback, epochs=1)
        telemetry.record_step({"loss": 1.0}, epoch=1)
        assert len(list(telemetry.pull())) == 9
        with pytest.raises(InvalidValue, match="run_id"):
            EsperCallback(telemetry, run_id="other")


DDP = """
import sys
sys.path.insert(0, {here!r})
import test_lightning as tests
callback = tests.EsperCallback()
tests.fit(callback, epochs=1, devices=2, strategy="ddp")
print("said", callback.telemetry.run_id)
"""


@pytest.mark.lengthy
def test_several_ranks_are_one_run(tmp_path: Path) -> None:
    """Lightning starts the second process itself; nobody has named the run."""
    (tmp_path / "train.py").write_text(DDP.format(here=str(Path(__file__).parent)), encoding="utf-8")
    with RunningGateway() as gateway:
        environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}", "OMP_NUM_THREADS": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        del environ["OTEL_METRICS_EXPORTER"]
        done = subprocess.run(
            [sys.executable, tmp_path / "train.py"],
            capture_output=True,
            text=True,
            check=False,
            env=environ,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with TamiyoClient(gateway.grpc) as client:
            until("both have ended", lambda: [run.ended for run in client.runs()] == ["completed"] * 2)
            runs = client.runs()
            assert [(run.rank, run.world_size, run.stored) for run in runs] == [(0, 2, 4), (1, 2, 4)]
            assert len({(run.run_id, run.attempt) for run in runs}) == 1
            norms = [
                [p.state.training_metrics["gradient_norm"] for p in client.pull(runs[0].run_id, rank=rank)]
                for rank in (0, 1)
            ]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class Two(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Two optimizers that step in turn in each batch; notes what each of them saw."""

    def __init__(self, callback: EsperCallback | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)
        self.callback = callback
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        for part, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            loss = torch.nn.functional.cross_entropy(self.second(self.first(inputs)), targets)
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.callback is not None:
                self.callback.put(loss=loss)
            self.losses.append(loss.item())
            self.norms.append(torch.cat([parameter.grad.flatten() for parameter in part.parameters()]).norm().item())
            optimizer.step()
        return loss * 100

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.Adam(self.second.parameters(), lr=0.2)]


class Quasi(Module):
    """Its optimizer computes loss and gradients several times in a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_with_several_optimizers_each_step_is_a_step() -> None:
    without, _ = fit(None, module=Two)
    callback = EsperCallback(run_id="two")
    module, trainer = fit(callback, module=lambda: Two(callback))
    assert parameters(module) == parameters(without)
    packets = pulled(callback)
    assert [p.step for p in packets] == [*range(1, 33)]
    assert trainer.global_step == 32
    assert [p.state.training_loss for p in packets] == pytest.approx(module.losses)
    assert all("esper.optimizer.index" in p.names for p in packets)
    found = [p.state.training_metrics for p in packets]
    assert [metrics["gradient_norm"] for metrics in found] == pytest.approx(module.norms)
    assert [metrics["optimizer_lr"] for metrics in found] == pytest.approx([0.1, 0.2] * 16)
    for metrics, later in zip(found[::2], found[1::2], strict=True):
        seconds = (metrics["input_wait_ms"] + metrics["step_latency_ms"]) / 1e3
        assert metrics["samples_per_s"] * seconds == pytest.approx(8, rel=1e-3)
        assert "step_latency_ms" in later
        assert not {"input_wait_ms", "samples_per_s"} & {*later}
    silent = EsperCallback(run_id="two")
    fit(silent, module=Two)
    assert len(pulled(silent)) == 32
    assert not [p for p in pulled(silent) if "loss" in p.state.training_metrics]  # what is returned is none of theirs


class Slow(Two):
    """The work before its second optimizer's step takes long."""

    def manual_backward(self, loss: Any) -> None:
        if len(self.losses) % 2:
            time.sleep(0.01)
        super().manual_backward(loss)


def test_the_work_before_a_step_belongs_to_that_step() -> None:
    callback = EsperCallback()
    fit(callback, epochs=1, module=Slow)
    spent_ms = [p.state.training_metrics["step_latency_ms"] for p in pulled(callback)]
    assert min(spent_ms[1::2]) >= 10.0
    assert statistics.median(spent_ms[::2]) < 10.0
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks


def test_an_optimizer_that_computes_several_times_makes_one_step() -> None:
    callback = EsperCallback(run_id="lbfgs")
    module, _ = fit(callback, module=Quasi)
    packets = pulled(callback)
    assert [p.step for p in packets] == [*range(1, 17)]
    evaluations = len(module.norms) // 16
    assert evaluations > 1
    assert [p.state.training_metrics["gradient_norm"] for p in packets] == pytest.approx(
        module.norms[evaluations - 1 :: evaluations]
    )


class Stopped(BaseException):
    """As a KeyboardInterrupt, at which Lightning leaves the process."""


def test_a_fit_that_was_interrupted_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    callback = EsperCallback()
    with pytest.raises(Stopped):
        fit(callback, module=lambda: Module(4, Stopped()), accumulate_grad_batches=3)
    assert [p.step for p in pulled(callback)] == [1, 2]
    assert not _live
    module, trainer = fit(callback, accumulate_grad_batches=3, num_sanity_val_steps=2)
    packets = pulled(callback)
    groups = [module.losses[at : at + size] for at, size in ((0, 3), (3, 3), (6, 2), (8, 3), (11, 3), (14, 2))]
    assert [p.state.training_loss for p in packets] == pytest.approx([sum(group) / len(group) for group in groups])
    assert "validation_loss" not in packets[0].state.training_metrics
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.validate(module, module.loader, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    fit(callback, epochs=1)
    assert pulled(callback)[0].state.training_metrics.get("loss_delta") is None  # a test is no resuming


def test_trainers_and_models_can_be_copied_and_tuned() -> None:
    with esper_otel.start(run_id="mine") as telemetry:
        callback = EsperCallback(telemetry)
        copied: list[Any] = []

        class Copies(lightning.Callback):  # type: ignore[misc, name-defined]
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *more: Any) -> None:
                if not copied:
                    copied.extend(pickle.loads(pickle.dumps([callback, copy.deepcopy(pl_module.layer)])))

        fit(callback, epochs=1, callbacks=[callback, Copies()])
    again: Any = copied[0]
    assert [again.telemetry] == [None]
    fit(again, epochs=1)
    assert again.telemetry.run_id == "mine"
    assert [p.step for p in pulled(again)] == [*range(1, 9)]


@pytest.mark.parametrize("on_mistake", ["raise", "warn"])
def test_names_that_nothing_knows_are_found_before_the_first_step(
    on_mistake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And do not cost the run where mistakes are to be logged: the steps and what has the right name are recorded."""
    with pytest.raises(esper_otel.UnknownMetric, match="unknown validation result 'acc': did you mean 'accuracy'"):
        EsperCallback(validation={"acc": "val_acc"})
    settings = esper_otel.EsperSettings(on_mistake=on_mistake)
    callback = EsperCallback(metrics={"acuracy": "train_acc", "accuracy": "train_acc"}, settings=settings)
    data = torch.utils.data.TensorDataset(torch.ones(8, 4), torch.zeros(8, dtype=torch.long))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = lightning.Trainer(
        callbacks=[callback], max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    if on_mistake == "raise":
        with pytest.raises(esper_otel.UnknownMetric, match="unknown metric 'acuracy': did you mean 'accuracy'"):
            trainer.fit(Module(), loader)
        assert not _live
        return
    trainer.fit(Module(), loader)
    assert callback.telemetry is not None
    packets = callback.telemetry.pull().packets
    assert len(packets) == 2
    assert caplog.text.count("unknown metric 'acuracy'") == 1
    assert callback.telemetry.health()["mistakes"] == 1
