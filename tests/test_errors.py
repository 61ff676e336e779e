"""What the message about an unknown name suggests."""

from __future__ import annotations

import re

import pytest

import esper_otel
from esper_otel.errors import UnknownMetric
from esper_otel.record.names import Names
from esper_otel.schema import METRICS, SEED_FIELDS, STEP_METRICS

pytestmark = pytest.mark.own_code

DECLARE = "declare your own with start(metrics=[esper_otel.Metric("
NAMES = Names()


def of_step(name: str) -> UnknownMetric:
    with pytest.raises(UnknownMetric) as raised:
        NAMES.resolved({name: 1.0})
    return raised.value


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("val_loss", "give it as telemetry.validation(loss=...)"),
        ("validation_loss", "give it as telemetry.validation(loss=...)"),
        ("eval_loss", "give it as telemetry.validation(loss=...)"),
        ("val/loss", "give it as telemetry.validation(loss=...)"),
        ("valloss", "give it as telemetry.validation(loss=...)"),
        ("Loss/val", "give it as telemetry.validation(loss=...)"),
        ("Loss/train", "did you mean 'loss'?"),
        ("valLoss", "give it as telemetry.validation(loss=...)"),
        ("val_accuracy", "give it as telemetry.validation(accuracy=...)"),
        ("val_acc", "give it as telemetry.validation(accuracy=...)"),
        ("lr", "did you mean 'optimizer_lr' or 'esper.optimizer.lr'?"),
        ("learning_rate", "did you mean 'optimizer_lr' or 'esper.optimizer.lr'?"),
        ("LR", "did you mean 'optimizer_lr' or 'esper.optimizer.lr'?"),
        ("train/lr", "did you mean 'optimizer_lr' or 'esper.optimizer.lr'?"),
        ("train_loss", "did you mean 'loss'?"),
        ("train/loss", "did you mean 'loss'?"),
        ("training_loss", "did you mean 'loss'?"),
        ("acc", "did you mean 'accuracy'?"),
        ("grad_norm", "did you mean 'gradient_norm'?"),
        ("gradnorm", "did you mean 'gradient_norm'?"),
        ("samples_per_sec", "did you mean 'samples_per_s'?"),
        ("throughput", "did you mean 'samples_per_s'?"),
        ("step_time", "did you mean 'step_latency_ms'?"),
        ("iter_time", "did you mean 'step_latency_ms'?"),
        ("epoch", "give it as step(epoch=...) or record_step(..., epoch=...)"),
        ("batch_size", "give it as step(samples=...) or record_step(..., samples=...)"),
        ("los", "did you mean 'loss'?"),
        ("Loss", "did you mean 'loss'?"),
        ("acuracy", "did you mean 'accuracy'?"),
        ("gradient_nrom", "did you mean 'gradient_norm'?"),
        ("lossdelta", "did you mean 'loss_delta'?"),
        ("kasmina.apply", "did you mean 'kasmina.apply_ms'?"),
        ("apply_ms", "did you mean 'kasmina.apply_ms'?"),
        ("gpu_util", "did you mean 'gpu_util_percent'?"),
        ("gpu_mem", "did you mean 'gpu_mem_free_gb' or 'gpu_mem_used_gb'?"),
        ("optimizer.lr", "did you mean 'optimizer_lr' or 'esper.optimizer.lr'?"),
    ],
)
def test_a_name_that_people_type_leads_to_the_right_place(name: str, hint: str) -> None:
    """Other libraries' names, slips, and parts."""
    assert str(of_step(name)) == f"unknown metric {name!r}: {hint}"


@pytest.mark.parametrize(
    "name",
    [
        *("aux_loss", "kl_loss", "q_loss", "g_loss", "d_loss", "l1_loss", "policy_loss", "test_loss", "loss_mean"),
        *(
            "perplexity",
            "tokens",
            "epoch_time",
            "tokens_per_s",
            "val_perplexity",
            "val_f1",
            "weight_norm",
            "param_norm",
            "bleu",
            "f1",
            "reward",
        ),
        *("cpu_mem_used_gb", "gpu_mem_total_gb", "gpu_temp_c", "loss_var", "weight_decay", "momentum", "cost", "alpha"),
        *(
            "temperature",
            "top5_accuracy",
            "train_perplexity",
            "norm",
            "ms",
            "",
            "损失",
            "entropy",
            "mse",
            "rank",
            "time",
        ),
    ],
)
def test_another_thing_is_not_taken_for_a_slip(name: str) -> None:
    """A hint that is followed would put one thing under the name of another."""
    error = of_step(name)
    assert error.nearest == ()
    assert f"{DECLARE}{name!r}, ...)]); known: accuracy, " in str(error)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("lr", "did you mean 'learning_rate'?"),
        ("grad_norm", "did you mean 'gradient_norm'?"),
        ("alfa", "did you mean 'alpha'?"),
        ("val_loss", "give it as telemetry.validation(loss=...)"),
        ("loss", f"known: {', '.join(sorted(SEED_FIELDS))}"),
        ("latency", f"known: {', '.join(sorted(SEED_FIELDS))}"),
        ("kernel_latency_ms", "did you mean 'last_kernel_latency_ms'?"),
    ],
)
def test_the_fields_of_seeds_are_told_apart_from_those_of_steps(field: str, hint: str) -> None:
    """Whichever way they are recorded."""
    with esper_otel.start(export_steps=False) as telemetry, telemetry.step(epoch=0) as now:
        words = f"^{re.escape(f'unknown seed field {field!r}: {hint}')}$"
        with pytest.raises(UnknownMetric, match=words):
            now.seed("a", **{field: 1.0})
        with pytest.raises(UnknownMetric, match=words):
            telemetry.seeds(["a"], **{field: [1.0]})


def test_each_way_to_record_a_step_says_the_same() -> None:
    """put, record_step, and what a processor needs."""
    words = "unknown metric 'lr': did you mean 'optimizer_lr' or 'esper.optimizer.lr'?"
    with esper_otel.start(export_steps=False) as telemetry:
        with pytest.raises(UnknownMetric) as raised:
            telemetry.record_step({"lr": 0.1}, epoch=0)
        assert str(raised.value) == words
        with telemetry.step(epoch=0) as now, pytest.raises(UnknownMetric) as raised:
            now.put(lr=0.1)
        assert str(raised.value) == words
    assert UnknownMetric("lr", [metric.name for metric in METRICS]).nearest == ("esper.optimizer.lr",)


def test_a_known_name_is_never_a_slip_for_another() -> None:
    """So no threshold is too wide for our own names."""
    names = [metric.name for metric in STEP_METRICS]
    for name in names:
        others = [each for each in names if each != name]
        assert UnknownMetric(name, others).nearest == (), name


def test_a_users_own_metric_is_among_what_can_be_meant() -> None:
    """Declared names are as good as ours."""
    own = [
        esper_otel.Metric("tokens_per_s", unit="rate", description="Tokens."),
        esper_otel.Metric("val_loss", unit="1", description="A loss."),
    ]
    names = Names(own)
    assert names.resolved({"val_loss": 1.0}) == {"val_loss": 1.0}
    assert UnknownMetric("准确", ["损失"]).nearest == UnknownMetric("+", ["-"]).nearest == ()
    with pytest.raises(UnknownMetric, match="did you mean 'tokens_per_s'"):
        names.resolved({"token_per_s": 1.0})
