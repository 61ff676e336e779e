"""Hugging Face's Trainer for real, on a tiny model made on the spot: the right steps, and the same curve."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from gateways import RunningGateway
from later import Later, needs
from programs import free_port, until

from esper_otel import Packets, TamiyoClient
from esper_otel.session.ending import _live

torch = pytest.importorskip("torch")
needs("transformers", "accelerate")
runs = Later("transformers_runs")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]  # warnings of the Trainer's own


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pulled(callback: Any) -> list[Packets]:
    assert callback.telemetry is not None
    return list(callback.telemetry.pull(max_packets=1000))


def metric(callback_packets: list[Packets], name: str) -> list[float]:
    return [p.state.training_metrics[name] for p in callback_packets]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"max_grad_norm": 0.05, "bf16": True},
    ],
    ids=["plain", "accumulating", "clipping in bf16"],
)
def test_steps_are_the_trainers_own_and_the_curve_is_the_same(tmp_path: Path, more: dict[str, Any]) -> None:
    """Loss and norm as the Trainer logs them at each step: before clipping, accumulated as it does."""
    without = runs.train(tmp_path, **more)
    callback = runs.EsperCallback(run_id="hf")
    trainer = runs.train(tmp_path, callback, **more)
    assert runs.logged(trainer, "loss") == runs.logged(without, "loss")
    assert runs.logged(trainer, "grad_norm") == runs.logged(without, "grad_norm")
    packets = pulled(callback)
    steps = len(runs.logged(trainer, "loss"))
    assert [p.step for p in packets] == [*range(1, steps + 1)]
    assert [p.state.current_epoch for p in packets] == [0] * (steps // 2) + [1] * (steps // 2)
    assert metric(packets, "loss") == pytest.approx(
        runs.logged(trainer, "loss"), abs=6e-5
    )  # older ones log four digits
    assert metric(packets, "gradient_norm") == pytest.approx(runs.logged(trainer, "grad_norm"), rel=1e-6)
    assert metric(packets, "optimizer_lr")[0] == pytest.approx(5e-5)
    assert "validation_loss" in packets[-1].state.training_metrics
    for p in packets:
        assert {"samples_per_s", "input_wait_ms", "step_latency_ms", "loss_ewma"} <= p.names
    per_step = metric(packets, "samples_per_s")[0] * (
        metric(packets, "input_wait_ms")[0] + metric(packets, "step_latency_ms")[0]
    )
    assert per_step / 1e3 == pytest.approx(4 * more.get("gradient_accumulation_steps", 1), rel=1e-3)


def test_without_clipping_the_norm_is_computed(tmp_path: Path) -> None:
    clipped, computed = runs.EsperCallback(run_id="hf"), runs.EsperCallback(run_id="hf")
    runs.train(tmp_path, clipped, max_grad_norm=1e9)
    runs.train(tmp_path, computed, max_grad_norm=0)
    assert metric(pulled(computed), "gradient_norm") == pytest.approx(
        metric(pulled(clipped), "gradient_norm"), rel=1e-5
    )
    assert torch.nn.utils.clip_grad_norm_.__module__.startswith("torch")


@pytest.mark.skipif(torch.__version__ < "2.6", reason="transformers resumes with torch 2.6 and later only")
def test_a_resumed_run_goes_on_with_its_numbers_and_averages(tmp_path: Path) -> None:
    whole, second = runs.EsperCallback(run_id="hf"), runs.EsperCallback(run_id="hf")
    runs.train(tmp_path, whole, save_strategy="steps", save_steps=8)
    expected = pulled(whole)
    (tmp_path / "checkpoint-8").rename(tmp_path / "kept elsewhere")
    runs.train(tmp_path / "other", second, resume=str(tmp_path / "kept elsewhere"))
    resumed = pulled(second)
    assert [p.step for p in resumed] == [*range(9, 17)]
    assert [p.state.current_epoch for p in resumed] == [1] * 8
    ewma = metric(expected, "loss_ewma")[7]
    for loss, found in zip(metric(resumed, "loss"), metric(resumed, "loss_ewma"), strict=True):
        ewma += 0.2 * (loss - ewma)
        assert found == pytest.approx(ewma, rel=1e-6)
    assert metric(resumed, "loss_delta")[0] == pytest.approx(
        metric(resumed, "loss")[0] - metric(expected, "loss")[7], abs=1e-6
    )


@pytest.mark.parametrize("where", ["callback", "batches", "evaluation"])
def test_an_exception_outside_the_training_step_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """With its name; nothing of ours is left in the Trainer's classes, and it can train once more."""
    kinds = (runs.Failing, runs.Trainer, runs.Accelerator, runs.CallbackHandler)
    classes = [dict(vars(kind)) for kind in kinds]
    callback = runs.EsperCallback(run_id="hf")
    caplog.set_level("INFO", "esper_otel")
    more: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = runs.train(
        tmp_path, callback, *([runs.Fails()] if where == "callback" else []), kind=runs.Failing, runs=False, **more
    )
    trainer.where = where
    with pytest.raises(KeyError, match="in the middle"):
        trainer.train()
    assert "run hf KeyError, frames recorded" in caplog.text
    assert [p.step for p in pulled(callback)] == [1, 2, *([3] if where == "callback" else [])]
    assert not _live
    assert [dict(vars(kind)) for kind in kinds] == classes
    trainer.where = ""
    trainer.remove_callback(runs.Fails)
    trainer.train()
    assert not _live
    packets = pulled(callback)
    assert metric(packets, "loss") == pytest.approx(runs.logged(trainer, "loss")[-16:], abs=6e-5)


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
import transformers_runs as runs
without, with_it = (runs.train({folder!r}, *callbacks, num_train_epochs=1, eval_strategy="no")
                    for callbacks in ((), (runs.EsperCallback(),)))
