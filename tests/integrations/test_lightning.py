"""Lightning for real, on a tiny module: the right steps, and the same curve as without the callback."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from gateways import RunningGateway
from later import Later, needs
from programs import until

import esper_otel
from esper_otel import InvalidValue, Packets, TamiyoClient
from esper_otel.session.ending import _live

torch = pytest.importorskip("torch")
needs("lightning")
runs = Later("lightning_runs")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]  # warnings of Lightning's own


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")


def pulled(callback: Any) -> list[Packets]:
    assert callback.telemetry is not None
    return list(callback.telemetry.pull(max_packets=1000))


def parameters(module: Any) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in module.parameters()]


def test_each_optimizer_step_is_a_step_and_the_curve_is_the_same() -> None:
    without, _ = runs.fit(None, val_check_interval=4)
    callback = runs.EsperCallback(run_id="lightning", metrics={"accuracy": "train_acc"})
    module, _ = runs.fit(callback, val_check_interval=4)
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
    callback = runs.EsperCallback(run_id="lightning")
    module, _ = runs.fit(callback, accumulate_grad_batches=3, gradient_clip_val=0.01, precision=precision)
    packets = pulled(callback)
    groups = [module.losses[at : at + size] for at, size in ((0, 3), (3, 3), (6, 2), (8, 3), (11, 3), (14, 2))]
    assert [p.state.training_loss for p in packets] == pytest.approx([sum(group) / len(group) for group in groups])
    assert [p.state.training_metrics["gradient_norm"] for p in packets] == pytest.approx(module.norms)
    assert min(module.norms) > 0.01


def test_a_resumed_run_goes_on_with_its_numbers_and_averages(tmp_path: Path) -> None:
    whole = runs.EsperCallback(run_id="resumed")
    runs.fit(whole, epochs=2)
    first = runs.EsperCallback(run_id="resumed")
    _, trainer = runs.fit(first, epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = runs.EsperCallback(run_id="resumed")
    runs.fit(second, epochs=2, resume=tmp_path / "last.ckpt")
    parts = [*pulled(first), *pulled(second)]
    assert [p.step for p in parts] == [*range(1, 17)]
    uninterrupted = pulled(whole)
    for name in ("loss", "loss_ewma", "grad_var", "loss_volatility"):
        found = [p.state.training_metrics.get(name) for p in parts]
        assert found == [p.state.training_metrics.get(name) for p in uninterrupted], name


def test_an_exception_goes_on_and_the_step_is_recorded_as_failed() -> None:
    callback = runs.EsperCallback(run_id="fails")
    with pytest.raises(KeyError, match="in the middle"):
        runs.fit(callback, module=lambda: runs.Module(2))
    assert callback.telemetry is not None
    assert callback.telemetry.health()["failed"] == 1
    assert [p.step for p in pulled(callback)] == [1, 2, 3]


def test_a_session_that_is_there_is_used_and_left_open() -> None:
    with esper_otel.start(run_id="mine") as telemetry:
        callback = runs.EsperCallback(telemetry)
        runs.fit(callback, epochs=1)
        telemetry.record_step({"loss": 1.0}, epoch=1)
        assert len(list(telemetry.pull())) == 9
        with pytest.raises(InvalidValue, match="run_id"):
            runs.EsperCallback(telemetry, run_id="other")


DDP = """
import sys
sys.path.insert(0, {here!r})
import lightning_runs as runs
callback = runs.EsperCallback()
runs.fit(callback, epochs=1, devices=2, strategy="ddp")
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
        environ["PYTHON_EXEC"] = str(warm.executable(tmp_path, warm.FRAMEWORKS))
        done = warm.run(tmp_path / "train.py", env=environ, imported=warm.FRAMEWORKS)
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


def test_with_several_optimizers_each_step_is_a_step() -> None:
    without, _ = runs.fit(None, module=runs.Two)
    callback = runs.EsperCallback(run_id="two")
    module, trainer = runs.fit(callback, module=lambda: runs.Two(callback))
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
    silent = runs.EsperCallback(run_id="two")
    runs.fit(silent, module=runs.Two)
    assert len(pulled(silent)) == 32
    assert not [p for p in pulled(silent) if "loss" in p.state.training_metrics]  # what is returned is none of theirs


def test_the_work_before_a_step_belongs_to_that_step() -> None:
    callback = runs.EsperCallback()
    runs.fit(callback, epochs=1, module=runs.Slow)
    spent_ms = [p.state.training_metrics["step_latency_ms"] for p in pulled(callback)]
    pause_ms = runs.Slow.pause_s * 1e3
    assert min(spent_ms[1::2]) >= pause_ms
    assert statistics.median(spent_ms[::2]) < pause_ms
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks


def test_an_optimizer_that_computes_several_times_makes_one_step() -> None:
    callback = runs.EsperCallback(run_id="lbfgs")
    module, _ = runs.fit(callback, module=runs.Quasi)
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
    callback = runs.EsperCallback()
    with pytest.raises(Stopped):
        runs.fit(callback, module=lambda: runs.Module(4, Stopped()), accumulate_grad_batches=3)
    assert [p.step for p in pulled(callback)] == [1, 2]
    assert not _live
    module, trainer = runs.fit(callback, accumulate_grad_batches=3, num_sanity_val_steps=2)
    packets = pulled(callback)
    groups = [module.losses[at : at + size] for at, size in ((0, 3), (3, 3), (6, 2), (8, 3), (11, 3), (14, 2))]
    assert [p.state.training_loss for p in packets] == pytest.approx([sum(group) / len(group) for group in groups])
    assert "validation_loss" not in packets[0].state.training_metrics
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.validate(module, module.loader, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    runs.fit(callback, epochs=1)
    assert pulled(callback)[0].state.training_metrics.get("loss_delta") is None  # a test is no resuming


def test_trainers_and_models_can_be_copied_and_tuned() -> None:
    with esper_otel.start(run_id="mine") as telemetry:
        callback = runs.EsperCallback(telemetry)
        copies = runs.Copies(callback)
        runs.fit(callback, epochs=1, callbacks=[callback, copies])
    again: Any = copies.copied[0]
    assert [again.telemetry] == [None]
    runs.fit(again, epochs=1)
    assert again.telemetry.run_id == "mine"
    assert [p.step for p in pulled(again)] == [*range(1, 9)]


@pytest.mark.parametrize("on_mistake", ["raise", "warn"])
def test_names_that_nothing_knows_are_found_before_the_first_step(
    on_mistake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And do not cost the run where mistakes are to be logged: the steps and what has the right name are recorded."""
    with pytest.raises(esper_otel.UnknownMetric, match="unknown validation result 'acc': did you mean 'accuracy'"):
        runs.EsperCallback(validation={"acc": "val_acc"})
    settings = esper_otel.EsperSettings(on_mistake=on_mistake)
    callback = runs.EsperCallback(metrics={"acuracy": "train_acc", "accuracy": "train_acc"}, settings=settings)
    data = torch.utils.data.TensorDataset(torch.ones(8, 4), torch.zeros(8, dtype=torch.long))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = runs.lightning.Trainer(
        callbacks=[callback], max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    if on_mistake == "raise":
        with pytest.raises(esper_otel.UnknownMetric, match="unknown metric 'acuracy': did you mean 'accuracy'"):
            trainer.fit(runs.Module(), loader)
        assert not _live
        return
    trainer.fit(runs.Module(), loader)
    assert callback.telemetry is not None
    packets = callback.telemetry.pull().packets
    assert len(packets) == 2
    assert caplog.text.count("unknown metric 'acuracy'") == 1
    assert callback.telemetry.health()["mistakes"] == 1
