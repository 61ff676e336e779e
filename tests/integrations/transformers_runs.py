"""Trainings with Hugging Face's Trainer, for test_transformers.py: here, so that other tests need not wait for it."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from opentelemetry.metrics import get_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import get_tracer_provider

from esper_otel.integrations.transformers import EsperCallback

__all__ = ["Accelerator", "CallbackHandler", "EsperCallback", "Trainer"]

transformers: Any = import_module("transformers")
# Some versions start exporters to localhost when this module is imported; their threads would outlive these tests.
if find_spec("transformers.utils.metrics") is not None:
    import_module("transformers.utils.metrics")
    for _provider in (get_meter_provider(), get_tracer_provider()):
        if isinstance(_provider, MeterProvider | TracerProvider):
            _provider.shutdown()
Accelerator: Any = import_module("accelerate").Accelerator
CallbackHandler: Any = transformers.trainer_callback.CallbackHandler
Trainer: Any = transformers.Trainer


class Fails(transformers.TrainerCallback):  # type: ignore[misc]
    """An error of the user's own."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2:
            raise KeyError("in the middle")


def train(
    folder: Path,
    *callbacks: Any,
    resume: str | None = None,
    kind: Any = Trainer,
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
    rows: list[dict[str, Any]]
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
    trainer: Any = kind(
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


class Failing(Trainer):  # type: ignore[misc]
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


class Preferring(Trainer):  # type: ignore[misc]
    """As TRL's DPO: two forwards with labels, a loss that is neither of theirs; its training_step calls the base's."""

    def compute_loss(self, model: Any, inputs: Any, *more: Any, return_outputs: bool = False, **named: Any) -> Any:
        del more, named
        chosen, rejected = model(**inputs), model(**{**inputs, "labels": 1 - inputs["labels"]})
        loss = -torch.nn.functional.logsigmoid(0.1 * (rejected.loss - chosen.loss))
        return (loss, chosen) if return_outputs else loss

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        return super().training_step(*arguments, **named)


class Alone(Trainer):  # type: ignore[misc]
    """Its training_step has nothing of the base's."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = 3 * model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach() / self.args.gradient_accumulation_steps


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or 4)


class Copying(transformers.TrainerCallback):  # type: ignore[misc]
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


class Interrupted(Trainer):  # type: ignore[misc]
    """Raises in the first training, after some steps."""

    raises: list[BaseException] = []  # noqa: RUF012 - one for the class

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 2 and self.raises:
            raise self.raises.pop()
        return super().compute_loss(*arguments, **named)


class Stream(torch.utils.data.IterableDataset[Any]):
    """Ends without having said when."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)