print("said", json.dumps([[runs.logged(each, name) for each in (without, with_it)] for name in ("loss", "grad_norm")]))
"""


@pytest.mark.lengthy
def test_several_ranks_are_one_run_and_the_curve_is_the_same(tmp_path: Path) -> None:
    """As under torchrun: each of two processes has the norm of the averaged gradients, and half of the samples."""
    (tmp_path / "train.py").write_text(
        RANKS.format(here=str(Path(__file__).parent), folder=str(tmp_path)), encoding="utf-8"
    )
    with RunningGateway() as gateway:
        environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}"}
        environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "job-8"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        del environ["OTEL_METRICS_EXPORTER"]
        script = tmp_path / "train.py"
        numbered = [{**environ, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        ranks = [warm.started(script, env=each, imported=warm.FRAMEWORKS) for each in numbered]
        done = [(*rank.communicate(), rank.returncode) for rank in ranks]
        assert [status for *_, status in done] == [0, 0], [errors[-3000:] for _, errors, _ in done]
        losses, norms = json.loads(
            next(line.partition("said ")[2] for line in done[0][0].splitlines() if "said [[[" in line)
        )
        assert losses[0] == losses[1]
        assert norms[0] == norms[1]
        with TamiyoClient(gateway.grpc) as client:
            until("both have ended", lambda: [run.ended for run in client.runs()] == ["completed"] * 2)
            runs = [(run.run_id, run.rank, run.world_size, run.stored) for run in client.runs()]
            assert runs == [("job-8", 0, 2, 4), ("job-8", 1, 2, 4)]
            mine, other = ([*client.pull("job-8", rank=rank)] for rank in (0, 1))
        assert metric(mine, "gradient_norm") == pytest.approx(norms[1], rel=1e-6)
        assert metric(other, "gradient_norm") == pytest.approx(norms[1], rel=1e-6)
        both = zip(metric(mine, "loss"), metric(other, "loss"), strict=True)
        assert [sum(pair) / 2 for pair in both] == pytest.approx(losses[1], abs=6e-5)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Preferring", {"gradient_accumulation_steps": 3}),
        ("Alone", {"gradient_accumulation_steps": 3}),
        ("Trainer", {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 3}),
        ("Trainer", {"compute_loss_func": "summed", "gradient_accumulation_steps": 3}),
        ("Trainer", {"words": True, "gradient_accumulation_steps": 3}),
    ],
    ids=["own loss", "own training_step", "label smoothing", "loss function", "uneven numbers of tokens"],
)
def test_the_loss_is_the_trainers_and_the_model_can_be_copied(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    """The eight batches of an epoch make steps of three, three and two; whatever the model itself calls its loss."""
    trainer_class = getattr(runs, kind)
    if "compute_loss_func" in more:
        more = {**more, "compute_loss_func": runs.summed}
    without = runs.train(tmp_path, runs.Copying(tmp_path), kind=trainer_class, **more)
    callback, copying = runs.EsperCallback(run_id="hf"), runs.Copying(tmp_path)
    trainer = runs.train(tmp_path, callback, copying, kind=trainer_class, **more)
    assert all(copying.kept)
    assert runs.logged(trainer, "loss") == runs.logged(without, "loss")
    for mine, other in zip(trainer.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    packets = pulled(callback)
    assert metric(packets, "loss") == pytest.approx(runs.logged(trainer, "loss"), abs=6e-5)
    per_step = [
        m["samples_per_s"] * (m["input_wait_ms"] + m["step_latency_ms"]) / 1e3
        for m in (p.state.training_metrics for p in packets)
    ]
    assert per_step == pytest.approx([12, 12, 8] * 2, rel=1e-3)


def test_a_training_that_was_interrupted_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    callback = runs.EsperCallback()
    runs.Interrupted.raises = [KeyboardInterrupt()]
    classes = [dict(vars(kind)) for kind in (runs.Interrupted, runs.Trainer, runs.Accelerator)]
    trainer = runs.train(tmp_path, callback, kind=runs.Interrupted, runs=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = callback.telemetry
    assert first is not None
    assert [p.step for p in pulled(callback)] == [1, 2, 3]
    assert first.health()["failed"] == 1
    assert not _live
    trainer.train()
    packets = pulled(callback)
    assert callback.telemetry is not first
    assert [p.step for p in packets] == [*range(1, 17)]
    assert metric(packets, "loss") == pytest.approx(runs.logged(trainer, "loss")[-16:], abs=6e-5)
    per_step = metric(packets, "samples_per_s")[5] * (
        metric(packets, "input_wait_ms")[5] + metric(packets, "step_latency_ms")[5]
    )
    assert per_step / 1e3 == pytest.approx(4, rel=1e-3)
    assert [dict(vars(kind)) for kind in (runs.Interrupted, runs.Trainer, runs.Accelerator)] == classes


def test_a_batch_size_that_is_found_is_the_same_run_again(tmp_path: Path) -> None:
    callback = runs.EsperCallback()
    runs.Interrupted.raises = [RuntimeError("CUDA out of memory.")]
    trainer = runs.train(
        tmp_path, callback, kind=runs.Interrupted, auto_find_batch_size=True, per_device_train_batch_size=8
    )
    packets = pulled(callback)
    size = trainer._train_batch_size
    assert size < 8
    assert [p.step for p in packets] == [*range(1, trainer.state.global_step + 1)]
    assert metric(packets, "loss") == pytest.approx(runs.logged(trainer, "loss")[-len(packets) :], abs=6e-5)
    again = pickle.loads(pickle.dumps(callback))
    assert again.telemetry is None


def test_the_epochs_of_a_stream_are_unknown(tmp_path: Path) -> None:
    known, unknown = runs.EsperCallback(run_id="hf"), runs.EsperCallback(run_id="hf")
    runs.train(tmp_path, known, max_steps=20, eval_strategy="no")
    trainer = runs.train(tmp_path, unknown, max_steps=20, eval_strategy="no", data=runs.Stream)
    assert set(metric(pulled(known), "epochs_total")) == {3}
    packets = pulled(unknown)
    assert not [p for p in packets if "epochs_total" in p.state.training_metrics]
    assert [p.state.current_epoch for p in packets] == [0] * 8 + [1] * 8 + [2] * 4
    assert metric(packets, "loss") == pytest.approx(runs.logged(trainer, "loss"), abs=6e-5)
