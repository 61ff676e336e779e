"""The exceptions of esper_otel.

EsperOtelError
├── MistakeError             a mistake in the program: raised at once, always
│   ├── UnknownMetric        a name that is not in the catalogue (ValueError)
│   ├── InvalidValue         a value of the wrong type or shape (TypeError)
│   ├── InvalidName          an empty run id, a seed id with control characters, ... (ValueError)
│   ├── InvalidCatalogue     metric declarations that contradict each other (ValueError)
│   └── WrongState           a call out of order: a step inside a step, a closed session (RuntimeError)
├── ConfigurationError       an invalid setting or environment variable (ValueError)
├── ProbeUnavailable         missing hardware, driver or library; the text is the reason
├── AdapterError             telemetry that cannot be converted to a Leyline packet
└── GatewayError             a gateway refused a pull, or could not be reached
    ├── GatewayUnavailable   no answer in time; the same pull may be retried
    ├── UnknownRun           no step of the run is stored
    └── StaleCursor          the cursor is from an earlier store of this run: pull without a cursor

Conditions that depend on data or the environment (NaN, a dead endpoint, a missing driver) raise nothing in
the training loop: they are counted and logged. ``ProbeUnavailable`` is used only inside this package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "ConfigurationError",
    "EsperOtelError",
    "GatewayError",
    "GatewayUnavailable",
    "InvalidCatalogue",
    "InvalidName",
    "InvalidValue",
    "MistakeError",
    "StaleCursor",
    "UnknownMetric",
    "UnknownRun",
    "WrongState",
]


class EsperOtelError(Exception):
    """Base of every exception that esper_otel defines."""


class MistakeError(EsperOtelError):
    """A mistake in the calling program."""


class UnknownMetric(MistakeError, ValueError):
    """The name of a metric or of a seed's field is not declared; ``nearest`` lists similar names."""

    def __init__(self, name: object, known: Iterable[str], *, what: str = "metric") -> None:
        names = sorted(known)
        self.name = name
        self.nearest: tuple[str, ...] = _nearest(str(name), names)
        hint = _hint(self.nearest, names)
        if elsewhere := _ELSEWHERE.get("".join(_words(str(name)))):
            hint = f"give it as {elsewhere}"
        elif not self.nearest and what == "metric":
            hint = f"declare your own with start(metrics=[esper_otel.Metric({str(name)!r}, ...)]); {hint}"
        super().__init__(f"unknown {what} {name!r}: {hint}")


def unknown(what: str, name: object, known: Iterable[str]) -> ConfigurationError:
    """Returns the exception for an unknown name of something other than a metric, such as a setting."""
    names = sorted(known)
    return ConfigurationError(f"unknown {what} {name!r}: {_hint(_nearest(str(name), names), names)}")


def nearest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Returns up to three known names that may be meant, or else the most similar one; empty if none is similar."""
    names = sorted(known)
    return _nearest(name, names) or tuple(difflib.get_close_matches(name, names, 1))


def _hint(nearest: Sequence[str], known: Sequence[str]) -> str:
    return "did you mean " + " or ".join(map(repr, nearest)) + "?" if nearest else "known: " + ", ".join(known)


# Names used by other libraries, with the names that may correspond here.
_OTHER_WORDS = {
    **dict.fromkeys(("train_loss", "training_loss", "loss_train"), ("loss",)),
    **dict.fromkeys(("acc", "train_acc", "train_accuracy", "training_accuracy", "accuracy_train"), ("accuracy",)),
    **dict.fromkeys(("grad_norm", "gradnorm", "grads_norm", "total_norm", "gnorm"), ("gradient_norm",)),
    **dict.fromkeys(
        ("lr", "learning_rate", "train_lr", "lr_0"), ("optimizer_lr", "esper.optimizer.lr", "learning_rate")
    ),
    **dict.fromkeys(("throughput", "samples_per_sec", "samples_per_second"), ("samples_per_s",)),
    **dict.fromkeys(("step_time", "step_time_ms", "batch_time", "iter_time", "time_per_step"), ("step_latency_ms",)),
    **dict.fromkeys(("data_time", "data_wait", "data_wait_ms"), ("input_wait_ms",)),
}
# Names of values that are given in another way than as metrics of a step or a seed; without separators.
_ELSEWHERE = {
    **{
        words: f"telemetry.validation({argument}=...)"
        for when in ("val", "valid", "validation", "eval", "evaluation")
        for name, argument in {"loss": "loss", "acc": "accuracy", "accuracy": "accuracy"}.items()
        for words in (when + name, name + when)
    },
    **{
        name: f"step({argument}=...) or record_step(..., {argument}=...)"
        for name, argument in {
            "epoch": "epoch",
            **dict.fromkeys(("step", "globalstep"), "global_step"),
            **dict.fromkeys(("samples", "numsamples", "batchsize"), "samples"),
        }.items()
    },
}


def _nearest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Returns up to three known names that may be meant: those with the same meaning, or else similar ones."""
    others = [other for other in _OTHER_WORDS.get("_".join(_words(name)), ()) if other in known]
    found = others or sorted((each for each in known if _resembles(name, each)), key=lambda each: -_ratio(name, each))
    return tuple(found[:3])


def _resembles(name: str, known: str) -> bool:
    """Whether it is the known name with typing errors, without separators, or a part of it.

    Words are compared one by one, because ``aux_loss``, ``tokens_per_s`` and ``cpu_mem`` are not typing errors for
    ``loss``, ``samples_per_s`` and ``gpu_mem``.
    """
    mine, theirs = _words(name), _words(known)
    if "".join(mine) == "".join(theirs):
        return bool(mine)
    if len(mine) == len(theirs):
        return all(map(_is_slip, mine, theirs))
    parts = [theirs[start : start + len(mine)] for start in range(len(theirs))]
    return len(mine) >= 2 and mine in parts


def _is_slip(word: str, known: str) -> bool:
    return word == known or (max(len(word), len(known)) > 3 and _ratio(word, known) >= 0.65)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _words(name: str) -> list[str]:
    """Splits a name into words: those of ``val/loss``, ``valLoss`` and ``val_loss`` are the same."""
    return re.findall(r"[^\W_]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())


class InvalidValue(MistakeError, TypeError):
    """A value has a type or shape that is never valid; ``name`` identifies the value."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(f"{name}: {message}")


class InvalidName(MistakeError, ValueError):
    """A run id, seed id or metric name is invalid."""


class InvalidCatalogue(MistakeError, ValueError):
    """Declarations contradict each other; ``faults`` lists all contradictions."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults: tuple[str, ...] = tuple(faults)
        super().__init__("; ".join(self.faults))


class WrongState(MistakeError, RuntimeError):
    """A call is not valid in the current state."""


class ConfigurationError(EsperOtelError, ValueError):
    """A setting is invalid; the message contains its name, the value and the fix."""


class ProbeUnavailable(EsperOtelError):
    """The readings of a probe are not available; the text is the reason shown to the user."""


class AdapterError(EsperOtelError):
    """Telemetry cannot be converted to a Leyline packet; the message names the field."""


class GatewayError(EsperOtelError):
    """A gateway refused a pull; the message is the gateway's reason."""


class GatewayUnavailable(GatewayError):
    """A gateway did not answer in time; the same pull may be retried."""


class UnknownRun(GatewayError):
    """No step of this run is stored."""


class StaleCursor(GatewayError):
    """A cursor was not issued for this run, or it is from an earlier store of the run that no longer exists."""
