"""Hugging Face's Trainer for real, on a tiny model made on the spot: the right steps, and the same curve."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gateways import RunningGateway
from programs import until

from esper_otel import Packets, TamiyoClient
from esper_otel.session.ending import _live

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from esper_otel.integrations.transformers import EsperCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]  # warnings of the Trainer's own


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Fails(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """An error of the user's own."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2:
            raise KeyError("in the middle")


def train(
    folder: Path,
    *callbacks: Any,
    resume: str | None = None,
    kind: Any = transformers.Trainer,
    data: Any = list,
    runs: bool = True,
    compute_loss_func: Any = None,
    words: bool = False,
    **more: Any,
) -> Any:
    """32 samples, 4 at a time, 2 epochs."""
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = transformers.BertForSequenceClassification(config)
    random = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(0, 50, (8,), generator=random), "labels": row % 2} for row in range(32)]
    if words:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        )
        masked = [torch.arange(8) > row % 7 for row in range(32)]  # so many tokens of each do not count
        rows = [{**row, "labels": row["input_ids"].where(mask, -100)} for row, mask in zip(rows, masked, strict=True)]
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "disable_tqdm": True,
        **more,
    }
    trainer = kind(
        model,
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=data(rows),
        eval_dataset=rows[:8],
        compute_loss_func=compute_loss_func,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    if runs:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if "loss" in line]


def pulled(callback: EsperCallback) -> list[Packets]:
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
    without = train(tmp_path, **more)
    callback = EsperCallback(run_id="hf")
    trainer = train(tmp_path, callback, **more)
    assert logged(trainer, "loss") == logged(without, "loss")
    assert logged(trainer, "grad_norm") == logged(without, "grad_norm")
    packets = pulled(callback)
    steps = len(logged(trainer, "loss"))
    assert [p.step for p in packets] == [*range(1, steps + 1)]
    assert [p.state.current_epoch for p in packets] == [0] * (steps // 2) + [1] * (steps // 2)
    assert metric(packets, "loss") == pytest.approx(logged(trainer, "loss"), abs=6e-5)  # older ones log four digits
    assert metric(packets, "gradient_norm") == pytest.approx(logged(trainer, "grad_norm"), rel=1e-6)
    assert metric(packets, "optimizer_lr")[0] == pytest.approx(5e-5)
    assert "validation_loss" in packets[-1].state.training_metrics
    for p in packets:
        assert {"samples_per_s", "input_wait_ms", "step_latency_ms", "loss_ewma"} <= p.names
    per_step = metric(packets, "samples_per_s")[0] * (
        metric(packets, "input_wait_ms")[0] + metric(packets, "step_latency_ms")[0]
    )
    assert per_step / 1e3 == pytest.approx(4 * more.get("gradient_accumulation_steps", 1), rel=1e-3)


def test_without_clipping_the_norm_is_computed(tmp_path: Path) -> None:
    clipped, computed = EsperCallback(run_id="hf"), EsperCallback(run_id="hf")
    train(tmp_path, clipped, max_grad_norm=1e9)
    train(tmp_path, computed, max_grad_norm=0)
    assert metric(pulled(computed), "gradient_norm") == pytest.approx(
        metric(pulled(clipped), "gradient_norm"), rel=1e-5
    )
    assert torch.nn.utils.clip_grad_norm_.__module__.startswith("torch")


@pytest.mark.skipif(torch.__version__ < "2.6", reason="transformers resumes with torch 2.6 and later only")
def test_a_resumed_run_goes_on_with_its_numbers_and_averages(tmp_path: Path) -> None:
    whole, second = EsperCallback(run_id="hf"), EsperCallback(run_id="hf")
    train(tmp_path, whole, save_strategy="steps", save_steps=8)
    expected = pulled(whole)
    (tmp_path / "checkpoint-8").rename(tmp_path / "kept elsewhere")
    train(tmp_path / "other", second, resume=str(tmp_path / "kept elsewhere"))
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


class Failing(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Has no more batches, or cannot evaluate, after two steps."""

    where = ""

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        if self.where == "batches" and self.state.global_step == 2:
            raise KeyError("in the middle")
        return super().get_batch_samples(*arguments, **named)

    def evaluate(self, *arguments: Any, **named: Any) -> Any:
        if self.where == "evaluation":
            raise KeyError("in the middle")
        return super().evaluate(*arguments, **named)


@pytest.mark.parametrize("where", ["callback", "batches", "evaluation"])
def test_an_exception_outside_the_training_step_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """With its name; nothing of ours is left in the Trainer's classes, and it can train once more."""
    kinds = (Failing, transformers.Trainer, accelerate.Accelerator, transformers.trainer_callback.CallbackHandler)
    classes = [dict(vars(kind)) for kind in kinds]
    callback = EsperCallback(run_id="hf")
    caplog.set_level("INFO", "esper_otel")
    more: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = train(tmp_path, callback, *([Fails()] if where == "callback" else []), kind=Failing, runs=False, **more)
    trainer.where = where
    with pytest.raises(KeyError, match="in the middle"):
        trainer.train()
    assert "run hf KeyError, frames recorded" in caplog.text
    assert [p.step for p in pulled(callback)] == [1, 2, *([3] if where == "callback" else [])]
    assert not _live
    assert [dict(vars(kind)) for kind in kinds] == classes
    trainer.where = ""
    trainer.remove_callback(Fails)
    trainer.train()
    assert not _live
    packets = pulled(callback)
    assert metric(packets, "loss") == pytest.approx(logged(trainer, "loss")[-16:], abs=6e-5)


RANKS = """
import json, sys
sys.path.insert(0, {here!r})
import test_transformers as tests
without, with_it = (tests.train({folder!r}, *callbacks, num_train_epochs=1, eval_strategy="no")
                    for callbacks in ((), (tests.EsperCallback(),)))
print("said", json.dumps([[tests.logged(each, name) for each in (without, with_it)] for name in ("loss", "grad_norm")]))
"""


@pytest.mark.lengthy
def test_several_ranks_are_one_run_and_the_curve_is_the_same(tmp_path: Path) -> None:
    """torchrun, two processes: each has the norm of the averaged gradients, and half of the samples."""
    (tmp_path / "train.py").write_text(
        RANKS.format(here=str(Path(__file__).parent), folder=str(tmp_path)), encoding="utf-8"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job-8"]
    with RunningGateway() as gateway:
        environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}", "OMP_NUM_THREADS": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        del environ["OTEL_METRICS_EXPORTER"]
        done = subprocess.run(
            [*command, tmp_path / "train.py"], capture_output=True, text=True, check=False, env=environ, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses, norms = json.loads(
            next(line.partition("said ")[2] for line in done.stdout.splitlines() if "said [[[" in line)
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


class Preferring(transformers.Trainer):  # type: ignore[misc, name-defined]
    """As TRL's DPO: two forwards with labels, a loss that is neither of theirs; its training_step calls the base's."""

    def compute_loss(self, model: Any, inputs: Any, *more: Any, return_outputs: bool = False, **named: Any) -> Any:
        del more, named
        chosen, rejected = model(**inputs), model(**{**inputs, "labels": 1 - inputs["labels"]})
        loss = -torch.nn.functional.logsigmoid(0.1 * (rejected.loss - chosen.loss))
        return (loss, chosen) if return_outputs else loss

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        return super().training_step(*arguments, **named)


class Alone(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Its training_step has nothing of the base's."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = 3 * model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach() / self.args.gradient_accumulation_steps


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or 4)


class Copying(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """What scripts do with a model in training: an EMA, a best copy, a checkpoint of the whole object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, optimizer = given["model"], given["optimizer"]
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        torch.save(model, self.folder / "model.pt")
        torch.optim.swa_utils.AveragedModel(model)
        model.save_pretrained(self.folder / "saved")
        copy.deepcopy(optimizer)
        pickle.dumps(given["train_dataloader"].dataset)
        self.kept.append(vars(copied).keys() == vars(model).keys() and not copied._forward_hooks)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Preferring, {"gradient_accumulation_steps": 3}),
        (Alone, {"gradient_accumulation_steps": 3}),
        (transformers.Trainer, {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 3}),
        (transformers.Trainer, {"compute_loss_func": summed, "gradient_accumulation_steps": 3}),
        (transformers.Trainer, {"words": True, "gradient_accumulation_steps": 3}),
    ],
    ids=["own loss", "own training_step", "label smoothing", "loss function", "uneven numbers of tokens"],
)
def test_the_loss_is_the_trainers_and_the_model_can_be_copied(tmp_path: Path, kind: Any, more: dict[str, Any]) -> None:
    """The eight batches of an epoch make steps of three, three and two; whatever the model itself calls its loss."""
    without = train(tmp_path, Copying(tmp_path), kind=kind, **more)
    callback, copying = EsperCallback(run_id="hf"), Copying(tmp_path)
    trainer = train(tmp_path, callback, copying, kind=kind, **more)
    assert all(copying.kept)
    assert logged(trainer, "loss") == logged(without, "loss")
    for mine, other in zip(trainer.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    packets = pulled(callback)
    assert metric(packets, "loss") == pytest.approx(logged(trainer, "loss"), abs=6e-5)
    per_step = [
        m["samples_per_s"] * (m["input_wait_ms"] + m["step_latency_ms"]) / 1e3
        for m in (p.state.training_metrics for p in packets)
    ]
    assert per_step == pytest.approx([12, 12, 8] * 2, rel=1e-3)


class Interrupted(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Raises in the first training, after some steps."""

    raises: list[BaseException] = []  # noqa: RUF012 - one for the class

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 2 and self.raises:
            raise self.raises.pop()
        return super().compute_loss(*arguments, **named)


def test_a_training_that_was_interrupted_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    callback = EsperCallback()
    Interrupted.raises = [KeyboardInterrupt()]
    classes = [dict(vars(kind)) for kind in (Interrupted, transformers.Trainer, accelerate.Accelerator)]
    trainer = train(tmp_path, callback, kind=Interrupted, runs=False)
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
    assert metric(packets, "loss") == pytest.approx(logged(trainer, "loss")[-16:], abs=6e-5)
    per_step = metric(packets, "samples_per_s")[5] * (
        metric(packets, "input_wait_ms")[5] + metric(packets, "step_latency_ms")[5]
    )
    assert per_step / 1e3 == pytest.approx(4, rel=1e-3)
    assert [dict(vars(kind)) for kind in (Interrupted, transformers.Trainer, accelerate.Accelerator)] == classes


def test_a_batch_size_that_is_found_is_the_same_run_again(tmp_path: Path) -> None:
    callback = EsperCallback()
    Interrupted.raises = [RuntimeError("CUDA out of memory.")]
    trainer = train(tmp_path, callback, kind=Interrupted, auto_find_batch_size=True, per_device_train_batch_size=8)
    packets = pulled(callback)
    size = trainer._train_batch_size
    assert size < 8
    assert [p.step for p in packets] == [*range(1, trainer.state.global_step + 1)]
    assert metric(packets, "loss") == pytest.approx(logged(trainer, "loss")[-len(packets) :], abs=6e-5)
    again = pickle.loads(pickle.dumps(callback))
    assert again.telemetry is None


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc, name-defined]
    """Ends without having said when."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_the_epochs_of_a_stream_are_unknown(tmp_path: Path) -> None:
    known, unknown = EsperCallback(run_id="hf"), EsperCallback(run_id="hf")
    train(tmp_path, known, max_steps=20, eval_strategy="no")
    trainer = train(tmp_path, unknown, max_steps=20, eval_strategy="no", data=Stream)
    assert set(metric(pulled(known), "epochs_total")) == {3}
    packets = pulled(unknown)
    assert not [p for p in packets if "epochs_total" in p.state.training_metrics]
    assert [p.state.current_epoch for p in packets] == [0] * 8 + [1] * 8 + [2] * 4
    assert metric(packets, "loss") == pytest.approx(logged(trainer, "loss"), abs=6e-5)
